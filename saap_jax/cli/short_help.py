"""What `--help` says of a command with many options: those that people use, in groups, and what to type."""

import ast
import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Mapping
from typing import Any, NamedTuple

from saap_jax.cli.console import console, show, show_lines


class Short(NamedTuple):
    """The short help of a command."""

    groups: Mapping[str, tuple[str, ...]]
    """Options by what they are for, as dotted names of fields."""
    examples: tuple[str, ...]


INDENT = 28
"""Columns in front of what is said of an option."""

TEXT = ("calibration.scenarios", "calibration.examples", "calibration.seed")
JUDGED = ("evaluation.in_domain", "evaluation.out_of_domain", "evaluation.windows")

SHORT: dict[str, Short] = {
    "compare": Short(
        {
            "what is compared": ("model.name", "estimation.estimators", "recipes", "ratios", "grid.seeds"),
            "on which text": (*TEXT[:2], *JUDGED),
            "how": ("race", "search.allocation", "compensation.method", "name"),
        },
        (
            "saap compare quickstart",
            "saap compare --recipes saap llm-pruner-param-second flap --ratios 0.2 0.5 --grid.seeds 0 1 2",
            "saap compare --estimation.estimators wanda gate_fisher+wanda --ratios 0.3 --race",
        ),
    ),
    "score": Short(
        {
            "what is scored": ("model.name", "estimation.estimators", "from_run"),
            "on which text": (*TEXT, "calibration.length"),
            "what is kept": ("keep_statistics", "name", "runs"),
        },
        (
            "saap score --estimation.estimators wanda gate_fisher",
            "saap score --calibration.scenarios prose=text:A.txt code=builtin:reference",
            "saap score --from-run runs/score --estimation.estimators taylor_element+wanda",
        ),
    ),
    "prune": Short(
        {
            "what goes": ("model.name", "ratio", "estimator", "recipe", "search.shape", "search.skip_layers"),
            "on which text": TEXT,
            "what makes up for it": ("compensation.method",),
            "to what the model may take, instead of a ratio": ("targets.parameters", "targets.latency"),
            "where it goes": ("out",),
        },
        (
            "saap prune --ratio 0.3 --out models/small",
            "saap prune --recipe flap --ratio 0.2 --calibration.scenarios jsonl:c4.jsonl#text",
            "saap prune --targets.parameters 70% --search.multiple-of.mlp 32",
        ),
    ),
    "recover": Short(
        {
            "which model": ("model", "dense", "out"),
            "what is trained": ("method.name", "method.rank", "method.bits"),
            "on which text, for how long": ("data.sources", "training.max_steps", "training.learning_rate"),
            "by what": ("training.distillation", "training.hidden", "training.top_k_logits"),
        },
        (
            "saap recover models/pruned --method.name lora --training.max-steps 200",
            "saap recover models/pruned --training.distillation 0.5",
            "saap recover models/pruned --resume",
        ),
    ),
    "fidelity": Short(
        {
            "what is judged": ("model.name", "estimation.estimators", "channels_per_layer", "seed"),
            "on which text": TEXT,
            "what is kept": ("name", "runs"),
        },
        (
            "saap fidelity",
            "saap fidelity --estimation.estimators wanda gate_fisher saap --channels-per-layer 8",
            "saap fidelity fidelity",
        ),
    ),
    "frontier": Short(
        {
            "what is pruned": ("model.name", "estimation.estimators", "recipes", "ratios", "grid.seeds"),
            "the limit": ("max_ppl_increase", "judged", "tolerance"),
            "on which text": (*TEXT[:1], *JUDGED),
        },
        (
            "saap frontier --max-ppl-increase 10%",
            "saap frontier --estimation.estimators wanda saap --grid.seeds 0 1 2",
            "saap frontier frontier",
        ),
    ),
    "sensitivity": Short(
        {
            "what is pruned": ("model.name", "estimator", "fractions", "ratio", "align"),
            "on which text": (*TEXT[:2], *JUDGED),
            "what is kept": ("name", "runs"),
        },
        (
            "saap sensitivity",
            "saap sensitivity --ratio 0.3 --align 64",
            "saap sensitivity --model.name models/pruned --fractions 0.2 0.5",
        ),
    ),
    "evaluate": Short(
        {
            "on which text": ("sources", "windows", "length", "batch_size"),
            "on which tasks": ("tasks", "limit"),
            "how": ("dtype", "json"),
        },
        (
            "saap evaluate models/pruned smollm2-135m",
            "saap evaluate models/pruned --sources wikitext:wikitext2/test.txt --windows 0",
            "saap evaluate models/pruned --tasks my_items.jsonl --limit 200",
        ),
    ),
    "ab": Short(
        {
            "on which text and tasks": ("sources", "windows", "length", "tasks"),
            "limits of A beside B": (
                *("limits", "max_ppl_increase", "max_accuracy_drop", "max_size", "max_latency", "max_memory"),
            ),
            "how": ("json",),
        },
        (
            "saap ab runs/quickstart:wanda@0.2 runs/quickstart:dense",
            "saap ab models/pruned smollm2-135m --limits gates/default",
            "saap ab models/pruned models/old --max-ppl-increase 2% --max-size 450MiB --json ab.json",
        ),
    ),
    "plan": Short(
        {
            "what is done": ("task", "estimators", "method", "examples", "length"),
            "how": ("mesh.fsdp", "mesh.tensor", "batch", "remat", "search"),
        },
        (
            "saap plan llama-2-7b v5e-16",
            "saap plan llama-3.1-405b v5p-512 --search",
            "saap plan my/config.json gpu:h100:8 --task recover --method lora",
        ),
    ),
}
"""By command; what is not here has few options, and `--help` shows them all."""


def show_short_help(command: str, default: Any) -> None:
    """Print the short help of a command of `SHORT`.

    Args:
        command: as it is called, such as `prune [CONFIG]`.
        default: its configuration, from which the default values are.
    """
    short = SHORT[command.split()[0]]
    show_lines(f"usage: saap {command} [OPTIONS]", "")
    show(inspect.cleandoc(type(default).__doc__ or "").partition("\n\n")[0])
    for title, names in short.groups.items():
        show_lines("", title)
        for name in names:
            option, said = f"  --{name.replace('_', '-')}  ".ljust(INDENT), _said(default, name)
            lines = textwrap.wrap(said, max(console.width - INDENT, 20))
            if len(option) > INDENT:
                show_lines(option.rstrip())
                option = " " * INDENT
            show_lines(option + lines[0], *(" " * INDENT + line for line in lines[1:]))
    show_lines("", "examples", *(f"  {example}" for example in short.examples), "")
    show_lines(f"every option: saap {command.split()[0]} --help-all")


def _said(default: Any, path: str) -> str:
    """Return what the first clause says of a field, and its default."""
    *parts, name = path.split(".")
    for part in parts:
        default = getattr(default, part)
    value = getattr(default, name)
    shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    said = field_docs(type(default))[name].partition(". ")[0].partition("; ")[0].rstrip(".")
    return f"{said} (default: {shown})" if shown not in ("", "None", "False") else said


@functools.cache
def field_docs(kind: type) -> dict[str, str]:
    """Return what the strings below the fields of a dataclass say of them, those of its bases included.

    >>> field_docs(Short)["groups"]
    'Options by what they are for, as dotted names of fields.'
    """
    found: dict[str, str] = {}
    for each in reversed([base for base in kind.__mro__ if dataclasses.is_dataclass(base) or base is kind]):
        body = ast.parse(textwrap.dedent(inspect.getsource(each))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, said in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(said, ast.Expr) and isinstance(said.value, ast.Constant):
                assert isinstance(field.target, ast.Name)
                found[field.target.id] = " ".join(str(said.value.value).split())
    return found
