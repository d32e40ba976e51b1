"""How a model came about, of the record in its directory: its model card, and what a page shows of it."""

from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import ModelCardData

from saap_jax.evaluation.resample import few
from saap_jax.evaluation.scales import format_figure, scale_of
from saap_jax.report.blocks import Block, Code, Section, View, Words, facts, said, section, text_table
from saap_jax.report.formats import format_percent, format_relative
from saap_jax.report.pages.common import written_section
from saap_jax.report.pages.compare import kept_figure
from saap_jax.report.render import escaped, markdown_text
from saap_jax.runs.directory import SCHEMA
from saap_jax.runs.origin import Loader, Origin, OriginStep
from saap_jax.runs.records import RunRecord
from saap_jax.runtime.errors import read_object, reading
from saap_jax.runtime.words import plural, visible

VERBS = {"prune": "Pruned", "compare": "Chosen and pruned", "recover": "Fine-tuned", "export": "Exported"}
"""Kind of a step -> the heading of what it did."""

_TRANSFORMERS = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(DIRECTORY)
tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)"""
_OURS = """\
import saap_jax

model, tokenizer = saap_jax.load_model(DIRECTORY), saap_jax.load_tokenizer(DIRECTORY)"""
_USE: dict[Loader, tuple[str, str]] = {
    "transformers": ("Any program that takes Hugging Face files of its family loads it.", _TRANSFORMERS),
    "remote_code": (
        "transformers loads it with the code beside it; read that first, it is short.",
        _TRANSFORMERS.replace("DIRECTORY", "DIRECTORY, trust_remote_code=True"),
    ),
    "saap_jax": (
        "Its layers differ, or have parts or files that transformers does not know: saap_jax loads or exports it.",
        _OURS,
    ),
    "traced": (
        "saap_jax loads it beside the problem that its factory returns.",
        "import saap_jax\n\nfunction, params = saap_jax.load_pruned(DIRECTORY, problem)",
    ),
    "maxtext": ("MaxText loads it with the settings of maxtext.yml, and so does saap_jax.", _OURS),
}
"""What loads a model -> that in a sentence, and how; DIRECTORY is where the files are."""


def card(origin: Origin, name: str) -> str:
    """Write the card of a model, which is called `name`: metadata in YAML, then Markdown.

    What is not known is left out of the metadata, but for the licence, which is `other`.
    """
    base, loader = origin["base"], origin["loader"]
    metadata = ModelCardData(
        base_model=base.get("repository"),
        library_name="transformers" if loader in ("transformers", "remote_code") else "saap_jax",
        license=base.get("license", "other"),
        license_name=base.get("license_name"),
        license_link=base.get("license_link"),
        pipeline_tag=None if loader == "traced" else "text-generation",
        tags=[*(["pruned"] if _is_pruned(origin) else []), "saap_jax"],
    )
    sentence, code = _USE[loader]
    blocks = [
        *_summary(origin, name),
        *_steps(origin),
        Section("Use", [Words(sentence), Code("use", code)]),
        Section("Licence", said(_licence(origin))),
    ]
    title = visible(escaped(name)) or "model"
    return f"---\n{metadata.to_yaml(line_break=chr(10))}\n---\n\n# {title}\n\n{visible(markdown_text(blocks))}"


def origin_view(path: Path, origin: Origin, *, id: str = "", name: str = "") -> View:
    """Make what a page shows of a model's directory.

    Raises:
        ValueError: its `keep.json` is damaged.
    """
    name, steps = name or path.resolve().name, origin["steps"]
    run: RunRecord = {"schema": SCHEMA, "name": name, "status": "finished", "stages": []}
    units, kept = _kept(path / "keep.json")
    shape: RunRecord = {"schema": SCHEMA, "model": {"units": units}}
    if origin["loader"] == "traced":
        shape["structures"] = []
    figure = kept_figure(shape, [{"candidate": name, "variant": name, "kept": kept}], "kept", "Kept by layer")
    about = "Share of the units of each layer that stays: dark is 0, bright is all of them."
    sections = [
        Section("Summary", _summary(origin, name)),
        *_steps(origin),
        *section("What is kept where", figure, about=about),
        Section("Licence", said(_licence(origin))),
    ]
    kind = VERBS[steps[-1]["kind"]].lower() if steps else "model"
    return View(name, kind, "saved", origin["base"]["name"], sections, run, id=id)


def _kept(file: Path) -> tuple[dict[str, int], dict[str, list[int | float]]]:
    """Read the units of each structure, and how many of them each layer has left, of the first step's model."""
    if not file.exists():
        return {}, {}
    with reading(file, "kept units by structure; the file was changed or damaged"):
        keep = read_object(file)
        units: dict[str, int] = {name: each["units"] for name, each in keep.items()}
        kept: dict[str, list[int | float]] = {name: [len(row) for row in each["kept"]] for name, each in keep.items()}
    if wrong := next((name for name, counts in kept.items() if max(counts, default=0) > units[name]), None):
        raise ValueError(
            f"{file}: expected at most {units[wrong]} units of {wrong} in a layer, got {max(kept[wrong])}; the file "
            "was changed or damaged"
        )
    return units, kept


def _is_pruned(origin: Origin) -> bool:
    return any(step["kind"] in ("prune", "compare") for step in origin["steps"])


def _summary(origin: Origin, name: str) -> list[Block]:
    """Say what a model is, of which model, and its parameters before the first step and after the last."""
    base, steps = origin["base"].get("repository") or origin["base"]["name"], origin["steps"]
    what = "pruned: whole units went, so that its arrays are smaller" if _is_pruned(origin) else "in other files"
    blocks: list[Block] = [*said(f"{name} is {base}, {what}. Made with saap_jax, in {plural(len(steps), 'step')}.")]
    if steps:
        before, after = steps[0]["parameters"][0], steps[-1]["parameters"][1]
        row = ("parameters", f"{before:,}", f"{after:,}", format_relative(float(before), float(after)))
        blocks.append(text_table("", ("", "before", "after", "change"), [row]))
    return blocks


def _steps(origin: Origin) -> list[Section]:
    return [Section(VERBS[step["kind"]], [*_step_blocks(step)]) for step in origin["steps"]]


def _step_blocks(step: OriginStep) -> Iterator[Block]:
    """Yield what a step did, what was measured of it, what models wrote, and its command."""
    known = {"of": step["model"]} | step["facts"]
    if "ratio" in step:
        asked, removed = map(format_percent, step["ratio"])
        known["ratio"] = f"{removed} % of the prunable parameters removed, {asked} % asked for"
    known["parameters"] = "{:,} before, {:,} after".format(*step["parameters"])
    known["versions"] = ", ".join(f"{name} {version}" for name, version in step.get("versions", {}).items() if version)
    yield facts(known)
    rows = []
    for figure in step.get("figures", ()):
        scale = scale_of(figure["metric"])
        ends = [format_figure(figure[end], scale) for end in ("low", "high") if end in figure]
        windows = figure.get("windows")
        interval = " to ".join(ends) or (few(windows) if windows else "not on record")
        value = format_figure(figure["value"], scale)
        rows.append((figure["metric"], figure["model"], value, interval, f"{windows:,}" if windows else ""))
    header = ("text", "model", "figure", "95 % interval", "windows")
    note = "intervals: percentile bootstrap over the windows of the text, each model for itself"
    yield text_table("", header, rows, 2, notes=[note]) if rows else Words("No perplexity is on record of this step.")
    yield from written_section(step.get("written", ()))
    yield Words("The command:")
    yield Code("command", step["command"])


def _licence(origin: Origin) -> str:
    """Say under which licence the model may be passed on."""
    base = origin["base"]
    name = base.get("repository") or base["name"]
    if licence := base.get("license"):
        terms = base.get("license_name", "") if licence == "other" else licence
        return f"That of {name}, as its files say: {terms or 'other'}. Its terms go with this model."
    return f"The files of {name} do not say its licence: look it up before you pass this model on."
