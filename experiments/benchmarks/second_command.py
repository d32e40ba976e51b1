"""What does a second command of the same shapes compile? Each one twice, in fresh processes, in an empty cache folder.

    python experiments/benchmarks/second_command.py              # compare, prune, evaluate, recover: a few windows
    python experiments/benchmarks/second_command.py --quickstart # `saap compare quickstart`, by stage
    PYTHONPATH=.venv/tpu-plan JAX_PLATFORMS=cpu python experiments/benchmarks/second_command.py --plan

Prints programs, those read from the cache, those compiled, and seconds: of processors, and by the clock. A plan needs
libtpu; what it keeps are no programs, so it counts those that are compiled all the same.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EVENTS = {
    "/jax/core/compile/backend_compile_duration": "programs",
    "/jax/compilation_cache/cache_hits": "read",
    "/jax/compilation_cache/cache_misses": "compiled",
}
CALIBRATION = ("--calibration.examples", "8", "--calibration.length", "32", "--calibration.batch-size", "2")
EVALUATION = ("--evaluation.windows", "4", "--evaluation.length", "32")
TRAINING = (
    *("--new-tokens", "0", "--data.length", "32", "--training.batch-size", "4"),
    *("--training.max-steps", "4", "--training.warmup", "1"),
)


def commands(model: str, arguments: argparse.Namespace) -> dict[str, list[str]]:
    """List the commands by name; what they make they find anew in a folder of each turn."""
    if arguments.plan:
        return {"plan": ["plan", "llama-2-7b", "v5e-16"]}
    if arguments.quickstart:
        return {"quickstart": ["compare", "quickstart"]}
    small = ("--model.name", model, *CALIBRATION, *EVALUATION)
    return {
        "compare": ["compare", "--methods", "wanda", "gate_fisher > least_squares", *small],
        "prune": ["prune", "--method", "wanda", "--ratio", "0.2", "--out", "pruned", *small],
        "evaluate": ["evaluate", model, "pruned", "--windows", "4", "--length", "32"],
        "recover": ["recover", "pruned", "--dense", model, "--method.name", "lora", *TRAINING, *EVALUATION],
    }


def child(words: list[str]) -> int:
    """Run a command as `saap` does; print what was counted as the last line of the error stream."""
    from saap_jax.runtime.programs import keep_programs

    keep_programs(words)
    import jax.monitoring

    counts = dict.fromkeys(EVENTS.values(), 0)

    def count(event: str, *_: object, **__: object) -> None:
        if event in EVENTS:
            counts[EVENTS[event]] += 1

    jax.monitoring.register_event_listener(count)
    jax.monitoring.register_event_duration_secs_listener(count)
    from saap_jax.cli.main import main

    code = main(words)
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps(counts | {"processor": used.ru_utime + used.ru_stime}), file=sys.stderr)
    return code


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--quickstart", action="store_true")
    parser.add_argument("--plan", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION")}
        environment["XDG_CACHE_HOME"] = f"{place}/cache"
        for turn in ("first", "second"):
            os.mkdir(folder := f"{place}/{turn}")
            for name, words in commands(arguments.model, arguments).items():
                start = time.perf_counter()
                inside = [sys.executable, str(Path(__file__).resolve()), "--inside", *words]
                done = subprocess.run(inside, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True, stdout=-3)
                if done.returncode:
                    raise SystemExit(done.stderr)
                found = json.loads(done.stderr.splitlines()[-1])
                told = ", ".join(f"{found[each]} {each}" for each in EVENTS.values())
                seconds = f"{found['processor']:.1f} s of processors, {time.perf_counter() - start:.1f} s"
                print(f"{turn:6s} {name:10s} {told}; {seconds}", flush=True)
                for record in Path(folder).glob("runs/quickstart/run.json"):
                    for stage in json.loads(record.read_text())["stages"]:
                        keys = ("seconds", "compile_seconds", "compiles", "cache_hits", "cache_misses")
                        print("       ", stage["name"], {key: round(stage[key], 1) for key in keys})
        size = sum(path.stat().st_size for path in Path(place, "cache").rglob("*-cache"))
        print(f"the cache holds {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        sys.exit(child(sys.argv[2:]))
    main()
