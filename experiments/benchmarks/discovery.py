"""Time of discovery from the traced program, of the shape of LLaMA-7B: scanned layers, and unrolled ones.

`python experiments/benchmarks/discovery.py` prints, for each model, the equations, the seconds of JAX's tracing and of
the analysis, and the microseconds of analysis an equation: linear in the equations if that stays the same. No weights.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from saap_jax.llama.attention import sight_of
from saap_jax.llama.model import Llama, abstract_llama, decode
from saap_jax.llama.spec import LayerWidths, LlamaSpec
from saap_jax.trace.trace import trace

TOKENS = jax.ShapeDtypeStruct((1, 128), jnp.int32)
REPEATS = 5


def llama_7b(layers: int) -> Llama:
    """Return the shapes of LLaMA-7B with so many layers."""
    widths = LayerWidths(kv_heads=32, q_per_kv=1, mlp=11008)
    return abstract_llama(LlamaSpec(vocab=32000, embed=4096, head_dim=128, layers=(widths,) * layers, tied=False))


def unrolled(layers: int) -> tuple[Callable[..., Any], Any]:
    """Return the function and parameters of the same model with a Python loop over layers of their own parameters."""
    model = llama_7b(layers)
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), model.segments[0])
    model.segments = nnx.List([])
    params = {"model": model, "layers": [one] * layers}

    def function(params: Any, tokens: Any) -> Any:
        model, constants = params["model"], params["model"].constants
        sight = sight_of(tokens.shape[1], params["layers"][0].attention.output.shape[-2], constants)
        x = model.embedded(tokens)
        for layer in params["layers"]:
            x, _ = decode(layer, x, None, sight, constants)
        return model.logits(model.final(x))

    return function, params


def timed(function: Callable[[], Any]) -> float:
    """Return the fewest seconds of a few calls."""
    seconds = []
    for _ in range(REPEATS):
        jax.clear_caches()
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def count_equations(jaxpr: Any) -> int:
    """Count the equations of a program and of those inside it."""
    inner = (each for eqn in jaxpr.eqns for value in eqn.params.values() for each in jax.tree.leaves(value))
    return len(jaxpr.eqns) + sum(
        count_equations(getattr(each, "jaxpr", each)) for each in inner if hasattr(each, "eqns")
    )


def main() -> None:
    """Print the table."""
    trace(lambda model, tokens: model(tokens), llama_7b(1), TOKENS)  # warms up what is imported late
    cases = {"scanned, 32 layers": (lambda model, tokens: model(tokens), llama_7b(32))}
    cases |= {f"unrolled, {layers} layers": unrolled(layers) for layers in (4, 8, 16, 32, 64)}
    print("model                  equations  structures  prunable  traced s   all s  us each")
    for name, (function, params) in cases.items():
        found = trace(function, params, TOKENS)
        tracing = timed(lambda f=function, p=params: jax.make_jaxpr(f)(p, TOKENS))
        everything = timed(lambda f=function, p=params: trace(f, p, TOKENS))
        equations = count_equations(found.program.jaxpr)
        each = (everything - tracing) / equations * 1e6
        print(
            f"{name:22}{equations:>10,} {len(found.structures):>11,}{len(found.prunable):>10,}"
            f"{tracing:>10.2f}{everything:>8.2f}{each:>9.0f}"
        )


if __name__ == "__main__":
    main()
