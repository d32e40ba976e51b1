"""Reading jaxprs: shapes, and the programs inside equations. Only this module knows how jax's versions differ."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.interpreters.partial_eval import dce_jaxpr

_PLAIN = ("jit", "closed_call", "core_call", "call", "remat", "remat2", "checkpoint")
CALLS = frozenset((*_PLAIN, "composite", "custom_jvp_call", "custom_vjp_call"))
"""Operations that apply the one program inside them to their operands."""


def shape_of(variable: Any) -> tuple[int, ...]:
    """Read the shape of a variable or literal."""
    return tuple(int(size) for size in getattr(variable.aval, "shape", ()))


def dtype_of(variable: Any) -> Any:
    """Read the type of a variable or literal."""
    return variable.aval.dtype


def draws_apart(eqn: JaxprEqn) -> bool:
    """Say whether each of the keys that an equation takes or makes draws for itself, whatever keys lie beside it.

    Those of threefry do; of the others a batch is drawn from the first key.
    """
    variables = (*eqn.invars, *eqn.outvars)
    return any(str(dtype_of(variable)) == "key<fry>" for variable in variables)


def opened(program: Any) -> tuple[Jaxpr, Sequence[Any]]:
    """Take a program and its constants, which a program that is not closed does not have.

    Since jax 0.12 there is one type for both.
    """
    if isinstance(program, ClosedJaxpr):
        return (program.jaxpr, program.consts)
    return (program, ())


def programs_in(program: Any) -> Iterator[Any]:
    """Yield a program, and those inside it."""
    yield program
    for each in jax.tree.leaves([[*eqn.params.values()] for eqn in opened(program)[0].eqns]):
        if isinstance(each, ClosedJaxpr | Jaxpr):
            yield from programs_in(each)


def constants_of(program: Any) -> list[Any]:
    """List the arrays that a program holds, and those inside it."""
    return [value for each in programs_in(program) for value in opened(each)[1]]


_OWN_DERIVATIVES = frozenset(["custom_jvp_call", "custom_vjp_call", "linear_call"])
"""Operations that bring their own derivative, of which a program's text has no more than a name."""


def derivatives_of(program: Any, order: int = 2) -> list[ClosedJaxpr]:
    """Trace the derivative of each call that brings its own, and of such calls within that, up to an order.

    The second order is what the estimators with the most derivatives take (`gate_hessian`).
    """
    found = []
    for eqn in (eqn for each in programs_in(program) for eqn in opened(each)[0].eqns):
        if eqn.primitive.name not in _OWN_DERIVATIVES:
            continue
        fixed = eqn.params.get("num_callee_consts", 0) + eqn.params.get("num_res", 0)  # only `linear_call` has them

        def pulled(*operands: Any, eqn: JaxprEqn = eqn, fixed: int = fixed) -> list[Any]:
            run = functools.partial(eqn.primitive.bind, **eqn.primitive.get_bind_params(eqn.params))
            results, pull = jax.vjp(functools.partial(run, *operands[:fixed]), *operands[fixed:])
            floats = [jnp.issubdtype(each.dtype, jnp.inexact) for each in results]
            ones = [jnp.ones_like(each) if real else np.zeros(each.shape, jax.dtypes.float0)
                    for each, real in zip(results, floats, strict=True)]  # fmt: skip
            return [each for each in pull(ones) if each.dtype != jax.dtypes.float0]

        with contextlib.suppress(Exception):  # of a rule that fails nothing is ever computed
            derivative = jax.make_jaxpr(pulled)(*(jax.ShapeDtypeStruct(shape_of(v), dtype_of(v)) for v in eqn.invars))
            found += [derivative, *(derivatives_of(derivative, order - 1) if order > 1 else ())]
    return found


def alive(program: ClosedJaxpr) -> ClosedJaxpr:
    """Drop the equations that no output needs, at any depth; the program takes the same arguments."""
    jaxpr, _ = dce_jaxpr(program.jaxpr, [True] * len(program.jaxpr.outvars), instantiate=True)
    return ClosedJaxpr(jaxpr, program.consts)


def called_program(eqn: JaxprEqn) -> Any:
    """Find the program that a call applies to its operands."""
    return next(eqn.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in eqn.params)


def scan_split(eqn: JaxprEqn) -> tuple[int, int]:
    """Tell where the carry starts among the operands of a scan, and where the stacked arrays do.

    Before jax 0.12 a scan counts its constants and carries; since then it has the trees of its three operands.
    """
    if "num_consts" in eqn.params:
        constants = eqn.params["num_consts"]
        carry = eqn.params["num_carry"]
    else:
        constants, carry = (len(part) for part in eqn.params["ft_in"].unpack()[:2])
    return constants, constants + carry
