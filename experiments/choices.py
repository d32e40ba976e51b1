"""What was tried: parts of our methods on development text, which no table of the arena has.

`report` prints every row, and writes those that decided something to docs/studies.md.

    export SAAP_DATA=DATA JAX_COMPILATION_CACHE_DIR=runs/programs
    python experiments/choices.py run [--model gemma3-270m] [--seeds 8] [--ratios 0.2 0.5] [--rows ROW ...]
    python experiments/choices.py report

`fast` takes one of the first two choices by held-out text. Rows after the third differ from the first in what their
names say. Judged on 32 windows each of a part of WikiText-2's training text and of Penn Treebank's, one of each stretch
of equal length; calibrated on 32 windows of C4, by seeds that the arena has not. One seed is a hint: rows that are
close are not told apart. What is done is in docs/choices, a file a model and seed.
"""

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from arena import Setting, run
from arena_report import MODELS, PROJECT

from saap_jax.recipes.registry import RECIPES

PLACE = PROJECT / "docs" / "choices"
PAGE = PROJECT / "docs" / "studies.md"
BEGIN, END = "<!-- choices: made by experiments/choices.py report -->", "<!-- /choices -->"
RATIOS = ("0.2", "0.5")
SETTING = Setting(
    texts={"WikiText-2": "wikitext:wikitext2/train_partial.txt", "Penn Treebank": "ptb:ptb/train.txt"},
    windows=32, first=32, drawn=8, docs=PLACE, timed=-1,
)  # fmt: skip
SCORE = "fused(fisher, leverage, wanda)"
LIMITS = "within(protect=(0.13, -0.07), attention=0.25, attention_from=0.3)"
WHOLE = "within(max_ratio={attention: 0})"
MORE, FRESH = "self_calibration(96, beside=True)", "self_calibration(96, seed=1)"
REST = f"{MORE} > least_squares > {FRESH} > scales(12, rate=0.03)"
CHOSEN = f"{SCORE} > {LIMITS} > uniform"
ROWS = {
    "fast": RECIPES["fast"].chain,
    "choice: fused scores, the ends protected": f"{CHOSEN} > least_squares",
    "choice: leverage, none protected, no head goes": f"leverage > {WHOLE} > uniform > least_squares",
    "choice: the closer behind least squares": (
        f"best_of({CHOSEN} > least_squares, leverage > {WHOLE} > uniform > least_squares)"
    ),
    "score: Taylor, gates and Wanda fused": f"fused > {LIMITS} > uniform > least_squares",
    "score: Fisher": f"fisher > {LIMITS} > uniform > least_squares",
    "score: leverage": f"gate_fisher/leverage > {LIMITS} > uniform > least_squares",
    "score: Wanda": f"gate_fisher/wanda > {LIMITS} > uniform > least_squares",
    "limits: no layer protected": f"{SCORE} > within(attention=0.25, attention_from=0.3) > uniform > least_squares",
    "limits: no head goes": (
        f"{SCORE} > within(protect=(0.13, -0.07), max_ratio={{attention: 0}}) > uniform > least_squares"
    ),
    "limits: heads go as channels do": f"{SCORE} > within(protect=(0.13, -0.07)) > uniform > least_squares",
    "limits: none, no head goes": f"{SCORE} > {WHOLE} > uniform > least_squares",
    "shares by softmax of block influence, leverage layer by layer": (
        f"block_influence(granularity=layer) > {WHOLE} > softmax(0.1) > layerwise(leverage) > least_squares"
    ),
    "estimated again in steps of 10 %": f"{CHOSEN} > rounds(0.1) > least_squares",
    "no repair": CHOSEN,
    "bias": f"{CHOSEN} > bias",
    "least squares: what it wrote (blend 0)": f"{CHOSEN} > least_squares(blend=0)",
    "least squares: all that is lacking (blend 1)": f"{CHOSEN} > least_squares(blend=1)",
    "least squares: damping 0.3": f"{CHOSEN} > least_squares(damping=0.3)",
    "least squares: damping 3": f"{CHOSEN} > least_squares(damping=3)",
    "least squares: all tokens alike": f"{CHOSEN} > least_squares(tokens=equal)",
    "least squares, then 24 steps of scales": f"{CHOSEN} > least_squares > scales(24)",
    "least squares, then scales on text of its own": f"{CHOSEN} > least_squares > {FRESH} > scales(24)",
    "text: the model's own": f"{CHOSEN} > self_calibration(128) > least_squares",
    "text: the model's own beside C4": f"{CHOSEN} > {MORE} > least_squares",
    "text: its own beside C4, drawn at 0.7": (
        f"{CHOSEN} > self_calibration(96, temperature=0.7, beside=True) > least_squares"
    ),
    "text: its own beside C4, from 4 tokens on": f"{CHOSEN} > self_calibration(96, 4, beside=True) > least_squares",
    "text: twice as much of its own beside C4": f"{CHOSEN} > self_calibration(192, beside=True) > least_squares",
    "text: its own beside C4, then scales on the same": f"{CHOSEN} > {MORE} > least_squares > scales(24)",
    "text: its own beside C4, then scales on more": f"{CHOSEN} > {MORE} > least_squares > {FRESH} > scales(24)",
    "… 12 steps at three times the rate": f"{CHOSEN} > {MORE} > least_squares > {FRESH} > scales(12, rate=0.03)",
    "… 24 steps at three times the rate": f"{CHOSEN} > {MORE} > least_squares > {FRESH} > scales(24, rate=0.03)",
    "layers all alike: no head goes": RECIPES["homogeneous"].chain,
    "layers all alike: a searched shape": f"{SCORE} > within(multiple_of={{mlp: 32}}) > uniform > shape > {REST}",
    "default": RECIPES["default"].chain,
    "modegpt-mlp": RECIPES["modegpt-mlp"].chain,
    "fasp-mlp": RECIPES["fasp-mlp"].chain,
    "llm-pruner-param-second": RECIPES["llm-pruner-param-second"].chain,
}


CHOICES = {
    "choice: fused scores, the ends protected": "fused scores, first and last layers kept",
    "choice: leverage, none protected, no head goes": "leverage, all layers pruned, no head",
}
"""Rows of the first table on the page -> what they are called there."""

PARTS = {
    "score: Fisher": "score: Fisher",
    "score: leverage": "score: leverage",
    "score: Wanda": "score: Wanda",
    "limits: no layer protected": "limits: first and last layers pruned too",
    "limits: no head goes": "limits: no head pruned",
    "limits: heads go as channels do": "limits: heads pruned like channels",
    "estimated again in steps of 10 %": "scores estimated again after each tenth",
    "no repair": "repair: none",
    "bias": "repair: bias",
    "least squares: what it wrote (blend 0)": "least squares with blend 0",
    "least squares: all that is lacking (blend 1)": "least squares with blend 1",
    "least squares: damping 0.3": "least squares with damping 0.3",
    "least squares: damping 3": "least squares with damping 3",
    "least squares: all tokens alike": "least squares with equal tokens",
    "least squares, then 24 steps of scales": "least squares, then scales on the same text",
    "least squares, then scales on text of its own": "least squares, then scales on text that the model wrote",
    "text: the model's own": "least squares on text that the model wrote",
    "text: the model's own beside C4": "least squares on C4 and such text",
    "text: twice as much of its own beside C4": "least squares on C4 and twice as much such text",
}
"""Rows of the second table."""


def found_of(model: str) -> list[dict]:
    """Read what was found of a model, a file a seed."""
    return [json.loads(path.read_text())["rows"] for path in sorted((PLACE / "arena").glob(f"claims-{model}-*.json"))]


def table(model: str, ratio: str, shown: Mapping[str, str], named: bool = True) -> list[str]:
    """Return rows of a model at a ratio in Markdown, perhaps with both: perplexity, and its difference from `fast`."""
    label = f"{MODELS[model]}, {100 * float(ratio):.0f} % | " if named else ""
    lines = []
    for name, called in shown.items():
        seeds = [rows for rows in found_of(model) if f"{name}@{ratio}" in rows]
        if not seeds:
            continue
        cells = []
        for text in SETTING.texts:
            own, fast = (
                float(np.mean([rows[f"{each}@{ratio}"]["losses"][text] for rows in seeds])) for each in (name, "fast")
            )
            cells += [f"{math.exp(own):.1f}", f"{100 * math.expm1(own - fast):+.1f}"]
        lines.append(f"| {label}{called} | {' | '.join(cells)} |")
    return lines


def block() -> list[str]:
    """Return what the page of studies has."""
    columns = " | ".join(f"{text} | from `fast`, %" for text in SETTING.texts)
    rule = "|---:" * (2 * len(SETTING.texts)) + "|"
    masks = [line for model in MODELS for ratio in RATIOS for line in table(model, ratio, CHOICES)]
    parts = table("smollm2-135m", "0.5", PARTS, named=False)
    return [
        *(f"| model | mask | {columns} |", f"|---|---{rule}", *masks, ""),
        *(f"| SmolLM2 at 50 % | {columns} |", f"|---{rule}", *parts),
    ]


def with_block(page: str) -> str:
    """Return a page with the tables between their markers.

    Raises:
        SystemExit: the page does not have them.
    """
    before, found, rest = page.partition(BEGIN)
    if not found or END not in rest:
        raise SystemExit(f"expected {BEGIN} and {END} on the page, found them not; add them where the tables belong")
    text = "\n".join(block())
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}"


def everything() -> list[str]:
    """Return every row that was run, by the names of `ROWS`."""
    return [line for model in MODELS for ratio in RATIOS for line in table(model, ratio, {name: name for name in ROWS})]


def main() -> None:
    """Run rows, or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--model", choices=(*MODELS,), default=next(iter(MODELS)))
    parser.add_argument("--seeds", type=int, nargs="+", default=[8])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.5])
    parser.add_argument("--rows", nargs="+", choices=(*ROWS,), default=[*ROWS], metavar="ROW")
    parser.add_argument("--cache", type=Path, default=Path("runs/.cache"))
    asked = parser.parse_args()
    if asked.what == "report":
        print("\n".join(everything()))
        PAGE.write_text(with_block(PAGE.read_text()))
        return
    run(asked.model, asked.seeds, {name: ROWS[name] for name in asked.rows}, asked.ratios, asked.cache, SETTING)


if __name__ == "__main__":
    main()
