"""What `saap recover` finds: before and after beside the dense model, and the course of the training."""

import functools
import math
from collections.abc import Sequence

import numpy as np

from saap_jax.evaluation.differences import paired_difference
from saap_jax.evaluation.scales import format_ppl
from saap_jax.records import RECOVERY, Row, RunRecord
from saap_jax.report.blocks import Column, Figure, Findings, Table, section
from saap_jax.report.figures import learning_figure
from saap_jax.report.formats import (
    TIED,
    format_count,
    format_mebibytes,
    format_millions,
    format_percent,
    format_relative,
    with_interval,
)
from saap_jax.report.pages.common import DOMAINS
from saap_jax.runs.directory import RunDirectory
from saap_jax.runs.standing import metrics, number
from saap_jax.runtime.words import plural


def recover_findings(directory: RunDirectory) -> Findings:
    """Show the models before and after, and the losses of every step."""
    run = directory.record
    steps = [row for row in directory.candidates() if "step" in row]
    done = {"data", "training", "after"} <= run.keys()
    table = None
    if {"before", "after"} <= run.keys():
        table = recovery_table(run)
    course = section("The course of the training", _course(steps) if steps else None)
    return Findings(summary(run) if done else ["The training is not finished."], "What came back", [table], more=course)


def recovery_table(run: RunRecord) -> Table:
    """List the models, each beside the one before the training."""
    before = run["before"]
    texts = [metric["name"] for metric in metrics(run)]
    rows = []
    for key, name in RECOVERY.items():
        if key in run:
            known = run[key]
            row = {"model": name, **known["ppl"], **{f"before {text}": before["ppl"].get(text) for text in texts}}
            low, high = known.get("slowest_and_fastest", (math.nan, math.nan))
            row |= {field: known.get(field) for field in ("parameters", "bytes", "tokens_per_second")}
            rows.append(row | {"slowest": low, "fastest": high})

    def figure(value: float, base: float | None) -> str:
        change = ""
        if not (base is None or value == base):
            change = f" ({format_relative(base, value)})"
        return format_ppl(number(value)) + change

    rate = functools.partial(with_interval, form=format_count)
    timed = any(row["tokens_per_second"] for row in rows)
    rounds = run.get("config", {}).get("repeats")
    columns = [
        Column("model", ("model",), words=True),
        Column("parameters (M)", ("parameters",), format_millions),
        Column("weights (MiB)", ("bytes",), format_mebibytes),
        *([Column("decoding (tokens a second)", ("tokens_per_second", "slowest", "fastest"), rate)] if timed else []),
        *(Column(f"{each['name']} ({each['domain']})", (each["name"], f"before {each['name']}"), figure)
          for each in metrics(run)),
    ]  # fmt: skip
    config = run.get("config", {})
    training = run.get("training")
    title = ""
    if training:
        title = f"{config['method']['name']}, {plural(training['steps'], 'step')} of {plural(training['rows'], 'row')}"
    notes = [f"in brackets behind a perplexity: change from the {RECOVERY['before']} model"]
    if timed:
        notes += [f"decoding: median of {rounds} rounds in turns (slowest to fastest)"]
    return Table(title, columns, rows, notes, "recovery")


def summary(run: RunRecord) -> list[str]:
    """Say what was trained on what, which parameters the recovered model has, and what it changed against what."""
    data = run["data"]
    training = run["training"]
    tokens = run["config"]["data"]["length"]
    held = data["held_out_rows"]
    lines = [
        f"text: {plural(data['documents'], 'document')} in {plural(data['rows'], 'row')} of {tokens} tokens, "
        f"{format_percent(data['filled'])} % filled; "
        f"{plural(data['predicted'], 'token')} to predict an epoch; {plural(held, 'row')} held out; "
        f"{plural(data['cut'], 'response')} cut, "
        f"{plural(data['left_out'], 'piece')} without a token to predict left out"
    ]
    trained = f"{training['trained']:,} numbers trained, of a model of {run['model']['parameters']:,}"
    if training["best_step"] is None:
        if held:
            why = "no held-out loss was finite"
        else:
            why = "no text was held out"
        lines.append(f"{trained}; the model is that of step {training['steps']}, the last one: {why}")
    else:
        if training["stopped"]:
            stopped = " (stopped: no lower held-out loss came)"
        else:
            stopped = ""
        worse = ""
        if training["best_loss"] >= training["first_loss"]:
            worse = ", which no step came below"
        lines.append(
            f"{trained}; the model is that of step {training['best_step']} of {training['steps']}{stopped}, where the "
            f"held-out loss was lowest: {training['best_loss']:.4f}, at first {training['first_loss']:.4f}{worse}"
        )
    return [*lines, *changes(run)]


def changes(run: RunRecord) -> list[str]:
    """Say of each text how the recovered model stands to the one that was trained and to the dense one.

    With an interval where the losses of windows are on record.
    """
    lines = []
    for metric in metrics(run) if "after" in run else ():
        name = metric["name"]
        parts = []
        after = run["after"].get("losses", {}).get(name, ())
        for key, of in (("before", "the model before"), ("dense", "the dense model")):
            if key in run:
                figures = [number(run[which]["ppl"].get(name)) for which in (key, "after")]
                said = format_relative(*figures)
                losses = run[key].get("losses", {}).get(name, ())
                if after and len(after) == len(losses) and all(map(math.isfinite, figures)):
                    pair = (np.array([each], np.float64) for each in (after, losses))
                    found = paired_difference(*pair, articles=run.get("articles", {}).get(name, ()))
                    said = found.numbers + f", {TIED} not to be told apart," * found.tied
                parts.append(f"{said} against {of} ({format_ppl(figures[0])})")
        if parts:
            value = format_ppl(number(run["after"]["ppl"].get(name)))
            if after:
                on = f" on {plural(len(after), 'window')} {DOMAINS[metric['domain']]}"
            else:
                on = ""
            lines.append(f"{name}{on}: recovered {value}, {' and '.join(parts)}")
    return lines


def _course(steps: Sequence[Row]) -> Figure:
    """Draw the losses of all steps."""
    ordered = sorted(steps, key=lambda row: row["step"])
    curves = {
        name: [(row["step"], number(row.get(field))) for row in ordered]
        for field, name in (("loss", "training"), ("held_out", "held out"))
    }
    return learning_figure("training", "Loss of training", curves, "step", "loss (nats a token)")
