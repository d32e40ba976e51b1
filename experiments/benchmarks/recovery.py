"""What do group-wise adapters cost? A training step beside one of plain LoRA, and the merged model beside floats.

    python experiments/benchmarks/recovery.py [--batch 4] [--length 256] [--rank 8] [--bits 4] [--group-size 32]
        [--repeats 7] [--new 33] [--remat none]

The steps (loss, gradients of the adapters, Adam) of both methods take turns, as do the decoders of the float and of
the merged model, so that drift of the machine hits all alike. Prints the median, smallest and largest of each, the
ratio of the same round, and what the compiled steps hold by the compiler's own analysis.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import saap_jax
from saap_jax.evaluation.cost import weight_bytes
from saap_jax.evaluation.timing import Workload, compile_programs, spread, time_in_turns
from saap_jax.llama.decoder import single_layers
from saap_jax.llama.loss import next_token_losses
from saap_jax.recovery.adapters import Method, groupwise, lora
from saap_jax.types import Remat

MIB = 2**20


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = (("batch", 4), ("length", 256), ("rank", 8), ("bits", 4), ("group-size", 32), ("repeats", 7), ("new", 33))
    for option, value in options:
        parser.add_argument(f"--{option}", type=int, default=value)
    parser.add_argument("--remat", default="none", choices=("none", "dots", "full"))
    given = parser.parse_args()

    model = saap_jax.load_model("smollm2-135m")
    group = {"bits": given.bits, "group_size": given.group_size}
    methods = [lora(rank=given.rank), groupwise(rank=given.rank, rounding="nearest", **group)]
    prepared = {method.name: method.prepare(model, jax.random.key(0)) for method in methods}
    tokens = np.random.default_rng(0).integers(0, model.embedding.shape[0], (given.batch, given.length), np.int32)
    steps = {m.name: training_step(m, prepared[m.name], jnp.asarray(tokens), given.remat) for m in methods}
    report_steps(steps, given.repeats, f"{given.batch} x {given.length} tokens, rank {given.rank}, remat {given.remat}")

    decoders = {"floats": model, "merged": methods[1].merge(prepared["groupwise"])}
    for name, each in decoders.items():
        print(f"{name:<10} weights {weight_bytes(each) / MIB:.1f} MiB")
    for batch in (1, 8):
        programs = [
            compile_programs(single_layers(each), Workload(batch, 128, given.new)) for each in decoders.values()
        ]
        times = time_in_turns(programs, given.repeats)
        for what in ("prefill", "step"):
            floats, merged = ([getattr(each, what) for each in measured] for measured in times)
            ratio = spread(ours / theirs for ours, theirs in zip(merged, floats, strict=True))
            print(
                f"batch {batch} {what:<8} floats {shown(floats)} ms   merged {shown(merged)} ms   "
                f"merged takes {ratio.median:.2f} x ({ratio.low:.2f} to {ratio.high:.2f})"
            )


def training_step(
    method: Method, model: saap_jax.Llama, tokens: jax.Array, remat: Remat
) -> tuple[Callable[[], Any], Any]:
    """Return what makes one step, and the compiled program."""
    graph, learning, frozen = nnx.split(model, method.trainable, ...)
    optimizer = optax.adam(1e-4)
    mask = jnp.ones(tokens.shape, bool)

    @jax.jit
    def step(learning: Any, frozen: Any, state: Any) -> tuple[Any, Any, jax.Array]:
        def loss(learning: Any) -> jax.Array:
            return jnp.sum(next_token_losses(nnx.merge(graph, learning, frozen), tokens, mask, remat=remat)[0])

        value, gradient = jax.value_and_grad(loss)(learning)
        updates, state = optimizer.update(gradient, state, learning)
        return optax.apply_updates(learning, updates), state, value

    state = optimizer.init(learning)
    compiled = step.lower(learning, frozen, state).compile()
    return lambda: jax.block_until_ready(compiled(learning, frozen, state)), compiled


def report_steps(steps: dict[str, tuple[Callable[[], Any], Any]], repeats: int, what: str) -> None:
    """Time the steps in turns; print them, their memory and their ratio."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, (run, _) in steps.items():
            start = time.perf_counter()
            run()
            if turn:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    print(f"a training step, {what}; median (smallest to largest)")
    for name, (_, compiled) in steps.items():
        memory = compiled.memory_analysis()
        held = [getattr(memory, f"{kind}_size_in_bytes") / MIB for kind in ("argument", "output", "temp")]
        print(
            f"{name:<10} {shown(times[name])} ms   "
            f"arguments {held[0]:.0f}, output {held[1]:.1f}, temporaries {held[2]:.0f} MiB"
        )
    ratio = spread(ours / theirs for ours, theirs in zip(times["groupwise"], times["lora"], strict=True))
    print(f"group-wise against LoRA: {ratio.median:.3f} x ({ratio.low:.3f} to {ratio.high:.3f})")


def shown(seconds: list[float]) -> str:
    """Return median and range in milliseconds."""
    found = spread(1e3 * each for each in seconds)
    return f"{found.median:.1f} ({found.low:.1f} to {found.high:.1f})"


if __name__ == "__main__":
    main()
