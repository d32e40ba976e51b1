"""An entry for the leaderboard: a method in one file, pruned and judged by fixed rules. What `saap enter` runs.

The rules are those of docs/leaderboard.md. Of the evaluation text, entrants are shown each second window; the others
are for the workflow that judges, which also draws other calibration texts.
"""

import datetime
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from saap_jax.config.method import CalibrationConfig, ModelConfig
from saap_jax.config.use import EnterConfig
from saap_jax.contrib.leaderboard.page import DENSE, EXAMPLES, JUDGED, Entry, leaderboard, read_entries
from saap_jax.data.sources import check_disjoint
from saap_jax.data.windows import evaluation_windows
from saap_jax.errors import reading
from saap_jax.evaluation.perplexity import metric_name
from saap_jax.runtime.digests import digest_of, git_commit, versions
from saap_jax.runtime.files import encoded, read_json, write_atomically
from saap_jax.runtime.progress import Passes, Track, quiet, step
from saap_jax.runtime.sources import run_file, source_digest
from saap_jax.steps.allocation.allocation import meets
from saap_jax.steps.chain import Chain, parse
from saap_jax.steps.run import Runner
from saap_jax.subjects.base import rows_of, run_losses
from saap_jax.subjects.llama import LlamaSubject, open_subject

SAME = ("chain", "code", "versions", "text", "seeds", "judged", DENSE)
"""What an entry of before has to have in common with this one so that its other ratios stay."""
MODEL = "smollm2-135m"
LENGTH = 128
WINDOWS = 96
ROWS = 8
"""The model; tokens a window, windows that are evaluated, and windows a microbatch."""


def enter(config: EnterConfig, *, track: Track = quiet) -> Path:
    """Prune the model by the method of a file at each ratio, on each calibration text, judge it, and write the entry.

    Returns:
        The JSON file.

    Raises:
        ValueError: a file that fails or has no METHOD, a chain that cannot run, a model with more parameters than asked
            for, or an accelerator, on which processor minutes mean something else.
        FileNotFoundError: no such file.
    """
    path = Path(config.file)
    if path.suffix != ".py" or not path.is_file():
        raise FileNotFoundError(f"enter: expected a Python file, such as leaderboard/mine.py, found none at {path}")
    if jax.default_backend() != "cpu":
        raise ValueError(f"enter: expected jax on CPU, got {jax.default_backend()}; set JAX_PLATFORMS=cpu")
    check_disjoint([config.calibration], [config.evaluation])
    given, chain = method_of(path)
    hidden = config.judge is not None
    drawn = np.random.default_rng(config.judge).integers(2**32, size=config.seeds).tolist()
    seeds = drawn if hidden else [*range(config.seeds)]
    with step(track, "load the model"):
        subject = open_subject(ModelConfig(name=MODEL))
        assert isinstance(subject, LlamaSubject)
    windows = evaluation_windows(config.evaluation, subject.words, LENGTH, 2 * WINDOWS)
    windows = rows_of(windows, slice(int(hidden), None, 2))
    with step(track, "evaluate the unpruned model"):
        dense = run_losses(subject, windows, subject.existing, ROWS).means
    found: dict[str, list[Any]] = {f"{ratio:g}": [] for ratio in config.ratios}
    for seed in track("prune and judge", seeds, len(seeds)):
        for ratio, judged in zip(found, _pruned(subject, chain, seed, config, windows, track), strict=True):
            found[ratio].append(judged)
    entry: Entry = {
        "name": path.stem,
        "idea": " ".join((given.get("__doc__") or "").partition("\n\n")[0].split()),
        "author": str(given.get("AUTHOR", "")),
        "chain": chain.written.replace(f"{path}:", f"{path.name}:"),
        "code": source_digest(path),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": git_commit(path.resolve().parent),
        "versions": versions(),
        "text": [config.calibration, metric_name(LENGTH, config.evaluation), digest_of(windows)],
        "seeds": seeds,
        "judged": hidden,
        DENSE: dense.tolist(),
        "ratios": found,
    }
    place = path.parent / JUDGED if hidden else path.parent
    place.mkdir(exist_ok=True)
    written = place / f"{path.stem}.json"
    before = read_json(written) if written.is_file() else {}
    if all(before.get(name) == entry[name] for name in SAME):
        entry["ratios"] = before["ratios"] | found
    write_atomically(written, encoded(entry) + b"\n")
    return written


def method_of(path: Path) -> tuple[dict[str, Any], Chain]:
    """Run an entrant's file; return its names, and the chain that METHOD is, in which FILE stands for the file.

    Raises:
        ValueError: a file that fails or has no METHOD, or a METHOD that is no chain.
    """
    with reading(path, "a Python file that runs"):
        given = run_file(path)
    if not isinstance(method := given.get("METHOD"), str):
        got = "none" if method is None else type(method).__name__
        raise ValueError(f'{path}: expected METHOD = "CHAIN", got {got}')
    return given, parse(method.replace("FILE:", f"{path}:"))


def _pruned(
    subject: LlamaSubject, chain: Chain, seed: int, config: EnterConfig, windows: Any, track: Track
) -> Iterator[dict[str, Any]]:
    """Prune by a chain to each ratio, count the time of all processors, and judge what is left.

    One pass scores for all ratios; its time counts for each of them.

    Raises:
        ValueError: fewer parameters went than were asked for, or some were added.
    """
    text = subject.scenarios(
        CalibrationConfig(scenarios=(config.calibration,), examples=EXAMPLES, length=LENGTH, seed=seed)
    )
    start = _processor_seconds()
    runner = functools.partial(Runner, subject, text, [chain], Passes(ROWS, track=track))
    runner().check(chain, config.ratios)
    scores = runner().first()
    scored = _processor_seconds()
    for ratio in config.ratios:
        began = _processor_seconds()
        (own := runner()).first(scores)  # nothing else that another ratio made is there
        state = own.run(chain, ratio)
        assert isinstance(state.subject, LlamaSubject)
        jax.block_until_ready(state.subject.model)
        seconds = scored - start + _processor_seconds() - began
        removed = subject.removed(state.keep)
        if not meets(subject, state.keep, ratio):
            said = f"got {removed / subject.prunable:.1%}"
            raise ValueError(f"{chain.name}: expected {ratio:.0%} of the prunable parameters gone, {said}")
        if (added := state.subject.parameters - subject.parameters) > 0:
            raise ValueError(
                f"{chain.name}: expected no parameters beside the model's, got {added:,} more, as of biases"
            )
        losses = run_losses(state.subject, windows, state.keep, ROWS).means
        yield {"losses": losses.tolist(), "minutes": seconds / 60, "parameters": subject.parameters - removed}


def _processor_seconds() -> float:
    """Read the processor time of this process and of those that it started, in seconds."""
    return sum(os.times()[:4])


def shown(config: EnterConfig, written: Path) -> Iterator[Any]:
    """Show where the entry stands among those that lie beside it."""
    entries = read_entries(written.parent)
    for ratio in config.ratios:
        yield leaderboard(entries, ratio)
    yield {"entry": written}
