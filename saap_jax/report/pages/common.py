"""The blocks of a run of any kind: cost, what both models write, what to try next, and how to repeat it."""

import functools
import json
from collections.abc import Mapping, Sequence

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
    evaluated = sum(each.get("evaluated", 0) for each in races)
    return f"{100 * evaluated / every:.0f} % of the windows were evaluated; " if every else ""


def model_name(run: RunRecord) -> str:
    """Name a run's model, empty where the record does not tell."""
    asked = run.get("config", {}).get("model", "")
    return run.get("model", {}).get("name") or (asked if isinstance(asked, str) else asked.get("name", ""))


def closing_sections(run: RunRecord, about: Mapping[str, str | None] | None = None) -> list[Section]:
    """Make what ends the page of any run: what models write, cost, how to repeat it, coupled structures."""
    coupled = (
        "Parameters on the left, a box an axis; structures on the right, with a line to each axis that is cut with "
        "them. What is pinned is grey."
    )
    return [
        *written_section(run.get("written", ())),
        *section("Time, memory and cost", *_cost(run)),
        Section("To reproduce", _reproduce(run, about or {})),
        *section(
            "Coupled structures", coupling_figure(run["couplings"]) if "couplings" in run else None, about=coupled
        ),
    ]


def _reproduce(run: RunRecord, about: Mapping[str, str | None]) -> list[Block]:
    """Say command, versions, devices and configuration; what is known beside them comes first."""
    devices = run.get("devices", {})
    model = run.get("model", {})
    versions = run.get("versions", {})
    seeds = {name: ", ".join(map(str, s)) if isinstance(s, list) else s for name, s in run.get("seeds", {}).items()}
    known = {
        **about,
        "saap_jax": versions.get("saap_jax"),
        "git commit": run.get("git_commit"),
        "started": run.get("started"),
        "finished": run.get("finished"),
        "host": run.get("host"),
        "devices": "{count} x {kind} ({platform})".format(**devices) if devices else None,
        "model": model.get("name"),
        "layers": model.get("layers"),
        "units a layer": ", ".join(f"{name} {units}" for name, units in model.get("units", {}).items()),
        "parameters": f"{model['parameters']:,}" if "parameters" in model else None,
        "prunable parameters": f"{model['prunable_parameters']:,}" if "prunable_parameters" in model else None,
        "seeds": "; ".join(f"{name} {seed}" for name, seed in seeds.items()),
        "libraries": ", ".join(f"{n} {v}" for n, v in versions.items() if n != "saap_jax" and v),
    }
    config = Code("Configuration", json.dumps(plain(run.get("config")), indent=2))
    command = [Code("Command", run["command"])] if run.get("command") else []
    return [*command, facts(known), Section("Configuration", [config], folded=True)]


def _cost(run: RunRecord) -> list[Block]:
    """Say time, memory and cost; the table of stages has the columns that some stage has a number for."""
    blocks: list[Block] = []
    if stages := run.get("stages"):
        fields = [field for field in _STAGE if any(stage.get(field) is not None for stage in stages)]
        lines = []
        for stage in stages:
            name = stage["name"] + (f" ({stage['times']} times)" if stage.get("times", 1) > 1 else "")
            values = [(stage.get(field), _STAGE[field][1]) for field in fields]
            lines.append([name, *("-" if value is None else format(value, form) for value, form in values)])
        unit = "examples" if "structures" in run else "tokens"
        heads = (_STAGE[field][0].replace("tokens", unit) for field in fields)
        blocks.append(text_table("Stages", ["stage", *heads], lines))
    if cost := run.get("cost"):  # see `evaluation.cost`
        unit = "core" if run.get("devices", {}).get("platform") == "cpu" else "device"
        text = f"{cost['device_hours']:,.3g} device-hours on {plural(cost['devices'], unit)}"
        if (usd := cost.get("usd")) is None:
            blocks += said(f"{text}; {cost.get('note', 'no price is known')}.")
        else:
            prices = cost.get("prices") or {}
            each = f"{format_usd(prices['usd_per_hour'])} an hour each" if "usd_per_hour" in prices else ""
            source = ", ".join(part for part in (prices.get("kind"), each, prices.get("date")) if part)
            blocks += said(f"{text}: {format_usd(usd)}{f' ({source})' if source else ''}.")
            if (million := cost.get("usd_per_million_tokens")) and "structures" not in run:
                dense = format_usd(million["dense"])
                cut = format_usd(million["cut"])
                blocks += said(f"A million tokens in the timed forward pass: {dense} dense, {cut} cut.")
    if stages:
        more = "Memory is the highest of the process until the end of a stage."
        blocks.append(Words(f"All stages together: {seconds_of(run):,.0f} seconds. {more}"))
    return blocks


def seconds_of(run: RunRecord) -> float | None:
    """Add up the seconds of all stages, None where none was recorded."""
    stages = run.get("stages", [])
    return sum(stage["seconds"] for stage in stages) if stages else None


def suggestions_section(run: RunRecord) -> list[Section]:
    """Say what the run suggests to do next; nothing where it suggests nothing, of a sensitivity why so."""
    known = "suggestions" in run if run.get("kind") == "sensitivity" else run.get("suggestions")
    return [Section("What to try next", suggestion_blocks(run))] if known else []


def suggestion_blocks(run: RunRecord) -> list[Block]:
    """Say the suggestions that a run keeps: what, with which expected effect, by which command; or why none."""
    suggestions = run.get("suggestions", [])
    if not suggestions:
        windows = min((len(losses) for losses in run.get(DENSE, {}).get("losses", {}).values()), default=FEWEST)
        why = f" ({few})" if (few := too_few(windows)) else ""
        return [*said(f"No suggestion: nothing measured is sure to be an improvement{why}.")]
    blocks: list[Block] = []
    for place, one in enumerate(suggestions, start=1):
        blocks += said(f"{place}. " * (len(suggestions) > 1) + one["text"])
        effect = one["effect"]
        measured = effect.startswith("measured")
        blocks.append(Words(f"{effect[0].upper()}{effect[1:]}" if measured else f"Expected effect: {effect}"))
        blocks.append(Code("Command", one["command"]))
    return blocks


def written_section(texts: Sequence[WrittenText]) -> list[Section]:
    """Show what models wrote after the same prompts; nothing where nothing is on record."""
    lines = [
        [each["prompt"] if not place else "", model, " ".join(text.split()) or "(nothing)"]
        for each in texts
        for place, (model, text) in enumerate(each["texts"].items())
    ]
    about = "The likeliest token each time. To be looked at: a few sentences do not tell how good a model is."
    table = text_table("", ("prompt", "model", "goes on"), lines, words=3)
    return section("What they write", table if texts else None, about=about)


def subject_sentence(run: RunRecord) -> str:
    """Say of which model and texts a run is."""
    scenarios = run.get("config", {}).get("calibration", {}).get("scenarios", ())
    judged = [metric["name"].partition(" ")[2] for metric in metrics(run)]
    return (
        f"{model_name(run)}, calibrated on {' and '.join(scenarios) or 'all sets'}, evaluated on {' and '.join(judged)}"
    )


def structure_sentences(run: RunRecord) -> list[str]:
    """Say what of a traced model can be pruned, and what repairs leave as it is."""
    lines = [
        f"Repairs of {method} leave {name} as it is: {reason}."
        for method, reasons in run.get("unrepaired", {}).items()
        for name, reason in reasons.items()
    ]
    if "structures" not in run:
        return lines
    structures = run["structures"]
    model = run["model"]
    held = f"{model['prunable_parameters']:,} of {model['parameters']:,} parameters"
    found = [f"{plural(len(structures), 'structure')} with {held} can be pruned."]
    if copied := ", ".join(structure["name"] for structure in structures if structure["copied"]):
        found.append(f"Each copy (layer, expert) of a structure keeps as many units as the others: {copied}.")
    return found + lines
