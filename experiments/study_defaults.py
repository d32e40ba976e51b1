"""Which estimator, fusion, allocation and λ? The study behind the defaults; its result is docs/study.md.

    SAAP_DATA=DATA python experiments/study_defaults.py screen     # one seed, many arms: about 30 minutes on 2 cores
    SAAP_DATA=DATA python experiments/study_defaults.py confirm    # three seeds, the peers and what is left: 40 minutes
    SAAP_DATA=DATA python experiments/study_defaults.py more       # four times the calibration text: 25 minutes
    python experiments/study_defaults.py report                    # tables, and the figures of docs/study.md

An arm is an estimator, how its scores are fused, and how a budget is shared. Calibration is always on C4, evaluation
never: the screen looks at 32 windows of WikiText-2 that come after the 64 of the confirmation, so that what was chosen
on the one is tested on the other; Penn Treebank is looked at in the confirmation only. Both stages append to run
directories and go on where they were stopped; an arm that changed is done again.
"""

import argparse
import dataclasses
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from saap_jax.selection.calibrate import joined, make_members, score_statistics
from study_figures import Point, draw_points, draw_rows
from tables import in_percent, with_spread

import saap_jax
from saap_jax.api import select_path
from saap_jax.config import FusionConfig, SearchConfig, SharePerStructure
from saap_jax.data import Windows, pairs
from saap_jax.estimation import GATE_GRADIENT, Statistics
from saap_jax.evaluation.perplexity import window_losses
from saap_jax.llama import Llama
from saap_jax.llama.segments import existing_units, masks
from saap_jax.runs.directory import RunDirectory, plain, read_candidates, read_run
from saap_jax.types import STRUCTURES

RATIOS = (0.2, 0.5)
LENGTH = 128
CALIBRATION = "jsonl:text/c4_en_300docs.jsonl#text"
WIKITEXT, TREEBANK = "wikitext:wikitext2/test.txt", "ptb:ptb/valid.txt"
SHORT = {WIKITEXT: "WikiText-2", TREEBANK: "PTB"}
FIGURES = Path(__file__).parent.parent / "docs" / "figures"


class Arm(NamedTuple):
    """One variant of the method."""

    estimator: str
    search: SearchConfig
    fusion: FusionConfig = FusionConfig()


# --- the arms ------------------------------------------------------------------------------------

PROTECTED = (0, 1, 2, 3, -2, -1)
"""Layers that LLM-Pruner leaves alone."""

UNIFORM = SearchConfig(allocation="uniform", skip_layers=PROTECTED)
GLOBAL = SearchConfig(allocation="global")
FLAP = SearchConfig(allocation="global", rank_by="score")

PEERS = {
    "LLM-Pruner, second order": Arm("taylor_element_second", UNIFORM),
    "LLM-Pruner, first order": Arm("taylor_element", UNIFORM),
    "LLM-Pruner, no layer left alone": Arm("taylor_element", SearchConfig(allocation="uniform")),
    "FLAP without its bias": Arm("fluctuation(standardize=True, attention_power=1)", FLAP),
}
ESTIMATORS = ("taylor_vector", "taylor_element", "fisher", "gate_taylor", "gate_fisher", "wanda", "fluctuation")
PAPER, PAIR = "taylor_vector+taylor_element", "gate_taylor+taylor_element"
THREE, FISHER = "taylor_element+gate_taylor+wanda", "taylor_element+fisher+wanda"
MIXED = f"gate_fisher/{THREE}"


def change(search: SearchConfig, **options: Any) -> SearchConfig:
    """Return a search with other options."""
    return dataclasses.replace(search, **options)


SHARED = change(UNIFORM, attention_share=0.1)
"""What is removed comes from attention by one tenth, and from every layer that is not protected alike."""

RANKED = change(GLOBAL, attention_share=0.1, max_ratio=SharePerStructure(attention=1.0, mlp=0.7))
"""The same tenth, but one ranking of all channels, of which no layer loses more than 70 %."""

SAAP = Arm(MIXED, change(SHARED, rescore_every=0.1))


def screened() -> dict[str, Arm]:
    """Return all arms of the screen: those in steps first, then estimators, fusion, λ, ranking and allocation."""
    arms = {
        f"{name}, steps of 0.1": arm._replace(search=change(arm.search, rescore_every=0.1))
        for name, arm in {
            f"{MIXED}, uniform protected, attention 0.1": Arm(MIXED, SHARED),
            f"gate_fisher/{FISHER}, uniform protected, attention 0.1": Arm(f"gate_fisher/{FISHER}", SHARED),
            f"gate_fisher/{PAIR}, global, attention 0.1, cap 0.7": Arm(f"gate_fisher/{PAIR}", RANKED),
            f"{MIXED}, global, attention 0.1, cap 0.7": Arm(MIXED, RANKED),
            "gate_fisher, global": Arm("gate_fisher", GLOBAL),
            "taylor_element_second, uniform protected": Arm("taylor_element_second", UNIFORM),
        }.items()
    }
    finer = Arm(MIXED, change(SHARED, rescore_every=0.05))
    arms[f"{MIXED}, uniform protected, attention 0.1, steps of 0.05"] = finer
    arms["taylor_element_second, uniform protected"] = PEERS["LLM-Pruner, second order"]
    arms["FLAP without its bias"] = PEERS["FLAP without its bias"]
    for estimator in (*ESTIMATORS, PAPER, PAIR, "taylor_element+wanda", THREE, FISHER):
        arms[f"{estimator}, uniform protected"] = Arm(estimator, UNIFORM)
        arms[f"{estimator}, global"] = Arm(estimator, GLOBAL)
    for scope in ("global", "layer"):
        arms[f"{THREE}, uniform protected, fused per {scope}"] = Arm(THREE, UNIFORM, FusionConfig(scope=scope))
    pair = "gate_taylor+gate_fisher"
    for method in ("closed_form", "sampling"):
        arms[f"{pair}, uniform protected, {method}"] = Arm(pair, UNIFORM, FusionConfig(method=method))
    for estimator in ("gate_fisher", PAIR):
        normalised = change(GLOBAL, rank_by="score", normalize="structure_mean")
        arms[f"{estimator}, global, by score / structure mean"] = Arm(estimator, normalised)
    for estimator, base in (("gate_fisher", GLOBAL), (MIXED, RANKED)):
        for weight in (-0.5, -0.25, 0.25, 0.5):
            search = change(base, allocation="adaptive", stability_weight=weight)
            arms[f"{estimator}, adaptive λ = {weight:+g}"] = Arm(estimator, search)
    for share in (0.0, 0.1, 0.2):
        arms[f"{MIXED}, global, attention {share:g}"] = Arm(MIXED, change(GLOBAL, attention_share=share))
    arms[f"{MIXED}, global, attention 0.1, cap 0.7"] = Arm(MIXED, RANKED)
    arms[f"{MIXED}, global, attention 0.1, protected"] = Arm(
        MIXED, change(GLOBAL, attention_share=0.1, skip_layers=PROTECTED)
    )
    arms[f"{MIXED}, uniform protected, attention 0.1"] = Arm(MIXED, SHARED)
    return arms


def with_more_text() -> dict[str, Arm]:
    """Return what is done again with four times the calibration text: what is estimated once, for the same cost."""
    return {name: confirmed()[name] for name in ("saap, estimated once", "LLM-Pruner, first order")}


def confirmed() -> dict[str, Arm]:
    """Return the peers and what the screen has left, the default of `saap` first."""
    return {
        "saap (default)": SAAP,
        "saap, estimated once": Arm(MIXED, SHARED),
        "gate_fisher / fused pair, global, steps of 0.1": Arm(f"gate_fisher/{PAIR}", change(RANKED, rescore_every=0.1)),
        **PEERS,
    }


# --- running -------------------------------------------------------------------------------------


class Stage(NamedTuple):
    """What is run on which text."""

    arms: dict[str, Arm]
    seeds: tuple[int, ...]
    texts: dict[str, tuple[int, int]]
    """Source -> first window and one behind the last."""
    examples: int = 32


def stages() -> dict[str, Stage]:
    """Return both stages."""
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
            if any(done.get(f"{arm}@{ratio:g}") != described(variant) for ratio in RATIOS)
        }
        if "dense" not in run.record:
            run.update(dense={source: evaluated(model, windows, None) for source, windows in texts.items()})
        if missing:
            windows = saap_jax.calibration_windows(CALIBRATION, tokenizer, stage.examples, LENGTH, seed)
            run_arms(model, windows, missing, texts, run)
        run.update(status="finished")


def run_arms(
    model: Llama, calibration: Windows, arms: dict[str, Arm], texts: dict[str, Windows], run: RunDirectory
) -> None:
    """Score once for all arms, then search, mask and evaluate each; append it when it is done."""
    start = time.perf_counter()
    statistics = observed(model, calibration, arms.values())
    print(f"{run.path.name}: observed in {time.perf_counter() - start:.0f} s", flush=True)
    for name, arm in arms.items():
        start = time.perf_counter()
        first = joined({"calibration": score_statistics(model, statistics, [arm.estimator], arm.fusion)})
        path = select_path(
            model, first, {"calibration": calibration}, arm.estimator, RATIOS, arm.search, fusion=arm.fusion
        )
        searched = time.perf_counter() - start
        exists = existing_units(model.segments)
        for ratio, selection in path.items():
            losses = {source: evaluated(model, windows, selection.keep) for source, windows in texts.items()}
            ppl = {source: np.exp(np.mean(each)) for source, each in losses.items()}
            run.append(
                {
                    "candidate": f"{name}@{ratio:g}",
                    "arm": described(arm),
                    "ratio": ratio,
                    "actual": selection.actual,
                    "units_removed": {n: int((exists[n] & ~selection.keep[n]).sum()) for n in STRUCTURES},
                    "ppl": ppl,
                    "losses": losses,
                    "search_seconds": searched,
                    "seconds": time.perf_counter() - start,
                }
            )
            ppl = "  ".join(f"{each:8.2f}" for each in ppl.values())
            print(f"{name[:90]:<90} {ratio:.0%} {ppl}", flush=True)


def observed(model: Llama, windows: Windows, arms: Iterable[Arm]) -> Statistics:
    """Return what one pass observes for all arms."""
    members = make_members(dict.fromkeys(arm.estimator for arm in arms), FusionConfig())
    needs = union_of_needs(members.values()) | {GATE_GRADIENT}
    return observe(model, pairs(windows, 8), needs, curvature=curvature_of(members.values()))


def evaluated(model: Llama, windows: Windows, keep: dict | None) -> list[float]:
    """Return the mean loss of each window, in nats a token."""
    losses = window_losses(model, pairs(windows, 8), None if keep is None else masks(keep))
    return (losses.sums / losses.counts).tolist()


def described(arm: Arm) -> dict:
    """Return an arm as JSON values."""
    return plain(
        {
            "estimator": arm.estimator,
            "search": dataclasses.asdict(arm.search),
            "fusion": dataclasses.asdict(arm.fusion),
        }
    )


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
    print("\nDifference of perplexity in per cent (95 % interval, paired bootstrap over seeds and windows)\n")
    print("| arm | against | WikiText-2 20% | WikiText-2 50% | PTB 20% | PTB 50% |\n|---|---|---|---|---|---|")
    ours = [arm for arm in stage.arms if arm not in PEERS and (arm, 0.5) in found]
    for arm in ours:
        for peer in (peer for peer in PEERS if (peer, 0.5) in found):
            cells = [in_percent(found[arm, r].losses[source], found[peer, r].losses[source]) for source, r in columns]
            print(f"| {arm} | {peer} | {' | '.join(cells)} |")


def draw_screen(name: str, stage: Stage, runs: Path) -> None:
    """Draw every arm of the screen at 20 % and at 50 %."""
    dense, found = results(name, stage, runs)
    points = []
    for arm, variant in stage.arms.items():
        if all((arm, ratio) in found for ratio in RATIOS):
            group = {"uniform": "uniform, layers protected", "global": "one ranking", "adaptive": "one ranking with λ"}
            shown = "in steps" if variant.search.rescore_every is not None else group[variant.search.allocation]
            points.append(Point(arm, *(float(found[arm, r].ppl(WIKITEXT)[0]) for r in RATIOS), shown))
    labels = (f"ppl@128 at 20 % (dense {dense[WIKITEXT]:.1f})", "ppl@128 at 50 %")
    title = "Screen: one seed, calibrated on C4, 32 windows of WikiText-2; lower left is better"
    peers = ("taylor_element_second, uniform protected", "FLAP without its bias")
    draw_points(points, peers, labels, title, FIGURES / f"study_{name}.svg")


def draw_confirmed(name: str, stage: Stage, runs: Path) -> None:
    """Draw the perplexity of each seed and its mean, a panel a text and ratio."""
    dense, found = results(name, stage, runs)
    arms = [arm for arm in stage.arms if all((arm, ratio) in found for ratio in RATIOS)]
    panels = {
        f"{SHORT[source]}, {ratio:.0%} removed (dense {dense[source]:.0f})": {
            arm: found[arm, ratio].ppl(source) for arm in arms
        }
        for source in stage.texts
        for ratio in RATIOS
    }
    title = f"ppl@128 of three calibration seeds, {stage.examples} windows of C4 each, and their mean"
    draw_rows(panels, set(PEERS), title, FIGURES / f"study_{name}.svg")


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
            (draw_screen if name == "screen" else draw_confirmed)(name, stage, arguments.runs)
            if name != "screen":
                print_differences(name, stage, arguments.runs)


if __name__ == "__main__":
    main()
