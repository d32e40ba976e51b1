"""What does one pass for all estimators cost? Against `taylor_element_second` alone, the dearest of them.

    python experiments/benchmarks/pass_cost.py [--examples 16] [--batch 8] [--repeats 5] [--remat dots]

`gate_hessian` is left out: it has a step of its own, see gate_hessian.py. Prints wall and CPU seconds (of all threads,
which other processes disturb less) of the pass over the text and of the formulas, whose cost does not depend on the
text: median of the repeats, warm, all taking turns in one process. Then the peak memory of each by itself, in a new
process, model and compiling included: of the device where it counts that, else of the process (Linux). Ratios are of
medians, with the lowest and the highest of a turn.
"""

import argparse
import multiprocessing
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np

import saap_jax
from saap_jax.data.windows import pairs
from saap_jax.estimation.base import Batch
from saap_jax.estimation.observe import observe, score, union_of_needs
from saap_jax.estimation.registry import ESTIMATORS, make_estimators
from saap_jax.llama.model import Llama

Name = TypeVar("Name", int, str)
ALONE = ("taylor_element_second",)
TOGETHER = tuple(name for name in ESTIMATORS if name != "gate_hessian")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, value in (("examples", 16), ("batch", 8), ("length", 128), ("repeats", 5)):
        parser.add_argument(f"--{option}", type=int, default=value)
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="dots")
    arguments = parser.parse_args()

    # first of all, for this process would leave them no memory on an accelerator
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as processes:
        peaks = processes.starmap(peak_memory, [(names, arguments) for names in (ALONE, TOGETHER)], chunksize=1)
    passes, formulas = measure(arguments)
    tokens = arguments.examples * arguments.length
    print(f"{tokens} tokens, batches of {arguments.batch} x {arguments.length}, remat={arguments.remat}")
    print_row(f"median of {arguments.repeats}", *ALONE, f"all {len(TOGETHER)}", "ratio")
    for what, seconds in {"pass": passes, "formulas": formulas, "both": passes + formulas}.items():
        for index, kind in enumerate(("wall s", "CPU s")):
            alone, together = seconds[..., index]
            (one, all_), turns = np.median(seconds[..., index], axis=1), together / alone
            ratio = f"{all_ / one:.2f} ({turns.min():.2f}-{turns.max():.2f})"
            print_row(f"{what}, {kind}", f"{one:.2f}", f"{all_:.2f}", ratio)
    one, all_ = np.divide(peaks, 2**30)
    print_row("peak memory, GiB", f"{one:.2f}", f"{all_:.2f}", f"{all_ / one:.2f}")


def print_row(*cells: str) -> None:
    """Print cells in columns."""
    print("".join(f"{cell:>24}" for cell in cells))


def measure(arguments: argparse.Namespace) -> np.ndarray:
    """Return seconds, [pass or formulas, alone or together, repeats, wall or CPU]."""
    model, pairs = load(arguments)
    sets = [make_estimators(names) for names in (ALONE, TOGETHER)]
    statistics = observe(model, pairs, union_of_needs(sets[1].values()), remat=arguments.remat)
    jobs: list[Callable[[], object]] = []
    for made in sets:
        needs = union_of_needs(made.values())
        jobs.append(lambda needs=needs: observe(model, pairs, needs, remat=arguments.remat).values)
    for made in sets:
        jobs.append(lambda made=made: score(made, statistics, model))
    seconds = take_turns(dict(enumerate(jobs)), arguments.repeats)
    return np.stack([seconds[number][1:] for number in range(4)]).reshape(2, 2, arguments.repeats, 2)


def load(arguments: argparse.Namespace) -> tuple[Llama, list[Batch]]:
    """Return the model and the microbatches."""
    model, tokenizer = saap_jax.load_model("smollm2-135m"), saap_jax.load_tokenizer("smollm2-135m")
    windows = saap_jax.calibration_windows("builtin:reference", tokenizer, arguments.examples, arguments.length, 0)
    return model, pairs(windows, arguments.batch)


def peak_memory(names: tuple[str, ...], arguments: argparse.Namespace) -> int:
    """Return the largest number of bytes that this process ever had in use, after one pass and its formulas."""
    model, pairs = load(arguments)
    made = make_estimators(names)
    score(made, observe(model, pairs, union_of_needs(made.values()), remat=arguments.remat), model)
    counted = jax.local_devices()[0].memory_stats()
    if counted:
        return counted["peak_bytes_in_use"]
    # not getrusage: that begins with the memory of the process that started this one
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def take_turns(jobs: Mapping[Name, Callable[[], object]], repeats: int) -> dict[Name, np.ndarray]:
    """Return each job's wall and CPU seconds, `[1 + repeats, 2]`, the first of which compiles.

    In turns, so that drift hits all jobs alike.
    """
    times: dict[Name, list[np.ndarray]] = {name: [] for name in jobs}
    for _ in range(1 + repeats):
        for name, job in jobs.items():
            start = clocks()
            jax.block_until_ready(jax.tree.leaves(job()))
            times[name].append(clocks() - start)
    return {name: np.stack(turns) for name, turns in times.items()}


def clocks() -> np.ndarray:
    """Return wall seconds and CPU seconds of all threads, which other processes disturb less."""
    return np.array([time.perf_counter(), time.process_time()])


if __name__ == "__main__":
    main()
