"""Progress where no bars are shown: a line a stage, one every interval with the time left, and steps within a stage."""

import io
import re
import time

from rich.console import Console

from saap_jax.cli import progress
from saap_jax.cli.progress import showing
from saap_jax.data import Windows, pairs
from saap_jax.evaluation.perplexity import window_losses
from saap_jax.llama import load_model, save_model
from saap_jax.runtime.steps import telling, within
from tests.helpers import random_tokens


def lines_of(body, *, terminal: bool = False) -> list[str]:
    """Return what is printed while `body(track)` runs."""
    file = io.StringIO()
    with showing(Console(file=file, force_terminal=terminal, width=100)) as track:
        body(track)
    return file.getvalue().splitlines()


def test_a_line_every_interval_with_the_time_left(monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL", 0.05)

    def body(track):
        time.sleep(0.12)
        for _ in track("evaluate", range(2), 2):
            for _ in within("windows", range(3)):
                time.sleep(0.06)

    first, *lines = lines_of(body)
    assert re.fullmatch(r"at work \d+ s after: start", first)
    assert "evaluate: 2 steps" in lines
    assert re.fullmatch(r"evaluate: done in 0\.\d s", lines[-1])
    told = [line for line in lines if "windows" in line]
    assert re.fullmatch(r"evaluate: 0 of 2 after 0 s; windows: 0 of 3 after 0 s", told[0])
    left = "after 0 s, about 0 s left"
    assert re.fullmatch(f"evaluate: 1 of 2 {left}; windows: 2 of 3 {left}", told[-1])
    assert len(lines) == 2 + len(told) + sum(line.startswith("at work") for line in lines), "and no line of its own"


def test_steps_within_loading_evaluating_and_saving(tiny_model_directory, tmp_path):
    seen = {}

    def show(what, items):
        for number, item in enumerate(items, start=1):
            seen[what] = number, len(items)
            yield item

    tokens = random_tokens(5, 8)
    with telling(show):
        model = load_model(tiny_model_directory)
        window_losses(model, pairs(Windows(tokens, tokens >= 0), 2))
        save_model(model, tmp_path / "saved")
    assert seen == {"parameters": (11, 11), "batches of windows": (3, 3), "tensors": (20, 20)}
    seen.clear()
    load_model(tiny_model_directory)
    assert seen == {}, "nobody is told any more"
