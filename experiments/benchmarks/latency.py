"""How well does the table of sub-block times predict cut models? Predicted and measured, side by side.

    python experiments/benchmarks/latency.py [--batch 1] [--prompt 128] [--repeats 9] [--multiple-of 1]

Cuts SmolLM2-135M by the size of weights at several ratios, in every layer alike and by one ranking of all layers (which
gives layers of many widths); what a model says does not change its time. The table is measured on the dense model, then
all models take turns. Prints the time to read the prompts and of a step, predicted and measured, and the error; docs
promise 10 %.
"""

import argparse
from typing import NamedTuple

import saap_jax
from saap_jax.contrib.targets import measure_table
from saap_jax.evaluation.timing import Spread, Workload, compile_programs, spread, time_in_turns
from saap_jax.llama.generate import decoder_of

NEW = 9
"""Tokens that are generated behind each prompt, as `saap prune` does."""


class Case(NamedTuple):
    """A model to predict."""

    ratio: float
    allocation: str


CASES = tuple(Case(ratio, allocation) for ratio in (0.2, 0.35, 0.5) for allocation in ("uniform", "global"))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, value in (("batch", 1), ("prompt", 128), ("repeats", 9), ("multiple-of", 1)):
        parser.add_argument(f"--{option}", type=int, default=value)
    arguments = parser.parse_args()

    workload = Workload(arguments.batch, arguments.prompt, NEW)
    dense = saap_jax.load_model("smollm2-135m")
    windows = saap_jax.calibration_windows(
        "builtin:reference", saap_jax.load_tokenizer("smollm2-135m"), examples=1, length=16, seed=0
    )
    scores = saap_jax.score_units(dense, windows, ["magnitude"], stability=False, batch_size=1).scores("magnitude")
    table = measure_table(dense, workload, repeats=arguments.repeats)
    models = [dense]
    for case in CASES:
        method = f"within(multiple_of={{mlp: {arguments.multiple_of}}}) > {case.allocation}"
        models.append(saap_jax.cut(dense, saap_jax.select_units(dense, scores, case.ratio, method).keep))
    programs = [compile_programs(decoder_of(model), workload) for model in models]
    print(f"batch {workload.batch}, {workload.prompt} prompt tokens; median (smallest to largest), ms")
    for name, model, times in zip(
        ["dense", *(f"{case.ratio:.0%} {case.allocation}" for case in CASES)],
        models,
        time_in_turns(programs, arguments.repeats),
        strict=True,
    ):
        reading = shown(1e3 * table.latency(model.spec), spread(1e3 * each.prefill for each in times))
        step = workload.batch / table.tokens_per_second(model.spec)
        print(f"{name:<12} {len(model.segments):>2} segments   read {reading}   step ", end="")
        print(shown(1e3 * step, spread(1e3 * each.step for each in times)), flush=True)


def shown(predicted: float, measured: Spread) -> str:
    """Return a prediction, what was measured, and the error."""
    range_ = f"({measured.low:.1f} to {measured.high:.1f})"
    return f"{predicted:6.1f}, measured {measured.median:6.1f} {range_} {predicted / measured.median - 1:+.1%}"


if __name__ == "__main__":
    main()
