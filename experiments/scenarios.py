"""Importance over several tasks against one text, with as many tokens: a section of docs/studies.md.

    SAAP_DATA=DATA python experiments/scenarios.py run [--seeds 3 4 5]
    python experiments/scenarios.py report

SmolLM2-135M, calibrated on 32 windows of 128 tokens of C4, or on 8 of each of C4, instructions, descriptions of data
sets and dialogue; and what the stability of importance brings, over examples or over the four. Judged on windows of
each task that nobody calibrated on (files are cut in two: three quarters, and the rest), and on development text of
other domains. What is done is not done again, and what was killed goes on. About an hour of processor time. `report`
prints perplexities, and writes differences to the page.
"""

import argparse
import datetime
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from claims import FAR, crossed, verdicts
from tables import perplexity, write_block

from saap_jax.config.method import CalibrationConfig, EvaluationConfig, ModelConfig
from saap_jax.jobs.candidates import key_of
from saap_jax.recipes.registry import RECIPES
from saap_jax.runs.cache import FileCache
from saap_jax.runtime.files import write_atomically
from saap_jax.steps.base import Store
from saap_jax.steps.chain import parse
from saap_jax.steps.run import Runner
from saap_jax.subjects.llama import open_subject

DOCS = Path(__file__).parent.parent / "docs"
RESULTS = DOCS / "scenarios"
MODEL, RATIOS, LENGTH = "smollm2-135m", (0.2, 0.5), 128
EXAMPLES = 32
"""Windows of calibration text, of one text or of four together."""
WINDOWS = 8
"""Of each text that judges, one of each of as many stretches."""

FILES = {
    "C4": ("jsonl", "text/c4_en_300docs.jsonl", "#text"),
    "instructions": ("instruct", "instruct/alpaca_random9k.jsonl", ""),
    "dialogue": ("text", "text/tiny_shakespeare.txt", ""),
}
TASKS = ("C4", "instructions", "descriptions", "dialogue")
OTHERS = {"WikiText-2": "wikitext:wikitext2/train_partial.txt", "Penn Treebank": "ptb:ptb/train.txt"}
ONE, FOUR = "C4", "four tasks"

SAAP = RECIPES["saap"].chain
PAPER = "stable(-0.25)"
CHAINS = {
    "saap, the unstable goes": SAAP,
    "saap, the stable goes": SAAP.replace(PAPER, "stable(0.25)"),
    "saap, no stability": SAAP.replace(f"{PAPER} > ", ""),
    "saap, the unstable over tasks goes": SAAP.replace(PAPER, "stable(-0.25, over=scenarios)"),
    "fast": RECIPES["fast"].chain,
}
"""Of one text, those without tasks."""

WANTED = {
    ONE: dict.fromkeys(("saap, the unstable goes", "saap, no stability"), RATIOS) | {"fast": RATIOS},
    FOUR: dict.fromkeys(CHAINS, RATIOS),
}
"""What is run on which text."""

PAIRS = [
    ((FOUR, "saap, no stability"), (ONE, "saap, no stability")),
    ((FOUR, "saap, the unstable goes"), (ONE, "saap, the unstable goes")),
    ((FOUR, "fast"), (ONE, "fast")),
    ((ONE, "saap, the unstable goes"), (ONE, "saap, no stability")),
    ((FOUR, "saap, the unstable goes"), (FOUR, "saap, no stability")),
    ((FOUR, "saap, the stable goes"), (FOUR, "saap, no stability")),
    ((FOUR, "saap, the unstable over tasks goes"), (FOUR, "saap, no stability")),
]
"""What is compared with what."""

CALLED = {
    "saap, the unstable goes": "`saap`",
    "saap, the stable goes": "`saap` with λ = 1/4",
    "saap, no stability": "`saap` without stability",
    "saap, the unstable over tasks goes": "`saap`, stability over tasks",
    "fast": "`fast`",
}
"""Chain -> what the page calls it."""


# --- running -----------------------------------------------------------------------------------------


def texts(place: Path) -> dict[str, tuple[str, str]]:
    """Cut the files of tasks in two; return the sources that calibrate and that judge, by task."""
    found = {"descriptions": ("builtin:descriptions", "builtin:descriptions")}
    place.mkdir(parents=True, exist_ok=True)
    for name, (kind, path, field) in FILES.items():
        lines = (Path(os.environ["SAAP_DATA"]) / path).read_text().splitlines(keepends=True)
        cut, sources = len(lines) * 3 // 4, []
        for part, some in (("calibration", lines[:cut]), ("held-out", lines[cut:])):
            file = place / f"{name}-{part}{Path(path).suffix}"
            write_atomically(file, "".join(some).encode())
            sources.append(f"{kind}:{file}{field}")
        found[name] = (sources[0], sources[1])
    return {name: found[name] for name in TASKS}


def judging(subject: Any, sources: Mapping[str, str]) -> dict[str, Any]:
    """Cut the windows that judge, by name of the text."""
    found, names = {}, [*sources]
    for first, second in zip(names[::2], names[1::2], strict=True):
        config = EvaluationConfig(
            in_domain=sources[first], out_of_domain=sources[second], windows=WINDOWS, length=LENGTH, drawn=0
        )
        found |= zip((first, second), subject.texts(config).values(), strict=True)
    return found


def run(seeds: Sequence[int], runs: Path, model: str = MODEL) -> None:
    """Prune and judge what is not in the file of its seed yet; what repairs comes last."""
    subject, tasks = open_subject(ModelConfig(name=model)), texts(runs / "scenarios-text")
    judges = judging(subject, {name: judge for name, (_, judge) in tasks.items()} | OTHERS)
    together = subject.join([*judges.values()])

    def losses(of: Any, keep: Any) -> dict[str, list[float]]:
        (found,) = (each for group in of.losses(together, [keep]) for each in group.values())
        return dict(zip(judges, np.round(found.means.reshape(-1, WINDOWS), 4).tolist(), strict=True))

    for dear, seed, text in itertools.product((False, True), seeds, WANTED):
        wanted = {name: ratios for name, ratios in WANTED[text].items() if (name == "fast") == dear}
        chosen = TASKS if text == FOUR else (ONE,)
        sources = tuple(f"{name}={tasks[name][0]}" for name in chosen)
        config = CalibrationConfig(scenarios=sources, examples=EXAMPLES // len(chosen), length=LENGTH, seed=seed)
        examples, chains = subject.scenarios(config), {name: parse(CHAINS[name]) for name in wanted}
        store = Store(FileCache(runs / ".cache"), key_of(subject, examples))
        runner = Runner(subject, examples, [*chains.values()], store=store)
        for name, ratio in ((name, ratio) for name, ratios in wanted.items() for ratio in ratios):
            found, key = results(model, seed), f"{text}, {name}@{ratio:g}"
            if found["rows"].get(key, {}).get("key") == (digest := runner.key_of(chains[name], ratio)):
                continue
            state = runner.run(chains[name], ratio)
            row = {"key": digest, "losses": losses(state.subject, state.keep)}
            found |= {"dense": found.get("dense") or losses(subject, subject.existing)}
            found |= {"date": datetime.date.today().isoformat(), "rows": found["rows"] | {key: row}}
            keep(model, seed, found)
            print(f"seed {seed}: {key}", flush=True)


def results(model: str, seed: int) -> dict[str, Any]:
    """Read what was found with a seed."""
    path = RESULTS / f"{model}-{seed}.json"
    return json.loads(path.read_text()) if path.exists() else {"rows": {}}


def keep(model: str, seed: int, found: Mapping[str, Any]) -> None:
    """Write what was found with a seed."""
    RESULTS.mkdir(exist_ok=True)
    content = json.dumps(found, separators=(",", ":"), sort_keys=True) + "\n"
    write_atomically(RESULTS / f"{model}-{seed}.json", content.encode())


# --- showing -----------------------------------------------------------------------------------------


def report(model: str = MODEL) -> None:
    """Print perplexities, and write the differences to the page of studies."""
    found = results_of(model)
    keys = keys_of(found)
    for ratio in RATIOS:
        print("\n".join([f"{100 * ratio:.0f} %", *table(found, keys, ratio), ""]))
    write_block("scenarios", block(model))


def results_of(model: str) -> list[dict[str, Any]]:
    """Read the results of a model, a file a seed.

    Raises:
        SystemExit: there are none.
    """
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{model}-*.json"))]
    if not found:
        raise SystemExit(f"expected results in {RESULTS}, found none; run a seed first")
    return found


def keys_of(found: Sequence[Any]) -> list[str]:
    """Return the rows that all seeds have."""
    return [key for key in found[0]["rows"] if all(key in each["rows"] for each in found)]


def block(model: str = MODEL) -> list[str]:
    """Return what the page of studies has: differences at each ratio."""
    found = results_of(model)
    keys = keys_of(found)
    dates = sorted({each["date"] for each in found})
    lines = [f"{len(found)} seeds of calibration text, {' and '.join(dates)}.", ""]
    lines += ["| ratio | | against | four tasks, % | verdict | other texts, % | verdict |"]
    lines += ["|---|---|---|---:|---|---:|---|"]
    return [*lines, *(line for ratio in RATIOS for line in compared(found, keys, ratio))]


def table(found: Sequence[Any], keys: Sequence[str], ratio: float) -> list[str]:
    """Return perplexities in Markdown, a row a chain and calibration text."""
    names = [*TASKS, *OTHERS]
    said = [f"| calibrated on, method | {' | '.join(names)} |", "|---" + "|---:" * len(names) + "|"]
    rows = {"(unpruned)": [[each["dense"][name] for each in found[:1]] for name in names]}
    for text, wanted in WANTED.items():
        for name in wanted:
            if (key := f"{text}, {name}@{ratio:g}") in keys:
                rows[f"{text}, {name}"] = [[each["rows"][key]["losses"][one] for each in found] for one in names]
    return said + [f"| {name} | {' | '.join(map(perplexity, cells))} |" for name, cells in rows.items()]


def compared(found: Sequence[Any], keys: Sequence[str], ratio: float) -> list[str]:
    """Return what may be said of each pair on the tasks together and on the other texts together, in Markdown."""
    lines = []
    pairs, cells = [], []
    for a, b in PAIRS:
        both = [f"{text}, {name}@{ratio:g}" for text, name in (a, b)]
        if set(both) <= set(keys):
            pairs.append([f"{CALLED[name]} on {text}" for text, name in (a, b)])
            cells.append([estimate(found, both, group) for group in (TASKS, (*OTHERS,))])
    columns = [verdicts(column) for column in zip(*cells, strict=True)] if cells else []
    for number, (first, second) in enumerate(pairs):
        parts = []
        for column in columns:
            value, low, high = column[number].difference.percent
            shown = f"{value:+.1f} ({low:+.1f} to {high:+.1f})"
            if high > FAR:
                shown = "× {:.2g} ({:.2g} to {:.2g})".format(*(1 + each / 100 for each in (value, low, high)))
            said = column[number].said.removeprefix("not significant, differences ").removesuffix(" cannot be seen")
            parts.append(f"{shown} | {said}")
        lines.append(f"| {100 * ratio:.0f} % | {first} | {second} | {' | '.join(parts)} |")
    return lines


def estimate(found: Sequence[Any], keys: Sequence[str], names: Sequence[str]) -> Any:
    """Estimate the difference of two rows on some texts together; each window is an article of its own."""
    a, b = (np.array([np.concatenate([each["rows"][key]["losses"][name] for name in names]) for each in found])
            for key in keys)  # fmt: skip
    return crossed(a, b, np.arange(a.shape[1]))


def main() -> None:
    """Run seeds, or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 4, 5])
    parser.add_argument("--runs", type=Path, default=Path("runs/study"))
    arguments = parser.parse_args()
    if arguments.what == "report":
        return report()
    if "SAAP_DATA" not in os.environ:
        parser.error("expected SAAP_DATA, the directory that holds text/, instruct/, wikitext2/ and ptb/")
    run(arguments.seeds, arguments.runs)


if __name__ == "__main__":
    main()
