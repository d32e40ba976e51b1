"""`saap plan`: from a configuration to plans, and what is shown of them."""

import json
from pathlib import Path

from saap_jax.config.use import PlanConfig
from saap_jax.planning.chips import GIB, target_of, targets
from saap_jax.planning.models import spec_of
from saap_jax.planning.plan import ROOM, Record, plan_one, search, settings_of
from saap_jax.report.blocks import Block, Words, text_table
from saap_jax.runtime.files import check_target, write_atomically
from saap_jax.runtime.progress import Track, quiet, step
from saap_jax.runtime.words import plural


def plan_job(config: PlanConfig, *, track: Track = quiet) -> Record:
    """Plan a job, write the result where `config.json` says, and return it: `plan`, or None, and what was `tried`.

    Raises:
        ValueError: an unknown model or machine, a mesh that does not fit it, no compiler for it, or no directory for
            the result.
    """
    check_target("json", config.json)
    spec = spec_of(config.model)
    target = target_of(config.target)
    if config.search:
        machines = targets(target.chip)
        best, tried = search(config, spec, track("trying machines", machines, len(machines)))
    else:
        with step(track, f"planning for {target.topology}"):
            best = plan_one(config, spec, target, None, config.batch, config.remat)
        tried = [best]
    result = {"plan": best, "tried": tried}
    if config.json:
        write_atomically(Path(config.json), json.dumps(result, indent=1).encode())
    return result


def shown(config: PlanConfig, result: Record) -> list[Block]:
    """Show what a device holds and what a step does, or why the job does not fit."""
    record = result["plan"]
    if record is None:
        kind = target_of(config.target).chip.kind
        tried = result["tried"]
        if tried:
            largest = tried[-1]["target"]
        else:
            largest = "none, by arithmetic"
        return [Words(f"{config.model} does not fit any {kind} machine: the largest that was tried is {largest}.")]
    if not record["fits"]:
        share, allowed = (1.0, "") if record["source"] == "compiled" else (ROOM, " that arithmetic allows")
        said = (
            f"{config.task} of {config.model} does not fit {record['target']}: it needs {record['overrun'] / GIB:.1f} "
            f"GiB more than the {share * record['memory'] / GIB:.1f} GiB of a device{allowed}."
        )
        return [*map(Words, (said, *record["remedies"], "Or let --search find a machine."))]
    mesh = " x ".join(f"{axis} {size}" for axis, size in record["mesh"].items() if size > 1) or "one device"
    held = record["bytes"]
    seconds = record["seconds"]
    parts = {
        "parameters": held["parameters"],
        "statistics" if config.task == "score" else "optimiser": held["state"],
        "temporaries": held["temporaries"],
        "peak": held["peak"],
        "of": record["memory"],
    }
    work = [
        ("operations", f"{record['flops'] / 1e12:.1f} TFLOP", f"{seconds['compute']:.3f}"),
        ("memory traffic", f"{record['moved'] / 1e9:.0f} GB", f"{seconds['memory']:.3f}"),
        *((f"sent, {kind}", f"{size / 1e9:.2f} GB", "") for kind, size in record["sent"].items() if size > 1e6),
        ("sent in all", f"{sum(record['sent'].values()) / 1e9:.1f} GB", f"{seconds['links']:.3f}"),
    ]
    title = f"{config.task} of {config.model} on {record['target']} ({plural(record['chips'], 'chip')}; {mesh})"
    if record["source"] == "compiled":
        how = "compiled for it"
    else:
        how = "by arithmetic alone, nothing was compiled"
    if record.get("assumed"):
        how += f"; assumed: {record['assumed']}"
    bound = {"compute": "operations", "memory": "memory traffic", "links": "the links"}[record["bound"]]
    peaks = "the peak rates taken here" + ", which are those of bfloat16" * (config.dtype == "float32")
    said = (
        f"A step of {record['batch']} x {config.length} tokens takes {record['step_seconds']:.3f} s at least, bound by "
        f"{bound}: {record['tokens_per_second']:,.0f} tokens/s ({how}).",
        f"{plural(config.examples, 'row')} in {plural(record['steps'], 'step')}: {record['total_seconds']:.0f} s, "
        f"{record['chip_hours']:.3f} chip-hours. Real programs reach 40 to 60 % of {peaks}.",
        f"Settings: {settings_of(record)}",
    )
    return [
        text_table(title, ("a device holds", "GiB"), [(name, f"{size / GIB:.2f}") for name, size in parts.items()]),
        text_table("", ("a step", "amount", "seconds"), work),
        *map(Words, said),
    ]
