"""How long does it take to start: Python, the package, help, and the first words of a comparison?

    python experiments/benchmarks/startup.py [--repeats 7] [--before CHECKOUT]

Fresh processes that take turns; modules are compiled once, as in an installation that was used before. Prints medians
of wall time and of processor time. A comparison is ended when it has said its first line.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FIRST = "saap compare quickstart, first line"
SAAP = ["-c", "import sys, saap_jax.__main__ as saap; sys.argv[0] = 'saap'; saap.run()"]  # as the console script does
WORDS = {
    "python -c pass": ["-c", "pass"],
    "import saap_jax": ["-c", "import saap_jax"],
    "saap --help": [*SAAP, "--help"],
    "saap compare --help": [*SAAP, "compare", "--help"],
    FIRST: [*SAAP, "compare", "quickstart"],
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--before", help="a checkout of an earlier state, measured in turns with this one")
    arguments = parser.parse_args()
    checkouts = {"now": str(Path(__file__).parents[2])} | ({"before": arguments.before} if arguments.before else {})
    taken: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as compiled:
        for turn in range(arguments.repeats + 1):
            for what, words in WORDS.items():
                for name, checkout in checkouts.items():
                    seconds = measured(words, checkout, compiled, first=what == FIRST)
                    if turn:  # the first turn compiles modules
                        taken.setdefault((what, name), []).append(seconds)
    for (what, name), each in taken.items():
        wall, processor = (statistics.median(values) for values in zip(*each, strict=True))
        print(f"{what:36} {name:7} {wall:6.2f} s, processor {processor:6.2f} s")


def measured(words: list[str], checkout: str, compiled: str, *, first: bool) -> tuple[float, float]:
    """Measure the seconds, and those of the processor, until a process has ended, or has said its first line."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"PYTHONPATH": checkout, "PYTHONPYCACHEPREFIX": compiled}
    with tempfile.TemporaryDirectory() as runs:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *words, *(["--runs", runs] if first else [])],
            env=environment, cwd=runs, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert process.stderr is not None
        if first:
            said = process.stderr.readline()
            wall = time.perf_counter() - start
            ticks = sum(map(int, Path(f"/proc/{process.pid}/stat").read_text().rsplit(") ", 1)[1].split()[11:13]))
            process.kill()
            process.wait()
            if not said.strip() or said.startswith(b"saap:"):
                raise SystemExit(f"expected a line about the work, got {said!r}")
            return wall, ticks / os.sysconf("SC_CLK_TCK")
        before = os.times()
        if said := process.stderr.read():
            raise SystemExit(f"expected nothing on the error stream, got {said.decode()}")
        process.wait()
        wall, after = time.perf_counter() - start, os.times()
        return wall, after.children_user + after.children_system - before.children_user - before.children_system


if __name__ == "__main__":
    main()
