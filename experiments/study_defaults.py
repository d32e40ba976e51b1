"""Which estimator, fusion, allocation and λ? The study behind the defaults; its result is in docs/studies.md.

    SAAP_DATA=DATA python experiments/study_defaults.py screen     # one seed, many arms: about 30 minutes on 2 cores
    SAAP_DATA=DATA python experiments/study_defaults.py confirm    # three seeds, the peers and what is left: 40 minutes
    SAAP_DATA=DATA python experiments/study_defaults.py more       # four times the calibration text: 25 minutes
    python experiments/study_defaults.py report                    # tables

An arm is a chain: an estimator, how its scores are fused, and how a budget is shared. Calibration is always on C4,
evaluation never: the screen looks at 32 windows of WikiText-2 that come after the 64 of the confirmation, so that
what was chosen on the one is tested on the other; Penn Treebank is looked at in the confirmation only. Both stages
append to run directories and go on where they were stopped; an arm that changed is done again.
"""

import argparse
import os
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tables import in_percent, with_spread

import saap_jax
from saap_jax.data.windows import Windows, pairs
from saap_jax.evaluation.perplexity import window_losses
from saap_jax.llama.model import Llama
from saap_jax.llama.segments import masks
from saap_jax.runs.directory import RunDirectory, read_candidates, read_run
from saap_jax.steps.chain import parse
from saap_jax.steps.run import Runner
from saap_jax.subjects.llama import subject_of
from saap_jax.types import STRUCTURES

RATIOS = (0.2, 0.5)
LENGTH = 128
CALIBRATION = "jsonl:text/c4_en_300docs.jsonl#text"
WIKITEXT, TREEBANK = "wikitext:wikitext2/test.txt", "ptb:ptb/valid.txt"
SHORT = {WIKITEXT: "WikiText-2", TREEBANK: "PTB"}


# --- the arms ------------------------------------------------------------------------------------

PROTECTED = "protect=(0, 1, 2, 3, -2, -1)"
"""Layers that LLM-Pruner leaves alone."""

UNIFORM = f"within({PROTECTED}) > uniform"
FLAP = "global(by=score)"

PEERS = {
    "LLM-Pruner, second order": f"taylor_element_second > {UNIFORM}",
    "LLM-Pruner, first order": f"taylor_element > {UNIFORM}",
    "LLM-Pruner, no layer left alone": "taylor_element > uniform",
    "FLAP without its bias": f"fluctuation(standardize=True, attention_power=1) > {FLAP}",
}
ESTIMATORS = ("taylor_vector", "taylor_element", "fisher", "gate_taylor", "gate_fisher", "wanda", "fluctuation")
PAPER, PAIR = "taylor_vector+taylor_element", "gate_taylor+taylor_element"
THREE, FISHER = "taylor_element+gate_taylor+wanda", "taylor_element+fisher+wanda"
MIXED = f"gate_fisher/{THREE}"

SHARED = f"within({PROTECTED}, attention=0.1) > uniform"
"""What is removed comes from attention by one tenth, and from every layer that is not protected alike."""

CAPPED = "within(attention=0.1, max_ratio={attention: 1.0, mlp: 0.7})"
RANKED = f"{CAPPED} > global"
"""The same tenth, but one ranking of all channels, of which no layer loses more than 70 %."""

SAAP = f"{MIXED} > {SHARED} > rounds(0.1)"


def screened() -> dict[str, str]:
    """Return all arms of the screen: those in steps first, then estimators, fusion, λ, ranking and allocation."""
    arms = {
        f"{name}, steps of 0.1": f"{arm} > rounds(0.1)"
        for name, arm in {
            f"{MIXED}, uniform protected, attention 0.1": f"{MIXED} > {SHARED}",
            f"gate_fisher/{FISHER}, uniform protected, attention 0.1": f"gate_fisher/{FISHER} > {SHARED}",
            f"gate_fisher/{PAIR}, global, attention 0.1, cap 0.7": f"gate_fisher/{PAIR} > {RANKED}",
            f"{MIXED}, global, attention 0.1, cap 0.7": f"{MIXED} > {RANKED}",
            "gate_fisher, global": "gate_fisher > global",
            "taylor_element_second, uniform protected": f"taylor_element_second > {UNIFORM}",
        }.items()
    }
    arms[f"{MIXED}, uniform protected, attention 0.1, steps of 0.05"] = f"{MIXED} > {SHARED} > rounds(0.05)"
    arms["taylor_element_second, uniform protected"] = PEERS["LLM-Pruner, second order"]
    arms["FLAP without its bias"] = PEERS["FLAP without its bias"]
    for estimator in (*ESTIMATORS, PAPER, PAIR, "taylor_element+wanda", THREE, FISHER):
        arms[f"{estimator}, uniform protected"] = f"{estimator} > {UNIFORM}"
        arms[f"{estimator}, global"] = f"{estimator} > global"
    for scope in ("global", "layer"):
        fused = f"fused({', '.join(THREE.split('+'))}, attention=fused, scope={scope})"
        arms[f"{THREE}, uniform protected, fused per {scope}"] = f"{fused} > {UNIFORM}"
    for method in ("closed_form", "sampling"):
        fused = f"fused(gate_taylor, gate_fisher, attention=fused, method={method})"
        arms[f"gate_taylor+gate_fisher, uniform protected, {method}"] = f"{fused} > {UNIFORM}"
    for estimator in ("gate_fisher", PAIR):
        arms[f"{estimator}, global, by score / structure mean"] = f"{estimator} > normalize > {FLAP}"
    for estimator, limits in (("gate_fisher", ""), (MIXED, f"{CAPPED} > ")):
        for weight in (-0.5, -0.25, 0.25, 0.5):
            arms[f"{estimator}, adaptive λ = {weight:+g}"] = f"{estimator} > {limits}stable({weight}) > global"
    for share in (0.0, 0.1, 0.2):
        arms[f"{MIXED}, global, attention {share:g}"] = f"{MIXED} > within(attention={share}) > global"
    arms[f"{MIXED}, global, attention 0.1, cap 0.7"] = f"{MIXED} > {RANKED}"
    arms[f"{MIXED}, global, attention 0.1, protected"] = f"{MIXED} > within({PROTECTED}, attention=0.1) > global"
    arms[f"{MIXED}, uniform protected, attention 0.1"] = f"{MIXED} > {SHARED}"
    return arms


def with_more_text() -> dict[str, str]:
    """Return what is done again with four times the calibration text: what is estimated once, for the same cost."""
    return {name: confirmed()[name] for name in ("saap, estimated once", "LLM-Pruner, first order")}


def confirmed() -> dict[str, str]:
    """Return the peers and what the screen has left, the default of `saap` first."""
    return {
        "saap (default)": SAAP,
        "saap, estimated once": f"{MIXED} > {SHARED}",
        "gate_fisher / fused pair, global, steps of 0.1": f"gate_fisher/{PAIR} > {RANKED} > rounds(0.1)",
        **PEERS,
    }


# --- running -------------------------------------------------------------------------------------


class Stage(NamedTuple):
    """What is run on which text."""

    arms: dict[str, str]
    """Name -> chain."""
    seeds: tuple[int, ...]
    texts: dict[str, tuple[int, int]]
    """Source -> first window and one behind the last."""
    examples: int = 32


def stages() -> dict[str, Stage]:
    """Return all stages."""
    return {
        "screen": Stage(screened(), (0,), {WIKITEXT: (64, 96)}),
        "confirm": Stage(confirmed(), (0, 1, 2), {WIKITEXT: (0, 64), TREEBANK: (0, 64)}),
        "more": Stage(with_more_text(), (0, 1, 2), {WIKITEXT: (0, 64), TREEBANK: (0, 64)}, examples=128),
    }


def run_stage(name: str, stage: Stage, runs: Path) -> None:
    """Do what the run directories of a stage do not hold yet."""
    model, tokenizer = saap_jax.load_model("smollm2-135m"), saap_jax.load_tokenizer("smollm2-135m")
    texts = {}
    for source, (first, stop) in stage.texts.items():
        windows = saap_jax.evaluation_windows(source, tokenizer, LENGTH, stop)
        texts[source] = Windows(*(part[first:stop] for part in windows))
    for seed in stage.seeds:
        config = {"calibration": CALIBRATION, "examples": stage.examples, "length": LENGTH, "seed": seed}
        run = RunDirectory.open(
            runs / f"{name}-{seed}", config | {"texts": {s: list(w) for s, w in stage.texts.items()}}
        )
        done = {row["candidate"]: row["arm"] for row in run.candidates()}
        missing = {
            arm: variant
            for arm, variant in stage.arms.items()
            if any(done.get(f"{arm}@{ratio:g}") != parse(variant).written for ratio in RATIOS)
        }
        if "dense" not in run.record:
            run.update(dense={source: evaluated(model, windows, None) for source, windows in texts.items()})
        if missing:
            windows = saap_jax.calibration_windows(CALIBRATION, tokenizer, stage.examples, LENGTH, seed)
            run_arms(model, windows, missing, texts, run)
        run.update(status="finished")


def run_arms(
    model: Llama, calibration: Windows, arms: dict[str, str], texts: dict[str, Windows], run: RunDirectory
) -> None:
    """Choose by each arm, all scored from one pass, mask and evaluate; append it when it is done."""
    subject, chains = subject_of(model), {name: parse(arm) for name, arm in arms.items()}
    runner = Runner(subject, {"calibration": calibration}, [*chains.values()])
    start = time.perf_counter()
    runner.first()
    print(f"{run.path.name}: observed in {time.perf_counter() - start:.0f} s", flush=True)
    for name, chain in chains.items():
        for ratio in RATIOS:
            start = time.perf_counter()
            keep = runner.choose(chain, ratio).keep
            searched = time.perf_counter() - start
            losses = {source: evaluated(model, windows, keep) for source, windows in texts.items()}
            ppl = {source: np.exp(np.mean(each)) for source, each in losses.items()}
            run.append(
                {
                    "candidate": f"{name}@{ratio:g}",
                    "arm": chain.written,
                    "ratio": ratio,
                    "actual": subject.removed(keep) / subject.prunable,
                    "units_removed": {n: int((subject.existing[n] & ~keep[n]).sum()) for n in STRUCTURES},
                    "ppl": ppl,
                    "losses": losses,
                    "search_seconds": searched,
                    "seconds": time.perf_counter() - start,
                }
            )
            said = "  ".join(f"{each:8.2f}" for each in ppl.values())
            print(f"{name[:90]:<90} {ratio:.0%} {said}", flush=True)


def evaluated(model: Llama, windows: Windows, keep: dict | None) -> list[float]:
    """Return the mean loss of each window, in nats a token."""
    return window_losses(model, pairs(windows, 8), None if keep is None else masks(keep)).means.tolist()


# --- reporting -----------------------------------------------------------------------------------


class Result(NamedTuple):
    """An arm at a ratio: losses of each text, `[seeds, windows]`, and units removed, a mean over seeds."""

    losses: dict[str, np.ndarray]
    removed: dict[str, float]

    def ppl(self, source: str) -> np.ndarray:
        """Return the perplexity of each seed."""
        return np.exp(self.losses[source].mean(axis=1))


def results(name: str, stage: Stage, runs: Path) -> tuple[dict[str, float], dict[tuple[str, float], Result]]:
    """Read a stage: dense perplexities, and the result of every arm and ratio that all seeds have."""
    rows, dense = [], {}
    for seed in stage.seeds:
        path = runs / f"{name}-{seed}"
        dense = {source: float(np.exp(np.mean(each))) for source, each in read_run(path)["dense"].items()}
        rows.append({row["candidate"]: row for row in read_candidates(path)[0]})
    found = {}
    for arm, ratio in ((arm, ratio) for arm in stage.arms for ratio in RATIOS):
        each = [by_name.get(f"{arm}@{ratio:g}") for by_name in rows]
        if all(each):
            losses = {source: np.array([row["losses"][source] for row in each]) for source in stage.texts}
            removed = {n: float(np.mean([row["units_removed"][n] for row in each])) for n in STRUCTURES}
            found[arm, ratio] = Result(losses, removed)
    return dense, found


def print_table(name: str, stage: Stage, runs: Path) -> None:
    """Print a stage as a table in Markdown: perplexity (± standard deviation over seeds) and KV heads removed."""
    dense, found = results(name, stage, runs)
    said = ", ".join(f"{source} {value:.2f}" for source, value in dense.items())
    print(f"\n{name}: dense {said}\n")
    columns = [(source, ratio) for source in stage.texts for ratio in RATIOS]
    print("| arm | " + " | ".join(f"{SHORT[s]} {r:.0%}" for s, r in columns) + " | KV heads gone |")
    print("|---" * (len(columns) + 2) + "|")
    arms = [arm for arm in stage.arms if all((arm, ratio) in found for ratio in RATIOS)]
    for arm in sorted(arms, key=lambda arm: found[arm, 0.2].ppl(WIKITEXT).mean()):
        texts = [with_spread(found[arm, ratio].ppl(source)) for source, ratio in columns]
        heads = ", ".join(f"{found[arm, ratio].removed['attention']:.0f}" for ratio in RATIOS)
        print(f"| {arm} | {' | '.join(texts)} | {heads} |")


def print_differences(name: str, stage: Stage, runs: Path) -> None:
    """Print how much lower the perplexity of each arm is than that of each peer, with intervals."""
    _, found = results(name, stage, runs)
    columns = [(source, ratio) for source in stage.texts for ratio in RATIOS]
    print("\nDifference of perplexity in per cent (95 % interval, that of `saap ab`)\n")
    print("| arm | against | WikiText-2 20% | WikiText-2 50% | PTB 20% | PTB 50% |\n|---|---|---|---|---|---|")
    ours = [arm for arm in stage.arms if arm not in PEERS and (arm, 0.5) in found]
    for arm in ours:
        for peer in (peer for peer in PEERS if (peer, 0.5) in found):
            cells = [in_percent(found[arm, r].losses[source], found[peer, r].losses[source]) for source, r in columns]
            print(f"| {arm} | {peer} | {' | '.join(cells)} |")


def main() -> None:
    """Run a stage, or print what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("screen", "confirm", "more", "report"))
    parser.add_argument("--runs", type=Path, default=Path("runs/study"))
    arguments = parser.parse_args()
    if arguments.what != "report":
        if "SAAP_DATA" not in os.environ:
            parser.error("expected SAAP_DATA, the directory that holds text/, wikitext2/ and ptb/; it is not set")
        run_stage(arguments.what, stages()[arguments.what], arguments.runs)
    for name, stage in stages().items():
        if (arguments.runs / f"{name}-{stage.seeds[-1]}").exists():
            print_table(name, stage, arguments.runs)
            if name != "screen":
                print_differences(name, stage, arguments.runs)


if __name__ == "__main__":
    main()
