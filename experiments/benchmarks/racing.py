"""What share of all evaluations does a race of 20 variants take, and is its verdict that of all of them?

    SAAP_DATA=DATA python experiments/benchmarks/racing.py record FILE [--ratio 0.2] [--windows 1024]
    python experiments/benchmarks/racing.py simulate [FILE ...] [--windows 1024] [--draws 40]
    SAAP_DATA=DATA python experiments/benchmarks/racing.py race FILE [--ratio 0.2] [--windows 1024]

`record` evaluates 20 variants on windows drawn over the articles of WikiText-2's test part, and keeps their losses in
FILE, batch by batch: the same command goes on, and evaluates more. `simulate` draws articles of such a file with
replacement until there are so many windows, lets the variants race, and judges all of them on all of these windows as
a comparison without a race does. It does the same with the losses of the arena that was,
where its files are in docs/arena: 17 methods of seed 0 and three of seed 1, blocks of eight neighbouring windows for
articles. Of those that are left all windows count, as evaluated. `race` races in earnest, on the windows of FILE:
nothing of it is read but keep-sets.
`racing-0.2.npz` beside this script is such a file: at 20 %, 104 windows.
"""

import argparse
import dataclasses
import json
import re
import tempfile
from pathlib import Path

import numpy as np

from saap_jax.config.jobs import CompareConfig
from saap_jax.config.method import CalibrationConfig, ModelConfig
from saap_jax.data.sources import read_texts
from saap_jax.data.windows import Windows, consecutive_windows, tokenize
from saap_jax.evaluation.differences import differences_against
from saap_jax.evaluation.race import race_state
from saap_jax.jobs.candidates import add, table_of
from saap_jax.jobs.job import Material
from saap_jax.jobs.losses import measure
from saap_jax.jobs.racing import counted, evaluate_to, left_of, looks_of, run_fields, start_race
from saap_jax.llama.files.tokenizer import load_tokenizer
from saap_jax.runs.directory import RunDirectory
from saap_jax.runs.standing import DENSE
from saap_jax.runtime.progress import Passes, bars
from saap_jax.steps.chain import expand
from saap_jax.steps.run import Runner
from saap_jax.subjects.llama import open_subject

MODEL, LENGTH, BATCH = "smollm2-135m", 128, 8
TEXT, CALIBRATION = "wikitext:wikitext2/test.txt", "c4=jsonl:text/c4_en_300docs.jsonl#text"
FEW = "within(protect=(0.13, -0.07))"
SCORES = "random,magnitude,taylor_vector,taylor_element,taylor_element_second,fisher,gate_taylor,gate_fisher,wanda"
METHODS = (
    f"{{{SCORES},fluctuation,activation_norm,fused}} > {FEW} > uniform",
    f"{{taylor_element,fisher,gate_taylor}} > {FEW} > global",
    "fluctuation(standardize=True) > within(min_keep=0) > global(by=score)",
    "fused > within(protect=(0.13, -0.07), attention=0.1) > uniform",
    "shortgpt",
    "shortened-llama-taylor",
    "saap",
)
"""Twenty, which repair nothing: estimators, and recipes as far as they choose."""

ARENA = Path(__file__).parents[2] / "docs" / "arena"


def drawn_windows() -> tuple[np.ndarray, np.ndarray]:
    """Cut each article into windows; all in a random order, and the number of each one's article."""
    tokenizer, (document,) = load_tokenizer(MODEL), read_texts(TEXT, "all")
    articles = re.split(r"(?m)^(?= = [^=].*[^=] = \n{4})", document.text)[1:]
    parts = [consecutive_windows(tokenize(text, tokenizer), LENGTH) for text in articles]
    of = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    order = np.random.default_rng(0).permutation(len(of))
    return np.concatenate(parts)[order], of[order]


def record(file: Path, ratio: float, windows: int) -> None:
    """Evaluate all variants on one batch of windows after the other."""
    subject, chains = open_subject(ModelConfig(name=MODEL)), expand(METHODS)
    found = dict(np.load(file).items()) if file.exists() else {"losses": np.zeros((len(chains), 0), np.float32)}
    if "dense" not in found:
        runner = Runner(subject, subject.scenarios(CalibrationConfig(scenarios=(CALIBRATION,))), chains, Passes())
        found |= {"names": np.array([chain.name for chain in chains]), "dense": np.zeros(0, np.float32)}
        keeps = [runner.choose(chain, ratio).keep for chain in chains]
        found |= {f"keep/{name}": np.stack([keep[name] for keep in keeps]) for name in subject.existing}
    tokens, articles = drawn_windows()
    for start in range(found["losses"].shape[1], windows, BATCH):
        text = Windows(tokens[start : start + BATCH], np.ones((BATCH, LENGTH), bool))
        sets, new = [*keeps_of(found), subject.existing], {}
        for group in subject.losses(text, sets, batch_size=BATCH, at_once=2):
            new |= group
        losses = np.stack([new[number].means for number in range(len(sets))]).astype(np.float32)
        found["losses"] = np.concatenate([found["losses"], losses[:-1]], axis=1)
        found |= {"dense": np.append(found["dense"], losses[-1]), "articles": articles[: start + BATCH]}
        np.savez_compressed(file.with_suffix(".part.npz"), **found)
        file.with_suffix(".part.npz").replace(file)
        print(f"{start + BATCH} of {windows} windows", flush=True)


def keeps_of(found: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Read the keep-sets of a file."""
    parts = {key.removeprefix("keep/"): value for key, value in found.items() if key.startswith("keep/")}
    return [{name: part[number] for name, part in parts.items()} for number in range(len(found["names"]))]


def left_of_all(losses: np.ndarray) -> set[int]:
    """Judge all variants on all windows: the lowest, and those that a comparison calls tied with it."""
    best = int(losses.mean(axis=1).argmin())
    others = [number for number in range(len(losses)) if number != best]
    found = differences_against(losses[best][None], losses[others][:, None])
    return {best, *(other for other, each in zip(others, found, strict=True) if not each.sure)}


def simulate(what: str, losses: np.ndarray, articles: np.ndarray, windows: int, draws: int) -> None:
    """Race on windows of articles that are drawn with replacement, and print a line."""
    random, found = np.random.default_rng(0), []
    of = [np.flatnonzero(articles == each) for each in np.unique(articles)]
    for _ in range(draws):
        drawn = np.concatenate([of[each] for each in random.integers(len(of), size=windows)])[:windows]
        own = losses[:, random.permutation(drawn)].astype(np.float64)
        verdict, whole = (
            race_state([row[None] for row in own], looks_of(windows, BATCH), margin=0.005),
            left_of_all(own),
        )
        took = sum(windows if each in verdict.left else count for each, count in enumerate(verdict.windows))
        kept = int(own.mean(axis=1).argmin()) in verdict.left
        found.append((took / own.size, kept, len(verdict.left), len(whole), {*verdict.left} == whole))
    share, kept, left, whole, equal = np.array(found, float).T
    middle, most, all_of = 100 * np.quantile(share, [0.5, 0.9, 1.0])
    print(f"| {what} | {middle:.0f} | {most:.0f} | {all_of:.0f} | {100 * kept.mean():.0f} | {left.mean():.1f} | "
          f"{whole.mean():.1f} | {100 * equal.mean():.0f} |", flush=True)  # fmt: skip


def explained(losses: np.ndarray, dense: np.ndarray) -> list[str]:
    """Say what the unpruned model's loss explains of the differences from the lowest, of the five next ones."""
    first, *others = np.argsort(losses.mean(axis=1))[:6]
    return [f"{100 * np.corrcoef(losses[each] - losses[first], dense)[0, 1] ** 2:.0f} %" for each in others]


def simulate_all(files: list[Path], windows: int, draws: int) -> None:
    """Print a table: shares in per cent of all evaluations, median, 90 % quantile and most of the draws; in how many
    draws the lowest of all stays, how many are left, by the race and of all, and in how many they are the same."""
    print("| losses | median | 90 % | most | lowest kept, % | left | of all | same, % |\n|---|" + "---:|" * 7)
    for file in files:
        found = np.load(file)
        name = f"{file.stem}, {found['losses'].shape[1]} windows of {len(np.unique(found['articles']))} articles"
        simulate(name, found["losses"], found["articles"], windows, draws)
        print(f"explained by the unpruned model's loss: {', '.join(explained(found['losses'], found['dense']))}")
    paths = [ARENA / f"{MODEL}-{seed}.json" for seed in (0, 1)]
    seeds = [json.loads(path.read_text())["rows"] for path in paths if path.exists()]
    for ratio in ("0.2", "0.35", "0.5") if len(seeds) == 2 else ():
        names = [name for name in sorted(seeds[0]) if name.endswith(f"@{ratio}")]
        for text in ("WikiText-2", "Penn Treebank"):
            rows = [seeds[0][name]["losses"][text] for name in names]
            rows += [seeds[1][name]["losses"][text] for name in names[: 20 - len(names)]]
            simulate(f"arena, {ratio}, {text}", np.array(rows), np.arange(len(rows[0])) // BATCH, windows, draws)


def race_in_earnest(file: Path, ratio: float, most: int) -> None:
    """Race as `saap compare --race` does, on the windows of a file, and set the verdict beside that of its losses."""
    found, config = dict(np.load(file).items()), CompareConfig(methods=METHODS, ratios=(ratio,), race=True)
    windows, names = min(most, found["losses"].shape[1]), [f"{name}@{ratio:g}" for name in found["names"]]
    text = {f"ppl@{LENGTH} {TEXT}": Windows(drawn_windows()[0][:windows], np.ones((windows, LENGTH), bool))}
    with tempfile.TemporaryDirectory() as place:
        run = RunDirectory.open(Path(place) / "race", dataclasses.asdict(config))
        run.begin({})
        material = Material(open_subject(ModelConfig(name=MODEL)), {}, text, {})
        table = table_of(config, run, material, [], [], bars)
        for name, keep in zip(names, keeps_of(found), strict=True):
            add(table, name, keep)
        measure(table, [DENSE], {}, doing="dense")
        racing, field = start_race(table, config.race_margin), {name: [name] for name in names}
        (verdict,) = run_fields(racing, [field], "race", None)
        evaluate_to(racing, dict.fromkeys(left_of(field, verdict), racing.rows), "finish", None)
        took = counted(racing, names)
    print(f"{took['evaluated']} of {took['budget'] * took['keep_sets']} evaluations, ending {verdict.ending!r}")
    print("windows:", dict(zip(names, verdict.windows, strict=True)))
    print("left:", sorted(left_of(field, verdict)))
    print(
        "left of all:", sorted(names[number] for number in left_of_all(found["losses"][:, :windows].astype(np.float64)))
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["record", "simulate", "race"])
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--windows", type=int, default=1024)
    parser.add_argument("--draws", type=int, default=40)
    given = parser.parse_args()
    if given.what == "simulate":
        simulate_all(given.files, given.windows, given.draws)
    elif given.what == "record":
        record(given.files[0], given.ratio, given.windows)
    else:
        race_in_earnest(given.files[0], given.ratio, given.windows)
