"""How much of what pruning costs does compensation undo, without training? A section of docs/studies.md.

    SAAP_DATA=DATA python experiments/study_compensation.py run    # three seeds, 20 % and 50 %: 1.5 h on two cores
    python experiments/study_compensation.py report                # its tables

Units are chosen as `study_defaults.py` found best, calibrated on C4; evaluation is on WikiText-2 and Penn
Treebank, never on C4. Every arm keeps the same units and differs in what is done to the output matrices. Appends to a
run directory a seed, and goes on where it was stopped.
"""

import argparse
import os
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from study_defaults import CALIBRATION, LENGTH, RATIOS, SHORT, TREEBANK, WIKITEXT, evaluated
from tables import in_percent, perplexity

import saap_jax
from saap_jax.data.windows import Windows, pairs
from saap_jax.llama.model import Llama
from saap_jax.runs.directory import RunDirectory, read_candidates, read_run
from saap_jax.steps.chain import parse
from saap_jax.steps.repair.output import Bias, LeastSquares, OutputRepair
from saap_jax.steps.run import Runner
from saap_jax.subjects.llama import subject_of
from saap_jax.surgery.compensation import compensate
from saap_jax.types import STRUCTURES, Keep

SEEDS = (0, 1, 2)
METHOD = "fused > within(protect=(0.13, -0.07), attention=0.1) > uniform > rounds(0.1)"
WINDOWS = 64


class Arm(NamedTuple):
    """What is done to the kept units, on how many windows of calibration text."""

    repair: OutputRepair | None
    examples: int = 32


ARMS = {
    "none": Arm(None),
    "least squares": Arm(LeastSquares()),
    "least squares, 128 windows": Arm(LeastSquares(), 128),
    "least squares, 512 windows": Arm(LeastSquares(), 512),
    "FLAP's bias": Arm(Bias(propagate="dense")),
    "least squares, dense": Arm(LeastSquares(propagate="dense")),
}


def run_seed(
    seed: int,
    model: Llama,
    tokenizer: object,
    texts: dict[str, Windows],
    runs: Path,
    arms: list[str],
    ratios: list[float],
) -> None:
    """Do what the run directory of a seed does not hold yet."""
    run = RunDirectory.open(runs / f"compensation-{seed}", {"seed": seed, "method": parse(METHOD).written})
    calibration = saap_jax.calibration_windows(CALIBRATION, tokenizer, 32, LENGTH, seed)
    keeps = chosen(run, model, calibration, METHOD)
    done = {row["candidate"] for row in run.candidates()}
    if "dense" not in run.record:
        run.update(dense={source: evaluated(model, windows, None) for source, windows in texts.items()})
    for name in arms:
        arm = ARMS[name]
        windows = saap_jax.calibration_windows(CALIBRATION, tokenizer, arm.examples, LENGTH, seed)
        for ratio in ratios:
            if f"{name}@{ratio:g}" in done:
                continue
            start = time.perf_counter()
            repaired, made = model, []
            if arm.repair is not None:
                repaired, made = compensate(model, keeps[ratio], pairs(windows, 8), arm.repair)
            seconds = time.perf_counter() - start
            losses = {source: evaluated(repaired, text, keeps[ratio]) for source, text in texts.items()}
            corrections = [each._asdict() for each in made]
            ppl = {source: np.exp(np.mean(each)) for source, each in losses.items()}
            measured = {"ppl": ppl, "losses": losses, "seconds": seconds}
            run.append({"candidate": f"{name}@{ratio:g}", **measured, "corrections": corrections})
            ppl = "  ".join(f"{each:8.2f}" for each in ppl.values())
            print(f"seed {seed}  {name:<28} {ratio:.0%} {ppl}  {seconds:.0f} s", flush=True)
    run.update(status="finished")


def chosen(run: RunDirectory, model: Llama, calibration: Windows, method: str) -> dict[float, Keep]:
    """Return which units are kept at each ratio, as the run holds them or by a method."""
    if not (run.path / "keeps.npz").exists():
        chain = parse(method)
        runner = Runner(subject_of(model), {"calibration": calibration}, [chain])
        keeps = {ratio: runner.choose(chain, ratio).keep for ratio in RATIOS}
        run.save_arrays("keeps", {f"{r}/{n}": kept for r, keep in keeps.items() for n, kept in keep.items()})
    arrays = run.load_arrays("keeps")
    return {ratio: {name: arrays[f"{ratio}/{name}"] for name in STRUCTURES} for ratio in RATIOS}


def print_tables(runs: Path) -> None:
    """Print perplexities over the seeds, and differences from no compensation and from FLAP's bias."""
    rows = []
    for seed in (seed for seed in SEEDS if (runs / f"compensation-{seed}" / "metrics.jsonl").exists()):
        rows.append({row["candidate"]: row for row in read_candidates(runs / f"compensation-{seed}")[0]})
        dense = {
            s: float(np.exp(np.mean(each))) for s, each in read_run(runs / f"compensation-{seed}")["dense"].items()
        }
    columns = [(source, ratio) for source in (WIKITEXT, TREEBANK) for ratio in RATIOS]
    losses = {
        (arm, source, ratio): np.array([each[f"{arm}@{ratio:g}"]["losses"][source] for each in rows])
        for arm in ARMS
        for source, ratio in columns
        if all(f"{arm}@{ratio:g}" in each for each in rows)
    }
    arms = [arm for arm in ARMS if all((arm, *column) in losses for column in columns)]
    print("dense: " + ", ".join(f"{SHORT[source]} {value:.1f}" for source, value in dense.items()) + "\n")
    print("| compensation | " + " | ".join(f"{SHORT[s]} {r:.0%}" for s, r in columns) + " |\n|---" + "|---" * 4 + "|")
    for arm in arms:
        print(f"| {arm} | " + " | ".join(perplexity(losses[arm, *column]) for column in columns) + " |")
    for base in ("none", "FLAP's bias"):
        print(f"\nDifference from {base} in per cent (95 % interval, that of `saap ab`)\n")
        print(
            "| compensation | " + " | ".join(f"{SHORT[s]} {r:.0%}" for s, r in columns) + " |\n|---" + "|---" * 4 + "|"
        )
        for arm in (arm for arm in arms if arm != base and base in arms):
            print(f"| {arm} | " + " | ".join(in_percent(losses[arm, *c], losses[base, *c]) for c in columns) + " |")
    print(
        "\nMean error of what the corrected sub-blocks write, on held-out windows, before -> after; share of the rise"
    )
    print("of the mean loss on WikiText-2 that is undone\n")
    for arm in (arm for arm in arms if arm != "none"):
        for ratio in RATIOS:
            made = [c for each in rows for c in each[f"{arm}@{ratio:g}"]["corrections"]]
            before, after = (np.mean([c[key] for c in made]) for key in ("error", "corrected"))
            whole, none, own = np.log(dense[WIKITEXT]), *(losses[a, WIKITEXT, ratio].mean() for a in ("none", arm))
            print(f"{arm:<28} {ratio:.0%}  {before:.3f} -> {after:.3f}   {(none - own) / (none - whole):.0%}")


def main() -> None:
    """Run the study, or print what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--runs", type=Path, default=Path("runs/study"))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--ratios", type=float, nargs="+", choices=RATIOS, default=list(RATIOS))
    arguments = parser.parse_args()
    if arguments.what == "run":
        if "SAAP_DATA" not in os.environ:
            parser.error("expected SAAP_DATA, the directory that holds text/, wikitext2/ and ptb/; it is not set")
        model, tokenizer = saap_jax.load_model("smollm2-135m"), saap_jax.load_tokenizer("smollm2-135m")
        texts = {s: saap_jax.evaluation_windows(s, tokenizer, LENGTH, WINDOWS) for s in (WIKITEXT, TREEBANK)}
        for seed in arguments.seeds:
            run_seed(seed, model, tokenizer, texts, arguments.runs, arguments.arms, arguments.ratios)
    print_tables(arguments.runs)


if __name__ == "__main__":
    main()
