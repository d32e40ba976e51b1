"""The blocks of a run of any kind: cost, what both models write, what to try next, and how to repeat it."""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from saap_jax.evaluation.resample import FEWEST, too_few
from saap_jax.evaluation.scales import Scale, format_figure, scale_of
from saap_jax.records import RaceRecord, RunRecord, WrittenText
from saap_jax.report.blocks import Block, Code, Column, Section, Words, facts, said, section, text_table
from saap_jax.report.couplings import coupling_figure
from saap_jax.report.formats import format_usd
from saap_jax.runs.standing import DENSE, metrics
from saap_jax.runtime.files import plain
from saap_jax.runtime.words import plural

DOMAINS = {"in": "in domain", "out": "out of domain"}

_STAGE = {
    "seconds": ("seconds", ",.1f"),
    "compile_seconds": ("of them compiling", ",.1f"),
    "compiles": ("programs", ","),
    "cache_hits": ("of them from the cache", ","),
    "tokens": ("tokens", ","),
    "tokens_per_second": ("tokens a second", ",.0f"),
    "peak_host_gib": ("peak host memory (GiB)", ".2f"),
    "peak_device_gib": ("peak device memory (GiB)", ".2f"),
}
"""Field of a stage, see `runs.stages`: heading, and how it is written."""


def figure_of(run: RunRecord) -> Scale:
    """Say what the figures of a run are: perplexities, or mean losses."""
    return scale_of(next((metric["name"] for metric in metrics(run)), ""))


def metric_columns(run: RunRecord, wide: bool = False) -> list[Column]:
    """Make a column a metric of a run, for rows that have its figure under its name."""
    names = [metric["name"] for metric in metrics(run)]
    return [Column(name, (name,), functools.partial(format_figure, scale=scale_of(name)), wide=wide) for name in names]


def share_evaluated(*races: RaceRecord) -> str:
    """Say what share of the windows races took; empty where that is not on record."""
    every = sum(each.get("keep_sets", 0) * each.get("budget", 0) for each in races)
    if not every:
        return ""
    evaluated = sum(each.get("evaluated", 0) for each in races)
    return f"{100 * evaluated / every:.0f} % of the windows were evaluated; "


def model_name(run: RunRecord) -> str:
    """Name a run's model, empty where the record does not tell."""
    name = run.get("model", {}).get("name")
    if name:
        return name
    asked = run.get("config", {}).get("model", "")
    if isinstance(asked, str):  # the file of a factory
        return asked
    return asked.get("name", "")


def closing_sections(run: RunRecord, about: Mapping[str, str | None] | None = None) -> list[Section]:
    """Make what ends the page of any run: what models write, cost, how to repeat it, coupled structures."""
    sections = [
        *written_section(run.get("written", ())),
        *section("Time, memory and cost", *_stage_blocks(run), *_price_blocks(run), *_sum_blocks(run)),
        Section("To reproduce", _reproduce(run, about or {})),
    ]
    if "couplings" in run:
        coupled = (
            "Parameters on the left, a box an axis; structures on the right, with a line to each axis that is cut with "
            "them. What is pinned is grey."
        )
        sections += section("Coupled structures", coupling_figure(run["couplings"]), about=coupled)
    return sections


def _reproduce(run: RunRecord, about: Mapping[str, str | None]) -> list[Block]:
    """Say command, versions, devices and configuration; what is known beside them comes first."""
    model = run.get("model", {})
    versions = run.get("versions", {})
    known = {
        **about,
        "saap_jax": versions.get("saap_jax"),
        "git commit": run.get("git_commit"),
        "started": run.get("started"),
        "finished": run.get("finished"),
        "host": run.get("host"),
    }
    if run.get("devices"):
        known["devices"] = "{count} x {kind} ({platform})".format(**run["devices"])
    known |= {
        "model": model.get("name"),
        "layers": model.get("layers"),
        "units a layer": ", ".join(f"{name} {units}" for name, units in model.get("units", {}).items()),
    }
    for field in ("parameters", "prunable_parameters"):
        if field in model:
            known[field.replace("_", " ")] = f"{model[field]:,}"
    known["seeds"] = "; ".join(f"{name} {listed(seeds)}" for name, seeds in run.get("seeds", {}).items())
    known["libraries"] = ", ".join(f"{n} {v}" for n, v in versions.items() if n != "saap_jax" and v)

    config = Code("Configuration", json.dumps(plain(run.get("config")), indent=2))
    blocks: list[Block] = [facts(known), Section("Configuration", [config], folded=True)]
    if run.get("command"):
        blocks.insert(0, Code("Command", run["command"]))
    return blocks


def listed(value: Any) -> str:
    """Write a value of a configuration, the items of a list with commas between."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)


def _stage_blocks(run: RunRecord) -> list[Block]:
    """List the stages, with the columns that some stage has a number for; nothing where none is on record."""
    stages = run.get("stages", [])
    if not stages:
        return []
    fields = [field for field in _STAGE if any(stage.get(field) is not None for stage in stages)]
    lines = []
    for stage in stages:
        name = stage["name"]
        if stage.get("times", 1) > 1:
            name += f" ({stage['times']} times)"
        lines.append([name, *(_stage_cell(stage, field) for field in fields)])
    heads = [_STAGE[field][0] for field in fields]
    if "structures" in run:  # a traced model counts what its batches are of
        heads = [head.replace("tokens", "examples") for head in heads]
    return [text_table("Stages", ["stage", *heads], lines)]


def _stage_cell(stage: Mapping[str, Any], field: str) -> str:
    """Write a number of a stage, a dash where it has none."""
    value = stage.get(field)
    if value is None:
        return "-"
    return format(value, _STAGE[field][1])


def _price_blocks(run: RunRecord) -> list[Block]:
    """Say device-hours and, where a price is known, dollars, as `evaluation.cost` records them."""
    cost = run.get("cost")
    if not cost:
        return []
    unit = "device"
    if run.get("devices", {}).get("platform") == "cpu":
        unit = "core"
    text = f"{cost['device_hours']:,.3g} device-hours on {plural(cost['devices'], unit)}"
    usd = cost.get("usd")
    if usd is None:
        return [*said(f"{text}; {cost.get('note', 'no price is known')}.")]

    prices = cost.get("prices") or {}
    source = [prices.get("kind"), prices.get("date")]
    if "usd_per_hour" in prices:
        source.insert(1, f"{format_usd(prices['usd_per_hour'])} an hour each")
    text += f": {format_usd(usd)}"
    if any(source):
        text += f" ({', '.join(filter(None, source))})"
    blocks: list[Block] = [*said(f"{text}.")]
    million = cost.get("usd_per_million_tokens")
    if million and "structures" not in run:
        dense = format_usd(million["dense"])
        cut = format_usd(million["cut"])
        blocks += said(f"A million tokens in the timed forward pass: {dense} dense, {cut} cut.")
    return blocks


def _sum_blocks(run: RunRecord) -> list[Block]:
    """Say how long all stages took together; nothing where none is on record."""
    seconds = seconds_of(run)
    if seconds is None:
        return []
    more = "Memory is the highest of the process until the end of a stage."
    return [Words(f"All stages together: {seconds:,.0f} seconds. {more}")]


def seconds_of(run: RunRecord) -> float | None:
    """Add up the seconds of all stages, None where none was recorded."""
    stages = run.get("stages", [])
    if not stages:
        return None
    return sum(stage["seconds"] for stage in stages)


def suggestions_section(run: RunRecord) -> list[Section]:
    """Say what the run suggests to do next; nothing where it suggests nothing, of a sensitivity why so."""
    # a finished sensitivity has an empty list, which says that it looked
    looked = run.get("kind") == "sensitivity" and "suggestions" in run
    if not looked and not run.get("suggestions"):
        return []
    return [Section("What to try next", suggestion_blocks(run))]


def suggestion_blocks(run: RunRecord) -> list[Block]:
    """Say the suggestions that a run keeps: what, with which expected effect, by which command; or why none."""
    suggestions = run.get("suggestions", [])
    if not suggestions:
        windows = min(map(len, run.get(DENSE, {}).get("losses", {}).values()), default=FEWEST)
        why = too_few(windows)
        if why:
            why = f" ({why})"
        return [*said(f"No suggestion: nothing measured is sure to be an improvement{why}.")]
    blocks: list[Block] = []
    for place, one in enumerate(suggestions, start=1):
        text = one["text"]
        if len(suggestions) > 1:
            text = f"{place}. {text}"
        effect = f"Expected effect: {one['effect']}"
        if one["effect"].startswith("measured"):
            effect = "M" + one["effect"].removeprefix("m")
        blocks += [*said(text), Words(effect), Code("Command", one["command"])]
    return blocks


def written_section(texts: Sequence[WrittenText]) -> list[Section]:
    """Show what models wrote after the same prompts; nothing where nothing is on record."""
    if not texts:
        return []
    lines = []
    for each in texts:
        prompt = each["prompt"]
        for model, text in each["texts"].items():
            lines.append([prompt, model, " ".join(text.split()) or "(nothing)"])
            prompt = ""  # said once, beside the first model
    about = "The likeliest token each time. To be looked at: a few sentences do not tell how good a model is."
    return section("What they write", text_table("", ("prompt", "model", "goes on"), lines, words=3), about=about)


def subject_sentence(run: RunRecord) -> str:
    """Say of which model and texts a run is."""
    scenarios = run.get("config", {}).get("calibration", {}).get("scenarios", ())
    calibrated = " and ".join(scenarios) or "all sets"
    # of `ppl@128 builtin:reference`, the text
    evaluated = " and ".join(metric["name"].partition(" ")[2] for metric in metrics(run))
    return f"{model_name(run)}, calibrated on {calibrated}, evaluated on {evaluated}"


def structure_sentences(run: RunRecord) -> list[str]:
    """Say what of a traced model can be pruned, and what repairs leave as it is."""
    sentences = []
    if "structures" in run:
        structures = run["structures"]
        model = run["model"]
        held = f"{model['prunable_parameters']:,} of {model['parameters']:,} parameters"
        sentences.append(f"{plural(len(structures), 'structure')} with {held} can be pruned.")
        copied = ", ".join(structure["name"] for structure in structures if structure["copied"])
        if copied:
            sentences.append(f"Each copy (layer, expert) of a structure keeps as many units as the others: {copied}.")
    for method, reasons in run.get("unrepaired", {}).items():
        for name, reason in reasons.items():
            sentences.append(f"Repairs of {method} leave {name} as it is: {reason}.")
    return sentences
