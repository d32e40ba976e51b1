"""Compile a task's program for a machine that need not be there; say what it holds, does and sends, and how long.

The time is a roofline: the largest of operations at the chip's peak, bytes at its memory's bandwidth, and bytes between
chips at one axis' links. Real programs reach 40 to 60 % of it; what bounds them is what it says.
"""

import dataclasses
import itertools
import math
import os
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax

from saap_jax.config.mesh import by_axis
from saap_jax.config.use import PlanConfig
from saap_jax.evaluation.cost import program_bytes
from saap_jax.extras import need
from saap_jax.llama.attention import attending, whole
from saap_jax.llama.spec import LlamaSpec
from saap_jax.planning.chips import GIB, Machine, targets
from saap_jax.planning.count import Collectives, collectives_of, shard_bytes, work_of
from saap_jax.planning.estimate import Estimate, Mesh, estimate, meshes, passes_of
from saap_jax.planning.programs import of_experts, program_of, weight_sizes
from saap_jax.runtime.digests import computed_by
from saap_jax.runtime.mesh import check_experts, layout_of, mesh_sizes
from saap_jax.runtime.programs import remembered
from saap_jax.types import Remat

Record = dict[str, Any]

ROWS = (1, 2, 4, 8)
"""Rows for each part of the batch that are tried."""

SLACK = 1.3
"""How far above the memory an estimate may be for its program to be compiled all the same."""

ROOM = 0.92
"""Share of the memory that an estimate may take where nothing is compiled."""

TRIES = 3
"""Programs that are compiled for each machine, before the next larger one is tried."""

_QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


def plan_one(
    config: PlanConfig, spec: LlamaSpec, target: Machine, mesh: Mesh | None, batch: int, remat: Remat
) -> Record:
    """Plan a task for one machine, mesh, batch and rematerialisation; `fits` says whether it can run.

    Args:
        mesh: sizes, or None for those of `config.mesh`.
        batch: rows at once, or 0 for one a part of the batch.

    Raises:
        ValueError: what cannot be spread so, or no compiler for the machine.
    """
    sizes = mesh or mesh_sizes(config.mesh, target.devices)
    check_experts(by_axis(sizes), spec.constants.traits.experts, config.model)
    data, fsdp = sizes[:2]
    batch = batch or data * fsdp
    if batch % (data * fsdp):
        raise ValueError(
            f"batch: expected a multiple of {data * fsdp}, the parts that data {data} x fsdp {fsdp} make, got {batch}"
        )
    guess = estimate(config, spec, sizes, batch, remat)
    about: Record = {
        "model": config.model,
        "target": target.topology,
        "chips": target.chips,
        "task": config.task,
        "mesh": by_axis(sizes),
        "batch": batch,
        "length": config.length,
        "dtype": config.dtype,
        "remat": remat,
        "attention": config.attention,
        "memory": target.memory,
    }
    if target.chip.compiled:
        record = about | compiled(config, spec, target, sizes, batch, remat, guess)
    else:
        held = {name: getattr(guess, name) for name in ("parameters", "state", "temporaries", "peak")}
        record = about | {
            "source": "arithmetic",
            "assumed": target.chip.assumed,
            "bytes": held,
            "flops": guess.flops,
            "moved": guess.memory_bytes,
            "sent": {"all": guess.sent},
            "overrun": guess.peak - ROOM * target.memory,
        }
    record["fits"] = record["overrun"] <= 0
    if record["fits"]:
        del record["overrun"]
        record |= _times(config, record, target)
    else:
        record["remedies"] = remedies(config, spec, target, sizes, batch, remat, record["overrun"])
    return record


def compiled(
    config: PlanConfig, spec: LlamaSpec, target: Machine, mesh: Mesh, batch: int, remat: Remat, guess: Estimate
) -> Record:
    """Compile the program for the target's devices and read off what it holds and does."""
    devices = _devices(target)
    layout = layout_of(dataclasses.replace(config.mesh, **by_axis(mesh)), devices)
    program = program_of(config, spec, layout, batch, remat)
    with jax.set_mesh(layout.mesh), attending(config.attention):
        traced = program.trace()
        lowered = traced.lower()
    about = (target.topology, devices[0].client.platform_version, lowered.as_text(), computed_by())
    told = remembered(about, lambda: told_by(lowered, target, guess))
    beside = shard_bytes(program.beside)
    held = {"parameters": shard_bytes(program.parameters) + beside, "state": shard_bytes(program.state)}
    held |= {name: size + beside * (name == "peak") for name, size in told.get("bytes", {}).items()}
    work = work_of_device(traced.jaxpr, spec, mesh)
    return {"source": "compiled", **work, **told, "bytes": held, "overrun": told["overrun"] + beside}


def told_by(lowered: Any, target: Machine, guess: Estimate) -> Record:
    """Compile a program; say by how many bytes it exceeds the memory, what it holds, and what it sends.

    jax cannot read back what it compiled for chips that are not here, so this is what is kept of it.
    """
    try:
        executable = lowered.compile()
    except Exception as error:  # the compiler's own kinds are private
        overrun = overrun_of(str(error))
        if overrun is None:
            raise ValueError(f"{target.topology}: the compiler failed: {str(error).splitlines()[0][:300]}") from error
        return {"overrun": overrun}
    memory = executable.memory_analysis()
    try:
        sent = collectives_of(executable.as_text() or "", target.devices)
    except jax.errors.JaxRuntimeError:  # the compiler cannot print what it made, as XLA at times
        sent = Collectives({"by arithmetic": guess.sent}, {})
    peak = program_bytes(memory)
    held = {"temporaries": memory.temp_size_in_bytes, "peak": peak}
    return {"bytes": held, "sent": sent.bytes, "largest": sent.largest, "overrun": peak - target.memory}


def work_of_device(jaxpr: Any, spec: LlamaSpec, mesh: Mesh) -> dict[str, float]:
    """Count the operations of one device, and the bytes that its products read and write.

    Along `expert`, devices share the products of experts, and each does all of the rest for itself.
    """
    work = work_of(jaxpr, weight_sizes(spec))
    tensor = mesh[2]
    expert = math.prod(mesh[3:])
    alone = math.prod(mesh[:3])
    if expert == 1:
        return {"flops": work.flops / alone, "moved": work.weight_bytes / tensor + work.other_bytes / alone}
    shared = work_of(jaxpr, weight_sizes(spec), counted=of_experts(spec))
    flops, weights, others = (part - (1 - 1 / expert) * split for part, split in zip(work, shared, strict=True))
    return {"flops": flops / alone, "moved": weights / tensor + others / alone}


def _times(config: PlanConfig, record: Record, target: Machine) -> Record:
    """Compute the roofline of a step, and of the whole text."""
    guess = Estimate(0, 0, 0, record["flops"], record["moved"], sum(record["sent"].values()))
    seconds = guess.seconds(target)
    bound = max(seconds, key=lambda name: seconds[name])
    step = seconds[bound]
    steps = -(-config.examples // record["batch"])
    return {
        "seconds": seconds,
        "bound": bound,
        "step_seconds": step,
        "tokens_per_second": record["batch"] * config.length / step,
        "steps": steps,
        "total_seconds": steps * step,
        "chip_hours": steps * step * target.chips / 3600,
        "overlap_efficiency": seconds["compute"] / step,
        "serial_efficiency": seconds["compute"] / sum(seconds.values()),
    }


def remedies(
    config: PlanConfig, spec: LlamaSpec, target: Machine, mesh: Mesh, batch: int, remat: Remat, overrun: float
) -> list[str]:
    """Name the three cheapest changes, with the bytes a device that each saves by arithmetic; least time first."""
    (data, fsdp, tensor) = mesh[:3]
    expert = mesh[3:]
    parts = data * fsdp
    tries: list[tuple[str, PlanConfig, Mesh, int, Remat]] = []
    if config.task != "evaluate" and remat != "full":
        tries.append(("--remat full", config, mesh, batch, "full"))
    if batch > parts and batch // 2 % parts == 0:
        tries.append((f"--batch {batch // 2}", config, mesh, batch // 2, remat))
    if data > 1 and spec.embed % parts == 0:
        tries.append((f"--mesh.data 1 --mesh.fsdp {parts}", config, (1, parts, tensor, *expert), batch, remat))
    if fsdp % 2 == 0 and batch // 2 % (parts // 2) == 0:
        half = batch // 2
    else:
        half = batch
    for axis, doubled in (("tensor", (2 * tensor, *expert)), ("expert", (tensor, 2 * math.prod(expert)))):
        if fsdp % 2 == 0 and (narrower := (data, fsdp // 2, *doubled)) in meshes(target.devices, spec):
            text = f"--mesh.fsdp {fsdp // 2} --mesh.{axis} {by_axis(narrower)[axis]} --batch {half}"
            tries.append((text, config, narrower, half, remat))
    options: dict[str, Any] = {"length": config.length // 2} if config.length > 512 else {}
    if whole(config.attention, config.length) and not whole("auto", config.length):
        options["attention"] = "auto"
    if config.dtype == "float32":
        options["dtype"] = "bfloat16"
    for name, value in options.items():
        tries.append((f"--{name} {value}", dataclasses.replace(config, **{name: value}), mesh, batch, remat))
    if larger := [each for each in targets(target.chip) if each.chips > target.chips]:
        grown = (data, fsdp * larger[0].devices // target.devices, tensor, *expert)
        text = f"--target {larger[0].topology} (with --mesh.fsdp -1)"
        tries.append((text, config, grown, grown[0] * grown[1], remat))
    before = estimate(config, spec, mesh, batch, remat).peak
    saved = [(text, before - estimate(one, spec, where, rows, how).peak) for text, one, where, rows, how in tries]
    saved = [(text, much) for text, much in saved if much > 0.02 * GIB]
    enough = sorted(saved, key=lambda each: each[1] < overrun)  # those that suffice come first, in their order
    return [f"{text}: saves about {much / GIB:.1f} GiB a device" for text, much in enough[:3]]


def overrun_of(message: str) -> float | None:
    """Read the bytes by which a program exceeds the memory off the compiler's message; None if it does not say.

    >>> overrun_of("Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.") / 2**30
    4.75
    """
    size = r"([\d.]+)([KMGT]?)"
    said = re.search(rf"[Ee]xceed\w* hbm capacity by {size}|\({size}\) exceeds available HBM \({size}\)", message)
    if said is None:
        return None
    amounts = [float(number) * 1024.0 ** " KMGT".index(unit or " ") for number, unit in re.findall(size, said[0])]
    return amounts[0] - sum(amounts[1:])


def _devices(target: Machine) -> Any:
    """Describe the devices of a machine that is not there, as the compiler describes them."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    need("tpu-plan", f"target {target.topology}: planning for a TPU compiles for it, which takes no TPU")
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=target.topology).devices
    except Exception as error:  # the runtime's own kinds are private
        reason = str(error).splitlines()[0][:200]
        raise ValueError(f"target: {target.topology} is no machine that the compiler knows: {reason}") from error


# --- the search over machines ----------------------------------------------------------------------


Way = tuple[Mesh, int, Remat]
"""A way to use a machine: the mesh, rows at once, and what is rematerialised."""


def ways(config: PlanConfig, spec: LlamaSpec, target: Machine) -> list[Way]:
    """List the ways that may fit by arithmetic, from the fastest a token."""
    remats: tuple[Remat, ...] = ("none", "dots", "full") if passes_of(config, "none")[0] else ("none",)
    found = []
    for mesh, rows, remat in itertools.product(meshes(target.devices, spec), ROWS, remats):
        batch = rows * mesh[0] * mesh[1]
        if rows > 1 and batch > config.examples:
            continue
        guess = estimate(config, spec, mesh, batch, remat)
        if guess.peak <= SLACK * target.memory:
            # Ties by the whole of the work, and by memory: of equal ways the one that surely fits.
            seconds = guess.seconds(target)
            key = (max(seconds.values()) / batch, sum(seconds.values()) / batch, guess.peak)
            found.append((key, (mesh, batch, remat)))
    return [way for _, way in sorted(found)]


def search(
    config: PlanConfig,
    spec: LlamaSpec,
    machines: Iterable[Machine],
    *,
    enough: int = TRIES,
    plan: Callable[..., Record] = plan_one,
) -> tuple[Record | None, list[Record]]:
    """Find the plan of the least time a row on the first machine that the job fits; return it and all that were tried.

    On each machine the ways are planned that are fastest by arithmetic and, if none of them fits, those that need the
    least memory, until `enough` plans fit. None for the plan where no machine is large enough.
    """
    tried: list[Record] = []
    for machine in machines:
        choices = ways(config, spec, machine)
        fit = []
        small = sorted(choices, key=lambda way: estimate(config, spec, *way).peak)
        for way in dict.fromkeys([*choices[:TRIES], *small[:TRIES]]):
            if len(fit) >= enough or (fit and way not in choices[:TRIES]):
                break
            tried.append(plan(config, spec, machine, *way))
            fit += tried[-1:] * tried[-1]["fits"]
        if fit:
            return min(fit, key=lambda record: record["step_seconds"] / record["batch"]), tried
    return None, tried


def settings_of(record: Record) -> str:
    """Write the options that make `saap plan` (and the command itself) use the machine in a plan's way."""
    mesh = " ".join(f"--mesh.{axis} {size}" for axis, size in record["mesh"].items())
    return f"{mesh} --batch {record['batch']} --remat {record['remat']}"
