"""How fast is the scoring pass? In forward passes, against a matrix product, an earlier state of the project, torch.

    python experiments/benchmarks/scoring.py [--examples 32] [--batch 8] [--length 128] [--repeats 3] [--remat dots]
        [--before DIRECTORY] [--torch] [--memory]

`--before` is another checkout of the project, measured in the same run; `--torch` (the packages of `make parity`) adds
what LLM-Pruner does: gradients of all parameters from batches, and gradients and their squares one window at a time.
Every arm is a process of its own that waits for its turn, so that no pool of threads disturbs another; the variants
take turns, and seconds are medians of warm passes. A pass reads the text, makes the statistics and applies the
formulas. Operations are counted as a forward pass has them (two a parameter, the unembedding included, and attention).
`--memory` adds the peak of each variant in a fresh process (Linux: the process; model and compiling included).
"""

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

EIGHT = "magnitude wanda fluctuation gate_fisher gate_taylor taylor_vector taylor_element random"
VARIANTS = {
    "forward": "",
    "wanda": "wanda",
    "gate_fisher": "gate_fisher",
    "taylor_element": "taylor_element",
    "all eight of the quickstart": EIGHT,
    "fisher": "fisher",
    "fisher, taylor_element_second": "fisher taylor_element_second",
}
TORCH = ("torch, gradients", "torch, gradients and squares")
MATMUL = "matmul"
WARM = "one batch of "
"""Before a variant: to see how much memory it takes."""
SIZE = 4096


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, value in (("examples", 32), ("batch", 8), ("length", 128), ("repeats", 3)):
        parser.add_argument(f"--{option}", type=int, default=value)
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="dots")
    parser.add_argument("--before", metavar="DIRECTORY")
    for flag in ("torch", "memory"):
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument("--worker", choices=("jax", "torch"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        serve(jax_jobs(arguments) if arguments.worker == "jax" else torch_jobs(arguments))
        return
    arms = {"now": (None, (MATMUL, *VARIANTS))}
    if arguments.before:
        arms["before"] = (arguments.before, tuple(VARIANTS))
    if arguments.torch:
        arms["torch"] = (None, TORCH)
    seconds = take_turns(arms, arguments)
    peaks = (
        {arm: {name: peak(arm, tree, name) for name in names} for arm, (tree, names) in arms.items()}
        if (arguments.memory)
        else {}
    )
    show(seconds, peaks, arguments)


def take_turns(arms: dict[str, Any], arguments: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of every repeat, by arm and variant: round after round, all of them once."""
    found: dict[str, dict[str, list[float]]] = {arm: {name: [] for name in names} for arm, (_, names) in arms.items()}
    with contextlib.ExitStack() as stack:
        ask = {arm: stack.enter_context(worker(arm, tree)) for arm, (tree, _) in arms.items()}
        for turn in range(arguments.repeats + 1):
            for name in dict.fromkeys(name for by_name in found.values() for name in by_name):
                for arm in [arm for arm in arms if name in found[arm]]:
                    seconds = ask[arm](name)["seconds"]
                    found[arm][name] += [seconds] * bool(turn)  # the first one compiles
                    print(f"{turn}: {arm}, {name}: {seconds:.2f} s", file=sys.stderr)
    return found


@contextlib.contextmanager
def worker(arm: str, tree: str | None) -> Iterator[Callable[[str], dict[str, Any]]]:
    """Yield what makes a process of its own, of another checkout if one is given, do a variant once."""
    environment = os.environ | ({"PYTHONPATH": str(Path(tree).resolve())} if tree else {})
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", "torch" if arm == "torch" else "jax"]
    with subprocess.Popen(
        command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        requests, answers = process.stdin, process.stdout
        assert requests is not None
        assert answers is not None

        def ask(name: str) -> dict[str, Any]:
            with contextlib.suppress(BrokenPipeError):
                print(name, file=requests, flush=True)
            if not (answer := answers.readline()):
                raise SystemExit(f"{arm}: the process that measures {name!r} ended; see above why")
            return json.loads(answer)

        yield ask
        requests.close()


def peak(arm: str, tree: str | None, name: str) -> float:
    """Return the most GiB that a fresh process held for one variant."""
    with worker(arm, tree) as ask:
        return ask(f"{WARM}{name}")["peak"]


Job = Callable[[bool], Any]
"""Does one pass over all windows, or over one batch of them where that is said."""


def serve(jobs: dict[str, Job]) -> None:
    """Do what is asked for on stdin, and say how long it took and the peak so far."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print
    for line in sys.stdin:
        start = time.perf_counter()
        name = line.rstrip("\n")
        jobs[name.removeprefix(WARM)](name.startswith(WARM))
        seconds = time.perf_counter() - start
        # not getrusage: that begins with the memory of the process that started this one
        held = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20
        out.write(json.dumps({"seconds": seconds, "peak": held}) + "\n")


def jax_jobs(arguments: argparse.Namespace) -> dict[str, Job]:
    """Return the variants, each a call that ends when its results are there."""
    import jax

    import saap_jax
    from saap_jax.data.windows import pairs
    from saap_jax.evaluation.perplexity import window_losses

    model, windows = text(arguments)
    first = type(windows)(*(array[: arguments.batch] for array in windows))
    batches = pairs(windows, arguments.batch)
    print(f"{saap_jax.__file__}: jax {jax.__version__}", file=sys.stderr)

    def score(names: tuple[str, ...]) -> Job:
        options = {"batch_size": arguments.batch, "remat": arguments.remat}
        try:
            from saap_jax.runtime.progress import Passes
            from saap_jax.steps.score.calibrate import calibrate
            from saap_jax.steps.score.score import Score
            from saap_jax.subjects.llama import subject_of
        except ModuleNotFoundError:  # `--before` names a checkout from before methods were chains
            from saap_jax.api import calibrate

            return lambda one: jax.block_until_ready(calibrate(model, first if one else windows, names, **options))
        subject, plan = subject_of(model), {name: Score(name) for name in names}
        passes = Passes(**options)
        return lambda one: jax.block_until_ready(
            calibrate(subject, {"text": first if one else windows}, plan, passes).scenarios
        )

    jobs = {name: score(tuple(names.split())) for name, names in VARIANTS.items() if names}
    matrix = jax.random.normal(jax.random.key(0), (SIZE, SIZE))
    return jobs | {
        "forward": lambda one: window_losses(model, batches[:1] if one else batches),
        MATMUL: lambda _: jax.block_until_ready(jax.numpy.matmul(matrix, matrix)),
    }


def torch_jobs(arguments: argparse.Namespace) -> dict[str, Job]:
    """Return what LLM-Pruner does: a backward pass for gradients of all parameters, and one a window for squares."""
    import torch
    import transformers

    import saap_jax

    model, windows = text(arguments)
    with tempfile.TemporaryDirectory() as directory:
        saap_jax.save_model(model, path := Path(directory) / "model")
        ours = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    del model
    tokens = torch.as_tensor(windows.tokens, dtype=torch.long)
    parameters = list(ours.parameters())
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads", file=sys.stderr)

    def gradients(one: bool) -> None:
        for parameter in parameters:
            parameter.grad = None
        for some in tokens.split(arguments.batch)[: 1 if one else None]:
            (ours(some, labels=some).loss * len(some) / len(tokens)).backward()

    def squares(one: bool) -> None:
        mean, square = ([torch.zeros_like(parameter) for parameter in parameters] for _ in range(2))
        for window in tokens[: 1 if one else None, None]:
            for parameter in parameters:
                parameter.grad = None
            ours(window, labels=window).loss.backward()
            each = [parameter.grad for parameter in parameters]
            torch._foreach_add_(mean, each)
            torch._foreach_addcmul_(square, each, each)

    return dict(zip(TORCH, (gradients, squares), strict=True))


def text(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Return the packaged model and the calibration windows."""
    import saap_jax

    model, tokenizer = saap_jax.load_model("smollm2-135m"), saap_jax.load_tokenizer("smollm2-135m")
    return model, saap_jax.calibration_windows("builtin:reference", tokenizer, arguments.examples, arguments.length, 0)


def show(
    seconds: dict[str, dict[str, list[float]]], peaks: dict[str, dict[str, float]], arguments: argparse.Namespace
) -> None:
    """Print a table in Markdown: a row a variant, columns an arm."""
    middle = {arm: {n: statistics.median(times) for n, times in rows.items()} for arm, rows in seconds.items()}
    rate = 2 * SIZE**3 / middle["now"][MATMUL]
    done = operations(arguments) * arguments.examples * arguments.length
    share = done / middle["now"]["forward"] / rate
    print(
        f"{arguments.examples} windows of {arguments.length} tokens, batches of {arguments.batch}, remat "
        f"{arguments.remat}, median of {arguments.repeats}; a product of {SIZE} x {SIZE} matrices: {rate / 1e9:.0f} "
        f"GFLOP/s, of which the forward pass has {share:.0%}\n"
    )
    arms = [arm for arm in ("before", "now") if arm in middle]
    against = middle.get("torch", {}).get(TORCH[1])
    heads = ["pass", *(f"{arm}: {unit}" for arm in arms for unit in ("seconds", "forward passes"))]
    heads += ["of torch's squares"] * bool(against) + [f"{arm}: peak GiB" for arm in peaks]
    print("| " + " | ".join(heads) + " |\n|---" + "|---:" * (len(heads) - 1) + "|")
    for name in (*VARIANTS, *middle.get("torch", {})):
        cells = [name]
        for arm in arms:
            taken = middle["torch" if name in TORCH and arm == "now" else arm].get(name)
            base = middle["now" if name in TORCH else arm]["forward"]
            cells += ["", ""] if taken is None else [f"{taken:.1f}", f"{taken / base:.2f}"]
        taken = middle["now"].get(name) or middle["torch"][name]
        cells += [f"{taken / against:.2f}"] if against else []
        cells += [f"{found[name]:.2f}" if name in found else "" for found in peaks.values()]
        print("| " + " | ".join(cells) + " |")


def operations(arguments: argparse.Namespace) -> float:
    """Count the operations of one token's forward pass: two a parameter, and attention to every position."""
    import saap_jax

    model = saap_jax.load_model("smollm2-135m")
    heads = sum(layer.kv_heads * layer.q_per_kv for layer in model.spec.layers)
    return 2.0 * saap_jax.count_parameters(model) + 4.0 * heads * model.spec.head_dim * arguments.length


if __name__ == "__main__":
    main()
