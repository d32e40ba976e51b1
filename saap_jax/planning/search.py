"""The smallest machine that a job fits, and the fastest way to use it: ranked by arithmetic, decided by compiling."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from saap_jax.config.use import PlanConfig
from saap_jax.llama.spec import LlamaSpec
from saap_jax.planning.chips import Target, targets
from saap_jax.planning.estimate import Mesh, estimate, meshes
from saap_jax.planning.plan import Record, plan_one
from saap_jax.types import Remat

ROWS = (1, 2, 4, 8)
"""Rows for each part of the batch that are tried."""

SLACK = 1.3
"""How far above the memory an estimate may be for its program to be compiled all the same."""

TRIES = 3
"""Programs that are compiled for each machine, before the next larger one is tried."""


class Way(NamedTuple):
    """A way to use a machine."""

    mesh: Mesh
    batch: int
    remat: Remat


def ways(config: PlanConfig, spec: LlamaSpec, target: Target) -> list[Way]:
    """Return the ways that may fit by arithmetic, from the fastest a token."""
    remats: tuple[Remat, ...] = ("none", "dots", "full") if config.task != "evaluate" else ("none",)
    found = []
    for mesh in meshes(target.devices, spec):
        parts = mesh[0] * mesh[1]
        for rows in ROWS:
            batch = rows * parts
            if rows > 1 and batch > config.examples:
                continue
            for remat in remats:
                guess = estimate(config, spec, mesh, batch, remat)
                if guess.peak <= SLACK * target.memory:
                    # Ties by the whole of the work, and by memory: of equal ways the one that surely fits.
                    seconds = guess.seconds(target)
                    key = (max(seconds.values()) / batch, sum(seconds.values()) / batch, guess.peak)
                    found.append((key, Way(mesh, batch, remat)))
    return [way for _, way in sorted(found)]


def search(
    config: PlanConfig,
    spec: LlamaSpec,
    target: Target,
    *,
    enough: int = TRIES,
    progress: Callable[[Iterable[Target]], Iterator[Target]] = iter,
    plan: Callable[..., Record] = plan_one,
) -> tuple[Record | None, list[Record]]:
    """Return the best plan on the smallest machine of the target's kind that the job fits, and all that were made.

    A machine is tried with the ways that are fastest by arithmetic and, if none of them fits, with those that need the
    least memory. None for the plan where no machine is large enough. With `enough` plans that fit, no further ones of
    that machine are made.
    """
    tried: list[Record] = []
    for machine in progress(targets(target.chip)):
        made = plans_on(config, spec, machine, enough=enough, plan=plan)
        tried += made
        if best := fastest(made):
            return best, tried
    return None, tried


def plans_on(
    config: PlanConfig, spec: LlamaSpec, machine: Target, *, enough: int = TRIES, plan: Callable[..., Record] = plan_one
) -> list[Record]:
    """Return the plans made for a machine, until `enough` fit: of the fastest ways by arithmetic and, if none of them
    fits, of those that need the least memory.
    """
    choices = ways(config, spec, machine)
    smallest = sorted(choices, key=lambda way: estimate(config, spec, way.mesh, way.batch, way.remat).peak)
    made: list[Record] = []
    for way in dict.fromkeys([*choices[:TRIES], *smallest[:TRIES]]):
        fit = sum(record["fits"] for record in made)
        if fit >= enough or (fit and way not in choices[:TRIES]):
            break
        made.append(plan(config, spec, machine, way.mesh, way.batch, way.remat) | {"way": list(way)})
    return made


def fastest(plans: Iterable[Record]) -> Record | None:
    """Return the plan that takes the least time a row, of those that fit."""
    fit = (record for record in plans if record["fits"])
    return min(fit, key=lambda record: record["step_seconds"] / record["batch"], default=None)


def settings_of(record: Record) -> str:
    """Return the options that make `saap plan` (and the command itself) use the machine in a plan's way."""
    mesh = " ".join(f"--mesh.{axis} {size}" for axis, size in record["mesh"].items())
    return f"{mesh} --batch {record['batch']} --remat {record['remat']}"
