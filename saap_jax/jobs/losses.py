"""Losses of candidates: each model is evaluated once on the same windows, whoever asks for it.

A candidate that changes no weights is a mask of the unpruned model; masks are evaluated together by one program. One
whose weights were repaired is a model of its own and is evaluated alone. Losses are kept in the cache by model and
windows. The masks of one batch depend on what is asked for and not on what is known already, so that a run that is
taken up again gets the same numbers.
"""

import itertools
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from saap_jax.jobs.candidates import Candidates, Row, deciding, figure, record
from saap_jax.runs.stages import Stage
from saap_jax.runtime.processes import broadcast, is_primary
from saap_jax.steps.run import digest
from saap_jax.subjects.base import Examples, Subject, joined, rows_of, run_losses
from saap_jax.types import Keep, WindowLosses


def measure(
    table: Candidates,
    names: Sequence[str],
    about: Mapping[str, Row],
    *,
    doing: str,
    stage: Stage | None = None,
) -> dict[str, Row]:
    """Evaluate candidates on all windows and record them, by name; `about` is what is recorded beside the figures."""
    windows = {metric: np.arange(rows) for metric, rows in table.rows.items()}
    found = losses_of(table, names, windows, doing, stage)
    rows = {}
    for name in names:
        ppl = {metric: figure(metric, np.asarray(losses)) for metric, losses in found[name]["losses"].items()}
        rows[name] = record(table, name, about.get(name, {}), {"ppl": ppl, **found[name]})
    return rows


def losses_of(
    table: Candidates,
    names: Sequence[str],
    windows: Mapping[str, np.ndarray],
    doing: str,
    stage: Stage | None,
) -> dict[str, Row]:
    """Measure `parameters`, `losses` by metric and `seconds` of each candidate on some windows of each text."""
    # Candidates of the same mask are one model, evaluated under the first name.
    firsts: dict[str, str] = {}
    for name in names:
        firsts.setdefault(table.choices[name].model, name)

    # What the cache holds is not evaluated again.
    chosen = {metric: numbers.tolist() for metric, numbers in windows.items()}
    keys = {model: digest(table.key, model, chosen) for model in firsts}
    found = {}
    for model, key in keys.items():
        known = table.cache.value(key)
        if known is not None:
            found[model] = known

    texts = table.material.texts
    text = joined([rows_of(texts[metric], numbers) for metric, numbers in windows.items() if len(numbers)])
    tokens = table.subject.size(text).tokens
    masked = [model for model, name in firsts.items() if table.choices[name].masked]
    repaired = [model for model, name in firsts.items() if not table.choices[name].masked and model not in found]
    evaluations = itertools.chain(
        _evaluate_masks(table, {model: table.choices[firsts[model]].keep for model in masked}, text, {*found}, doing),
        _evaluate_repaired(table, {model: firsts[model] for model in repaired}, text),
    )
    best = _Best(table, firsts)
    for model, known in found.items():
        best.see(model, known)
    for each in evaluations:
        table.cache.keep(keys[each.model], measured(each, windows))
        row = table.cache.value(keys[each.model])
        found[each.model] = row
        if stage is not None:
            stage.tokens += tokens
        best.see(each.model, row, new=True)
    return {name: found[table.choices[name].model] for name in names}


class Evaluated(NamedTuple):
    """A model that was just evaluated."""

    model: str
    """Its digest."""
    losses: WindowLosses
    seconds: float
    subject: Subject
    """Whose weights: the unpruned model's, or repaired ones."""
    keep: Keep


def measured(evaluated: Evaluated, windows: Mapping[str, np.ndarray]) -> Row:
    """Write what was measured as the cache and a run hold it; losses are in nats a token, one a window."""
    subject = evaluated.subject
    ends = np.cumsum([len(numbers) for numbers in windows.values()])[:-1]
    parts = np.split(evaluated.losses.means, ends)
    return {
        "parameters": subject.parameters - subject.removed(evaluated.keep),  # with biases that a repair has added
        "losses": {metric: part.tolist() for metric, part in zip(windows, parts, strict=True)},
        "seconds": evaluated.seconds,
    }


def _evaluate_masks(
    table: Candidates, keeps: Mapping[str, Keep], text: Examples, known: set[str], doing: str
) -> Iterator[Evaluated]:
    """Evaluate masks in batches; those known already keep their place in a batch, and are not computed again."""
    models = list(keeps)
    done = {number for number, model in enumerate(models) if model in known}
    if len(done) == len(models):
        return
    groups = table.subject.losses(
        text,
        [*keeps.values()],
        batch_size=table.evaluation.batch_size,
        at_once=table.at_once,
        done=done,
        progress=lambda steps: table.passes.track(doing, steps, len(steps)),
    )
    began = time.perf_counter()
    for group in groups:
        seconds = (time.perf_counter() - began) / len(group)
        for number, losses in group.items():
            if number not in done:
                model = models[number]
                yield Evaluated(model, losses, seconds, table.subject, keeps[model])
        began = time.perf_counter()


def _evaluate_repaired(table: Candidates, names: Mapping[str, str], text: Examples) -> Iterator[Evaluated]:
    """Repair and evaluate one model after the other."""
    if not names:
        return
    for model, name in table.passes.track("repair and evaluate", names.items(), len(names)):
        began = time.perf_counter()
        state = table.state(name)
        losses = run_losses(state.subject, text, state.keep, table.evaluation.batch_size)
        yield Evaluated(model, losses, time.perf_counter() - began, state.subject, state.keep)


# --- the best repaired model, kept until it is saved ---------------------------------------------


class _Best:
    """The lowest so far of the candidates that may be cut; a repaired one is kept, so that no repair is done twice."""

    def __init__(self, table: Candidates, firsts: Mapping[str, str]) -> None:
        self.table = table
        self.firsts = firsts
        self.metric = deciding(table.material.texts)
        self.lowest = np.inf

    def see(self, model: str, row: Row, *, new: bool = False) -> None:
        """Take the losses of a model into account; cut one that was just repaired and is the lowest."""
        name = self.firsts[model]
        if name not in self.table.cuttable:
            return
        mean = float(np.mean(row["losses"][self.metric]))
        if not mean < self.lowest:  # nor one that is not finite
            return
        self.lowest = mean
        if new and not self.table.choices[name].masked:
            drop_cuts(self.table)
            cut(self.table, name)


def cut(table: Candidates, name: str) -> Path:
    """Find the cut model of a candidate in the cache, and make it where it is not there."""
    place = _place(table, name)
    if not broadcast(place.exists):
        state = table.state(name)
        state.subject.cut(state.keep).save(place, state.keep)
    return place


def drop_cuts(table: Candidates) -> None:
    """Remove the cut models of a run from the cache."""
    if is_primary():
        for name in table.cuttable:
            shutil.rmtree(_place(table, name), ignore_errors=True)


def _place(table: Candidates, name: str) -> Path:
    # The name of the run is part of the key: two runs never share a cut model that one of them removes.
    return table.cache.path / digest(table.key, "cut", table.run.path.name, table.choices[name].model)
