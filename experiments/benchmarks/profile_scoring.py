"""Where does the time of the scoring pass go? A profile of its step on a CPU, by kind of operation.

    python experiments/benchmarks/profile_scoring.py [--estimators taylor_element] [--examples 16] [--batch 8] [--top 0]

Runs one warm pass under jax.profiler and looks every event up in the program that XLA dumped. Time is that of threads:
two cores have two seconds a second. Products that XLA hands on to a pool of threads (its own `dot`, not YNNPACK's) show
only the handing on; they, and waiting, are in the last line, which is what remains of all threads' time. `--top` lists
single operations. PYTHONPATH=DIRECTORY profiles another checkout.
"""

import argparse
import collections
import os
import re
import tempfile
import time
from pathlib import Path

KINDS = (
    ("product with the vocabulary, forward and backward", r"btv.*dot|dot.*btv"),
    ("attention: scores, weights, values and their gradients", r"bkgts|btkgh,bskh"),
    ("products of the layers, forward and backward", r"dot"),
    ("softmax over the vocabulary and its backward pass", r"49152"),
    ("copies and transposes", r"copy|transpose"),
    ("zeros, and stacked slices written", r"broadcast|dynamic-update-slice"),
    ("sums into the state", r"wrapped_add|add_bitcast_fusion"),
    ("other elementwise work and reductions", r""),
)
"""Kind of operation -> what its name, result and place in the program match; the first that does."""


def main() -> None:
    """Profile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--estimators", nargs="+", default=["taylor_element"])
    for option, value in (("examples", 16), ("batch", 8), ("length", 128), ("top", 0)):
        parser.add_argument(f"--{option}", type=int, default=value)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        dump = "--xla_dump_hlo_as_text --xla_dump_hlo_module_re=.*observe_step.*"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={directory} {dump}"
        seconds, spent = profiled(arguments, directory)
        places = instructions(directory)
    kinds: dict[str, float] = dict.fromkeys((kind for kind, _ in KINDS), 0.0)
    for name, taken in spent.items():
        if name in places and not name.startswith("while"):
            text = f"{name} {places[name]}"
            kinds[next(kind for kind, pattern in KINDS if re.search(pattern, text))] += taken
    total = seconds * (os.cpu_count() or 1)
    print(
        f"{', '.join(arguments.estimators)}: {seconds:.2f} s, {total:.2f} s of threads\n\n| | s | % |\n|---|---:|---:|"
    )
    for kind, taken in (kinds | {"handed on to a pool, waiting, the host": total - sum(kinds.values())}).items():
        print(f"| {kind} | {taken:.2f} | {taken / total:.0%} |")
    for name, taken in spent.most_common(arguments.top):
        print(f"{taken:8.3f} s  {name:30} {places.get(name, '')[:160]}")


def profiled(arguments: argparse.Namespace, directory: str) -> tuple[float, collections.Counter]:
    """Return the seconds of a pass, and the seconds of each operation's events."""
    import jax

    import saap_jax
    from saap_jax.data.windows import pairs
    from saap_jax.estimation.observe import observe, union_of_needs
    from saap_jax.estimation.registry import make_estimators

    model, tokenizer = saap_jax.load_model("smollm2-135m"), saap_jax.load_tokenizer("smollm2-135m")
    windows = saap_jax.calibration_windows("builtin:reference", tokenizer, arguments.examples, arguments.length, 0)
    batches = pairs(windows, arguments.batch)
    needs = union_of_needs(make_estimators(arguments.estimators).values())

    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(observe(model, batches, needs, remat="dots").values)
        return time.perf_counter() - start

    run()
    with jax.profiler.trace(directory):
        seconds = run()
    [path] = Path(directory).glob("**/*.xplane.pb")
    spent: collections.Counter = collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            if line.name != "python":
                for event in line.events:
                    spent[event.name] += event.duration_ns / 1e9
    return seconds, spent


def instructions(directory: str) -> dict[str, str]:
    """Return, by name, the result of every instruction of the step and where in the program it is from."""
    [path] = Path(directory).glob("*observe_step*cpu_after_optimizations.txt")
    found = {}
    for line in path.read_text().splitlines():
        if match := re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (\S+) (.*)", line):
            place = re.search(r'op_name="([^"]*)"', match[3])
            found[match[1]] = f"{match[2]} {place[1] if place else ''}"
    return found


if __name__ == "__main__":
    main()
