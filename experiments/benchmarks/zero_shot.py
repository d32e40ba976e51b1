"""What do zero-shot tasks cost, beside the plain forward passes that they need?

    python experiments/benchmarks/zero_shot.py [--tasks boolq piqa hellaswag winogrande arc_easy] [--limit 200]

Needs tasks below SAAP_DATA (`zeroshot/NAME.jsonl`). A *needed pass* is the ordinary forward pass of the model (logits
and losses of all positions by `loss_step`, as perplexity has it) over each input that differs: the context and the
choice without its last token, once where two requests need the same. Its time is taken without padding: windows of the
mean length of those inputs, full of tokens, as many as make up the tokens of all of them. So padding is what tasks can
lose against the passes; logits that nobody needs are what they can win.

The tasks are scored as `saap evaluate --tasks` does, tokenising included, compiling left out (its seconds are printed).
Prints tokens, seconds (wall and CPU) of both, in turns, medians, their ratio (limit: 1.2), padding, programs compiled.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from pass_cost import clocks

import saap_jax
from saap_jax.config.use import TasksConfig
from saap_jax.evaluation.likelihood import Request, batches_of, distinct_inputs, encode_pair, score_step
from saap_jax.evaluation.perplexity import loss_step
from saap_jax.evaluation.tasks import find_tasks, run_tasks
from saap_jax.llama.segments import ones_gates

FIVE = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy")
LIMIT = 1.2


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=FIVE)
    parser.add_argument("--model", default="smollm2-135m")
    for option, value in (("limit", 200), ("batch-size", 8), ("repeats", 3)):
        parser.add_argument(f"--{option}", type=int, default=value)
    arguments = parser.parse_args()

    model, tokenizer = saap_jax.load_model(arguments.model), saap_jax.load_tokenizer(arguments.model)
    found = find_tasks(TasksConfig(tasks=tuple(arguments.tasks), limit=arguments.limit))
    if found.harness:
        raise SystemExit(f"expected local tasks, got {', '.join(found.harness)}; set SAAP_DATA")
    tasks = found.local
    requests = [encode_pair(tokenizer, *pair) for task in tasks for item in task.items for pair in item.pairs]
    describe(requests, model.constants.positions, arguments.batch_size)
    inputs = distinct_inputs(requests, model.constants.positions)
    needed = sum(len(each.tokens) for each in inputs)
    length = round(needed / len(inputs))
    passes = round(needed / length / arguments.batch_size)
    tokens = np.resize(np.concatenate([each.tokens for each in inputs]), (arguments.batch_size, length)).astype(
        np.int32
    )
    batch, gates = (jnp.asarray(tokens), jnp.ones(tokens.shape, bool)), ones_gates(model.segments)

    def plain() -> np.ndarray:
        start = clocks()
        for _ in range(passes):
            jax.block_until_ready(loss_step(model, *batch, gates))
        return clocks() - start

    def scored() -> np.ndarray:
        start = clocks()
        run_tasks(model, tokenizer, tasks, batch_size=arguments.batch_size)
        return clocks() - start

    jax.block_until_ready(loss_step(model, *batch, gates))
    cold = scored()
    rounds = [(plain(), scored()) for _ in range(arguments.repeats)]
    seconds = np.median(np.array(rounds), axis=0)
    ratio = np.median([own / base for base, own in rounds], axis=0)
    print(f"needed passes: {passes} of {arguments.batch_size} x {length} tokens; seconds wall (CPU)")
    for name, row in zip(("needed passes", "tasks"), seconds, strict=True):
        print(f"{name:<14}{row[0]:>10.1f} ({row[1]:.1f})")
    print(f"ratio         {ratio[0]:>10.2f} ({ratio[1]:.2f}), limit {LIMIT}")
    print(f"programs: {score_step._cache_size()}; to compile them, about {cold[0] - seconds[1][0]:.1f} s")


def describe(requests: list[Request], positions: int, batch_size: int) -> None:
    """Print how many tokens there are, as they come, as they are needed, and with padding."""
    inputs = distinct_inputs(requests, positions)
    batches = batches_of(inputs, batch_size)
    plain = sum(len(request.context) + len(request.continuation) - 1 for request in requests)
    counts = {
        f"{len(requests)} requests": plain,
        f"{len(inputs)} different inputs": sum(len(each.tokens) for each in inputs),
        f"{len(batches)} batches, padded": sum(batch.length * batch.size for batch in batches),
        "tokens that are scored": sum(len(request.continuation) for request in requests),
    }
    for name, count in counts.items():
        print(f"{name:<34}{count:>10,}")


if __name__ == "__main__":
    main()
