"""The blocks of a run of any kind: cost, what both models write, what to try next, and how to repeat it."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from saap_jax.evaluation.resample import FEWEST
from saap_jax.evaluation.scales import Scale, scale_of
from saap_jax.report.blocks import Block, Code, Figure, Section, Table, Words, facts, leaves, text_table
from saap_jax.report.csv_text import table_csv
from saap_jax.report.figures.couplings import coupling_figure
from saap_jax.report.figures.draw import saved
from saap_jax.report.formats import format_usd
from saap_jax.report.markdown import markdown_text
from saap_jax.runs.directory import plain
from saap_jax.runs.records import RunRecord, Stage, SuggestionRecord, WrittenText
from saap_jax.runs.standing import DENSE, metrics
from saap_jax.runtime.words import plural

DOMAINS = {"in": "in domain", "out": "out of domain"}

_STAGE_COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("seconds", "seconds", "{:,.1f}".format),
    ("compile_seconds", "of them compiling", "{:,.1f}".format),
    ("compiles", "programs", "{:,}".format),
    ("tokens", "tokens", "{:,}".format),
    ("tokens_per_second", "tokens a second", "{:,.0f}".format),
    ("peak_host_gib", "peak host memory (GiB)", "{:.2f}".format),
    ("peak_device_gib", "peak device memory (GiB)", "{:.2f}".format),
)
"""Field of a stage, see `runs.stages`; heading; how it is written."""


def figure_of(run: RunRecord) -> Scale:
    """Return what the figures of a run are: perplexities, or mean losses."""
    return scale_of(next((metric["name"] for metric in metrics(run)), ""))


def model_name(run: RunRecord) -> str:
    """Return the name of a run's model, empty where the record does not tell."""
    asked = run.get("config", {}).get("model", "")
    asked = asked if isinstance(asked, str) else asked.get("name", "")
    return run.get("model", {}).get("name") or asked


def closing_sections(run: RunRecord, about: Mapping[str, str] | None = None) -> list[Section]:
    """Return what ends the page of any run: what models write, cost, how to repeat it, coupled structures."""
    return [*written_section(run.get("written", ())), *cost_section(run), reproduce_section(run, about), *_coupled(run)]


def reproduce_section(run: RunRecord, about: Mapping[str, str] | None = None) -> Section:
    """Return the command, versions, devices and configuration; what is known beside them is said first."""
    devices, model, versions = run.get("devices", {}), run.get("model", {}), run.get("versions", {})
    seeds = {name: ", ".join(map(str, s)) if isinstance(s, list) else s for name, s in run.get("seeds", {}).items()}
    said = dict(about or {}) | {
        "saap_jax": versions.get("saap_jax"),
        "git commit": run.get("git_commit"),
        "started": run.get("started"),
        "finished": run.get("finished"),
        "host": run.get("host"),
        "devices": f"{devices.get('count')} x {devices.get('kind')} ({devices.get('platform')})" if devices else None,
        "model": model.get("name"),
        "layers": model.get("layers"),
        "units a layer": ", ".join(f"{name} {units}" for name, units in model.get("units", {}).items()),
        "parameters": f"{model['parameters']:,}" if "parameters" in model else None,
        "prunable parameters": f"{model['prunable_parameters']:,}" if "prunable_parameters" in model else None,
        "seeds": "; ".join(f"{name} {seed}" for name, seed in seeds.items()),
        "libraries": ", ".join(f"{n} {v}" for n, v in versions.items() if n != "saap_jax" and v),
    }
    command = run.get("command", "")
    blocks: list[Block] = [
        *([Code("Command", command)] if command else []),
        facts({name: str(value) for name, value in said.items() if value not in (None, "")}),
        Section("Configuration", [Code("Configuration", json.dumps(plain(run.get("config")), indent=2))], folded=True),
    ]
    return Section("To reproduce", blocks)


def cost_section(run: RunRecord) -> list[Section]:
    """Return time, memory and cost of a run; nothing where no stage was recorded."""
    stages, blocks = run.get("stages", []), [Words(said, soft=False) for said in cost_sentences(run)]
    if stages:
        said = f"All stages together: {seconds_of(run):,.0f} seconds."
        said += " Memory is the highest of the process until the end of a stage."
        blocks = [stage_table(stages), *blocks, Words(said)]
    return [Section("Time, memory and cost", blocks)] if blocks else []


def stage_table(stages: Sequence[Stage]) -> Table:
    """Return the stages of a run, with the columns that some stage has a number for."""
    columns = [column for column in _STAGE_COLUMNS if any(stage.get(column[0]) is not None for stage in stages)]
    lines = []
    for stage in stages:
        name = stage["name"] + (f" ({stage['times']} times)" if stage.get("times", 1) > 1 else "")
        values = [(form, stage.get(field)) for field, _, form in columns]
        lines.append([name, *("-" if value is None else form(value) for form, value in values)])
    return text_table("Stages", ["stage", *(heading for _, heading, _ in columns)], lines)


def cost_sentences(run: RunRecord) -> list[str]:
    """Say what a run cost, see `evaluation.cost`; nothing where that was not recorded."""
    if not (cost := run.get("cost")):
        return []
    platform = run.get("devices", {}).get("platform")
    unit = ("core" if platform == "cpu" else "device") + ("" if cost["devices"] == 1 else "s")
    said = f"{cost['device_hours']:,.3g} device-hours on {cost['devices']} {unit}"
    if (usd := cost.get("usd")) is None:
        return [f"{said}; {cost.get('note', 'no price is known')}."]
    prices = cost.get("prices") or {}
    each = f"{format_usd(prices['usd_per_hour'])} an hour each" if "usd_per_hour" in prices else ""
    source = ", ".join(part for part in (prices.get("kind"), each, prices.get("date")) if part)
    sentences = [f"{said}: {format_usd(usd)}{f' ({source})' if source else ''}."]
    if million := cost.get("usd_per_million_tokens"):
        dense, cut = format_usd(million["dense"]), format_usd(million["cut"])
        sentences.append(f"A million tokens in the timed forward pass: {dense} dense, {cut} cut.")
    return sentences


def seconds_of(run: RunRecord) -> float | None:
    """Return the seconds of all stages, None where none was recorded."""
    stages = run.get("stages", [])
    return sum(stage["seconds"] for stage in stages) if stages else None


def suggestions_section(run: RunRecord, *, always: bool = False) -> list[Section]:
    """Return what the run suggests to do next; nothing where it suggests nothing, or `always` why there is nothing."""
    known = "suggestions" in run if always else bool(run.get("suggestions"))
    return [Section("What to try next", suggestion_blocks(run))] if known else []


def suggestion_blocks(run: RunRecord) -> list[Block]:
    """Return the suggestions that a run keeps: what, with which expected effect, by which command; or why none."""
    suggestions = run.get("suggestions", [])
    if not suggestions:
        windows = min((len(losses) for losses in run.get(DENSE, {}).get("losses", {}).values()), default=FEWEST)
        few = f" ({plural(windows, 'window')}, where that takes {FEWEST})" if windows < FEWEST else ""
        return [Words(f"No suggestion: nothing measured is sure to be an improvement{few}.", soft=False)]
    blocks: list[Block] = []
    for place, suggestion in enumerate(suggestions, start=1):
        known: SuggestionRecord = {"text": suggestion} if isinstance(suggestion, str) else suggestion
        blocks.append(Words(f"{place}. " * (len(suggestions) > 1) + known.get("text", ""), soft=False))
        if effect := known.get("expected_effect", known.get("effect", "")):
            said = effect.startswith(("measured", "expected"))
            blocks.append(Words(f"{effect[0].upper()}{effect[1:]}" if said else f"Expected effect: {effect}"))
        blocks += [Code("Command", known["command"])] if known.get("command") else []
    return blocks


def written_section(texts: Sequence[WrittenText]) -> list[Section]:
    """Return what models wrote after the same prompts, a table a prompt; nothing where nothing is on record."""
    if not texts:
        return []
    said = "The likeliest token each time. To be looked at: a few sentences do not tell how good a model is."
    lines = [
        [each["prompt"] if not place else "", model, " ".join(text.split()) or "(nothing)"]
        for each in texts
        for place, (model, text) in enumerate(each["texts"].items())
    ]
    return [Section("What they write", [Words(said), text_table("", ("prompt", "model", "goes on"), lines, words=3)])]


def _coupled(run: RunRecord) -> list[Section]:
    """Return the figure of coupled structures; nothing where they were not recorded."""
    if "couplings" not in run:
        return []
    said = (
        "Parameters on the left, a box an axis; structures on the right, with a line to each axis that is cut with "
        "them. What is pinned is grey."
    )
    return [Section("Coupled structures", [Words(said), coupling_figure(run["couplings"])])]


def files_of(stem: str, blocks: Sequence[Block]) -> dict[str, str]:
    """Return blocks as the files that a command writes into its run: figures, tables of all digits, and the words."""
    files = {}
    for block in leaves(blocks):
        if isinstance(block, Figure):
            files[f"{block.name}.svg"] = saved(block).decode()
        elif isinstance(block, Table) and block.file:
            files[f"{block.file}.csv"] = table_csv(block)
    return files | {f"{stem}.md": markdown_text(blocks)}


def structure_sentences(run: RunRecord) -> list[str]:
    """Say what of a traced model can be pruned, and what repairs leave as it is."""
    lines = [
        f"Repairs of {method} leave {name} as it is: {reason}."
        for method, reasons in run.get("unrepaired", {}).items()
        for name, reason in reasons.items()
    ]
    if "structures" not in run:
        return lines
    structures, model = run["structures"], run["model"]
    held = f"{model['prunable_parameters']:,} of {model['parameters']:,} parameters"
    copied = ", ".join(structure["name"] for structure in structures if structure["copied"])
    said = [f"{plural(len(structures), 'structure')} with {held} can be pruned."]
    if copied:
        said.append(f"Each copy (layer, expert) of a structure keeps as many units as the others: {copied}.")
    return said + lines
