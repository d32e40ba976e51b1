"""How large is a report over many runs, and how long does a browser take to open it?

    python experiments/benchmarks/report_size.py [--runs 20] [--candidates 200] [--repeats 5] [--keep DIR]

Invents runs of a model of 32 layers, each with all records that a comparison keeps: losses of windows, what is kept,
scores, fusions, stages and cost. Prints the seconds to write the report and its size. With playwright (`pip install
playwright`) and Chromium (the command that SAAP_CHROMIUM names, or `chromium`) also the time from navigation to the
first frame after loading: median and range of fresh pages at 390 and 1440 pixels.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from saap_jax.report.write import write_reports
from saap_jax.runs.directory import RunDirectory

METRICS = ("ppl@128 builtin:reference", "ppl@128 builtin:descriptions")
ESTIMATORS = (
    "random", "magnitude", "taylor_vector", "taylor_element", "taylor_element_second", "gate_taylor", "gate_fisher",
    "gate_hessian", "wanda", "fluctuation", "taylor_element+gate_taylor+wanda", "gate_fisher+wanda",
)  # fmt: skip
SEARCHES = (
    "uniform", "global", *(f"adaptive,lambda={weight:g}" for weight in (-0.5, -0.25, -0.1, 0.1, 0.25, 0.5, 1.0)),
)  # fmt: skip
RATIOS = (0.2, 0.5)
LAYERS, UNITS, WINDOWS = 32, {"attention": 32, "mlp": 11008}, 64
PARAMETERS, PRUNABLE = 6_738_415_616, 6_476_005_376


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, value in (("runs", 20), ("candidates", 200), ("repeats", 5)):
        parser.add_argument(f"--{option}", type=int, default=value)
    parser.add_argument("--keep", help="directory for the runs and the report; default: one that is removed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(arguments.keep or temporary)
        paths = write_runs(directory, arguments.runs, arguments.candidates)
        start = time.perf_counter()
        written = write_reports(paths, directory / "report.html", overwrite=True)
        print(
            f"{arguments.runs} runs of {arguments.candidates} candidates: {time.perf_counter() - start:.1f} s to write"
        )
        for path in written:
            print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")
        opened(written[0], arguments.repeats)


def opened(page: Path, repeats: int) -> None:
    """Print how long a browser takes to open a page."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        print("not opened: playwright is not installed")
        return
    chromium = shutil.which(os.environ.get("SAAP_CHROMIUM", "chromium"))
    if chromium is None:
        print("not opened: no chromium; name one in SAAP_CHROMIUM")
        return
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for width in (390, 1440):
            seconds = []
            for _ in range(repeats):
                tab = browser.new_page(viewport={"width": width, "height": 900})
                tab.goto(page.resolve().as_uri())
                frame = (
                    "() => new Promise(done => requestAnimationFrame(() => setTimeout(() => done(performance.now()))))"
                )
                seconds.append(tab.evaluate(frame) / 1000)
                tab.close()
            low, high = min(seconds), max(seconds)
            print(f"open at {width} pixels: {statistics.median(seconds):.2f} s ({low:.2f} to {high:.2f})")
        browser.close()


def write_runs(directory: Path, runs: int = 20, candidates: int = 200) -> list[Path]:
    """Write invented comparisons, all of the same texts and model; every candidate is a line of the table."""
    return [write_run(directory / f"sweep-{number + 1:02}", number, candidates) for number in range(runs)]


def write_run(path: Path, seed: int, candidates: int) -> Path:
    """Write one invented comparison of so many candidates, half of them at each ratio."""
    random = np.random.default_rng(seed)
    config = {
        "name": path.name,
        "model": {"name": "invented-7b", "dtype": "bfloat16"},
        "calibration": {"scenarios": ["builtin:reference"], "examples": 32 + seed, "length": 128, "seed": seed},
        "estimation": {"estimators": list(ESTIMATORS), "remat": "dots"},
        "search": {"allocation": "uniform", "rank_by": "score_per_parameter", "multiple_of": {"mlp": 1 << (seed % 8)}},
        "ratios": list(RATIOS),
        "best_ratio": RATIOS[0],
    }
    run = RunDirectory.open(path, config, overwrite=True)
    dense = {metric: random.normal(2.5, 0.5, WINDOWS) for metric in METRICS}
    run.update(kind="compare", dense=measured(dense) | {"parameters": PARAMETERS, "seconds": 20.0}, **about(seed))
    names = [f"{estimator},{search}" for search in SEARCHES for estimator in ESTIMATORS]
    for number in range(candidates):
        place, ratio = divmod(number, len(RATIOS))
        name = names[place] if place < len(names) else f"{names[place % len(names)]},scenario={place // len(names)}"
        run.append(candidate(name, RATIOS[ratio], place / max(candidates / 2, 1), dense, random))
    members = {"taylor_element": 0.4, "gate_taylor": 0.05, "wanda": 20.0}
    run.update(fusions={"reference": {ESTIMATORS[10]: fusion(members, random)}}, **outcome(names[0], dense))
    shapes = {"attention": (LAYERS, 32), "mlp": (LAYERS, 512)}
    scores = {f"reference/{e}/{s}": random.lognormal(0, 2, shape) for e in ESTIMATORS for s, shape in shapes.items()}
    run.save_arrays("scores", scores)
    return path


def candidate(name: str, ratio: float, share: float, dense: dict, random: np.random.Generator) -> dict:
    """Return a line of `metrics.jsonl`; `share` in [0, 1] says how far down the table it is."""
    losses = {
        metric: values + (0.3 + share) * 2 * ratio + random.normal(0, 0.1, WINDOWS) for metric, values in dense.items()
    }
    actual = ratio + random.uniform(-0.004, 0.004)
    kept = {
        structure: np.clip(random.normal((1 - ratio) * units, 0.15 * units, LAYERS).round(), 0, units).astype(int)
        for structure, units in UNITS.items()
    }
    estimator, _, search = name.partition(",")
    return {
        "candidate": f"{name}@{ratio:g}",
        "variant": name,
        "seed": 0,
        "estimator": estimator,
        "allocation": search.partition(",")[0],
        "ratio_asked": ratio,
        "ratio_actual": actual,
        "parameters": round(PARAMETERS - PRUNABLE * actual),
        **measured(losses),
        "seconds": 11.3,
        "kept": kept,
    }


def measured(losses: dict) -> dict:
    """Return the perplexities of losses, and these themselves."""
    return {"ppl": {metric: float(np.exp(values.mean())) for metric, values in losses.items()}, "losses": losses}


def fusion(members: dict[str, float], random: np.random.Generator) -> dict:
    """Return the record of a learned fusion with a scope a layer."""
    scopes = [f"{structure}/{layer}" for structure in UNITS for layer in range(LAYERS)]
    sigmas = {m: {scope: sigma * random.uniform(0.5, 2) for scope in scopes} for m, sigma in members.items()}
    return {
        "sigmas": sigmas,
        "weights": {m: {scope: 1 / (2 * sigma**2) for scope, sigma in each.items()} for m, each in sigmas.items()},
        "loss": 0.0,
    }


def about(seed: int) -> dict:
    """Return what a run records of itself at its beginning."""
    return {
        "versions": {"saap_jax": "0.1.0", "jax": "0.10.2", "flax": "0.12.8", "python": "3.11.7"},
        "devices": {"platform": "gpu", "kind": "NVIDIA H100 80GB HBM3", "count": 1, "cores": 16},
        "git_commit": "0123456789abcdef0123456789abcdef01234567",
        "seeds": {"calibration": [seed]},
        "model": {
            "name": "invented-7b",
            "parameters": PARAMETERS,
            "prunable_parameters": PRUNABLE,
            "layers": LAYERS,
            "units": UNITS,
        },
        "metrics": [{"name": name, "domain": domain} for name, domain in zip(METRICS, ("in", "out"), strict=True)],
    }


def outcome(variant: str, dense: dict) -> dict:
    """Return what a run records at its end."""
    stages = [
        {
            "name": name,
            "seconds": seconds,
            "times": 1,
            "compile_seconds": seconds / 4,
            "compiles": 12,
            "peak_host_gib": 20.5,
            "peak_device_gib": 61.2,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds if tokens else None,
        }
        for name, seconds, tokens in (("load", 61.0, None), ("score", 95.0, 4096), ("evaluate", 2300.0, 3_276_800))
    ]
    ppl = measured(dense)["ppl"]
    return {
        "status": "finished",
        "stages": stages,
        "cost": {
            "device_hours": 0.68,
            "devices": 1,
            "usd": 2.9,
            "usd_per_million_tokens": {"dense": 0.021, "cut": 0.018},
            "prices": {"kind": "NVIDIA H100", "usd_per_hour": 4.2, "date": "2026-06"},
        },
        "suggestions": [
            {"text": "Two are level.", "effect": "expected: nothing", "command": "saap compare wanda --seeds 0 1 2"}
        ],
        "best": {
            "candidate": f"{variant}@0.2",
            "parameters": round(PARAMETERS - 0.2 * PRUNABLE),
            "bytes": 10_900_000_000,
            "dense_bytes": 13_476_831_232,
            "forward_seconds": 0.31,
            "dense_forward_seconds": 0.38,
            "forward_tokens": 1024,
            "ppl": {metric: 1.3 * value for metric, value in ppl.items()},
            "ppl_masked": {metric: 1.3 * value for metric, value in ppl.items()},
            "segments": 27,
        },
    }  # fmt: skip


if __name__ == "__main__":
    main()
