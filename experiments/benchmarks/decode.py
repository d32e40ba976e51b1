"""How fast are prefill and decoding? Against transformers (torch), and against what was removed from a cut model.

    python experiments/benchmarks/decode.py [--batch 1] [--prompt 128] [--new 33] [--repeats 9] [--ratio 0.5]
        [--pruned DIRECTORY] [--dtype float32] [--threads 2]

The dense model here, the same in transformers with its own cache, and a model with half of its prunable parameters
removed take turns, so that drift of the machine hits all alike. Without --pruned the half that goes is of small weights
in every layer (`magnitude`, uniform): what a model says does not change its time, only its widths do; --multiple-of
rounds MLP widths. Prints the median, smallest and largest of each, ratios of the same round, and what the cut model
should gain by its operations (prefill) and bytes (decoding). Needs torch (extra `parity`) for the comparison with
transformers, and leaves it out, saying so, where torch is missing.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import saap_jax
from saap_jax.evaluation.cost import in_turns
from saap_jax.evaluation.timing import Programs, Spread, Times, Workload, compile_programs, speed_up, spread, time_once
from saap_jax.llama.generate import decoder_of


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, value in (("batch", 1), ("prompt", 128), ("new", 33), ("repeats", 9), ("multiple-of", 1)):
        parser.add_argument(f"--{option}", type=int, default=value)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--pruned", default="")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of torch")
    arguments = parser.parse_args()

    workload = Workload(arguments.batch, arguments.prompt, arguments.new)
    dense = saap_jax.load_model("smollm2-135m", arguments.dtype)
    pruned = (
        saap_jax.load_model(arguments.pruned, arguments.dtype)
        if arguments.pruned
        else cut_by_magnitude(dense, arguments.ratio, arguments.multiple_of)
    )
    start = time.perf_counter()
    ours = compile_programs(decoder_of(dense), workload)
    smaller = compile_programs(decoder_of(pruned), workload)
    print(f"compiled in {time.perf_counter() - start:.1f} s; {len(pruned.segments)} segments in the cut model")
    runners: dict[str, Callable[[], Times]] = {"dense": lambda: time_once(ours), "cut": lambda: time_once(smaller)}
    if (theirs := torch_runner(dense, ours, arguments.dtype, arguments.threads)) is None:
        print("transformers: left out, torch is not installed (pip install 'saap_jax[parity]')")
    else:
        runners["transformers"] = theirs
    times = dict(zip(runners, in_turns([*runners.values()], arguments.repeats), strict=True))
    report(times, workload, ours, smaller)


def report(times: dict[str, list[Times]], workload: Workload, ours: Programs, smaller: Programs) -> None:
    """Print times, and ratios of the same round."""
    print(f"batch {workload.batch}, {workload.prompt} prompt tokens, {workload.new} new; median (smallest to largest)")
    for name, measured in times.items():
        prefill = spread(1e3 * each.prefill for each in measured)
        rate = spread(workload.batch / each.step for each in measured)
        print(f"{name:<14} prefill {shown(prefill, 1)} ms   decode {shown(rate, 2)} tokens/s")
    if "transformers" in times:
        pairs = list(zip(times["transformers"], times["dense"], strict=True))
        prefill = spread(theirs.prefill / ours.prefill for theirs, ours in pairs)
        step = spread(theirs.step / ours.step for theirs, ours in pairs)
        print(f"dense, times faster than transformers: prefill {shown(prefill, 2)}   decode {shown(step, 2)}")
    found = speed_up(smaller, times["cut"], ours, times["dense"])
    for name, predicted, measured in (
        ("prefill, by operations", found.prefill, found.measured_prefill),
        ("decode, by bytes", found.step, found.measured_step),
    ):
        share = measured.median / predicted
        print(f"cut, times faster than dense: {name}: {shown(measured, 2)}, predicted {predicted:.2f} = {share:.0%}")


def shown(values: Spread, digits: int) -> str:
    """Return median and range."""
    return f"{values.median:.{digits}f} ({values.low:.{digits}f} to {values.high:.{digits}f})"


def cut_by_magnitude(model: saap_jax.Llama, ratio: float, multiple: int) -> saap_jax.Llama:
    """Return a model without the units of the smallest weights."""
    tokenizer = saap_jax.load_tokenizer("smollm2-135m")
    windows = saap_jax.calibration_windows("builtin:reference", tokenizer, examples=1, length=16, seed=0)
    scores = saap_jax.score_units(model, windows, ["magnitude"], stability=False, batch_size=1).scores("magnitude")
    method = f"within(multiple_of={{mlp: {multiple}}}) > uniform"
    return saap_jax.cut(model, saap_jax.select_units(model, scores, ratio, method).keep)


def torch_runner(model: saap_jax.Llama, ours: Programs, dtype: str, threads: int) -> Callable[[], Times] | None:
    """Return what times the same model in transformers, greedily, or None where torch is missing."""
    try:
        import torch
    except ModuleNotFoundError:
        return None
    from transformers import LlamaForCausalLM

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as directory:
        path = saap_jax.save_model(model, Path(directory) / "model")
        theirs: Any = LlamaForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    prompts = torch.tensor(ours.prompts)
    left = ours.workload.new - 1

    def run() -> Times:
        with torch.inference_mode():
            start = time.perf_counter()
            result = theirs(prompts, use_cache=True, logits_to_keep=1)
            token = result.logits[:, -1:].argmax(-1)
            read = time.perf_counter()
            for _ in range(left):
                result = theirs(token, past_key_values=result.past_key_values, use_cache=True)
                token = result.logits[:, -1:].argmax(-1)
            return Times(read - start, read - start, (time.perf_counter() - read) / left)

    return run


if __name__ == "__main__":
    main()
