"""The programs inside equations: what jax's versions name differently is read here, and nowhere else."""

from collections.abc import Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


def opened(program: Any) -> tuple[Jaxpr, Sequence[Any]]:
    """Return a program and its constants, which a program that is not closed does not have.

    Since jax 0.12 there is one type for both.
    """
    return (program.jaxpr, program.consts) if isinstance(program, ClosedJaxpr) else (program, ())


def called_program(eqn: JaxprEqn) -> Any:
    """Return the program that a call applies to its operands."""
    return next(eqn.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in eqn.params)


def scan_split(eqn: JaxprEqn) -> tuple[int, int]:
    """Return where the carry starts among the operands of a scan, and where the stacked arrays do.

    Before jax 0.12 a scan counts its constants and carries; since then it has the trees of its three operands.
    """
    if "num_consts" in eqn.params:
        constants, carry = eqn.params["num_consts"], eqn.params["num_carry"]
    else:
        constants, carry = (len(part) for part in eqn.params["ft_in"].unpack()[:2])
    return constants, constants + carry
