"""What do losses in chunks cost and save? Scoring, evaluating and training with the logits of all words, and in chunks.

    python experiments/benchmarks/vocabulary.py [--vocab 262144] [--batch 8] [--length 128] [--repeats 3] [--bytes 28]

A model of Gemma 3 270M's sizes with random weights. Every task and way is a process of its own, which says its peak
(Linux: the process, model and compiling included) and the median of its warm steps; `--bytes` is the power of two that
the logits in memory stay below. `--vocab 49152` is a small vocabulary, whose logits are never cut up unless asked for.
"""

import argparse
import multiprocessing
import re
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from saap_jax.estimation.observe import observe, union_of_needs
from saap_jax.estimation.registry import make_estimators
from saap_jax.evaluation.perplexity import window_losses
from saap_jax.llama import loss
from saap_jax.llama.model import random_llama
from saap_jax.llama.spec import LayerWidths, LlamaSpec
from saap_jax.recovery.objective import Objective, Packed, sums_of

TASKS = ("score", "evaluate", "train")
WAYS = {"all logits": 62, "chunks": 0}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, value in (("vocab", 262_144), ("batch", 8), ("length", 128), ("repeats", 3), ("bytes", 28)):
        parser.add_argument(f"--{option}", type=int, default=value)
    arguments = parser.parse_args()
    size = arguments.batch * arguments.length * arguments.vocab * 4 / 2**30
    print(f"{arguments.batch} x {arguments.length} tokens, {arguments.vocab:,} words: {size:.2f} GiB of logits\n")
    print("| | all logits: s | GiB | chunks: s | GiB | time |\n|---|---:|---:|---:|---:|---:|")
    for task in TASKS:
        rows = []
        for bound in WAYS.values():
            with multiprocessing.get_context("spawn").Pool(1) as alone:
                rows.append(alone.apply(measured, (task, bound or arguments.bytes, vars(arguments))))
        cells = [f"{value:.2f}" for row in rows for value in row]
        print(f"| {task} | " + " | ".join(cells) + f" | {rows[1][0] / rows[0][0]:.2f} x |", flush=True)


def measured(task: str, bound: int, options: dict[str, int]) -> tuple[float, float]:
    """Return the median seconds of a step, and the peak of this process in GiB."""
    loss.LOGITS = 2**bound
    loss.LOGITS_ONCE = min(loss.LOGITS_ONCE, 2**bound) if bound == options["bytes"] else 2**bound
    widths = LayerWidths(kv_heads=1, q_per_kv=4, mlp=2048)
    spec = LlamaSpec(vocab=options["vocab"], embed=640, head_dim=256, layers=(widths,) * 18, tied=True)
    model = random_llama(spec, jax.random.key(0))
    shape = (options["batch"], options["length"])
    tokens, mask = jax.random.randint(jax.random.key(1), shape, 0, spec.vocab), jnp.ones(shape, bool)
    needs = union_of_needs(make_estimators(["taylor_element", "gate_fisher", "wanda"]).values())
    rows = Packed(tokens, jnp.zeros(shape, jnp.int32), jnp.broadcast_to(jnp.arange(shape[1])[None], shape), mask)

    @jax.jit
    def gradient(model: Any) -> Any:
        return jax.value_and_grad(lambda model: sums_of(model, None, rows, Objective(remat="dots")).loss)(model)

    step = {
        "score": lambda: observe(model, [(tokens, mask)], needs, remat="dots").values,
        "evaluate": lambda: window_losses(model, [(tokens, mask)]).sums,
        "train": lambda: gradient(model),
    }[task]
    jax.block_until_ready(step())
    times = []
    for _ in range(options["repeats"]):
        start = time.perf_counter()
        jax.block_until_ready(step())
        times.append(time.perf_counter() - start)
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20
    return statistics.median(times), peak


if __name__ == "__main__":
    main()
