"""What `saap recover` finds: before and after beside the dense model, and the course of the training."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from saap_jax.evaluation.differences import decimals_of, paired_difference
from saap_jax.evaluation.resample import few
from saap_jax.evaluation.scales import format_ppl
from saap_jax.report.figures.training import training_plot
from saap_jax.report.kinds.common import cost_section, files_of, reproduce_section
from saap_jax.report.kinds.variants import DOMAINS
from saap_jax.report.kinds.written import written_section
from saap_jax.report.page.blocks import Block, Bullets, Data, Detail, Picture, Section, Table, text_table
from saap_jax.report.page.formats import (
    TIED,
    format_change,
    format_count,
    format_mebibytes,
    format_millions,
    format_percent,
)
from saap_jax.runs.reading import read_rows
from saap_jax.runs.records import Row, RunRecord
from saap_jax.runs.standing import metrics, number
from saap_jax.runtime.words import plural, signed

VARIANTS = {"dense": "dense", "before": "pruned", "after": "recovered"}
"""Key of a model in the record -> what the table calls it."""


def recover_sections(path: Path, run: RunRecord, detail: Detail) -> list[Section]:
    """Return the sections of a run, finished or not."""
    candidates = read_rows(path, run, "recover")
    said = summary(run) if {"data", "training", "after"} <= run.keys() else ["The training is not finished."]
    blocks: list[Block] = [recovery_table(run)] if {"before", "after"} <= run.keys() else []
    blocks += [recovery_data(run)] if blocks and detail.downloads else []
    course = [Picture("Loss of training", training_plot(curves_of(candidates)))] if detail.drawn else []
    course = course if any("step" in row for row in candidates) else []
    return [
        Section("summary", "Summary", [Bullets(said)]),
        *([Section("recovery", "What came back", blocks)] if blocks else []),
        *([Section("training", "The course of the training", course)] if course else []),
        *written_section(run),
        *cost_section(run),
        reproduce_section(run),
    ]


def recovery_files(run: RunRecord, candidates: Sequence[Row]) -> dict[str, str]:
    """Return the files of a run: the table, and every step's numbers with their figure."""
    picture = Picture("Loss of training", training_plot(curves_of(candidates)))
    return files_of("recovery", [recovery_table(run), recovery_data(run), picture])


def recovery_table(run: RunRecord) -> Table:
    """Return a line a property, a column a model."""
    models = [key for key in VARIANTS if key in run]
    properties = [("parameters (M)", "parameters", format_millions), ("weights (MiB)", "bytes", format_mebibytes)]
    if any(run[key].get("tokens_per_second") for key in models):
        properties.append(("decoding (tokens a second)", "tokens_per_second", format_count))
    rows = [
        [label, *_cells([number(run[key].get(field)) for key in models], models, form)]
        for label, field, form in properties
    ]
    for metric in metrics(run):
        values = [number(run[key]["ppl"].get(metric["name"])) for key in models]
        rows.append([f"{metric['name']} ({metric['domain']})", *_cells(values, models, format_ppl)])
    header = ["", *(VARIANTS[key] for key in models), f"change from {VARIANTS['before']}"]
    config, training = run.get("config", {}), run.get("training")
    title = f"{config['method']['name']}, {training['steps']} steps of {training['rows']} rows" if training else ""
    return text_table(title, header, rows)


def _cells(values: Sequence[float], models: Sequence[str], form: Callable[[float], str]) -> list[str]:
    by_model = dict(zip(models, values, strict=True))
    return [*map(form, values), format_change(by_model["before"], by_model["after"])]


def recovery_data(run: RunRecord) -> Data:
    """Return the table with all digits: a line a model."""
    names = [metric["name"] for metric in metrics(run)]
    fields = ("parameters", "bytes", "tokens_per_second")
    rows = [
        [label, *map(run[key].get, fields), *map(run[key]["ppl"].get, names)]
        for key, label in VARIANTS.items()
        if key in run
    ]
    return Data("CSV of the models, full precision", "recovery.csv", ["model", *fields, *names], rows)


def summary(run: RunRecord) -> list[str]:
    """Say what was trained on what, which parameters the recovered model has, and what it changed against what."""
    data, training = run["data"], run["training"]
    tokens, held = run["config"]["data"]["length"], data["held_out_rows"]
    lines = [
        f"text: {plural(data['documents'], 'document')} in {data['rows']:,} rows of {tokens} tokens, "
        f"{format_percent(data['filled'])} % filled; "
        f"{data['predicted']:,} tokens to predict an epoch; {held:,} rows held out; {data['cut']:,} responses cut, "
        f"{data['left_out']:,} pieces without a token to predict left out"
    ]
    trained = f"{training['trained']:,} numbers trained, of a model of {run['model']['parameters']:,}"
    if training["best_step"] is None:
        why = "no held-out loss was finite" if held else "no text was held out"
        lines.append(f"{trained}; the model is that of step {training['steps']}, the last one: {why}")
    else:
        stopped = " (stopped: no lower held-out loss came)" if training["stopped"] else ""
        lines.append(
            f"{trained}; the model is that of step {training['best_step']} of {training['steps']}{stopped}, where the "
            f"held-out loss was lowest: {training['best_loss']:.4f}, at first {training['first_loss']:.4f}"
        )
    return [*lines, *changes(run)]


def changes(run: RunRecord) -> list[str]:
    """Say of each text how the recovered model stands to the one that was trained and to the dense one.

    With the interval of the paired bootstrap over the windows where their losses are on record and suffice.
    """
    lines = []
    for metric in metrics(run):
        name, said = metric["name"], []
        for key, of in (("before", "the model before"), ("dense", "the dense model")):
            if "after" not in run or key not in run:
                continue
            base, after = (number(run[which]["ppl"].get(name)) for which in (key, "after"))
            said.append(f"{format_change(base, after)}{_interval(run, key, name)} against {of} ({format_ppl(base)})")
        if said:
            windows = len(run["after"].get("losses", {}).get(name, ()))
            on = f" on {plural(windows, 'window')} {DOMAINS[metric['domain']]}" if windows else ""
            lines.append(f"{name}{on}: recovered {format_ppl(after)}, {' and '.join(said)}")
    return lines


def _interval(run: RunRecord, key: str, name: str) -> str:
    losses = [run[which].get("losses", {}).get(name, ()) for which in ("after", key)]
    if not losses[0] or len(losses[0]) != len(losses[1]):
        return ""
    difference = paired_difference(*(np.array(each, np.float64)[None] for each in losses))
    _, low, high = difference.percent
    if difference.same or not math.isfinite(difference.value):
        return ""
    if math.isnan(low):
        return f" ({few(difference.windows)})"
    digits = decimals_of(difference.percent[0])
    return f" ({signed(low, digits)} to {signed(high, digits)} %)" + (
        "" if difference.sure else f", {TIED} not to be told apart,"
    )


def curves_of(candidates: Sequence[Row]) -> dict[str, list[tuple[int, float]]]:
    """Return the losses of all steps by field, those that are finite."""
    steps = sorted((row for row in candidates if "step" in row), key=lambda row: row["step"])
    return {
        field: [(row["step"], value) for row in steps if math.isfinite(value := number(row.get(field)))]
        for field in ("loss", "held_out")
    }
