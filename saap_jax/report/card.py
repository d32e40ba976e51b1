"""The model card of a directory, `README.md`: what was done to which model, in figures that are on record alone."""

from huggingface_hub import ModelCardData

from saap_jax.report.blocks import Code, Section, Words
from saap_jax.report.markdown import escaped, markdown_text
from saap_jax.report.pages.origin import VERBS, is_pruned, origin_licence, origin_sizes, origin_summary, step_blocks
from saap_jax.runs.origin import Loader, Origin
from saap_jax.runtime.words import visible

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
    """Return the card of a model, which is called `name`: metadata in YAML, then Markdown."""
    said, code = _USE[origin["loader"]]
    blocks = [
        Words(origin_summary(origin, name)),
        *origin_sizes(origin),
        *(Section(VERBS[step["kind"]], [*step_blocks(step)]) for step in origin["steps"]),
        Section("Use", [Words(said), Code("use", code)]),
        Section("Licence", [Words(origin_licence(origin))]),
    ]
    return f"---\n{metadata(origin)}\n---\n\n# {visible(escaped(name)) or 'model'}\n\n{visible(markdown_text(blocks))}"


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
        tags=[*(["pruned"] if is_pruned(origin) else []), "saap_jax"],
    )
    return data.to_yaml(line_break="\n")
