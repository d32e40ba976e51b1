"""What docs/arena.md and README.md say of the arena: made of the files in docs/arena, and held against them."""

import collections
import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from claims import LEVEL, Crossed, Verdict, crossed, verdicts
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from saap_jax.recipes import RECIPES
from saap_jax.report.figures import logarithmic
from saap_jax.steps.chain import parse

matplotlib.rcParams["svg.hashsalt"] = "arena"  # the same figure is the same file

PROJECT = Path(__file__).parent.parent
DOCS = PROJECT / "docs"
MODELS = {"smollm2-135m": "SmolLM2-135M-Instruct", "gemma3-270m": "Gemma 3 270M"}
OURS = ("fast", "default", "homogeneous")
CONTENDERS = ("modegpt-mlp", "llm-pruner-param-second", "slimgpt", "fasp-mlp", "osscar", "ziplm-no-search")
"""Published rows that come first, since they end the evaluation of others early; also their variants."""
FEWER = {
    "sleb-8-windows": ("sleb", "layer)", "layer, examples=8)"),
    "blockpruner-8-windows": ("blockpruner", "block_ablation", "block_ablation(examples=8)"),
    "gisp-28-steps": ("gisp", "/112", "/28"),
}
"""Rows in the place of recipes that would take hours: name, and what of the chain is replaced by what."""
MIXED = "-our-repair"
"""All of our repair behind a published method, with the units that it chose and the refit that it has."""
REPAIRED = ("modegpt-mlp", "llm-pruner-param-second", "slimgpt", "fasp-mlp", "osscar", "llm-pruner-param-mix")
"""Methods that have such a row: the lowest of the columns."""
SEEDS, FEWEST_SEEDS, FARTHEST, SHOWN = (3, 4, 5, 6, 7), 3, 4, 8
"""Seeds of a row, and the fewest that are shown; times the lowest perplexity that are drawn; rows that are listed."""
BEGIN, END = "<!-- arena: made by experiments/arena.py report -->", "<!-- /arena -->"
STEPS = "![perplexity after each step of our methods, with 95 % intervals](arena/steps.svg)"
FIGURE = "![perplexity of the lowest methods, ours in red; processor minutes where known]({}arena/front.svg)"

Result = dict[str, Any]
"""A file: `dense` and `articles` by text, in reading order, and `rows` by NAME@RATIO; or one row."""

TITLE = "# The arena: published methods and ours"
AFTER = " after LoRA"
COLUMN = "A column is a model, a share that went and a text. *Surely* is at 5 %, beside all rows together."
HINT = """Open a figure for its interval: how far a row is from `default`, and ours from the lowest published row.
Open a name for what else is known of it. On the site, click a head of the table to sort by it."""
PROTOCOL = """\
    SAAP_DATA=DATA python experiments/arena.py run [--model MODEL] [--examples 512] [--after lora] [--tasks]
    python experiments/arena.py report

- Each method is a [recipe](estimators.md#recipes): `saap methods NAME` says what it is made of, and where it differs
  from its paper. All see the same windows of 128 tokens of C4, drawn with the seed, and lose the same share of the
  prunable parameters (attention and MLP); *removed* is what really went, *heads* are KV heads with all their query
  heads. float32. `default` has the unpruned model write more text, which begins as those windows do.
- Rows of `default` and of its steps that ran before 2026-12-01 chose behind least squares. Today's choice, before any
  repair, takes the same way on each of their seeds (`fast` was run again), so they are rows of today's chain.
- Judged by ppl@128 on 128 windows of WikiText-2 (raw test) and of Penn Treebank (valid): one of each of 128 stretches
  of equal length, drawn with a fixed seed. Nothing of ours was chosen on these texts, but for two older constants:
  how many layers are protected, and that heads go from 30 % on only. A row that is 12 % above the
  lowest after the first 32 windows, a random part of them, stays there: `~` marks its perplexity, the unpruned
  model's on all windows times the ratio of the two on its own.
- Differences are in per cent of perplexity with a 95 % interval each, by a crossed model of random seeds and articles
  (stretches of four neighbouring windows of Penn Treebank), never narrower than Student's interval of the seed means:
  `experiments/claims.py`. *Surely* is Holm's procedure at 5 %, over the published rows of a column, or the
  steps of one. What cannot be seen is the half width of the interval at the level at which it tested last.
- Of five planned seeds, those that are there were looked at as they came: SmolLM2 with three, four and then five;
  Gemma with three and, at 35 %, where one verdict was open, a fourth. The intervals are not widened for that.
- On 512 windows few published rows ran: `llm-pruner-param-second`, the lowest at 20 % on 32 windows, and `modegpt-mlp`,
  the lowest at 50 % on Penn Treebank. `slimgpt`, the lowest at 50 % on WikiText-2, did not. One seed was looked at
  before the other two, and `default` ran when the figures of `fast` were known.
- Ours stand beside the lowest published row, which was chosen after the fact, and all rows beside `default`.
- *KL* is KL(p_unpruned ‖ p) in nats a token, *words* the share of places whose likeliest word changes, both on the
  first 32 windows of each text. *Tasks* is the mean accuracy on the first 200 items of each of ARC easy, BoolQ,
  HellaSwag, PIQA and WinoGrande, ± 95 % of items, and of seeds where there are several. *Forward* is the time of a
  forward pass of 8 windows in per cent of the unpruned model's, median of five in turns. *Minutes* are processor time,
  of all cores together, of scoring, choosing and repairing; compiling, loading and evaluating are not in it; *GiB* the
  most memory held meanwhile; both of the last seed, on which each row scored by itself.
- *+ LoRA* is after 64 steps of LoRA of rank 8 on all matrices, merged. A step has four rows of 256 tokens of C4 and of
  Alpaca's instructions, in the same order for all rows of a seed, at a rate of 0.003; the language loss alone is
  lowered. Such a row is evaluated on as many windows as before. On SmolLM2 `default` and two published rows a ratio
  were trained, at 20 % `saap` among them; on Gemma, at 50 % alone, `default` and `fasp-mlp`, the lowest published row
  there on Penn Treebank. Rate and steps were chosen for none of them.
- A row named `-8-windows` looks at eight of the windows only. One named `-28-steps` goes in 28 steps instead of 112.
  Their recipes would take hours here.
- Rows named `-our-repair` choose as published and are repaired as ours are. They count as neither.
"""


class Row(NamedTuple):
    """What is run under a name."""

    chain: str
    kind: str
    """`ours`, `published`, `mixed` (a published choice, our repair), `part` of a chain of ours, or `floor`."""


@functools.cache
def rows() -> dict[str, Row]:
    """List the rows, contenders first: recipes that can be run, ours behind what they begin with that is a method."""
    there = {name: each.chain for name, each in RECIPES.items() if not each.missing and not each.repair}
    there |= {name: there.pop(of).replace(*change) for name, (of, *change) in FEWER.items()}
    there |= {f"{name}{MIXED}": f"{name} > reconstruct" for name in REPAIRED}
    ours = [name for name in OURS if name in there]
    first = [name for name in there if name.startswith(CONTENDERS)]
    kinds = {name: "mixed" if name.endswith(MIXED) else "published" for name in there if name not in ours}
    chains, found = {parse(each).written for each in there.values()}, dict[str, Row]()
    for name in ours:
        steps = parse(there[name]).steps
        allocated = next(at for at, step in enumerate(steps, 1) if step.kind == "allocation")
        for end in (end for end in range(allocated, len(steps)) if steps[end - 1].kind != "text"):
            part = " > ".join(step.text for step in steps[:end])
            if part not in chains:
                chains.add(part)
                found[f"{name}[:{end}]"] = Row(part, "part")
        found[name] = Row(there[name], "ours")
    return (
        found
        | {name: Row(there[name], kinds[name]) for name in [*first, *there] if name in kinds}
        | {"random": Row("random", "floor")}
    )


FILE = re.compile(r"claims-(?:fresh(?P<fresh>\d+)-)?(?P<model>.+)-(?P<examples>\d+)-(?P<seed>\d+)")
"""Names of files, without their ends."""


def result_path(docs: Path, model: str, examples: int, seed: int | str, fresh: int = 0) -> Path:
    """Name the file of a model, number of calibration windows and seed, on the first or a fresh set of windows."""
    return docs / "arena" / f"claims-{f'fresh{fresh}-' * bool(fresh)}{Path(model).name}-{examples}-{seed}.json"


class Line(NamedTuple):
    """A row at a ratio: what was found by seed."""

    name: str
    kind: str
    found: dict[str, Result]

    def values(self, what: str) -> list[Any]:
        """List a value of all seeds that have it."""
        return [each[what] for each in self.found.values() if each.get(what) is not None]

    def mean(self, what: str) -> float:
        """The mean of a number, or of one by text; NaN where no seed has it."""
        known = [np.mean([*each.values()] if isinstance(each, dict) else each) for each in self.values(what)]
        return float(np.mean(known)) if known else math.nan

    @property
    def minutes(self) -> float:
        """Processor minutes, where it ran by itself."""
        return (self.mean("scoring") + self.mean("seconds")) / 60

    def accuracy(self, dense: Mapping[str, str], default: "Line | None" = None) -> str:
        """The mean accuracy on tasks with its interval; folded, how far it is from the unpruned model and `default`."""
        known = self.values("tasks")
        if not known:
            return "–"
        apart = [f"from unpruned: {accuracy(known, [dense] * len(known))}"] if dense else []
        both = [seed for seed, row in self.found.items() if row.get("tasks") and default and default.answers(seed)]
        if default and default is not self and both:
            own, others = ([line.found[seed]["tasks"] for seed in both] for line in (self, default))
            apart.append(f"from default: {accuracy(own, others)} (paired)")
        apart.append(f"{counting(len(known), 'seed')}, {len(next(iter(known[0].values())))} items a task at most")
        return folded(accuracy(known), "; ".join(apart))

    def answers(self, seed: str) -> Mapping[str, str] | None:
        """The answers to tasks on a seed, where there are any."""
        return self.found.get(seed, {}).get("tasks")


def accuracy(known: Sequence[Mapping[str, str]], others: Sequence[Mapping[str, str]] = ()) -> str:
    """The mean accuracy on tasks, or its difference from that of others on the same seeds, per cent, ± 95 %.

    The interval is of items, and of several seeds also of these, as `claims.py` has it. Differences are paired by item;
    where some answered more items, those count that all answered.
    """
    if not known:
        return "–"
    every = [*known, *others]
    right = []
    for task in (task for task in known[0] if all(task in each for each in every)):
        many = min(len(each[task]) for each in every)
        numbers = np.array([[*map(int, each[task][:many])] for each in every], float)
        right.append(numbers[: len(known)] - (numbers[len(known) :] if others else 0))
    by_items = sum(each.mean(0).var(ddof=1) / each.shape[1] for each in right) / len(right) ** 2
    means = np.mean([each.mean(1) for each in right], axis=0)
    half = 1.96 * math.sqrt(by_items)
    if len(means) > 1:
        freedoms = (len(means) - 1.0, sum(each.shape[1] - 1.0 for each in right))
        half = Crossed(0.0, (means.var(ddof=1) / len(means), by_items), freedoms, len(right)).half()
    return f"{100 * means.mean():{'+' if others else ''}.1f} ± {100 * half:.1f}"


class Group(NamedTuple):
    """The files of a model and a number of calibration windows."""

    title: str
    examples: int
    seeds: tuple[str, ...]
    dense: dict[str, np.ndarray]
    articles: dict[str, np.ndarray]
    lines: dict[float, list[Line]]
    failed: dict[str, str]
    tasks: dict[str, str]
    """The unpruned model's answers."""
    few: list[tuple[float, Line]]
    """Rows of fewer than `FEWEST_SEEDS` seeds, with their ratios."""
    fresh: int = 0
    """Which set of windows judges: 0 the first one, N the N-th that no table had before."""

    def log_perplexity(self, line: Line, text: str) -> float:
        """The unpruned model's on all windows, and the mean difference from it on those evaluated, over the seeds."""
        dense, losses = self.dense[text], [np.array(each[text]) for each in line.values("losses")]
        return float(dense.mean() + np.mean([np.mean(each - dense[: len(each)]) for each in losses]))

    def perplexity(self, line: Line, text: str) -> str:
        """The perplexity in words, marked where windows are missing."""
        value = math.exp(min(self.log_perplexity(line, text), 700))
        few = any(len(each[text]) < len(self.dense[text]) for each in line.values("losses"))
        return ("~" if few else "") + (f"{value:.1f}" if value < 1e4 else f"{value:.1e}")

    def beside(self, a: Line, b: Line | None, text: str) -> Crossed:
        """Estimate the difference of two rows, or of one from the unpruned model, on what both have."""
        seeds = [seed for seed in a.found if b is None or seed in b.found]
        pairs = [(a.found[seed]["losses"][text], b.found[seed]["losses"][text] if b else self.dense[text])
                 for seed in seeds]  # fmt: skip
        count = min(len(each) for pair in pairs for each in pair)
        of_a, of_b = (np.array([each[:count] for each in some], np.float64) for some in zip(*pairs, strict=True))
        return crossed(of_a, of_b, self.articles[text][:count])

    def of(self, ratio: float, *kinds: str) -> list[Line]:
        """Choose lines by kind, the lowest on the first text first."""
        some = [line for line in self.lines.get(ratio, ()) if line.kind in kinds]
        return sorted(some, key=lambda line: self.log_perplexity(line, next(iter(self.dense))))

    def named(self, ratio: float, name: str) -> Line | None:
        """Find a line by name."""
        return next((line for line in self.lines[ratio] if line.name == name), None)

    def lowest(self, lines: Sequence[Line], text: str) -> Line | None:
        """Find the lowest line on a text."""
        return min(lines, key=lambda line: self.log_perplexity(line, text), default=None)

    def against(self, line: Line, others: Sequence[Line], text: str) -> dict[str, Verdict]:
        """Judge a line beside others, all together."""
        found = verdicts([self.beside(line, other, text) for other in others])
        return {other.name: verdict for other, verdict in zip(others, found, strict=True)}


def groups(docs: Path) -> list[Group]:
    """Read all files: fewest calibration windows first, then the first windows, models in the order of `MODELS`."""
    names = [FILE.fullmatch(path.stem) for path in (docs / "arena").glob("claims-*.json")]
    keys = {(int(name["examples"]), int(name["fresh"] or 0), name["model"]) for name in names if name}
    order = sorted(keys, key=lambda key: (*key[:2], [*MODELS, key[2]].index(key[2])))
    return [read_group(docs, model, examples, rows(), fresh) for examples, fresh, model in order]


def read_group(docs: Path, model: str, examples: int, known: Mapping[str, Row], fresh: int = 0) -> Group:
    """Read the files of a model; rows of fewer than `FEWEST_SEEDS` seeds stand apart."""
    files = sorted(docs.glob(str(result_path(Path(), model, examples, "*", fresh))))
    of_seed = {path.stem.rpartition("-")[2]: json.loads(path.read_text()) for path in files}
    first, lines, few = next(iter(of_seed.values())), dict[float, list[Line]](), list[tuple[float, Line]]()
    failed = {key: row["failed"] for each in of_seed.values() for key, row in each["rows"].items() if "failed" in row}
    for key in sorted({key for each in of_seed.values() for key in each["rows"]}):
        name, _, ratio = key.rpartition("@")
        found = {seed: each["rows"][key] for seed, each in of_seed.items() if "losses" in each["rows"].get(key, {})}
        kind = known[name].kind if name in known else "part" if "[" in name else "published"
        if len(found) >= FEWEST_SEEDS:
            lines.setdefault(float(ratio), []).append(Line(name, kind, found))
        elif found:
            few.append((float(ratio), Line(name, kind, found)))
    dense, articles = ({text: np.array(each) for text, each in first[what].items()} for what in ("dense", "articles"))
    title = MODELS.get(model, model) + f", fresh windows {fresh}" * bool(fresh)
    answers = [each["tasks"] for each in of_seed.values() if "tasks" in each]
    tasks = max(answers, key=lambda each: len("".join(each.values())), default={})
    return Group(
        title, examples, tuple(of_seed), dense, articles, dict(sorted(lines.items())), failed, tasks, few, fresh
    )


# --- words -----------------------------------------------------------------------------------------


def percent(ratio: float) -> str:
    """Write a share in per cent."""
    return f"{100 * ratio:.0f} %"


def difference(verdict: Verdict) -> str:
    """Write a difference with its interval and verdict."""
    value, low, high = verdict.difference.percent
    if value >= 1000:
        return f"× {1 + value / 100:.0f}, {verdict.said}"
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f}), {verdict.said}"


def counting(many: int, of: str) -> str:
    """Write a number of things.

    >>> counting(1, "seed"), counting(3, "seed")
    ('1 seed', '3 seeds')
    """
    return f"{many} {of}{'s' * (many != 1)}"


def listed(words: Sequence[str]) -> str:
    """Join words as a sentence does.

    >>> listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"])
    ('a', 'a and b', 'a, b and c')
    """
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def folded(shown: str, text: str) -> str:
    """Fold a text under a figure or a name, within a cell."""
    return f"<details><summary>{shown}</summary>{text}</details>" if text else shown


def written(*cells: str) -> str:
    """Write a row of a table."""
    return f"| {' | '.join(cells)} |".replace(" nan ", " – ")


def table(found: Sequence[Group]) -> list[str]:
    """Make the one table: a row a method, model and ratio, models and ratios in turns, the lowest first."""
    texts, several = [*found[0].dense], len({group.examples for group in found}) > 1
    heads = ["method", "model", "gone, %", *texts, "KL", "tasks, %", "forward, %", "minutes", "GiB"]
    said = [written(*heads), "|---|---|" + "---:|" * (len(heads) - 2)]
    for group in found:
        title = f"{group.title}, {group.examples} windows" if several else group.title
        dense = (f"{math.exp(group.dense[text].mean()):.1f}" for text in texts)
        right = accuracy([group.tasks] if group.tasks else [])
        said.append(written("unpruned", title, "0", *dense, "0.00", right, "100", "0.0", "–"))
        for some, after in ((group, ""), (trained(group), " + LoRA")):
            said += [line for ratio in some.lines for line in rows_at(some, ratio, title, after)]
    return said


def rows_at(group: Group, ratio: float, title: str, after: str) -> list[str]:
    """Make the rows of a model at a ratio; what is seldom asked for, and intervals, are folded."""
    published, ours, default = group.of(ratio, "published"), group.of(ratio, "ours"), group.named(ratio, "default")
    said = collections.defaultdict[tuple[str, str], list[str]](list)
    for text in group.dense:
        if best := group.lowest(published, text):
            for line in ours:
                verdict = group.against(line, published, text)[best.name]
                said[line.name, text].append(f"from {best.name}: {difference(verdict)}")
        for some in (published, *([line] for line in ours if line is not default)) if default else ():
            found = verdicts([group.beside(line, default, text) for line in some])
            for line, verdict in zip(some, found, strict=True):
                said[line.name, text].append(f"from default: {difference(verdict)}")
    made = []
    for line in group.of(ratio, "ours", "published", "mixed", "floor"):
        more = f"{100 * line.mean('actual'):.1f} % removed, {line.mean('heads'):.0f} KV heads gone; "
        more += f"{100 * line.mean('changed'):.0f} % of the likeliest words change; {len(line.found)} seeds"
        name = folded(f"<b>{line.name}{after}</b>" if line.kind == "ours" else f"{line.name}{after}", more)
        figures = [folded(group.perplexity(line, t), "; ".join(said[line.name, t])) for t in group.dense]
        numbers = [f"{line.mean('kl'):.2f}", line.accuracy(group.tasks, default), f"{100 * line.mean('forward'):.0f}"]
        numbers += [f"{line.minutes:.1f}", f"{line.mean('gib'):.1f}"]
        made.append(written(name, title, f"{100 * ratio:.0f}", *figures, *numbers))
    return made


class Column(NamedTuple):
    """A model, a share that went, and a text."""

    group: Group
    ratio: float
    text: str

    def __str__(self) -> str:
        return f"{self.group.title.removesuffix(AFTER)} at {self.of_group()}"

    def of_group(self) -> str:
        """Name the column among those of its group."""
        return f"{percent(self.ratio)} on {self.text}"

    def lowest(self) -> list[str]:
        """Name the lowest row."""
        line = self.group.lowest(self.group.of(self.ratio, "ours", "published"), self.text)
        return [line.name] if line else []

    def surely_below(self, kind: str, other: str, every_look: bool = False) -> list[str]:
        """Name the rows of a kind that are surely below every row of the other.

        With `every_look` the level is divided by how often a row was looked at: with `FEWEST_SEEDS` seeds, and with
        each seed more.
        """
        others, names = self.group.of(self.ratio, other), []
        for line in self.group.of(self.ratio, kind):
            level = LEVEL / (len(line.found) - FEWEST_SEEDS + 1 if every_look else 1)
            found = self.group.against(line, others, self.text).values()
            if found and all(each.difference.value < 0 and each.p_value < level for each in found):
                names.append(line.name)
        return names


def counted(names_of: Mapping[str, Sequence[str]]) -> str:
    """Say in how many columns each name is, the most first; where it is in few, or is missing in few, also in which.

    >>> counted({"A at 20 %": ["a"], "B at 20 %": ["a", "b"], "A at 50 %": ["a"], "B at 50 %": ["c"]})
    '`a` in 3 of 4 columns (not B at 50 %), `b` in 1 (B at 20 %) and `c` in 1 (B at 50 %)'
    """
    said, of = [], f" of {len(names_of)} columns"
    every = list(itertools.chain.from_iterable(names_of.values()))
    for name in sorted(dict.fromkeys(every), key=every.count, reverse=True):
        without = [column for column, names in names_of.items() if name not in names]
        inside = [column for column in names_of if column not in without]
        few = f" (not {listed(without)})" if 0 < len(without) <= min(3, len(names_of) / 2) else ""
        few = f" ({listed(inside)})" if len(inside) < min(3, len(names_of) / 2) else few
        said.append(f"`{name}` in {len(names_of) - len(without)}{of}{few}")
        of = ""
    return listed(said)


def faster(group: Group) -> dict[str, list[str]]:
    """List, by column, the published rows surely below `default` that are as fast or faster, where all are timed."""
    said: dict[str, list[str]] = {}
    for ratio in group.lines:
        default, published = group.named(ratio, "default"), group.of(ratio, "published")
        for text in group.dense if default else ():
            judged = group.against(default, published, text)
            lower = [line for line in published if judged[line.name].said == "surely higher"]
            if all(line.minutes > 0 for line in (*lower, *[default] * bool(lower))):
                column = f"{group.title}, {percent(ratio)}, {text}"
                said[column] = [line.name for line in lower if line.minutes <= default.minutes]
    return said


def standing(columns: Sequence[Column]) -> list[str]:
    """Say in how many columns which row is lowest, and which is surely below all rows of the other side."""
    name = str if len({each.group.title for each in columns}) > 1 else Column.of_group
    said = [f"Lowest: {counted({name(each): each.lowest() for each in columns})}."] if columns else []
    for kind, other, side in (("ours", "published", "published row"), ("published", "ours", "row of ours")):
        sure = {name(each): each.surely_below(kind, other) for each in columns}
        if any(sure.values()):
            many = sorted({len(each.group.of(each.ratio, other)) for each in columns})
            them = " to ".join(map(str, dict.fromkeys((many[0], many[-1]))))
            said.append(f"Surely below every {side} ({them} of them): {counted(sure)}.")
            shared = {name(each): each.surely_below(kind, other, every_look=True) for each in columns}
            if shared != sure:
                said.append(
                    f"With the level divided by the looks, one for each seed from the third on: {counted(shared)}."
                )
    return said


def answer(found: Sequence[Group]) -> list[str]:
    """Answer in a paragraph each: how ours stand, beside rows as fast, after training, and with more text."""
    first = of_least_text(found)
    parts = {"": first, "After LoRA": [trained(group) for group in first]}
    for group in found[len(first) :]:
        parts.setdefault(f"Calibrated on {group.examples} windows", []).append(group)
    paragraphs = []
    for which, some in parts.items():
        columns = [Column(group, ratio, text) for group in some for ratio in group.lines
                   if group.of(ratio, "published") for text in group.dense]  # fmt: skip
        said = standing(columns)
        if not which and (judged := [names for group in first for names in faster(group).values()]):
            above = f"In {sum(map(bool, judged)) or 'none'} of {len(judged)} columns `default` is surely above"
            said.append(f"{above} a published row that takes as long or less.")
        if len(titles := {each.group.title.removesuffix(AFTER) for each in columns}) == 1 and which:
            which += f", {titles.pop()}"
        if said:
            paragraphs.append(" ".join([f"{which}."] * bool(which) + said))
    if left := [title for title in MODELS.values() if title not in {group.title for group in found}]:
        paragraphs.append(f"**{', '.join(left)}** has no rows yet.")
    return paragraphs


def paths(group: Group, ratio: float) -> list[list[tuple[Line, str]]]:
    """List rows whose chains begin alike, shortest first, each with the steps that it adds to the one before."""
    steps, found = {line.name: line.values("chain")[0] for line in group.lines[ratio]}, []
    for whole in steps.values():
        path = sorted((n for n, own in steps.items() if whole[: len(own)] == own), key=lambda n: len(steps[n]))
        if len(path) < 2 or any(len(own) > len(whole) and own[: len(whole)] == whole for own in steps.values()):
            continue
        at = [0, *(len(steps[n]) for n in path)]
        added = [", ".join(f"{kind}: `{text}`" for kind, text in whole[a:b]) for a, b in itertools.pairwise(at)]
        found.append([(line, one) for n, one in zip(path, added, strict=True) if (line := group.named(ratio, n))])
    return found


def ablation(group: Group) -> list[str]:
    """Make tables of what each step adds, of rows whose chains begin alike, each beside the one before."""
    said: list[str] = []
    for ratio, path in ((each, path) for each in group.lines for path in paths(group, each)):
        lines, texts = [line for line, _ in path], group.dense
        found = {t: verdicts([group.beside(b, a, t) for a, b in itertools.pairwise(lines)]) for t in texts}
        title = f"{lines[-1].name}, {percent(ratio)}, {group.title}, {group.examples} windows"
        said += [f"| {title} | " + " | ".join(f"{text} | adds, %" for text in texts) + " |"]
        said += ["|---" * (1 + 2 * len(texts)) + "|"]
        for at, (line, added) in enumerate(path):
            cells = [added]
            for text in texts:
                cells += [group.perplexity(line, text), difference(found[text][at - 1]) if at else ""]
            said.append(f"| {' | '.join(cells)} |")
        said.append("")
    return said


def repaired(group: Group) -> list[str]:
    """Make tables of published choices that are repaired as `fast` is: beside their own repair, and beside `fast`."""
    said: list[str] = []
    for ratio in group.lines:
        fast = group.named(ratio, "fast")
        pairs = [(line, own) for line in group.of(ratio, "mixed")
                 if fast and (own := group.named(ratio, line.name.removesuffix(MIXED)))]  # fmt: skip
        if not (fast and pairs):
            continue
        found = {t: [verdicts([group.beside(a, b, t) for a, b in some])
                     for some in (pairs, [(line, fast) for line, _ in pairs])] for t in group.dense}  # fmt: skip
        title = f"chosen by, {percent(ratio)}, {group.title}, {group.examples} windows"
        said += [f"| {title} | " + " | ".join(f"{t} | from its own repair, % | from `fast`, %" for t in found) + " |"]
        said += ["|---" * (1 + 3 * len(found)) + "|"]
        for at, (line, own) in enumerate(pairs):
            cells = [[group.perplexity(line, t), *(difference(each[at]) for each in found[t])] for t in found]
            said.append(f"| {own.name} | {' | '.join(itertools.chain.from_iterable(cells))} |")
        said.append("")
    return said


def trained(group: Group) -> Group:
    """Take what was found after training in place of what was found before."""
    lines: dict[float, list[Line]] = {}
    for ratio, line in ((ratio, line) for ratio, some in group.lines.items() for line in some):
        after = {s: each | {"tasks": None} | each["after"] for s, each in line.found.items() if "after" in each}
        if len(after) >= FEWEST_SEEDS:
            lines.setdefault(ratio, []).append(line._replace(found=after))
    return group._replace(lines=lines, title=f"{group.title}{AFTER}")


def by_training(group: Group) -> list[str]:
    """Make tables of what training changes, each row beside itself before."""
    said: list[str] = []
    for ratio, lines in trained(group).lines.items():
        pairs = [(line, line._replace(found={seed: own.found[seed] for seed in line.found}))
                 for line in lines if (own := group.named(ratio, line.name))]  # fmt: skip
        found = {text: verdicts([group.beside(*pair, text) for pair in pairs]) for text in group.dense}
        title = f"trained, {percent(ratio)}, {group.title}, {group.examples} windows"
        said += [f"| {title} | " + " | ".join(f"{text} before | after | changes, %" for text in found) + " |"]
        said += ["|---" * (1 + 3 * len(found)) + "|"]
        for at, (line, own) in enumerate(pairs):
            cells = [[group.perplexity(own, t), group.perplexity(line, t), difference(found[t][at])] for t in found]
            said.append(f"| {line.name} | {' | '.join(itertools.chain.from_iterable(cells))} |")
        said.append("")
    return said


def about(group: Group) -> list[str]:
    """Say where the rows of a group come from, and what failed."""
    found = [row for lines in group.lines.values() for line in lines for row in line.found.values()]
    dates, commits = ({row[what] for row in found} for what in ("date", "commit"))
    said = [f"- {group.title}, calibrated on {group.examples} windows: seeds {', '.join(group.seeds)}, run "
            f"{min(dates)} to {max(dates)}, commits {', '.join(sorted(commits))}."]  # fmt: skip
    return said + [f"- `{key}` could not be pruned: {why}" for key, why in group.failed.items()]


def on_few_seeds(group: Group) -> list[str]:
    """Say what is known of the rows of too few seeds; a line a ratio."""
    said: dict[float, list[str]] = {}
    for ratio, line in sorted(group.few):
        if line.kind != "part":
            figures = " / ".join(group.perplexity(line, text) for text in group.dense)
            said.setdefault(ratio, []).append(f"`{line.name}` {figures} ({listed([*line.found])})")
    about = f"of {group.title}, calibrated on {group.examples} windows (seeds in brackets)"
    return [f"- {percent(ratio)} {about}: {', '.join(rows)}" for ratio, rows in said.items()]


def of_least_text(found: Sequence[Group]) -> list[Group]:
    """Choose the groups that were calibrated on as little text as the first."""
    return [group for group in found if group.examples == found[0].examples]


def listing(paragraphs: Sequence[str]) -> list[str]:
    """Make a list."""
    return [f"- {each}" for each in paragraphs]


def appendix(title: str, lines: Sequence[str]) -> list[str]:
    """Make a section that is folded."""
    return [f"## {title}", "", "<details><summary>Show</summary>", "", *lines, "", "</details>", ""]


def pages(docs: Path = DOCS) -> tuple[str, str] | None:
    """Make docs/arena.md and the block of README.md; None where there are no files."""
    every = groups(docs)
    if not (found := [group for group in every if group.lines]):
        return None
    first = of_least_text(found)
    said = [TITLE, "", *listing([*answer(found), COLUMN]), "", FIGURE.format(""), "", HINT, "", *table(found), ""]
    above = [f"- {column}: {', '.join(names)}" for group in first for column, names in faster(group).items() if names]
    said += appendix(
        "What is surely below `default` and takes no longer",
        above or ["Nothing." if any(map(faster, first)) else "The rows that are surely below it are not timed yet."],
    )
    said += appendix("What each step adds", [STEPS, "", *(line for group in found for line in ablation(group))])
    if ours := [line for group in found for line in repaired(group)]:
        said += appendix("Our repair behind published choices", ours)
    if changed := [line for group in found for line in by_training(group)]:
        said += appendix("What LoRA changes", changed)
    said += appendix("Protocol", [PROTOCOL, *(line for group in found for line in about(group))])
    few = [line for group in every for line in on_few_seeds(group)]
    tried = {line.name for group in found for lines in group.lines.values() for line in lines}
    tried |= {line.name for group in every for _, line in group.few}
    missing = [f"On fewer than {FEWEST_SEEDS} seeds, and so not judged:", "", *few, ""] if few else []
    names = [name for name, each in rows().items() if each.kind not in ("part", "floor") and name not in tried]
    missing += ["Not run:", "", *(f"- `{name}`" for name in names)]
    missing += [f"- `{of}`: `{name}` stands in its place" for name, (of, *_) in FEWER.items()]
    missing += [f"- `{name}` cannot be run here: {each.missing}" for name, each in RECIPES.items() if each.missing]
    return "\n".join([*said, *appendix("What has no row", missing)]).rstrip() + "\n", readme_block(found)


def readme_block(found: Sequence[Group]) -> str:
    """Make what README.md says: figure, sentences, and ours beside the paper's method and the lowest published row."""
    said, found = answer(found), of_least_text(found)
    names = [name for name in (*OURS, "saap") if any(g.named(ratio, name) for g in found for ratio in g.lines)]
    heads = ["unpruned", *(f"`{name}`" for name in names), "lowest published", "`default` from it, % (95 %)"]
    made = [f"| {' / '.join(found[0].dense)} | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for group, ratio in ((g, r) for g in found for r in g.lines):
        lines = [[group.named(ratio, name)] * len(group.dense) for name in names]
        published, default = group.of(ratio, "published"), group.named(ratio, "default")
        best = [group.lowest(published, text) for text in group.dense]
        cells = [" / ".join(group.perplexity(line, text) if line else "–"
                            for line, text in zip(each, group.dense, strict=True))
                 for each in (*lines, best)]  # fmt: skip
        cells[-1] += f" (`{'`, `'.join(dict.fromkeys(line.name for line in best if line))}`)"
        apart = [group.against(default, published, text)[line.name].difference.percent if default and line else ()
                 for line, text in zip(best, group.dense, strict=True)]  # fmt: skip
        cells.append(" / ".join("{:+.1f} ({:+.1f} to {:+.1f})".format(*each) if each else "–" for each in apart))
        dense = " / ".join(f"{math.exp(losses.mean()):.1f}" for losses in group.dense.values())
        made.append(f"| {group.title}, {percent(ratio)} | {' | '.join([dense, *cells])} |")
    counts = sorted({len(line.found) for group in found for lines in group.lines.values() for line in lines})
    seeds = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    how = (
        f"{COLUMN} Figures are ppl@128, calibrated on {found[0].examples} windows of C4, with {seeds} of {len(SEEDS)} "
        "seeds a row; `~` marks those of some of the windows. [All methods, and how it was measured](docs/arena.md)."
    )
    return "\n".join([FIGURE.format("docs/"), "", *listing([*said, how]), "", *made])


def panels(
    found: Sequence[Group], of: Callable[[Group, float], list[Any]], width: float, height: float
) -> tuple[Figure, list[tuple[Any, Group, float, list[Any]]]]:
    """Make a figure of what `of` finds of models and ratios: a model a column, a ratio a row, no axes for nothing."""
    there = [(group, ratio, some) for group in found for ratio in group.lines if (some := of(group, ratio))]
    columns, rows = dict.fromkeys(group.title for group, *_ in there), sorted({ratio for _, ratio, _ in there})
    figure = Figure(figsize=(width * len(columns), height * len(rows)), layout="constrained")
    place = {title: number for number, title in enumerate(columns, 1)}
    made = []
    for group, ratio, some in there:
        axis = figure.add_subplot(len(rows), len(columns), rows.index(ratio) * len(columns) + place[group.title])
        axis.set_title(f"{group.title}, {percent(ratio)}")
        made.append((axis, group, ratio, some))
    return figure, made


def draw(found: Sequence[Group], path: Path) -> None:
    """Draw perplexity against processor minutes: a model a column, a ratio a row; what is on no front is grey.

    Where one of the lowest rows is not timed, they stand one below the other.
    """
    figure, made = panels(found, lambda group, ratio: group.of(ratio, "ours", "published"), 4.2, 2.8)
    for axis, group, _, there in made:
        text = next(iter(group.dense))
        timed = [line for line in there if line.minutes > 0]
        values = {line.name: group.log_perplexity(line, text) for line in timed}
        near = [line for line in timed if values[line.name] <= min(values.values()) + math.log(FARTHEST)]
        first = there[:SHOWN]
        if not all(line.minutes > 0 for line in first):
            dots(axis, group, {line.name: line for line in first})
            continue
        ordered = sorted(near, key=lambda line: line.minutes)
        front = [
            line for at, line in enumerate(ordered) if all(values[line.name] < values[o.name] for o in ordered[:at])
        ]
        apart = [a for a, b in itertools.pairwise(front) if b.minutes > 1.1 * a.minutes] + front[-1:]
        for line in ordered:
            half, ours = group.beside(line, None, text).half(), line.kind == "ours"
            middle, low, high = (math.exp(values[line.name] + sign * half) for sign in (0, -1, 1))
            colour = "tab:red" if ours else "tab:blue" if line in front or line.name == "saap" else "0.75"
            axis.errorbar(line.minutes, middle, yerr=[[middle - low], [high - middle]], fmt="o", ms=4, color=colour)
            if ours or line in apart or line.name == "saap":
                beside = (5, -9 if ours else 3)  # so that names of neighbours do not meet
                axis.annotate(line.name, (line.minutes, middle), beside, textcoords="offset points", color=colour)
        steps = np.array([(line.minutes, math.exp(values[line.name])) for line in front])
        axis.step(*steps.T, where="post", color="0.7", linewidth=1)
        axis.set(xscale="log", xlabel="processor minutes", ylabel=f"{text} ppl@128")
        axis.set_xlim(ordered[0].minutes / 2, 12 * ordered[-1].minutes)
        axis.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_locator=NullLocator())
        logarithmic(axis)
    figure.savefig(path, metadata={"Date": None})


def draw_steps(found: Sequence[Group], path: Path) -> None:
    """Draw the perplexity after each step of ours: a model a column, a ratio a row."""

    def ours_of(group: Group, ratio: float) -> list[Any]:
        return [own for own in paths(group, ratio) if {line.kind for line, _ in own} <= {"part", "ours"}]

    figure, made = panels(found, ours_of, 5.6, 2.2)
    for axis, group, _, ours in made:
        dots(axis, group, {
            f"{own[-1][0].name}: {'+ ' * bool(at)}{', '.join(re.findall('`([a-z_]+)', added))}": line
            for own in sorted(ours, key=len) for at, (line, added) in enumerate(own)
        })  # fmt: skip
    figure.savefig(path, metadata={"Date": None})


def dots(axis: Any, group: Group, lines: Mapping[str, Line]) -> None:
    """Draw the perplexity of rows on the first text with their intervals, a label a row."""
    text = next(iter(group.dense))
    for label, line in lines.items():
        middle, half = group.log_perplexity(line, text), group.beside(line, None, text).half()
        value, low, high = (math.exp(middle + sign * half) for sign in (0, -1, 1))
        colour = "tab:blue" if line.kind == "published" else "tab:red"
        axis.errorbar(value, label, xerr=[[value - low], [high - value]], fmt="o", ms=4, color=colour)
    axis.set_xlabel(f"{text} ppl@128")
    axis.invert_yaxis()
    axis.tick_params(axis="y", labelsize=8)


def differing(docs: Path, readme: Path) -> list[str]:
    """List the lines of docs/arena.md and of the block of README.md that differ from what the files say."""
    found: list[str] = []
    block = readme.read_text().partition(BEGIN)[2].partition(END)[0]
    for made, there in zip(pages(docs) or (), ((docs / "arena.md").read_text(), block), strict=False):
        expected, lines = (each.strip("\n").split("\n") for each in (made, there))
        found += [line for line in lines if line not in expected]
        found += [f"missing: {line}" for line in expected if line not in lines]
    return found


def report(docs: Path = DOCS, readme: Path = PROJECT / "README.md") -> None:
    """Write docs/arena.md, its figure, and the block of README.md."""
    if (made := pages(docs)) is None:
        raise SystemExit(f"expected results of {FEWEST_SEEDS} seeds in {docs / 'arena'}, found none; the page stays")
    before, begin, rest = readme.read_text().partition(BEGIN)
    if END not in rest:
        raise SystemExit(f"{readme}: expected {BEGIN} and {END} around what the arena says, found them not")
    found = [group for group in groups(docs) if group.lines]
    for drawn, name in ((draw, "front"), (draw_steps, "steps")):
        drawn([group for group in found if group.examples == found[0].examples], docs / "arena" / f"{name}.svg")
    (docs / "arena.md").write_text(made[0])
    readme.write_text(f"{before}{begin}\n{made[1]}\n{END}{rest.partition(END)[2]}")
