"""The arena: published methods as recipes on one model, text and budget; what docs/arena.md shows.

    SAAP_DATA=DATA python experiments/arena.py run --seeds 0 1 2 [--recipes flap default ...] [--model gemma3-270m]
    python experiments/arena.py report

`run` compares each recipe in a process of its own on seed 0, so that its time and memory are its own; on other seeds
those that do not train, ask oracles or estimate again share one. What is done is not done again, and what was killed
goes on. Results become a small file for each model and seed in docs/arena; `report` makes docs/arena.md and its figures
of these files. Calibrated on 32 windows of 128 tokens of C4, judged on the first windows of WikiText-2 (raw test) and
of Penn Treebank (valid): 64 of each, or 32 where a vocabulary of 262,144 makes each of them take so much longer.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from arena_figures import OURS, Line, draw_ranks, draw_ratios, draw_seconds

from saap_jax.config import CompareConfig
from saap_jax.config.method import CalibrationConfig, EvaluationConfig, ModelConfig
from saap_jax.evaluation.differences import paired_difference
from saap_jax.evaluation.race import race
from saap_jax.jobs import compare
from saap_jax.jobs.racing import looks_of
from saap_jax.recipes import RECIPES
from saap_jax.runs.directory import read_candidates, read_run
from saap_jax.runs.standing import named
from saap_jax.steps.chain import parse
from saap_jax.steps.score.oracles import is_oracle

DOCS = Path(__file__).parent.parent / "docs"
RESULTS = DOCS / "arena"
CALIBRATION = "c4=jsonl:text/c4_en_300docs.jsonl#text"
WIKITEXT, TREEBANK = "wikitext:wikitext2/test.txt", "ptb:ptb/valid.txt"
SHORT = {f"ppl@128 {WIKITEXT}": "WikiText-2", f"ppl@128 {TREEBANK}": "Penn Treebank"}
RATIOS = (0.2, 0.35, 0.5)


class Model(NamedTuple):
    """A model of the page."""

    title: str
    windows: int
    """Of each text, on which methods are judged."""


MODELS = {"smollm2-135m": Model("SmolLM2-135M-Instruct", 64), "gemma3-270m": Model("Gemma 3 270M", 32)}
"""Those that the page shows; the first is the one that `run` takes unless another is named."""

TIMED = 0
"""The seed on which every recipe runs alone."""

FEWEST_SEEDS = 3
"""From which on a table is of methods, not of what they kept on one text."""

RANDOM = "random"
"""Beside the recipes, as what none of them may be worse than."""

HEAD = """# The arena: published methods on one model, one text, one budget

Each method is a [recipe](estimators.md#recipes): `saap methods NAME` says what it is made of and where it differs from
its paper. All of them see the same calibration text and lose the same share of the prunable parameters (attention and
MLP).

    SAAP_DATA=DATA python experiments/arena.py run --seeds 0 1 2 [--model MODEL]
    python experiments/arena.py report

Protocol: float32; calibrated on 32 windows of 128 tokens of C4, drawn with the seed; ppl@128 on the first windows of
WikiText-2 (raw test) and of Penn Treebank (valid), never on the calibration text. Mean and standard deviation over
seeds; differences from the lowest of a column in per cent of perplexity with 95 % intervals
(paired bootstrap over seeds and windows); ≈ where [the race](racing.md) over the windows, of the means over the seeds,
cannot tell a method from the lowest, and p of "as good as any" by its tests. Minutes are processor time, of both cores
together, and GiB the peak of memory, of the whole run of a recipe, a mean over the seeds on which it ran alone (– where
it did on none): loading, compiling, observing, choosing, correcting and evaluating at all three ratios.
"""


def run(model: str, seed: int, names: Sequence[str], runs: Path) -> None:
    """Run each recipe on the calibration text of a seed, and write what was found; not what is known already."""
    left = [name for name in names if not set(_keys(name)) <= _results(model, seed)["rows"].keys()]
    shared = [name for name in left if seed != TIMED and _can_share(name)]
    for some in [shared] * bool(shared) + [[name] for name in left if name not in shared]:
        place = runs / _run_name(model, seed, some)
        words = [sys.executable, __file__, "one", "--model", model, "--seeds", str(seed), "--recipes", *some]
        words += ["--runs", str(runs)]
        before, kept = _processor_seconds(), place.with_suffix(".seconds")
        code = subprocess.run(words).returncode
        spent = _processor_seconds() - before + (float(kept.read_text()) if kept.exists() else 0.0)
        runs.mkdir(parents=True, exist_ok=True)
        kept.write_text(f"{spent:.1f}")  # what was killed goes on, and its time is part of it
        if code:
            raise SystemExit(f"{', '.join(some)}, seed {seed}: ended with code {code}; the same command goes on")
        write(model, seed, place, spent if len(some) == 1 else None)


def _can_share(name: str) -> bool:
    """Say whether a recipe reads the text but a few times, so that others beside it save more than it takes."""
    if name == RANDOM:
        return True
    chain = parse(name)
    trains = any(each.costly and each.name != "layerwise" for each in chain.steps)
    oracles = any(is_oracle(member) for each in chain.scores for member in each.members())
    return not trains and not oracles and not any(each.drives for each in chain.steps)


def _processor_seconds() -> float:
    """Return the processor time of the processes that have ended; other work on the machine does not change it."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def one(model: str, seed: int, names: Sequence[str], runs: Path) -> None:
    """Run recipes on the calibration text of a seed; among them perhaps units at random."""
    config = CompareConfig(
        name=_run_name(model, seed, names),
        model=ModelConfig(name=model),
        calibration=CalibrationConfig(scenarios=(CALIBRATION,), seed=seed),
        methods=tuple(names),
        evaluation=EvaluationConfig(in_domain=TREEBANK, out_of_domain=WIKITEXT, windows=MODELS[model].windows),
        ratios=RATIOS,
        runs=str(runs),
    )
    compare.compare(config)


def write(model: str, seed: int, run_directory: Path, seconds: float | None) -> None:
    """Add the results of a run, and what it took where one recipe ran alone, to the file of its model and seed."""
    RESULTS.mkdir(exist_ok=True)
    record, found = read_run(run_directory), _results(model, seed)
    gib = max(stage.get("peak_host_gib") or 0.0 for stage in record["stages"])
    took = {} if seconds is None else {"seconds": round(seconds, 1), "gib": gib}
    found["dense"] = _losses(record["dense"])
    units = {name: number * record["model"]["layers"] for name, number in record["model"]["units"].items()}
    for row in read_candidates(run_directory)[0]:
        found["rows"][f"{row['variant']}@{row['ratio_asked']:g}"] = took | {
            "actual": round(row["ratio_actual"], 4),
            "heads": units["attention"] - int(sum(row["kept"]["attention"])),
            "losses": _losses(row),
        }
    _path(model, seed).write_text(json.dumps(found, indent=None, separators=(",", ":"), sort_keys=True) + "\n")


def _run_name(model: str, seed: int, names: Sequence[str]) -> str:
    return f"arena-{model}-{seed}-{names[0] if len(names) == 1 else 'shared'}"


def _keys(name: str) -> list[str]:
    return [f"{name}@{ratio:g}" for ratio in RATIOS]


def _path(model: str, seed: int) -> Path:
    return RESULTS / f"{model}-{seed}.json"


def _results(model: str, seed: int) -> dict[str, Any]:
    path = _path(model, seed)
    return json.loads(path.read_text()) if path.exists() else {"rows": {}}


def _files(model: str) -> list[Path]:
    """Return the results of the seeds on which our own method has run, which comes last; others have just begun."""
    found = sorted(RESULTS.glob(f"{model}-*.json"))
    return [path for path in found if set(_keys(OURS)) <= json.loads(path.read_text())["rows"].keys()]


def _losses(row: Any) -> dict[str, list[float]]:
    return {SHORT[name]: [round(value, 4) for value in values] for name, values in row["losses"].items()}


def lines(model: str, ratio: float) -> list[Line]:
    """Return the methods that every seed of a model has, by perplexity on WikiText-2."""
    seeds = [json.loads(path.read_text())["rows"] for path in _files(model)]
    found = []
    for name in _methods():
        key = f"{name}@{ratio:g}"
        if all(key in rows for rows in seeds):
            losses = {text: np.array([rows[key]["losses"][text] for rows in seeds]) for text in SHORT.values()}
            known = {
                what: [rows[key][what] for rows in seeds if what in rows[key]]
                for what in ("heads", "seconds", "gib", "actual")
            }
            found.append(
                Line(name, losses, *(float(np.mean(values)) if values else math.nan for values in known.values()))
            )
    return sorted(found, key=lambda line: line.losses["WikiText-2"].mean())


def _methods() -> list[str]:
    return [RANDOM, *(name for name, each in RECIPES.items() if not each.missing)]


def table(model: str, ratio: float) -> list[str]:
    """Return the table of a model at a ratio in Markdown."""
    found = lines(model, ratio)
    best = {text: min(found, key=lambda line: line.losses[text].mean()) for text in SHORT.values()}
    said = ["| method | " + " | ".join(f"{text} | against the lowest, % | p" for text in best)]
    said[0] += " | KV heads gone | processor minutes | GiB |"
    said.append("|---" + "|---:" * (3 * len(best) + 3) + "|")
    verdicts = {text: _raced(found, text) for text in best}
    for line in found:
        cells = []
        for text, first in best.items():
            each = line.perplexities(text)
            mean = line.perplexity(text)
            spread = f" ± {each.std(ddof=1):.1f}" if len(each) > 1 else ""
            cells.append(f"{mean:.1f}{spread}" if mean < 1e4 else f"{mean:.1e}")
            if line is first:
                cells += ["lowest", ""]
                continue
            value, low, high = paired_difference(line.losses[text], first.losses[text]).percent
            cells.append(f"{value:+.1f} ({low:+.1f} to {high:+.1f})" if value < 1000 else f"× {1 + value / 100:.0f}")
            p, left = verdicts[text][line.name]
            cells.append(("< 0.001" if p < 0.001 else f"{p:.3f}") + (" ≈" if left else ""))
        cells += [
            f"{line.heads:.0f}",
            *(f"{value:.1f}" if value > 0 else "–" for value in (line.seconds / 60, line.gib)),
        ]
        said.append(f"| {named(line.name, ratio, line.actual)} | {' | '.join(cells)} |")
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
    known = {model: about for model, about in MODELS.items() if _files(model)}
    if not known:
        raise SystemExit(f"expected results in {RESULTS}, found none; run a seed first")
    said = [line for model, about in known.items() for line in section(model, about)]
    missing = [f"- `{name}`: {each.missing}" for name, each in RECIPES.items() if each.missing]
    results = (json.loads(path.read_text())["rows"] for model in known for path in _files(model))
    tried = {key.partition("@")[0] for rows in results for key in rows}
    if names := [f"`{name}`" for name, each in RECIPES.items() if not each.missing and name not in tried]:
        said += [f"Not run, and so in no table: {', '.join(names)}.", ""]
    said += ["What cannot be run here:", "", *missing, ""] if missing else []
    (DOCS / "arena.md").write_text("\n".join([HEAD, *said]).rstrip() + "\n")


def section(model: str, about: Model) -> list[str]:
    """Return what the page says of a model, and draw its figures."""
    files = _files(model)
    dense = json.loads(files[0].read_text())["dense"]
    known = ", ".join(f"{text} {math.exp(np.mean(losses)):.1f}" for text, losses in dense.items())
    judged = f"{len(files)} calibration seed{'s' * (len(files) > 1)}, {about.windows} windows of each text"
    said = [f"## {about.title}", "", f"{judged}; dense: {known}.", ""]
    if len(files) < FEWEST_SEEDS:
        said += [f"Fewer than {FEWEST_SEEDS} seeds: of the methods themselves nothing is claimed.", ""]
    for ratio in RATIOS:
        said += [f"### {about.title}, {ratio:.0%} of the prunable parameters", "", *table(model, ratio), ""]
    some = {name for path in files for key in json.loads(path.read_text())["rows"] for name in key.split("@")[:1]}
    if few := sorted(some - {line.name for line in lines(model, RATIOS[0])}):
        said += [f"Not on every seed yet, and so not shown: {', '.join(few)}.", ""]
    found = {ratio: lines(model, ratio) for ratio in RATIOS}
    draw_ratios(found, {text: dense[text] for text in SHORT.values()}, RESULTS / f"{model}-ratios.svg")
    draw_ranks(found, RESULTS / f"{model}-ranks.svg")
    figures = {"perplexity at each ratio": "ratios", "rank at each ratio": "ranks"}
    if any(line.seconds > 0 for line in found[RATIOS[0]]):
        draw_seconds(found, RESULTS / f"{model}-seconds.svg")
        figures["perplexity against time"] = "seconds"
    return [*said, *(line for what, name in figures.items() for line in (f"![{what}](arena/{model}-{name}.svg)", ""))]


def main() -> None:
    """Run seeds, or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "one", "report"))
    parser.add_argument("--model", choices=(*MODELS,), default=next(iter(MODELS)))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", choices=_methods(), default=_methods())
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    if arguments.what == "report":
        report()
    elif arguments.what == "one":
        one(arguments.model, arguments.seeds[0], arguments.recipes, arguments.runs)
    else:
        for seed in arguments.seeds:
            run(arguments.model, seed, arguments.recipes, arguments.runs)


if __name__ == "__main__":
    main()
