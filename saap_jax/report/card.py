"""The card of a model, of the record in its directory of how it came about."""

from collections.abc import Iterator

from saap_jax.evaluation.resample import few
from saap_jax.evaluation.scales import format_figure, scale_of
from saap_jax.report.blocks import Block, Code, Section, Words, facts, said, text_table
from saap_jax.report.formats import format_percent, format_relative
from saap_jax.report.pages.common import written_section
from saap_jax.report.render import escaped, markdown_text
from saap_jax.runs.origin import Loader, Origin, OriginStep
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
    from huggingface_hub import ModelCardData

    base = origin["base"]
    loader = origin["loader"]
    steps = origin["steps"]
    kinds = {step["kind"] for step in steps}
    pruned = bool(kinds & {"prune", "compare"})
    metadata = ModelCardData(
        base_model=base.get("repository"),
        library_name="transformers" if loader in ("transformers", "remote_code") else "saap_jax",
        license=base.get("license", "other"),
        license_name=base.get("license_name"),
        license_link=base.get("license_link"),
        pipeline_tag=None if loader == "traced" else "text-generation",
        tags=[*(["pruned"] if pruned else []), "saap_jax"],
    )
    whole = base.get("repository") or base["name"]
    (sentence, code) = _USE[loader]
    what = "pruned: whole units went, so that its arrays are smaller" if pruned else "in other files"
    what = "fine-tuned" if not pruned and "recover" in kinds else what
    blocks: list[Block] = [*said(f"{name} is {whole}, {what}. Made with saap_jax, in {plural(len(steps), 'step')}.")]
    if steps:
        before = steps[0]["parameters"][0]
        after = steps[-1]["parameters"][1]
        row = ("parameters", f"{before:,}", f"{after:,}", format_relative(float(before), float(after)))
        blocks.append(text_table("", ("", "before", "after", "change"), [row]))
    licence = f"The files of {whole} do not say its licence: look it up before you pass this model on."
    if known := base.get("license"):
        terms = base.get("license_name", "") if known == "other" else known
        licence = f"That of {whole}, as its files say: {terms or 'other'}. Its terms go with this model."
    blocks += [Section(VERBS[step["kind"]], [*_step_blocks(step)]) for step in steps]
    blocks += [Section("Use", [Words(sentence), Code("use", code)]), Section("Licence", said(licence))]
    title = visible(escaped(name)) or "model"
    return f"---\n{metadata.to_yaml(line_break=chr(10))}\n---\n\n# {title}\n\n{visible(markdown_text(blocks))}"


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
    note = "intervals: over the windows of the text, each model for itself"
    yield text_table("", header, rows, 2, notes=[note]) if rows else Words("No perplexity is on record of this step.")
    yield from written_section(step.get("written", ()))
    yield Words("The command:")
    yield Code("command", step["command"])
