"""What does a pruned model learn from the unpruned one, beside the text? The ablation of docs/studies.md.

    SAAP_DATA=DATA python experiments/distillation.py run [--seeds 0 1 2] [--starts START …] [--arms ARM …] [--steps N]
    python experiments/distillation.py report

SmolLM2-135M without half of its prunable parameters, by the defaults of `saap prune` calibrated on C4: without their
repair, with it, or with scales of units behind it (the starts). Then `saap recover` of each of these models once for
each arm: with LoRA, on the same rows of C4 in the same order, for the same steps.
The seed draws the calibration text, the rows and the adapters. Judged on the first 32 windows of 128 tokens of
WikiText-2 (raw test) and of Penn Treebank (valid). Each arm runs in a process of its own, so that its memory is its
own. What is done is not done again, and what was killed goes on. Results become a small file for each number of steps
and seed in docs/distillation; `report` makes tables of docs/studies.md of them. Minutes are wall time: give each run
a core of its own (`taskset -c 0`), and leave that alone. A seed, two arms, three starts, in ten minutes on two cores:

    SAAP_DATA=DATA python experiments/distillation.py run --seeds 0 --starts mask "least squares" scales \\
        --arms "language loss" "all logits" --steps 12
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from study_defaults import CALIBRATION, LENGTH, SHORT, TREEBANK, WIKITEXT
from tables import in_percent, perplexity, write_block

from saap_jax.config.jobs import PruneConfig
from saap_jax.config.method import CalibrationConfig, EvaluationConfig, ModelConfig
from saap_jax.config.recover import MethodConfig, RecoverConfig, TrainingConfig, TrainingTextConfig
from saap_jax.jobs.prune import prune
from saap_jax.recovery.command import recover
from saap_jax.runs.directory import read_run
from saap_jax.steps.chain import parse

DOCS = Path(__file__).parent.parent / "docs"
RESULTS = DOCS / "distillation"
MODEL, RATIO, WINDOWS = "smollm2-135m", 0.5, 32
ROW, BATCH, RATE = 128, 4, 3e-3
TEXTS = {f"ppl@{LENGTH} {source}": SHORT[source] for source in (WIKITEXT, TREEBANK)}
"""Metric -> what the page calls it."""

BASE, LOGITS, TOP, HIDDEN = "language loss", "all logits", "top-64 logits", "hidden states"
ARMS: dict[str, dict[str, Any]] = {
    BASE: {},
    LOGITS: {"distillation": 0.5},
    TOP: {"distillation": 0.5, "top_k_logits": 64},
    HIDDEN: {"hidden": 1.0},
    "hidden states and all logits": {"distillation": 0.5, "hidden": 1.0},
}
"""Fields of `training` by arm; weights and temperature were not searched."""

UNREPAIRED = " > ".join(step.text for step in parse("default").steps if step.kind != "repair")
REFITTED = "least squares"
STARTS = {
    "mask": UNREPAIRED,
    REFITTED: f"{UNREPAIRED} > least_squares",
    "scales": f"{UNREPAIRED} > least_squares > scales",
}
"""What is pruned, and how it is repaired before it learns."""

PROTOCOL = {"ratio": RATIO, "batch": BATCH, "row": ROW, "rate": RATE, "windows": WINDOWS, "arms": ARMS}


class Case(NamedTuple):
    """What files are of: a seed, what learning starts from, and for how many steps it learns."""

    seed: int
    start: str
    steps: int


def run(case: Case, arms: Sequence[str], runs: Path) -> None:
    """Run each arm that has no result yet in a process of its own, and write what it found."""
    for arm in arms:
        if arm in _results(case)["rows"]:
            continue
        words = [sys.executable, __file__, "one", "--seeds", str(case.seed), "--arms", arm, "--steps", str(case.steps)]
        words += ["--starts", case.start, "--runs", str(runs)]
        if code := subprocess.run(words).returncode:
            raise SystemExit(f"{case}, {arm}: ended with code {code}; the same command goes on")


def one(case: Case, arm: str, runs: Path) -> None:
    """Prune, unless the pruned model of a seed is there, recover it, and write what was found."""
    seed, steps, named = case.seed, case.steps, SUFFIX[case.start]
    pruned = runs / f"distillation-{seed}-pruned{named}"
    if not pruned.exists():
        calibration = CalibrationConfig(scenarios=(CALIBRATION,), seed=seed)
        prune(
            PruneConfig(
                model=ModelConfig(name=MODEL), method=STARTS[case.start], ratio=RATIO, calibration=calibration,
                out=str(pruned), judge=False, runs=str(runs),
            )
        )  # fmt: skip
    config = RecoverConfig(
        name=f"distillation-{steps}-{seed}{named}-{arm.replace(' ', '-')}",
        model=str(pruned),
        dense=MODEL,
        method=MethodConfig(name="lora"),
        data=TrainingTextConfig(sources=(CALIBRATION,), length=ROW, held_out=0.0, seed=seed),
        training=TrainingConfig(
            max_steps=steps,
            batch_size=BATCH,
            microbatch=BATCH,
            learning_rate=RATE,
            warmup=steps // 8,
            check_every=8,
            seed=seed,
            **ARMS[arm],
        ),
        evaluation=EvaluationConfig(in_domain=TREEBANK, out_of_domain=WIKITEXT, windows=WINDOWS, length=LENGTH),
        new_tokens=0,
        runs=str(runs),
    )
    write(case, arm, read_run(recover(config).path))


def write(case: Case, arm: str, record: Mapping[str, Any]) -> None:
    """Add what a run found to the file of its case."""
    found = _results(case)
    stages = {stage["name"]: stage for stage in record["stages"]}
    found["dense"], found["pruned"] = (_losses(record[name]) for name in ("dense", "before"))
    found["rows"][arm] = {
        "losses": _losses(record["after"]),
        "seconds": round(sum(stages[name]["seconds"] for name in ("top-k logits", "train") if name in stages), 1),
        "gib": round(stages["train"]["peak_host_gib"], 3),
        "disk": record.get("top_k_logits", {}).get("bytes", 0),
    }
    RESULTS.mkdir(exist_ok=True)
    _path(case).write_text(json.dumps(found, separators=(",", ":"), sort_keys=True) + "\n")


SUFFIX = {start: "" if start == REFITTED else f"-{start}" for start in STARTS}
"""Of names of files."""


def _path(case: Case) -> Path:
    return RESULTS / f"{MODEL}-{case.steps}-{case.seed}{SUFFIX[case.start]}.json"


def _results(case: Case) -> dict[str, Any]:
    path, protocol = _path(case), PROTOCOL | {"steps": case.steps}
    if not path.exists():
        return {"protocol": protocol, "rows": {}}
    found = json.loads(path.read_text())
    if found["protocol"] != protocol:
        raise SystemExit(f"{path}: expected results of the protocol of this script, found another; move the file away")
    return found


def _losses(measured: Mapping[str, Any]) -> dict[str, list[float]]:
    return {TEXTS[name]: [round(value, 4) for value in values] for name, values in measured["losses"].items()}


def report() -> None:
    """Write the tables to the page of studies."""
    write_block("distillation", block(), DOCS / "studies.md")


def block() -> list[str]:
    """Return what the page of studies has.

    Raises:
        SystemExit: there are no results.
    """
    cases: dict[int, dict[str, list[Case]]] = {}
    for path in sorted(RESULTS.glob(f"{MODEL}-*.json")):
        steps, seed, *start = path.stem.removeprefix(f"{MODEL}-").split("-")
        case = Case(int(seed), start[0] if start else REFITTED, int(steps))
        cases.setdefault(case.steps, {}).setdefault(case.start, []).append(case)
    if not cases:
        raise SystemExit(f"expected results in {RESULTS}, found none; run a seed first")
    columns = " | ".join(f"{text} | against {BASE}, %" for text in TEXTS.values())
    lines = [f"| steps, tokens, seeds | from | learned from | {columns} | minutes |"]
    lines.append("|---|---|---" + "|---:" * (2 * len(TEXTS) + 1) + "|")
    notes = []
    for steps, by_start in sorted(cases.items()):
        for start in (start for start in STARTS if start in by_start):
            found = {case.seed: _results(case) for case in sorted(by_start[start])}
            lines += table(f"{steps}, {steps * BATCH * ROW:,}, {len(found)} | {start}", [*found.values()])
            base = {case.seed: _results(case) for case in by_start.get(REFITTED, [])}
            notes += against(start, base, found)
    return [*lines, "", *notes]


def against(start: str, base: Mapping[int, Any], found: Mapping[int, Any]) -> list[str]:
    """Say how far arms that start elsewhere are from those that start from the refitted model, after training."""
    seeds = sorted(base.keys() & found.keys())
    arms = [arm for arm in ARMS if seeds and all(arm in each[seed]["rows"] for each in (base, found) for seed in seeds)]
    if start == REFITTED or not arms:
        return []
    parts = []
    for arm in arms:
        changes = [f"{text} " + in_percent(*(np.array([each[seed]["rows"][arm]["losses"][text] for seed in seeds])
                                             for each in (found, base))) for text in TEXTS.values()]  # fmt: skip
        parts.append(f"by *{arm}* {' %, '.join(changes)} %")
    return [f"- From {start}, against the same from {REFITTED}, seed {', '.join(map(str, seeds))}: {'; '.join(parts)}."]


def table(label: str, found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return rows in Markdown: the model that nothing was learned by, then the arms that all seeds have."""
    arms = [arm for arm in ARMS if all(arm in each["rows"] for each in found)]
    cells = [cell for text in TEXTS.values() for cell in (perplexity([each["pruned"][text] for each in found]), "")]
    lines = [f"| {label} | (not trained) | {' | '.join(cells)} | |"]
    for arm in arms:
        rows = [each["rows"][arm] for each in found]
        cells = []
        for text in TEXTS.values():
            cells.append(perplexity([row["losses"][text] for row in rows]))
            cells.append(_change(found, arm, BASE, text) if arm != BASE and BASE in arms else "")
        minutes = np.median([row["seconds"] for row in rows]) / 60
        lines.append(f"| {label} | {arm} | {' | '.join(cells)} | {minutes:.1f} |")
    return lines


def _change(found: Sequence[Mapping[str, Any]], arm: str, base: str, text: str) -> str:
    return in_percent(*(np.array([each["rows"][name]["losses"][text] for each in found]) for name in (arm, base)))


def main() -> None:
    """Run seeds, or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "one", "report"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--starts", nargs="+", choices=list(STARTS), default=[REFITTED])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--runs", type=Path, default=Path("runs/study"))
    arguments = parser.parse_args()
    if arguments.what == "report":
        return report()
    if "SAAP_DATA" not in os.environ:
        parser.error("expected SAAP_DATA, the directory that holds text/, wikitext2/ and ptb/")
    for seed, start in itertools.product(arguments.seeds, arguments.starts):
        case = Case(seed, start, arguments.steps)
        if arguments.what == "one":
            return one(case, arguments.arms[0], arguments.runs)
        run(case, arguments.arms, arguments.runs)


if __name__ == "__main__":
    main()
