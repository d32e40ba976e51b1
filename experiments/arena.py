"""The arena: published methods and ours on the same text, budget and models; what docs/arena.md shows.

    export SAAP_DATA=DATA JAX_COMPILATION_CACHE_DIR=runs/programs
    python experiments/arena.py run [--model gemma3-270m] [--seeds 3 4] [--rows default flap]
    python experiments/arena.py run --rows default modegpt-mlp --after lora
    python experiments/arena.py run --rows default modegpt-mlp --ratios 0.2 --tasks --items 1000
    python experiments/arena.py run --windows fresh:1
    python experiments/arena.py report

`run` has one process for a model, which scores once a seed for all rows; contenders come first. A row is evaluated on
the first 32 windows of each text, in a random order that is always the same; where its mean loss there is within
`BEYOND` of the lowest so far at that ratio, on the other 96 too. What is done is in a file for each model and seed in
docs/arena, by a digest of chain, code of steps, model and text: the same command goes on, and a kill loses a row at a
ratio. With the last seed, when all programs are compiled, a row has a runner and scores of its own, so that time and
memory are its own; the smaller model takes turns with the unpruned one in a forward pass.
`--after lora` trains the named rows for 64 steps and evaluates them again. `--after groupwise` does so by 4-bit
group-wise adapters, the recovery of SAAP's paper, of `saap-in-groups`, whose widths groups divide. `--tasks` adds the
first 200 items of each task, or as many as `--items` says: more items take the place of fewer.
`--windows fresh:N` judges on the N-th set of windows that no table had, in files of its own. After any change of a
method of ours its claim is made on such a set; the rows of the windows before stay as they are.
`report` makes docs/arena.md, its figure and the block of README.md of these files.
"""

import argparse
import contextlib
import datetime
import functools
import itertools
import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from arena_report import DOCS, MODELS, SEEDS, Result, report, result_path, rows

from saap_jax.config.method import CalibrationConfig, ModelConfig
from saap_jax.config.recover import MethodConfig, RecoverConfig, TrainingConfig, TrainingTextConfig
from saap_jax.data.sources import join_texts, read_texts
from saap_jax.data.windows import (
    Windows,
    beginning,
    evaluation_windows,
    pairs,
    stratified_windows,
    tokenize,
    window_articles,
)
from saap_jax.evaluation.cost import median_seconds
from saap_jax.evaluation.tasks import Task, find_task, read_task, run_tasks
from saap_jax.jobs.candidates import key_of
from saap_jax.llama.loss import over_positions
from saap_jax.llama.model import Llama
from saap_jax.llama.passes import fits_kept_width, run_layers
from saap_jax.recovery.checkpoints import Checkpoints
from saap_jax.recovery.command import method_of, read_text, training_of
from saap_jax.recovery.loop import train
from saap_jax.recovery.train import join
from saap_jax.runs.cache import FileCache
from saap_jax.runtime.digests import digest_of, provenance
from saap_jax.runtime.files import write_atomically
from saap_jax.runtime.progress import Passes
from saap_jax.steps.base import State, Store
from saap_jax.steps.chain import Chain, expand
from saap_jax.steps.run import Runner, digest
from saap_jax.subjects.base import rows_of, run_losses
from saap_jax.subjects.llama import LlamaSubject, open_subject
from saap_jax.types import Keep

RATIOS = (0.2, 0.35, 0.5)
BATCH = 8
BEYOND = math.log(1.12)
"""Nats above the lowest from which on a row is evaluated on the first windows alone."""
STRETCHES = 32
"""Units of a text without articles: neighbouring windows, longer together than its articles are."""
STEPS = 64
SLOTS = {"lora": "after", "groupwise": "after groupwise"}
"""Methods of recovery, and where in a row it is what was found after them."""
TASKS = ("arc_easy", "boolq", "hellaswag", "piqa", "winogrande")
OLDER = 96
"""Windows at the beginning of a text that tables of before had: the first arena's, and those of the study."""


class Setting(NamedTuple):
    """What rows are calibrated and judged on; the tests have a smaller one."""

    texts: Mapping[str, str] = {"WikiText-2": "wikitext:wikitext2/test.txt", "Penn Treebank": "ptb:ptb/valid.txt"}
    calibration: str = "c4=jsonl:text/c4_en_300docs.jsonl#text"
    training: tuple[str, ...] = ("jsonl:text/c4_en_300docs.jsonl#text", "instruct:instruct/alpaca_random9k.jsonl")
    examples: int = 32
    length: int = 128
    windows: int = 128
    first: int = 32
    drawn: int = 35
    """Seed of the windows, and of their order."""
    fresh: int = 0
    """0: those windows. N: the N-th set of others that no table had."""
    older: int = OLDER
    items: int = 200
    """Of each task, where it has as many."""
    docs: Path = DOCS
    group_size: int = 32
    """Inputs of a group of group-wise adapters."""
    timed: int = SEEDS[-1]
    """The seed with which each row scores by itself."""


class Text(NamedTuple):
    """Windows in the order in which they are read, and the number of the article of each."""

    windows: Windows
    articles: list[int]


def text_of(source: str, tokenizer: Any, setting: Setting) -> Text:
    """Draw windows over a whole text, and tell which article (or stretch) the middle of each is of.

    Raises ValueError where a fresh set is asked for, and the text has no more windows.
    """
    count, seeds = setting.windows, [setting.drawn, setting.fresh] if setting.fresh else setting.drawn
    how = {} if setting.fresh else {"limit": count, "drawn": setting.drawn}
    windows, articles = (cut(source, tokenizer, setting.length, **how) for cut in (evaluation_windows, window_articles))
    if setting.fresh:
        chosen = fresh_windows(source, tokenizer, setting)
        windows = Windows(*(each[chosen] for each in windows))
        articles = articles and [articles[each] for each in chosen]
    articles = articles or [each * STRETCHES // count for each in range(count)]
    order = np.random.default_rng(seeds).permutation(count)
    return Text(Windows(*(each[order] for each in windows)), [articles[each] for each in order])


def fresh_windows(source: str, tokenizer: Any, setting: Setting) -> np.ndarray:
    """Number the windows of a fresh set among the neighbouring windows of the whole text, in its order.

    Those that share a token with the windows of before are left out; the others are cut into as many stretches as
    there are windows to draw, and each set takes one of every stretch, the next one of a random order. So sets share
    nothing, and each is spread over the text.

    Raises:
        ValueError: the text has not so many sets.
    """
    count, length = setting.windows, setting.length - len(beginning(tokenizer))
    size = tokenize(join_texts(read_texts(source, "evaluation")), tokenizer).size
    before = stratified_windows(np.arange(size, dtype=np.int32), count, length, setting.drawn)
    free = np.setdiff1d(np.arange(setting.older, size // length), before // length)
    sets = len(free) // count
    if setting.fresh > sets:
        raise ValueError(
            f"windows: expected one of the {sets} sets of {count} that {source} has beside the windows of before, got "
            f"fresh:{setting.fresh}; take a longer text"
        )
    stretches = np.split(free, np.arange(1, count) * len(free) // count)
    random = np.random.default_rng(setting.drawn)
    return np.array([random.permutation(stretch)[setting.fresh - 1] for stretch in stretches])


# --- judging ---------------------------------------------------------------------------------------


@jax.jit
def hidden_step(model: Llama, tokens: Any) -> Any:
    """Run to the last hidden states."""
    return model.hidden(tokens)[0]


@jax.jit
def judge_step(model: Llama, teacher: Llama, gates: Any, tokens: Any, mask: Any, hidden: Any) -> Any:
    """Sum up over each window, `[batch, 3]`: loss and KL(p_unpruned ‖ p) in nats, and words whose likeliest changes.

    All three at the positions that predict a real token; `hidden` is the unpruned model's, `[batch, seq, embed]`.
    """
    layers, narrow = len(model.spec.layers), fits_kept_width(model)
    own = model.final(run_layers(model, model.embedded(tokens), 0, layers, gates, kept_width=narrow))

    def of_positions(own: Any, other: Any, target: Any) -> Any:
        student, known = (jax.nn.log_softmax(each.logits(h), -1) for each, h in ((model, own), (teacher, other)))
        loss = -jnp.take_along_axis(student, target[..., None], -1)[..., 0]
        divergence = jnp.sum(jnp.exp(known) * (known - student), -1)
        return jnp.stack([loss, divergence, (student.argmax(-1) != known.argmax(-1)).astype(loss.dtype)], -1)

    each = over_positions(of_positions, own[:, :-1], hidden[:, :-1], tokens[:, 1:], logits=[model, teacher])
    return jnp.sum(jnp.where(mask[:, 1:, None], each, 0), axis=1)


class Judge:
    """Evaluates models beside the unpruned one."""

    def __init__(self, subject: LlamaSubject, texts: Mapping[str, Text], first: int) -> None:
        self.dense, self.texts, self.first = subject.model, texts, first
        batches = {name: pairs(rows_of(text.windows, slice(first)), BATCH) for name, text in texts.items()}
        self.batches = {n: [(*b, hidden_step(self.dense, b[0])) for b in some] for n, some in batches.items()}
        """Tokens, mask and the unpruned model's last hidden states."""

    @functools.cached_property
    def dense_losses(self) -> dict[str, list[float]]:
        """The unpruned model's, of all windows."""
        subject = LlamaSubject(self.dense)
        return self.judged(subject, subject.existing, {})["losses"]

    def judged(self, subject: LlamaSubject, keep: Keep, lowest: Mapping[str, float]) -> dict[str, Any]:
        """Measure losses by text, of the first windows or of all; divergence and changed words are of the first."""
        found: dict[str, Any] = {"losses": {}, "kl": {}, "changed": {}}
        gates = {name: jnp.asarray(each, jnp.float32) for name, each in keep.items()}
        for name, text in self.texts.items():
            sums = [np.asarray(judge_step(subject.model, self.dense, gates, *each)) for each in self.batches[name]]
            counts = text.windows.mask[: self.first, 1:].sum(1, keepdims=True)
            means = np.concatenate(sums)[: self.first].astype(np.float64) / counts
            losses, (_, divergence, changed) = means[:, 0], means.mean(0)
            rest = rows_of(text.windows, slice(self.first, None))
            if losses.mean() <= lowest.get(name, math.inf) + BEYOND and len(rest.tokens):
                losses = np.concatenate([losses, run_losses(subject, rest, keep, BATCH).means])
            found["losses"][name] = np.round(losses, 4).tolist()
            found["kl"][name], found["changed"][name] = round(float(divergence), 4), round(float(changed), 4)
        return found


# --- what is run -----------------------------------------------------------------------------------


def peak_gib(forget: bool = False) -> float | None:
    """Read the most memory that this process held, in GiB, or forget it; None where the system does not tell."""
    with contextlib.suppress(OSError, StopIteration):
        if forget:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
        return round(int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**20, 2)
    return None


class Memory(dict[str, Any]):
    """A cache that ends with its runner."""

    load, save = dict.get, dict.__setitem__


class Arena:
    """The rows of a model on the calibration text of a seed."""

    def __init__(self, subject: LlamaSubject, judge: Judge, seed: int, cache: Path, setting: Setting) -> None:
        self.subject, self.judge, self.seed, self.setting = subject, judge, seed, setting
        config = CalibrationConfig(
            scenarios=(setting.calibration,), seed=seed, examples=setting.examples, length=setting.length
        )
        self.text, self.cache = subject.scenarios(config), FileCache(cache)
        about = [subject.digests(), {name: digest_of(text.windows) for name, text in judge.texts.items()}]
        self.known = digest(about, {name: digest_of(each) for name, each in self.text.items()})
        self.alone: dict[str, tuple[Memory, float, float | None]] = {}
        """What the timed row began with: scores, the seconds that they took, and the memory."""
        self.path = result_path(setting.docs, subject.name, setting.examples, seed, setting.fresh)
        self.found: Result = json.loads(self.path.read_text()) if self.path.exists() else {"rows": {}}
        if self.found.get("about") != (key := digest(about)):
            articles = {name: text.articles for name, text in judge.texts.items()}
            self.keep(about=key, dense=judge.dense_losses, articles=articles)

    def keep(self, **found: Any) -> None:
        """Add to the file."""
        self.found |= found
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(self.found, separators=(",", ":")) + "\n"
        write_atomically(self.path, content.encode())

    def run(self, chains: Sequence[Chain], ratios: Sequence[float], after: str, tasks: bool) -> None:
        """Do what the file does not hold yet."""
        keys, left = Runner(self.subject, self.text, store=Store(None, self.known)), []
        asked = tasks_of(self.setting.items) if tasks else []
        for ratio, chain in itertools.product(ratios, chains):  # a chain goes on from what it begins with
            name, key = f"{chain.name}@{ratio:g}", keys.key_of(chain, ratio)
            row = self.found["rows"].get(name, {})
            of = row.get(SLOTS[after], {}) if after else row
            failed = "failed" in of  # what could not be pruned then may be possible now
            if of.get("key") != key or failed or not has_answers(of, asked):
                left.append((chain, ratio, name, key))
        shared = self._runner([chain for chain, *_ in left], self.cache, key_of(self.subject, self.text))
        if left and not has_answers(self.found, asked):
            self.keep(tasks=answered(self.subject, asked))
        for chain, ratio, name, key in left:
            if after or tasks:
                row = self._further(shared.run(chain, ratio), name, key, after, asked)
            else:
                row = {"key": key, "chain": [[step.kind, step.written] for step in chain.steps]}
                row |= {"date": datetime.date.today().isoformat(), "commit": (provenance()["git_commit"] or "")[:9]}
                try:
                    row |= self._row(shared, chain, ratio)
                except ValueError as error:
                    row |= {"failed": str(error)}
            there = json.loads(self.path.read_text())["rows"]  # another process may have added some
            self.keep(rows={**there, name: row})
            means = {text: f"{np.exp(np.mean(losses)):.1f}" for text, losses in row.get("losses", {}).items()}
            print(f"seed {self.seed} {name}", means or row["failed"], flush=True)

    def _runner(self, chains: Sequence[Chain], cache: Any, key: str = "") -> Runner:
        return Runner(self.subject, self.text, chains, Passes(BATCH), store=Store(cache, key))

    def _row(self, runner: Runner, chain: Chain, ratio: float) -> Result:
        """Prune, repair and evaluate; with the timed seed alone, from scores that nobody else made."""
        took: Result = {}
        if timed := self.seed == self.setting.timed:
            if chain.name not in self.alone:
                scores, began = Memory(), time.process_time()
                known = peak_gib(forget=True)
                self._runner([chain], scores).first()
                self.alone = {chain.name: (scores, time.process_time() - began, known and peak_gib())}
            runner = self._runner([chain], Memory(self.alone[chain.name][0]))
            peak_gib(forget=True)
        began = time.process_time()
        state = runner.run(chain, ratio)
        if timed:
            _, scoring, gib = self.alone[chain.name]
            took = {"scoring": round(scoring, 2), "seconds": round(time.process_time() - began, 2)}
            took["gib"] = gib and max(gib, peak_gib() or 0.0)
            pair = self.subject.cut(self.subject.existing), state.subject.cut(state.keep)
            rows = rows_of(next(iter(self.text.values())), slice(BATCH))
            whole, smaller = median_seconds([functools.partial(each.losses, rows, BATCH) for each in pair], 5)
            took["forward"] = round(smaller / whole, 3)
        others = [row for name, row in self.found["rows"].items() if name.endswith(f"@{ratio:g}")]
        rivals = [row["losses"] for row in others if "losses" in row]
        lowest = {text: min((float(np.mean(each[text][: self.setting.first])) for each in rivals), default=math.inf)
                  for text in self.judge.texts}  # fmt: skip
        gone = self.subject.existing["attention"] & ~state.keep["attention"]
        actual = round(self.subject.removed(state.keep) / self.subject.prunable, 4)
        found = self.judge.judged(state.subject, state.keep, lowest)
        return {"heads": int(gone.sum()), "actual": actual, **took, **found}

    def _further(self, state: State, name: str, key: str, after: str, asked: Sequence[Task]) -> Result:
        """Cut, train if asked for, and evaluate again: on as many windows as the row was, and on tasks."""
        row = dict(self.found["rows"].get(name, {}))
        if row.get("key") != key or "losses" not in row:
            raise SystemExit(f"{name}, seed {self.seed}: expected it to be run first, without --after and --tasks")
        pruned: Any = state.subject
        subject = pruned.with_model(pruned.cut(state.keep).model)
        if after:
            subject = subject.with_model(trained(subject, self.seed, self.setting, after))
            whole = {text: len(each) > self.setting.first for text, each in row["losses"].items()}
            ends = {text: math.inf if all_of else -math.inf for text, all_of in whole.items()}
            row[SLOTS[after]] = {"key": key, "steps": STEPS, **self.judge.judged(subject, subject.existing, ends)}
        if asked:
            of = row[SLOTS[after]] if after else row
            of["tasks"] = answered(subject, asked)
        return row


def tasks_of(items: int) -> list[Task]:
    """Read the first items of the tasks that are there."""
    places = {task: find_task(task) for task in TASKS}
    return [read_task(task, place, items) for task, place in places.items() if place]


def has_answers(row: Result, asked: Sequence[Task]) -> bool:
    """Tell whether a row has the answers to all items of tasks; those to more items begin with those to fewer."""
    known = row.get("tasks") or {}
    return all(len(known.get(task.name, "")) >= len(task.items) for task in asked)


def answered(subject: Any, asked: Sequence[Task]) -> dict[str, str]:
    """Run a model on tasks: by task, a 1 for each item that it answers rightly, or a 0."""
    found = run_tasks(subject.model, subject.words, asked)
    return {each.task: "".join(str(int(right)) for right in each.values["acc"]) for each in found}


def trained(subject: LlamaSubject, seed: int, setting: Setting, recovery: Any) -> Llama:
    """Train adapters of a model on rows of text and instructions, as `saap recover` does, and merge them.

    Args:
        recovery: a method of `SLOTS`.
    """
    groups = {"group_size": setting.group_size} if recovery == "groupwise" else {}
    config = RecoverConfig(
        model="", dense="", method=MethodConfig(name=recovery, **groups),
        data=TrainingTextConfig(sources=setting.training, length=2 * setting.length, held_out=0.0, seed=seed),
        training=TrainingConfig(
            max_steps=STEPS, batch_size=4, learning_rate=3e-3, warmup=4, check_every=STEPS, seed=seed, epochs=99
        ),
    )  # fmt: skip
    method = method_of(config.method)
    training = training_of(config, method, subject.model, None, read_text(config, subject.words), None)
    with tempfile.TemporaryDirectory() as place, Checkpoints(Path(place)) as checkpoints:
        outcome = train(training, checkpoints)
    return method.merge(join(outcome.trained, training.frozen))


def run(
    model: str, seeds: Sequence[int], chains: Mapping[str, str], ratios: Sequence[float], cache: Path,
    setting: Setting, *, after: str = "", tasks: bool = False,
) -> None:  # fmt: skip
    """Run rows, `{name: chain}`, on the calibration text of each seed."""
    subject: Any = open_subject(ModelConfig(name=model))
    try:
        texts = {name: text_of(source, subject.words, setting) for name, source in setting.texts.items()}
    except ValueError as error:
        raise SystemExit(str(error)) from None
    judge = Judge(subject, texts, setting.first)
    made = [Chain(expand([chain])[0].steps, name) for name, chain in chains.items()]
    for seed in seeds:
        Arena(subject, judge, seed, cache, setting).run(made, ratios, after, tasks)


def fresh_of(words: str) -> int:
    """Read the number of a set of windows: `fresh:N`, or 0 of `drawn`."""
    kind, _, number = words.partition(":")
    if words == "drawn":
        return 0
    if kind != "fresh" or not number.isdecimal() or int(number) < 1:
        raise argparse.ArgumentTypeError(f"expected drawn or fresh:N with N from 1 on, got {words!r}")
    return int(number)


def items_of(words: str) -> int:
    """Read how many items of a task are asked for, at least one."""
    if not words.isdecimal() or int(words) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1 on, got {words!r}")
    return int(words)


def main() -> None:
    """Run rows, or report."""
    known = {name: row.chain for name, row in rows().items()}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--model", choices=(*MODELS,), default=next(iter(MODELS)))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--rows", nargs="+", choices=(*known,), default=[*known], metavar="ROW")
    parser.add_argument("--ratios", type=float, nargs="+", choices=RATIOS, default=RATIOS)
    parser.add_argument("--examples", type=int, default=Setting().examples, help="windows of calibration text")
    parser.add_argument("--after", choices=(*SLOTS,), default="")
    parser.add_argument("--tasks", action="store_true")
    parser.add_argument("--items", type=items_of, default=Setting().items, help="items of each task")
    parser.add_argument("--windows", type=fresh_of, default="drawn", metavar="drawn|fresh:N", help="what judges")
    parser.add_argument("--cache", type=Path, default=Path("runs/.cache"))
    asked = parser.parse_args()
    if asked.what == "report":
        report()
        return
    setting = Setting(examples=asked.examples, fresh=asked.windows, items=asked.items)
    chains = {name: known[name] for name in asked.rows}
    run(asked.model, asked.seeds, chains, asked.ratios, asked.cache, setting, after=asked.after, tasks=asked.tasks)


if __name__ == "__main__":
    main()
