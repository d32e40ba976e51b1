"""The arena: published methods as recipes on one model, text and budget; what docs/arena.md shows.

    SAAP_DATA=DATA python experiments/arena.py run --seed 0 [--recipes flap saap ...]
    python experiments/arena.py report

`run` is a `saap compare` of one calibration seed, resumable, whose results become a small file in docs/arena; `report`
makes the tables of docs/arena.md of these files. Calibrated on 32 windows of 128 tokens of C4, judged on the first 64
windows of WikiText-2 (raw test) and of Penn Treebank (valid).
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from saap_jax.config import CompareConfig
from saap_jax.config.method import CalibrationConfig, EstimationConfig, EvaluationConfig
from saap_jax.evaluation.differences import paired_difference
from saap_jax.evaluation.race import race
from saap_jax.jobs import compare
from saap_jax.jobs.racing import looks_of
from saap_jax.recipes import recipes

DOCS = Path(__file__).parent.parent / "docs"
RESULTS = DOCS / "arena"
CALIBRATION = "c4=jsonl:text/c4_en_300docs.jsonl#text"
WIKITEXT, TREEBANK = "wikitext:wikitext2/test.txt", "ptb:ptb/valid.txt"
SHORT = {f"ppl@128 {WIKITEXT}": "WikiText-2", f"ppl@128 {TREEBANK}": "Penn Treebank"}
RATIOS = (0.2, 0.35, 0.5)
RANDOM = "random"
"""Beside the recipes, as what none of them may be worse than."""

HEAD = """# The arena: published methods on one model, one text, one budget

Each method is a [recipe](estimators.md#recipes): `saap recipes NAME` says what it is made of and where it differs from
its paper. All of them see the same calibration text and lose the same share of the prunable parameters (attention and
MLP).

    SAAP_DATA=DATA python experiments/arena.py run --seed 0
    python experiments/arena.py report

Protocol: SmolLM2-135M-Instruct, float32; calibrated on 32 windows of 128 tokens of C4, drawn with the seed; ppl@128 on
the first 64 windows of WikiText-2 (raw test) and of Penn Treebank (valid), never on the calibration text. Mean and
standard deviation over seeds; differences from the best of a column in per cent of perplexity with 95 % intervals
(paired bootstrap over seeds and windows); ≈ where [the race](racing.md) over the windows, of the means over the seeds,
cannot tell a method from the best, and p of "as good as the best" by its tests.
"""


def run(seed: int, names: Sequence[str], runs: Path) -> None:
    """Compare recipes on the calibration text of a seed, and write what was found."""
    config = CompareConfig(
        name=f"arena-{seed}",
        calibration=CalibrationConfig(scenarios=(CALIBRATION,), seed=seed),
        estimation=EstimationConfig(estimators=(RANDOM,)),
        recipes=tuple(names),
        evaluation=EvaluationConfig(in_domain=TREEBANK, out_of_domain=WIKITEXT, windows=64),
        ratios=RATIOS,
        runs=str(runs),
    )
    done = compare.compare(config)
    write(seed, done.record, done.candidates())


def write(seed: int, record: Any, rows: Sequence[Any]) -> None:
    """Add the results of a run to the file of its seed; a recipe that is there already is replaced."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"smollm2-135m-{seed}.json"
    found = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    found["dense"] = _losses(record["dense"])
    whole = {name: units * record["model"]["layers"] for name, units in record["model"]["units"].items()}
    for row in rows:
        found["rows"][f"{row['variant']}@{row['ratio_asked']:g}"] = {
            "actual": round(row["ratio_actual"], 4),
            "heads": whole["attention"] - int(sum(row["kept"]["attention"])),
            "losses": _losses(row),
        }
    path.write_text(json.dumps(found, indent=None, separators=(",", ":"), sort_keys=True) + "\n")


def _losses(row: Any) -> dict[str, list[float]]:
    return {SHORT[name]: [round(value, 4) for value in values] for name, values in row["losses"].items()}


class Line(NamedTuple):
    """A method at a ratio: losses of a text, `[seeds, windows]`, and what went."""

    name: str
    losses: dict[str, np.ndarray]
    heads: float

    def perplexities(self, text: str) -> np.ndarray:
        """Return the perplexity of each seed."""
        return np.exp(self.losses[text].mean(axis=1))


def lines(ratio: float) -> list[Line]:
    """Return the methods that every seed has, by perplexity on WikiText-2."""
    seeds = [json.loads(path.read_text())["rows"] for path in sorted(RESULTS.glob("*.json"))]
    found = []
    for key in seeds[0]:
        name, _, at = key.rpartition("@")
        if float(at) == ratio and all(key in rows for rows in seeds):
            losses = {text: np.array([rows[key]["losses"][text] for rows in seeds]) for text in SHORT.values()}
            found.append(Line(name, losses, float(np.mean([rows[key]["heads"] for rows in seeds]))))
    return sorted(found, key=lambda line: line.losses["WikiText-2"].mean())


def table(ratio: float) -> list[str]:
    """Return the table of a ratio in Markdown."""
    found = lines(ratio)
    best = {text: min(found, key=lambda line: line.losses[text].mean()) for text in SHORT.values()}
    said = ["| method | " + " | ".join(f"{text} | against the best, % | p" for text in best) + " | KV heads gone |"]
    said.append("|---" + "|---:" * (3 * len(best) + 1) + "|")
    verdicts = {text: _raced(found, text) for text in best}
    for line in found:
        cells = []
        for text, first in best.items():
            each = line.perplexities(text)
            mean = math.exp(line.losses[text].mean())
            spread = f" ± {each.std(ddof=1):.1f}" if len(each) > 1 else ""
            cells.append(f"{mean:.1f}{spread}" if mean < 1e4 else f"{mean:.1e}")
            if line is first:
                cells += ["best", ""]
                continue
            value, low, high = paired_difference(line.losses[text], first.losses[text]).percent
            cells.append(f"{value:+.1f} ({low:+.1f} to {high:+.1f})" if value < 1000 else f"× {1 + value / 100:.0f}")
            p, left = verdicts[text][line.name]
            cells.append(("< 0.001" if p < 0.001 else f"{p:.3f}") + (" ≈" if left else ""))
        said.append(f"| {line.name} | {' | '.join(cells)} | {line.heads:.0f} |")
    return said


def _raced(found: Sequence[Line], text: str) -> dict[str, tuple[float, bool]]:
    """Return the race's p-value of "as good as the best" on a text, and whether a method is left at its end."""
    losses = [line.losses[text] for line in found]
    verdict = race(losses, looks_of(losses[0].shape[1], EvaluationConfig().batch_size))
    return {
        line.name: (p, number in verdict.left)
        for number, (line, p) in enumerate(zip(found, verdict.p_values, strict=True))
    }


def report() -> None:
    """Write docs/arena.md."""
    files = sorted(RESULTS.glob("*.json"))
    if not files:
        raise SystemExit(f"expected results in {RESULTS}, found none; run a seed first")
    dense = json.loads(files[0].read_text())["dense"]
    known = ", ".join(f"{text} {math.exp(np.mean(losses)):.1f}" for text, losses in dense.items())
    said = [f"{len(files)} calibration seed{'s' * (len(files) > 1)}; dense: {known}.", ""]
    for ratio in RATIOS:
        said += [f"### {ratio:.0%} of the prunable parameters", "", *table(ratio), ""]
    missing = [f"- `{name}`: {each.missing}" for name, each in recipes().items() if each.missing]
    said += ["What cannot be run here:", "", *missing, ""] if missing else []
    (DOCS / "arena.md").write_text("\n".join([HEAD, *said]).rstrip() + "\n")


def main() -> None:
    """Run a seed, or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipes", nargs="+", default=["all"])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    if arguments.what == "run":
        run(arguments.seed, arguments.recipes, arguments.runs)
    else:
        report()


if __name__ == "__main__":
    main()
