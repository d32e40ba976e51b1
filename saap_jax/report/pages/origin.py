"""How a model came about, of the record in its directory: what its card says, and what a page shows of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

from saap_jax.evaluation.resample import few
from saap_jax.evaluation.scales import format_figure, scale_of
from saap_jax.report.blocks import Block, Code, Figure, Section, Table, View, Words, facts, text_table
from saap_jax.report.formats import format_percent, format_relative
from saap_jax.report.pages.common import written_section
from saap_jax.report.pages.compare import kept_figures
from saap_jax.runs import origin as records
from saap_jax.runs.origin import Origin, OriginStep
from saap_jax.runs.reading import SCHEMA
from saap_jax.runs.records import Row, RunRecord
from saap_jax.runtime.errors import read_object, reading
from saap_jax.runtime.words import plural

VERBS = {"prune": "Pruned", "compare": "Chosen and pruned", "recover": "Fine-tuned", "export": "Exported"}
"""Kind of a step -> the heading of what it did."""


class KeptUnits(TypedDict):
    """An entry of `keep.json`."""

    units: int
    kept: list[list[int]]
    """Of each layer."""


def origin_view(path: Path, origin: Origin, *, id: str = "", name: str = "") -> View:
    """Return what a page shows of a model's directory.

    Raises:
        ValueError: its `keep.json` is damaged.
    """
    name, steps = name or path.resolve().name, origin["steps"]
    run: RunRecord = {"schema": SCHEMA, "name": name, "status": "finished", "stages": []}
    sections = [Section("Summary", [Words(origin_summary(origin, name), soft=False), *origin_sizes(origin)])]
    sections += [Section(VERBS[step["kind"]], [*step_blocks(step)]) for step in steps]
    said = Words("Share of the units of each layer that stays: dark is 0, bright is all of them.")
    kept = _kept(path, origin, name)
    sections += [Section("What is kept where", [said, *kept])] if kept else []
    sections.append(Section("Licence", [Words(origin_licence(origin), soft=False)]))
    kind = VERBS[steps[-1]["kind"]].lower() if steps else "model"
    return View(name, kind, "saved", origin["base"]["name"], sections, run, id=id)


def _kept(path: Path, origin: Origin, name: str) -> list[Figure]:
    """Return the share of the units of the first step's model that each layer still has."""
    if not (path / "keep.json").exists():
        return []
    with reading(path / "keep.json", "kept units by structure; the file was changed or damaged"):
        keep: dict[str, KeptUnits] = read_object(path / "keep.json")
        kept: dict[str, list[int | float]] = {
            structure: [len(row) for row in each["kept"]] for structure, each in keep.items()
        }
    if wrong := next((s for s, counts in kept.items() if max(counts, default=0) > keep[s]["units"]), None):
        raise ValueError(
            f"{path / 'keep.json'}: expected at most {keep[wrong]['units']} units of {wrong} in a layer, got "
            f"{max(kept[wrong])}; the file was changed or damaged"
        )
    units = {structure: each["units"] for structure, each in keep.items()}
    run: RunRecord = {"schema": SCHEMA, "model": {"units": units}}
    if origin["loader"] == "traced":
        run["structures"] = []
    row: Row = {"candidate": name, "variant": name, "kept": kept}
    return kept_figures(run, [row], "kept", "Kept by layer")


# --- what card and page say --------------------------------------------------------------------------


def is_pruned(origin: Origin) -> bool:
    """Say whether a step took units away."""
    return any(step["kind"] in ("prune", "compare") for step in origin["steps"])


def origin_summary(origin: Origin, name: str) -> str:
    """Say what a model is, and of which model."""
    base = origin["base"].get("repository") or origin["base"]["name"]
    what = "pruned: whole units went, so that its arrays are smaller" if is_pruned(origin) else "in other files"
    return f"{name} is {base}, {what}. Made with saap_jax, in {plural(len(origin['steps']), 'step')}."


def origin_sizes(origin: Origin) -> Iterator[Block]:
    """Yield a table of parameters before the first step and after the last, where there are steps."""
    if steps := origin["steps"]:
        before, after = steps[0]["parameters"][0], steps[-1]["parameters"][1]
        row = ("parameters", f"{before:,}", f"{after:,}", format_relative(float(before), float(after)))
        yield text_table("", ("", "before", "after", "change"), [row])


def step_blocks(step: OriginStep) -> Iterator[Block]:
    """Yield what a step did, what was measured of it, what models wrote, and its command."""
    said = {"of": step["model"]} | step["facts"]
    if "ratio" in step:
        asked, removed = map(format_percent, step["ratio"])
        said["ratio"] = f"{removed} % of the prunable parameters removed, {asked} % asked for"
    said["parameters"] = "{:,} before, {:,} after".format(*step["parameters"])
    known = {name: version for name, version in step.get("versions", {}).items() if version}
    said["versions"] = ", ".join(f"{name} {version}" for name, version in known.items())
    yield facts({name: value for name, value in said.items() if value})
    if figures := step.get("figures"):
        yield _figure_table(figures)
    else:
        yield Words("No perplexity is on record of this step.")
    yield from written_section(step.get("written", ()))
    yield Words("The command:")
    yield Code("command", step["command"])


def _figure_table(figures: list[records.Figure]) -> Table:
    """Return a line a text and model, with the interval where there is one."""
    rows = []
    for figure in figures:
        scale = scale_of(figure["metric"])
        ends = [format_figure(figure[end], scale) for end in ("low", "high") if end in figure]
        windows = figure.get("windows")
        interval = " to ".join(ends) or (few(windows) if windows else "not on record")
        name, value = figure["metric"], format_figure(figure["value"], scale)
        rows.append((name, figure["model"], value, interval, f"{windows:,}" if windows else ""))
    header = ("text", "model", "figure", "95 % interval", "windows")
    note = "intervals: percentile bootstrap over the windows of the text, each model for itself"
    return text_table("", header, rows, words=2, notes=[note])


def origin_licence(origin: Origin) -> str:
    """Say under which licence the model may be passed on."""
    base = origin["base"]
    name = base.get("repository") or base["name"]
    if licence := base.get("license"):
        said = base.get("license_name", "") if licence == "other" else licence
        return f"That of {name}, as its files say: {said or 'other'}. Its terms go with this model."
    return f"The files of {name} do not say its licence: look it up before you pass this model on."
