"""What does it cost that all layers are alike? The price of the step `shape`; what docs/uniform.md shows.

    SAAP_DATA=DATA python experiments/uniform.py run [--seeds 0 1 2]
    python experiments/uniform.py report

Two comparisons a seed: layers that are free, by the defaults of `saap prune`, and layers all alike, whose shape is
searched (`shape`), both with channels in multiples of 32, at 20, 35 and 50 %, with and without least
squares. Calibrated on 32 windows of 128 tokens of C4, judged on the first 64 windows of WikiText-2 (raw test) and of
Penn Treebank (valid). What was killed goes on, what is done is not done again. Results become a small file for each
seed in docs/uniform; `report` makes docs/uniform.md of these files.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from study_defaults import CALIBRATION, LENGTH, TREEBANK, WIKITEXT
from tables import in_percent, perplexity

from saap_jax.config import CompareConfig
from saap_jax.config.method import CalibrationConfig, EvaluationConfig, ModelConfig
from saap_jax.jobs import compare
from saap_jax.runs.directory import read_candidates, read_run

DOCS = Path(__file__).parent.parent / "docs"
RESULTS = DOCS / "uniform"
MODEL, RATIOS, WINDOWS, MULTIPLE = "smollm2-135m", (0.2, 0.35, 0.5), 64, 32
TEXTS = {f"ppl@{LENGTH} {WIKITEXT}": "WikiText-2", f"ppl@{LENGTH} {TREEBANK}": "Penn Treebank"}
"""Metric -> what the page calls it."""

FREE, UNIFORM = "free", "uniform"
NONE, LEAST_SQUARES = "none", "least_squares"
ALIGNED = f"multiple_of={{mlp: {MULTIPLE}}}"
SHAPES = {
    FREE: "fused > within(protect=(0.13, -0.07), attention=0.25, attention_from=0.3, "
    f"{ALIGNED}) > uniform > rounds(0.1)",
    UNIFORM: f"fused > within({ALIGNED}) > uniform > shape",
}
"""The chain of each, without repair."""

HEAD = f"""# The price of uniform layers

    SAAP_DATA=DATA python experiments/uniform.py run
    python experiments/uniform.py report

MaxText, TPU servers and plain transformers take one number for all layers; the step `shape` finds the best such
shape ([how](estimators.md#refinements)). Here it is held against layers that are free (the defaults of `saap
prune`), on SmolLM2-135M, both by the scores of `default` from 32 windows of 128 tokens of C4, channels in multiples of
{MULTIPLE}, without compensation and with least squares on the same windows. ppl@{LENGTH} on the first {WINDOWS}
windows of WikiText-2 (raw test) and of Penn Treebank (valid); mean ± deviation over the seeds, which draw the
calibration text. The price is the difference of uniform from free in per cent of perplexity, with its 95 % interval
(paired bootstrap over seeds and windows). Of free layers the first four and the last two are left alone, and their
units are scored again after each tenth of the parameters; a uniform shape leaves no layer alone, and the first
scores order its units. What these two are of the price was not told apart. *gone* is what of the prunable
parameters really went, free and uniform: widths in multiples overshoot.
"""


def run(seed: int, runs: Path) -> None:
    """Compare both shapes on the calibration text of a seed, and write what was found."""
    if _path(seed).exists():
        return
    found: dict[str, Any] = {"rows": {}}
    for name, chain in SHAPES.items():
        config = CompareConfig(
            name=f"uniform-{seed}-{name}",
            model=ModelConfig(name=MODEL),
            calibration=CalibrationConfig(scenarios=(CALIBRATION,), seed=seed),
            methods=(f"{chain} > {{{NONE},{LEAST_SQUARES}}}",),
            evaluation=EvaluationConfig(in_domain=TREEBANK, out_of_domain=WIKITEXT, windows=WINDOWS, length=LENGTH),
            ratios=RATIOS,
            new_tokens=0,
            runs=str(runs),
        )
        compare.compare(config)
        directory = runs / config.name
        found["dense"] = _losses(read_run(directory)["dense"])
        for row in read_candidates(directory)[0]:
            method = LEAST_SQUARES if LEAST_SQUARES in row["candidate"] else NONE
            found["rows"][f"{name}/{method}@{row['ratio_asked']:g}"] = {
                "losses": _losses(row),
                "actual": round(row["ratio_actual"], 4),
                "kept": {structure: row["kept"][structure] for structure in ("attention", "mlp")},
            }
    RESULTS.mkdir(exist_ok=True)
    _path(seed).write_text(json.dumps(found, separators=(",", ":"), sort_keys=True) + "\n")


def _path(seed: int) -> Path:
    return RESULTS / f"{MODEL}-{seed}.json"


def _losses(measured: Any) -> dict[str, list[float]]:
    return {TEXTS[name]: [round(value, 4) for value in values] for name, values in measured["losses"].items()}


def report() -> None:
    """Write docs/uniform.md."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{MODEL}-*.json"))]
    if not found:
        raise SystemExit(f"expected results in {RESULTS}, found none; run a seed first")
    dense = ", ".join(f"{text} {np.exp(np.mean(found[0]['dense'][text])):.1f}" for text in TEXTS.values())
    said = [HEAD, f"{len(found)} seed{'s' * (len(found) > 1)}; dense: {dense}.", ""]
    for method, title in ((NONE, "Nothing corrected"), (LEAST_SQUARES, "With least squares")):
        said += [f"## {title}", "", *table(found, method), ""]
    said += ["## Shapes", "", "Layers that went whole, and KV heads and channels of each of the others, by seed:", ""]
    for ratio in RATIOS:
        shapes = "; ".join(_shape(each["rows"][f"{UNIFORM}/{NONE}@{ratio:g}"]["kept"]) for each in found)
        said.append(f"- {100 * ratio:.0f} %: {shapes}")
    (DOCS / "uniform.md").write_text("\n".join(said).rstrip() + "\n")


def table(found: Sequence[Any], method: str) -> list[str]:
    """Return the price at each ratio in Markdown."""
    said = ["| asked | gone | " + " | ".join(f"{text}, free | uniform | price, %" for text in TEXTS.values()) + " |"]
    said.append("|---" + "|---:" * (1 + 3 * len(TEXTS)) + "|")
    for ratio in RATIOS:
        rows = {name: [each["rows"][f"{name}/{method}@{ratio:g}"] for each in found] for name in SHAPES}
        cells = [", ".join(f"{100 * np.mean([row['actual'] for row in each]):.1f}" for each in rows.values()) + " %"]
        for text in TEXTS.values():
            free, uniform = (np.array([row["losses"][text] for row in each]) for each in rows.values())
            cells += [perplexity(free), perplexity(uniform), in_percent(uniform, free)]
        said.append(f"| {100 * ratio:.0f} % | {' | '.join(cells)} |")
    return said


def _shape(kept: dict[str, list[int]]) -> str:
    gone = sum(heads == channels == 0 for heads, channels in zip(kept["attention"], kept["mlp"], strict=True))
    return f"{gone}, {max(kept['attention'])}, {max(kept['mlp']):,}"


def main() -> None:
    """Run seeds, or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/study"))
    arguments = parser.parse_args()
    if arguments.what == "report":
        return report()
    if "SAAP_DATA" not in os.environ:
        parser.error("expected SAAP_DATA, the directory that holds text/, wikitext2/ and ptb/")
    for seed in arguments.seeds:
        run(seed, arguments.runs)


if __name__ == "__main__":
    main()
