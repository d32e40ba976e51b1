"""The model card of a directory, `README.md`: what was done to which model, in figures that are on record alone."""

from collections.abc import Iterable, Iterator

from huggingface_hub import ModelCardData

from saap_jax.evaluation.resample import few
from saap_jax.evaluation.scales import format_figure, scale_of
from saap_jax.report.page.blocks import Block, Code, Facts, Table, Words, text_table
from saap_jax.report.page.formats import format_change, format_percent
from saap_jax.report.page.markdown import block_lines, escaped
from saap_jax.runs.origin import Figure, Loader, Origin, OriginStep
from saap_jax.runtime.visible import visible
from saap_jax.runtime.words import plural

_VERBS = {"prune": "Pruned", "compare": "Chosen and pruned", "recover": "Fine-tuned", "export": "Exported"}
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
        "Its layers differ, or have parts that transformers does not know: saap_jax loads or exports it.",
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
    """Return the card of a model, which is called `name`: metadata in YAML, then Markdown."""
    lines = [f"# {escaped(name) or 'model'}", ""]
    for block in (Words(_summary(origin, name)), *_sizes(origin)):
        lines += block_lines(block, 2)
    for step in origin["steps"]:
        lines += _section(_VERBS[step["kind"]], _step_blocks(step))
    said, code = _USE[origin["loader"]]
    lines += _section("Use", [Words(said), Code("use", code)])
    lines += _section("Licence", [Words(_licence(origin))])
    body = "\n".join(lines).rstrip()
    return f"---\n{metadata(origin)}\n---\n\n{visible(body)}\n"


def metadata(origin: Origin) -> str:
    """Return the metadata of a card as YAML; what is not known is left out, but for the licence, which is `other`."""
    base, loader = origin["base"], origin["loader"]
    data = ModelCardData(
        base_model=base.get("repository"),
        library_name="transformers" if loader in ("transformers", "remote_code") else "saap_jax",
        license=base.get("license", "other"),
        license_name=base.get("license_name"),
        license_link=base.get("license_link"),
        pipeline_tag=None if loader == "traced" else "text-generation",
        tags=[*(["pruned"] if _is_pruned(origin) else []), "saap_jax"],
    )
    return data.to_yaml(line_break="\n")


def _section(title: str, blocks: Iterable[Block]) -> list[str]:
    return [f"## {title}", "", *(line for block in blocks for line in block_lines(block, 3))]


def _is_pruned(origin: Origin) -> bool:
    return any(step["kind"] in ("prune", "compare") for step in origin["steps"])


def _summary(origin: Origin, name: str) -> str:
    base = origin["base"].get("repository") or origin["base"]["name"]
    what = "pruned: whole units went, so that its arrays are smaller" if _is_pruned(origin) else "in other files"
    return f"{name} is {base}, {what}. Made with saap_jax, in {plural(len(origin['steps']), 'step')}."


def _sizes(origin: Origin) -> Iterator[Block]:
    """Yield a table of parameters before the first step and after the last, where there are steps."""
    if steps := origin["steps"]:
        before, after = steps[0]["parameters"][0], steps[-1]["parameters"][1]
        row = ("parameters", f"{before:,}", f"{after:,}", format_change(float(before), float(after)))
        yield text_table("", ("", "before", "after", "change"), [row])


def _step_blocks(step: OriginStep) -> Iterator[Block]:
    facts = {"of": step["model"]} | step["facts"]
    if "ratio" in step:
        asked, removed = map(format_percent, step["ratio"])
        facts["ratio"] = f"{removed} % of the prunable parameters removed, {asked} % asked for"
    facts["parameters"] = "{:,} before, {:,} after".format(*step["parameters"])
    known = {name: version for name, version in step.get("versions", {}).items() if version}
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in known.items())
    yield Facts({name: value for name, value in facts.items() if value})
    if figures := step.get("figures"):
        yield _figure_table(figures)
    else:
        yield Words("No perplexity is on record of this step.")
    yield Words("The command:")
    yield Code("command", step["command"])


def _figure_table(figures: list[Figure]) -> Table:
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
    return text_table("", header, rows, words=2)._replace(notes=[note])


def _licence(origin: Origin) -> str:
    base = origin["base"]
    name = base.get("repository") or base["name"]
    if licence := base.get("license"):
        said = base.get("license_name", "") if licence == "other" else licence
        return f"That of {name}, as its files say: {said or 'other'}. Its terms go with this model."
    return f"The files of {name} do not say its licence: look it up before you pass this model on."
