"""The programs inside equations: what jax's versions name differently is read here, and nowhere else."""

from collections.abc import Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.interpreters.partial_eval import dce_jaxpr

OPAQUE = ("pallas_call", "ffi_call", "custom_call", "tpu_custom_call", "pure_callback", "io_callback")
"""Operations that tell nothing of their axes."""


def opened(program: Any) -> tuple[Jaxpr, Sequence[Any]]:
    """Return a program and its constants, which a program that is not closed does not have.

    Since jax 0.12 there is one type for both.
    """
    return (program.jaxpr, program.consts) if isinstance(program, ClosedJaxpr) else (program, ())


def alive(program: ClosedJaxpr) -> ClosedJaxpr:
    """Return a program without the equations that no output needs, at any depth; it takes the same arguments."""
    jaxpr, _ = dce_jaxpr(program.jaxpr, [True] * len(program.jaxpr.outvars), instantiate=True)
    return ClosedJaxpr(jaxpr, program.consts)


def inner_programs(eqn: JaxprEqn) -> list[list[JaxprEqn]]:
    """Return the equations of each program that an equation holds."""
    programs = []
    for value in eqn.params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, ClosedJaxpr | Jaxpr):
                programs.append(list(opened(each)[0].eqns))
    return programs


def called_program(eqn: JaxprEqn) -> Any:
    """Return the program that a call applies to its operands."""
    return next(eqn.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in eqn.params)


def manual_axes(eqn: JaxprEqn) -> set[str]:
    """Return the axes of the mesh over which a `shard_map` runs; before jax 0.10.2 they have another name."""
    return set(eqn.params["newly_manual_axes" if "newly_manual_axes" in eqn.params else "manual_axes"])


def scan_split(eqn: JaxprEqn) -> tuple[int, int]:
    """Return where the carry starts among the operands of a scan, and where the stacked arrays do.

    Before jax 0.12 a scan counts its constants and carries; since then it has the trees of its three operands.
    """
    if "num_consts" in eqn.params:
        constants, carry = eqn.params["num_consts"], eqn.params["num_carry"]
    else:
        constants, carry = (len(part) for part in eqn.params["ft_in"].unpack()[:2])
    return constants, constants + carry


def opaque_names(eqn: JaxprEqn) -> str:
    """Return the names by which a user may know an operation without a rule, "" if it has none beside its own."""
    return ", ".join(kernel_names(eqn)) if eqn.primitive.name in OPAQUE else ""


def kernel_names(eqn: JaxprEqn) -> list[str]:
    """Return the names of a kernel or of a called function."""
    parameters = eqn.params
    own = [str(parameters[key]) for key in ("name", "target_name", "call_target_name") if parameters.get(key)]
    return list(dict.fromkeys([*own, *(source.split(" at ")[0] for source in source_names(eqn))]))


def source_names(eqn: JaxprEqn) -> list[str]:
    """Return name and place of the function that an operation was made of."""
    if eqn.primitive.name in ("scan", "while", "cond"):
        return []
    key = next((key for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in eqn.params), None)
    info = getattr(opened(eqn.params[key])[0], "debug_info", None) if key else None
    return [info.func_src_info] if info is not None and info.func_src_info else []
