"""The card of a model, of the record in its directory of how it came about."""

from collections.abc import Iterator

from saap_jax.evaluation.resample import few
from saap_jax.evaluation.scales import format_figure, scale_of
from saap_jax.report.blocks import Block, Code, Section, Words, facts, said, text_table
from saap_jax.report.formats import format_percent, format_relative
from saap_jax.report.pages.common import written_section
from saap_jax.report.render import escaped, markdown_text
from saap_jax.runs.origin import Base, Loader, Measurement, Origin, OriginStep
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
    # what the hub searches by
    library = "saap_jax"
    if loader in ("transformers", "remote_code"):
        library = "transformers"
    task = "text-generation"
    if loader == "traced":  # any program, of which no task is known
        task = None
    tags = ["saap_jax"]
    if pruned:
        tags.insert(0, "pruned")
    metadata = ModelCardData(
        base_model=base.get("repository"),
        library_name=library,
        license=base.get("license", "other"),
        license_name=base.get("license_name"),
        license_link=base.get("license_link"),
        pipeline_tag=task,
        tags=tags,
    )
    # what people read: what it is, its size, how it came about, how to use it, and its licence
    whole = base.get("repository") or base["name"]
    what = "in other files"
    if pruned:
        what = "pruned: whole units went, so that its arrays are smaller"
    elif "recover" in kinds:
        what = "fine-tuned"
    blocks: list[Block] = [*said(f"{name} is {whole}, {what}. Made with saap_jax, in {plural(len(steps), 'step')}.")]
    if steps:
        before = steps[0]["parameters"][0]
        after = steps[-1]["parameters"][1]
        row = ("parameters", f"{before:,}", f"{after:,}", format_relative(float(before), float(after)))
        blocks.append(text_table("", ("", "before", "after", "change"), [row]))
    blocks += [Section(VERBS[step["kind"]], [*_step_blocks(step)]) for step in steps]
    (sentence, code) = _USE[loader]
    blocks.append(Section("Use", [Words(sentence), Code("use", code)]))
    blocks.append(Section("Licence", said(_licence(base, whole))))
    title = visible(escaped(name)) or "model"
    return f"---\n{metadata.to_yaml(line_break=chr(10))}\n---\n\n# {title}\n\n{visible(markdown_text(blocks))}"


def _licence(base: Base, whole: str) -> str:
    """Say the licence of the first model, on which that of the card's model depends."""
    terms = base.get("license")
    if not terms:
        return f"The files of {whole} do not say its licence: look it up before you pass this model on."
    if terms == "other":  # the hub's word for one that it does not list, which has a name of its own at best
        terms = base.get("license_name") or "other"
    return f"That of {whole}, as its files say: {terms}. Its terms go with this model."


def _step_blocks(step: OriginStep) -> Iterator[Block]:
    """Yield what a step did, what was measured of it, what models wrote, and its command."""
    known = {"of": step["model"]} | step["facts"]
    if "ratio" in step:
        asked, removed = map(format_percent, step["ratio"])
        known["ratio"] = f"{removed} % of the prunable parameters removed, {asked} % asked for"
    known["parameters"] = "{:,} before, {:,} after".format(*step["parameters"])
    known["versions"] = ", ".join(f"{name} {version}" for name, version in step.get("versions", {}).items() if version)
    yield facts(known)
    rows = [_figure_row(figure) for figure in step.get("figures", ())]
    if rows:
        header = ("text", "model", "figure", "95 % interval", "windows")
        note = "intervals: over the windows of the text, each model for itself"
        yield text_table("", header, rows, 2, notes=[note])
    else:
        yield Words("No perplexity is on record of this step.")
    yield from written_section(step.get("written", ()))
    yield Words("The command:")
    yield Code("command", step["command"])


def _figure_row(figure: Measurement) -> tuple[str, str, str, str, str]:
    """Write text, model, figure, interval and windows; where there is no interval, the reason in its place."""
    scale = scale_of(figure["metric"])
    ends = [format_figure(figure[end], scale) for end in ("low", "high") if end in figure]
    interval = " to ".join(ends)
    windows = figure.get("windows", 0)
    size = ""
    if windows:
        size = f"{windows:,}"
        interval = interval or few(windows)
    value = format_figure(figure["value"], scale)
    return figure["metric"], figure["model"], value, interval or "not on record", size
