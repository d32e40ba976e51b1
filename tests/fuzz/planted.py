"""Defects on purpose, which the harness has to report. Each is called in place of the command line."""

import json
import os
import sys
from pathlib import Path
from time import sleep

import numpy as np


def traceback() -> int:
    """Fail as a program without any handling of errors does."""
    raise KeyError("planted")


def unforeseen() -> int:
    """Fail by an error that nobody foresaw, which `main` ends in its own way."""
    from saap_jax.cli import main

    main.COMMANDS["discover"] = main.COMMANDS["discover"]._replace(config="cli.commands:none")
    return main.main(["discover", "tiny"])


def memory() -> int:
    """Hold 3 GiB for a moment, and refuse the input afterwards."""
    np.ones(3 * 2**27)
    return refuse()


def work() -> int:
    """Never end."""
    while True:
        pass


def hang() -> int:
    """Never end, without any work."""
    while True:
        sleep(1)


def crash() -> int:
    """End by a signal."""
    os.abort()


def half_written() -> int:
    """Leave an output under its final name, and refuse the input afterwards."""
    Path("result.json").write_text('{"models": [')
    return refuse()


def overwritten() -> int:
    """Change a file that was there, and refuse the input afterwards."""
    Path("evaluation.txt").write_text("")
    return refuse()


def two_lines() -> int:
    """Refuse the input in two lines."""
    print("saap: this is", file=sys.stderr)
    return refuse()


def long_line() -> int:
    """Refuse the input in a line that shows all of it."""
    print("saap: got", "x" * 100_000, file=sys.stderr)
    return 2


def escape() -> int:
    """Refuse the input with a sequence that a terminal obeys."""
    print("saap: \x1b[2J", file=sys.stderr)
    return 2


def box() -> int:
    """Refuse the input as a library does."""
    print("+--- error ---+", file=sys.stderr)
    return 2


def another_code() -> int:
    """Refuse the input with another exit code."""
    refuse()
    return 3


def nothing() -> int:
    """Say that all went well, without any result."""
    return 0


def wrong_number() -> int:
    """Evaluate, and be 1 % off."""
    from tests.fuzz.formats import expected_model

    return _evaluated(expected_model("tiny"), 1.01)


def right_number() -> int:
    """Evaluate, as it should be."""
    from tests.fuzz.formats import expected_model

    return _evaluated(expected_model("tiny"))


def number_of_the_unharmed() -> int:
    """Say what the unharmed file says, whatever this one does."""
    return _evaluated(json.loads(Path("unharmed.json").read_text()))


def _evaluated(figures: dict, factor: float = 1.0) -> int:
    ppl = {name: factor * value for name, value in figures.items() if name.startswith("ppl")}
    model = {"model": "tiny", "parameters": figures["parameters"], "ppl": ppl, "tasks": []}
    Path("result.json").write_text(json.dumps({"models": [model]}))
    return 0


def refuse() -> int:
    """Refuse the input as it should be."""
    print("saap: planted", file=sys.stderr)
    return 2
