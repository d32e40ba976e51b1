"""`saap plan`: from words to plans, and to what is printed of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from saap_jax.cli.arguments import UsageError, parse, show_progress, split_words
from saap_jax.cli.console import show
from saap_jax.config.plan import PlanConfig
from saap_jax.planning.chips import GIB, target_of
from saap_jax.planning.models import spec_of
from saap_jax.planning.plan import Record, plan_one
from saap_jax.planning.search import search, settings_of
from saap_jax.runtime.files import check_target, write_atomically


def plan(config: PlanConfig, *, track: Callable[..., Any]) -> Record:
    """Plan a job, write the result where `config.json` says, and return it: `plan`, or None, and what was `tried`.

    Raises:
        ValueError: an unknown model or machine, a mesh that does not fit it, no compiler for it, or no directory for
            the result.
    """
    check_target("json", config.json)
    spec, target = spec_of(config.model), target_of(config.target)
    if config.search:
        best, tried = search(
            config, spec, target, progress=lambda items: track("trying machines", items, len(list(items)))
        )
    else:
        [best] = track(f"planning for {target.topology}", _lazily(config, spec, target), 1)
        tried = [best]
    result = {"plan": best, "tried": tried}
    if config.json:
        write_atomically(Path(config.json), json.dumps(result, indent=1).encode())
    return result


def _lazily(config: PlanConfig, spec: Any, target: Any) -> Any:
    yield plan_one(config, spec, target, None, config.batch, config.remat)


def shown(config: PlanConfig, result: Record) -> list[Table | str]:
    """Return what is printed of a result: a table and sentences."""
    record = result["plan"]
    if record is None:
        kind = target_of(config.target).chip.kind
        return [f"{config.model} does not fit any {kind} machine: the largest that was tried is {_last(result)}."]
    if not record["fits"]:
        over = record["overrun"] / GIB
        said: list[Table | str] = [
            f"{config.task} of {config.model} does not fit {record['target']}: it needs {over:.1f} GiB more than the "
            f"{record['memory'] / GIB:.1f} GiB of a device."
        ]
        return [*said, *(f"  {remedy}" for remedy in record["remedies"]), "Or let --search find a machine."]
    return [plan_table(config, record), *_sentences(config, record)]


def _last(result: Record) -> str:
    return result["tried"][-1]["target"] if result["tried"] else "none, by arithmetic"


def plan_table(config: PlanConfig, record: Record) -> Table:
    """Return what a device holds and what a step does."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in record["mesh"].items() if size > 1) or "one device"
    table = Table(
        title=f"{config.task} of {config.model} on {record['target']} ({record['chips']} chips; {mesh})",
        title_justify="left",
    )
    table.add_column("a device holds")
    table.add_column("GiB", justify="right")
    table.add_column("a step")
    table.add_column("amount", justify="right")
    table.add_column("seconds", justify="right")
    held = record["bytes"]
    left = [
        ("parameters", f"{held['parameters'] / GIB:.2f}"),
        ("statistics" if config.task == "score" else "optimiser", f"{held['state'] / GIB:.2f}"),
        ("temporaries", f"{held['temporaries'] / GIB:.2f}"),
        ("peak", f"{held['peak'] / GIB:.2f}"),
        ("of", f"{record['memory'] / GIB:.2f}"),
    ]
    seconds = record["seconds"]
    right = [
        ("operations", f"{record['flops'] / 1e12:.1f} TFLOP", f"{seconds['compute']:.3f}"),
        ("memory traffic", f"{record['moved'] / 1e9:.0f} GB", f"{seconds['memory']:.3f}"),
        *((f"sent, {kind}", f"{size / 1e9:.2f} GB", "") for kind, size in record["sent"].items() if size > 1e6),
        ("sent in all", f"{sum(record['sent'].values()) / 1e9:.1f} GB", f"{seconds['links']:.3f}"),
    ]
    for row in range(max(len(left), len(right))):
        table.add_row(*(left[row] if row < len(left) else ("", "")), *(right[row] if row < len(right) else ("",) * 3))
    return table


def _sentences(config: PlanConfig, record: Record) -> list[str]:
    how = "compiled for it" if record["source"] == "compiled" else "by arithmetic alone, nothing was compiled"
    how += f"; assumed: {record['assumed']}" if record.get("assumed") else ""
    bound = {"compute": "operations", "memory": "memory traffic", "links": "the links"}[record["bound"]]
    return [
        f"A step of {record['batch']} x {config.length} tokens takes {record['step_seconds']:.3f} s at least, bound by "
        f"{bound}: {record['tokens_per_second']:,.0f} tokens/s ({how}).",
        f"{record['steps'] * record['batch']} rows in {record['steps']} steps: {record['total_seconds']:.0f} s, "
        f"{record['chip_hours']:.3f} chip-hours. Real programs reach 40 to 60 % of the peak rates taken here.",
        f"Settings: {settings_of(record)}",
    ]


def run(words: list[str]) -> None:
    """Run `saap plan [MODEL] [TARGET] [options]`.

    Raises:
        UsageError: more words than a model and a target.
    """
    given, rest = split_words(words)
    if len(given) > 2:
        raise UsageError(f"plan: expected a model and a target, got {len(given)} words: {', '.join(given)}")
    named = [word for pair in zip(("--model", "--target"), given, strict=False) for word in pair]
    config, _ = parse("plan [MODEL] [TARGET]", PlanConfig(), [*named, *rest])
    with show_progress() as track:
        result = plan(config, track=track)
    show(*shown(config, result))
