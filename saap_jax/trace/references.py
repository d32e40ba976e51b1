"""Reference functions in place of kernels that tell nothing of their axes (Pallas, custom calls), while tracing.

A kernel is named by what the user calls (a jitted function or one with a custom derivative, the function itself), by
the name of that, by the name of the Pallas kernel, or by the target of a foreign call. The reference takes the arrays
that the kernel gets, flat and in their order, and returns the kernel's results.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
from jax.extend.core import JaxprEqn

from saap_jax.trace.interpret import Changes, evaluate
from saap_jax.trace.nested import inner_programs, kernel_names, source_names
from saap_jax.trace.rules import dtype_of, shape_of

Kernel = str | Callable[..., Any]
"""What names a kernel."""


def with_references(
    function: Callable[..., Any], references: Mapping[Kernel, Callable[..., Any]]
) -> Callable[..., Any]:
    """Return a function in which each kernel is replaced by its reference.

    Raises:
        ValueError: in the function: a kernel that it does not call, or a reference that fails or returns other shapes.
    """
    if not references:
        return function

    def replaced(*arguments: Any) -> Any:
        program, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
        equations = list(_every(program.jaxpr.eqns))
        for kernel in references:
            if not any(_is(kernel, eqn) for eqn in equations):
                called = sorted({name for eqn in equations for name in kernel_names(eqn)[:1]})
                raise ValueError(
                    f"Problem.references: expected kernels that the function calls, {', '.join(called) or 'none'}, "
                    f"got {_said(kernel)}; name a jitted function, or put jax.jit around the call of the kernel"
                )

        def replace(eqn: JaxprEqn) -> Callable[..., Any] | None:
            for kernel, reference in references.items():
                if _is(kernel, eqn):
                    return functools.partial(_results, kernel, reference, eqn)
            return None

        flat = jax.tree.leaves(arguments)
        results = evaluate(program.jaxpr, program.consts, flat, (), Changes([], replace=replace))
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return replaced


def _results(kernel: Kernel, reference: Callable[..., Any], eqn: JaxprEqn, *values: Any) -> list[Any]:
    try:
        results = jax.tree.leaves(reference(*values))
    except Exception as error:  # whatever the reference raises
        given = ", ".join(f"{value.dtype}{list(value.shape)}" for value in values)
        raise ValueError(
            f"Problem.references: the reference of {_said(kernel)} failed on the kernel's arrays {given}: "
            f"{type(error).__name__}: {error}"
        ) from error
    wanted = [(shape_of(out), dtype_of(out)) for out in eqn.outvars]
    got = [(tuple(each.shape), each.dtype) for each in results]
    if wanted != got:
        said = ["; ".join(f"{dtype}{list(shape)}" for shape, dtype in each) for each in (wanted, got)]
        raise ValueError(
            f"Problem.references: expected the reference of {_said(kernel)} to return {said[0]} as the kernel does "
            f"(under vmap its arrays have one axis more), got {said[1]}"
        )
    return results


def _every(equations: Iterable[JaxprEqn]) -> Iterator[JaxprEqn]:
    for eqn in equations:
        yield eqn
        for program in inner_programs(eqn):
            yield from _every(program)


def _is(kernel: Kernel, eqn: JaxprEqn) -> bool:
    return _said(kernel) in (kernel_names(eqn) if isinstance(kernel, str) else source_names(eqn))


def _said(kernel: Kernel) -> str:
    """Return a name as it is; of a function, its name and where it is defined, as jax writes it."""
    if isinstance(kernel, str):
        return kernel
    while isinstance(kernel, functools.partial):
        kernel = kernel.func
    plain = inspect.unwrap(kernel)
    code = getattr(plain, "__code__", None)
    name = getattr(plain, "__name__", type(plain).__name__)
    return f"{name} at {code.co_filename}:{code.co_firstlineno}" if code else name
