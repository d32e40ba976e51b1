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

from saap_jax.recipes.registry import RECIPES
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
IN_GROUPS = {"saap-in-groups": ("saap", "-0.07)", "-0.07), multiple_of={mlp: 32}")}
"""Rows beside recipes, for group-wise adapters: their groups have 32 inputs each, and widths are multiples of that."""
MIXED = "-our-repair"
"""All of our repair behind the units that a published method chose, in the place of a refit that it has."""
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
GROUPWISE = "after groupwise"
"""Where in a row it is what was found after group-wise adapters."""
FRESH = ", fresh windows"
NOTES = {
    "saap": "our reading of the selection from summaries, without its recovery, the stability weight ours",
    "saap-stable-goes": "our reading of the selection from summaries, without its recovery, the stability weight ours",
    "ziplm-no-search": "not ZipLM, which searches for how much each sub-block counts; here all count alike",
    "modegpt-mlp": "what MoDeGPT does to the MLP, and not to attention",
    "gisp-28-steps": "a quarter of the steps of GISP",
    "sleb-8-windows": "SLEB on eight windows",
}
"""What is said of a row wherever its details are."""
COMPARISON = "A comparison is of a model, a share that was pruned, and a text."
PLANNED = "at 5 % divided by the number of interim analyses"
SAID = ("repair", "", "After LoRA", "left")
SHORT = ("fast", "default", "saap")
"""What README.md has: paragraphs, and rows of its table."""
SCALED = (
    "`~` marks what was evaluated on some of the windows: the perplexity of `default` on all, times the ratio of the "
    "two on the windows and seeds of both."
)
COUNTED = """\
A published row counts in a comparison where it has three seeds or more. Without one there are the methods that cannot
be run here, below."""
SEEN = "`fast` was changed in view of a row of Gemma at 50 % on these windows, so there its own rows are no test."
BOTH = """\
Each published method as published, then all of our repair behind it (`reconstruct`: text that the model writes, least
squares, scales); *from its own* is what the repair adds. What `default` has beside it is then the choice alone."""
READING = (
    "`saap` is our reading of that paper's selection from summaries, without its recovery, the stability weight ours. "
    "The paper claims accuracy after recovery on 7B models; nothing here tells against that."
)
HINT = """Open a figure for its interval: how far a row is from `default`, and ours from the lowest published row.
Open a name for what else is known of it. On the site, click a head of the table to sort by it."""
PROTOCOL = """\
    SAAP_DATA=DATA python experiments/arena.py run [--model MODEL] [--examples 512] [--windows fresh:1]
    SAAP_DATA=DATA python experiments/arena.py run --rows default modegpt-mlp [--after lora] [--tasks --items 1000]
    python experiments/arena.py report

- Each method is a [recipe](methods.md#recipes): `saap methods NAME` says what it is made of, and where it differs
  from its paper. All see the same windows of 128 tokens of C4, drawn with the seed, and lose the same share of the
  prunable parameters (attention and MLP); *removed* is what really went, *heads* are KV heads with all their query
  heads. float32. `default` has the unpruned model write more text, which begins as those windows do.
- Rows of `default` and of its steps that ran before 2026-12-01 chose behind least squares. Today's choice, before any
  repair, takes the same way on each of their seeds (`fast` was run again), so they are rows of today's chain.
- Judged by ppl@128 on 128 windows of WikiText-2 (raw test) and of Penn Treebank (valid): one of each of 128 stretches
  of equal length, drawn with a fixed seed. A row that is 12 % above the lowest after the first 32 windows, a random
  part of them, stays there. `~` marks its perplexity: that of `default` on all windows and seeds, times the ratio of
  the two on the windows and seeds that both have. A row of fewer seeds than `default` stands by that ratio too, since
  seeds differ; its details say so. Where `default` has no seed with a row, the unpruned model takes its place, and the
  details say that. Until 2026-12-03 the unpruned model was the control for all, which on SmolLM2 made rows of 32
  windows 5 to 6 % lower on WikiText-2, and 1 to 3 % higher on Penn Treebank.
- **What was chosen in view of text that tables have.** Four constants of ours are as old as the first arena, and were
  made with its windows of these two texts in view: how many layers are protected; that heads go from 30 % on only; that
  they give a quarter of what goes beyond (`attention=0.25`); and that heads are scored by `gate_fisher`. `best`, which
  trained longer, was taken out by rows of these windows. And `fast` was changed on 2026-12-01, after a row of Gemma at
  50 % on these windows had shown it above a published row, and was judged again on the same windows. What else was
  chosen was chosen on [development text](studies.md#choices), which no table here has.
- **The next change of `fast` or `default` is judged on windows that no table had** (`--windows fresh:1`, `fresh:2`):
  others of the same two texts, spread over them, without a token of the windows here and of the first 96 of each text,
  which older tables have. The rows here then stay as history.
- Differences are in per cent of perplexity with a 95 % interval each, by a crossed model of random seeds and articles
  (stretches of four neighbouring windows of Penn Treebank), never narrower than Student's interval of the seed means:
  `experiments/claims.py`. Each says on how many windows and seeds it is, those that both rows have. *Significant* of a
  single difference is by Holm's procedure at 5 %, over the published rows of a comparison, or the steps of one; what
  cannot be seen is the half width of the interval at the level at which it tested last. *Significantly lower than
  every published row* is an intersection, so that each of its p-values is to be below 5 % as it is, without Holm's
  correction, which would let another bad rival weaken it. It is said of the rows that ran there; which ones did not is
  in a table above.
- Of five planned seeds, those that are there were looked at as they came: SmolLM2 with three, four and then five;
  Gemma with three and, at 35 %, where one verdict was open, a fourth. The intervals are not widened for that. What is
  said of every published row is said first with 5 % divided by the number of those interim analyses, one for each seed
  from the third on (Bonferroni), and then undivided.
- On 512 windows few published rows ran: `llm-pruner-param-second`, the lowest at 20 % on 32 windows, and `modegpt-mlp`,
  the lowest at 50 % on Penn Treebank. `slimgpt`, the lowest at 50 % on WikiText-2, did not. One seed was looked at
  before the other two, and `default` ran when the figures of `fast` were known.
- Ours stand beside the lowest published row, which was chosen after the fact, and all rows beside `default`. A lead of
  ours over a row as published mixes choice and repair. Rows named `-our-repair` take them apart: they choose as
  published, keep the refit that the method has, and then have all of our repair (`reconstruct`: text that the model
  writes, least squares, scales). They count neither as published nor as ours.
- *KL* is KL(p_unpruned ‖ p) in nats a token, *words* the share of places whose likeliest word changes, both on the
  first 32 windows of each text. *Tasks* is the mean accuracy on the first items of each of ARC easy, BoolQ,
  HellaSwag, PIQA and WinoGrande, how many is in the details, ± 95 % of items, and of seeds where there are several; on
  one seed it says nothing of others. Differences from `default` are paired by item. *Forward* is the time of a
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
- `ziplm-no-search` is not ZipLM, which searches for how much each sub-block counts: here all count alike.
"""


class Row(NamedTuple):
    """What is run under a name."""

    chain: str
    kind: str
    """`ours`, `published`, `mixed` (a published choice, our repair), `variant` of a published one, `part` of a chain of
    ours, or `floor`."""


@functools.cache
def rows() -> dict[str, Row]:
    """List the rows, contenders first: recipes that can be run, ours behind what they begin with that is a method."""
    there = {name: each.chain for name, each in RECIPES.items() if not each.missing and not each.repair}
    there |= {name: there.pop(of).replace(*change) for name, (of, *change) in FEWER.items()}
    there |= {name: there[of].replace(*change) for name, (of, *change) in IN_GROUPS.items()}
    there |= {f"{name}{MIXED}": f"{name} > reconstruct" for name in REPAIRED}
    ours = [name for name in OURS if name in there]
    first = [name for name in there if name.startswith(CONTENDERS)]
    kinds = dict.fromkeys([name for name in there if name not in ours], "published")
    kinds |= {name: "mixed" for name in kinds if name.endswith(MIXED)} | dict.fromkeys(IN_GROUPS, "variant")
    chains, found = {parse(each).written for each in there.values()}, dict[str, Row]()
    for name in ours:
        steps = parse(there[name]).steps
        allocated = next(at for at, step in enumerate(steps, 1) if step.kind == "allocation")
        for end in (end for end in range(allocated, len(steps)) if steps[end - 1].kind != "text"):
            part = " > ".join(step.written for step in steps[:end])
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
    ratio: float
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
        items = min(max(map(len, each.values())) for each in known)
        apart.append(f"{counting(len(known), 'seed')}, {items} items a task or all")
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
    few: list[Line]
    """Rows of fewer than `FEWEST_SEEDS` seeds."""
    fresh: int = 0
    """Which set of windows judges: 0 the first one, N the N-th that no table had before."""

    @property
    def model(self) -> str:
        """The title without the windows that judge."""
        return self.title.partition(FRESH)[0]

    def pairs(self, a: Line, b: Line | None, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Take the losses of two rows, or of one and the unpruned model, on the seeds and windows that both have.

        Returns those of each, `[seeds, windows]`, and the articles of the windows; no seed where they share none.
        """
        seeds = [seed for seed in a.found if b is None or seed in b.found]
        some = [[line.found[seed]["losses"][text] if line else self.dense[text] for seed in seeds] for line in (a, b)]
        count = min((len(each) for losses in some for each in losses), default=0)
        of_a, of_b = (np.array([each[:count] for each in losses], np.float64) for losses in some)
        return of_a, of_b, self.articles[text][:count]

    def control(self, line: Line) -> Line | None:
        """Find the row that stands in for the windows and seeds which a row lacks: `default` at the same ratio.

        None, of the unpruned model, where that has no seed with it, and of `default` itself.
        """
        default = self.named(line.ratio, "default")
        return default if default and line.name != default.name and {*line.found} & {*default.found} else None

    def log_perplexity(self, line: Line, text: str) -> float:
        """The log of the perplexity as if on all windows, and on all seeds of `default`.

        It is that of the control on all its seeds and windows, and the mean difference from it on those of both. So
        rows are ordered by how far they are from `default`, whichever seeds they have.
        """
        control = self.control(line)
        own, other, _ = self.pairs(line, control, text)
        whole = self.log_perplexity(control, text) if control else float(self.dense[text].mean())
        return whole + float(np.mean(own - other))

    def perplexity(self, line: Line, text: str) -> str:
        """The perplexity in words, marked where windows are missing."""
        value = math.exp(min(self.log_perplexity(line, text), 700))
        return "~" * self.lacks(line, text) + (f"{value:.1f}" if value < 1e4 else f"{value:.1e}")

    def lacks(self, line: Line, text: str) -> bool:
        """Tell whether a row was evaluated on some of the windows alone."""
        return any(len(each[text]) < len(self.dense[text]) for each in line.values("losses"))

    def by_unpruned(self, line: Line) -> bool:
        """Tell whether the unpruned model stands in for missing windows."""
        return self.control(line) is None and any(self.lacks(line, text) for text in self.dense)

    def seeds_of(self, line: Line) -> str:
        """Say how many seeds a row has, beside `default` where that has more."""
        default = self.named(line.ratio, "default")
        if default and len(default.found) > len(line.found):
            return f"{len(line.found)} of {len(default.found)} seeds"
        return counting(len(line.found), "seed")

    def beside(self, a: Line, b: Line | None, text: str) -> Crossed:
        """Estimate the difference of two rows, or of one from the unpruned model, on what both have."""
        return crossed(*self.pairs(a, b, text))

    def of(self, ratio: float, *kinds: str) -> list[Line]:
        """Choose lines by kind, the lowest on the first text first."""
        some = [line for line in self.lines.get(ratio, ()) if line.kind in kinds]
        return sorted(some, key=lambda line: self.log_perplexity(line, next(iter(self.dense))))

    def named(self, ratio: float, name: str) -> Line | None:
        """Find a line by name."""
        return next((line for line in self.lines.get(ratio, ()) if line.name == name), None)

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
    first, lines, few = next(iter(of_seed.values())), dict[float, list[Line]](), list[Line]()
    failed = {key: row["failed"] for each in of_seed.values() for key, row in each["rows"].items() if "failed" in row}
    for key in sorted({key for each in of_seed.values() for key in each["rows"]}):
        name, _, ratio = key.rpartition("@")
        found = {seed: each["rows"][key] for seed, each in of_seed.items() if "losses" in each["rows"].get(key, {})}
        kind = known[name].kind if name in known else "part" if "[" in name else "published"
        line = Line(name, kind, float(ratio), found)
        if len(found) >= FEWEST_SEEDS:
            lines.setdefault(line.ratio, []).append(line)
        elif found:
            few.append(line)
    dense, articles = ({text: np.array(each) for text, each in first[what].items()} for what in ("dense", "articles"))
    title = MODELS.get(model, model) + f"{FRESH} {fresh}" * bool(fresh)
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
    """Write a difference with its interval and verdict, and on how many windows and seeds it is."""
    value, low, high = verdict.difference.percent
    shown = f"× {1 + value / 100:.0f}" if value >= 1000 else f"{value:+.1f} ({low:+.1f} to {high:+.1f})"
    return f"{shown}, {verdict.said}; on {verdict.difference.windows} windows, {counting(verdict.seeds, 'seed')}"


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
        right = Line("unpruned", "", 0.0, {"": {"tasks": group.tasks}} if group.tasks else {}).accuracy({})
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
        mixed = group.of(ratio, "mixed")
        for some in (published, mixed, *([line] for line in ours if line is not default)) if default else ():
            found = verdicts([group.beside(line, default, text) for line in some])
            for line, verdict in zip(some, found, strict=True):
                said[line.name, text].append(f"from default: {difference(verdict)}")
    made = []
    for line in group.of(ratio, "ours", "published", "mixed", "floor"):
        more = f"{100 * line.mean('actual'):.1f} % removed, {line.mean('heads'):.0f} KV heads gone; "
        more += f"{100 * line.mean('changed'):.0f} % of the likeliest words change; {group.seeds_of(line)}"
        more += "; the unpruned model stands in for missing windows" * group.by_unpruned(line)
        more += f"; {NOTES[line.name]}" if line.name in NOTES else ""
        name = folded(f"<b>{line.name}{after}</b>" if line.kind == "ours" else f"{line.name}{after}", more)
        figures = [folded(group.perplexity(line, t), "; ".join(said[line.name, t])) for t in group.dense]
        numbers = [f"{line.mean('kl'):.2f}", line.accuracy(group.tasks, default), f"{100 * line.mean('forward'):.0f}"]
        numbers += [f"{line.minutes:.1f}", f"{line.mean('gib'):.1f}"]
        made.append(written(name, title, f"{100 * ratio:.0f}", *figures, *numbers))
    return made


class Comparison(NamedTuple):
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

    def below(self, kind: str, other: str, interim: bool = True) -> list[str]:
        """Name the rows of a kind that are significantly below every row of the other.

        That is an intersection: it is wrong where one single difference is not there, so each p-value is to be below
        the level as it is (intersection-union test), however many rivals there are. The level is divided by how many
        times results were looked at, `interim`: with `FEWEST_SEEDS` seeds, and with each one more that a rival has too.
        """
        others, names = self.group.of(self.ratio, other), []
        for line in self.group.of(self.ratio, kind):
            shared = max((len(line.found.keys() & each.found.keys()) for each in others), default=0)
            level = LEVEL / (max(1, shared - FEWEST_SEEDS + 1) if interim else 1)
            found = [self.group.beside(line, each, self.text) for each in others]
            if found and all(each.value < 0 and each.p_value < level for each in found):
                names.append(line.name)
        return names


def counted(names_of: Mapping[str, Sequence[str]]) -> str:
    """Say in how many comparisons each name is, the most first; where it is in few, or in all but few, also in which.

    >>> counted({"A at 20 %": ["a"], "B at 20 %": ["a", "b"], "A at 50 %": ["a"], "B at 50 %": ["c"]})
    '`a` in 3 of 4 comparisons (not B at 50 %), `b` in 1 (B at 20 %) and `c` in 1 (B at 50 %)'
    """
    said, of = [], f" of {counting(len(names_of), 'comparison')}"
    every = list(itertools.chain.from_iterable(names_of.values()))
    for name in sorted(dict.fromkeys(every), key=every.count, reverse=True):
        without = [each for each, names in names_of.items() if name not in names]
        inside = [each for each in names_of if each not in without]
        few = f" (not {listed(without)})" if 0 < len(without) <= min(3, len(names_of) / 2) else ""
        few = f" ({listed(inside)})" if len(inside) < min(3, len(names_of) / 2) else few
        said.append(f"`{name}` in {len(names_of) - len(without)}{of}{few}")
        of = ""
    return listed(said)


def faster(group: Group) -> dict[str, list[str]]:
    """List, by comparison, the published rows significantly below `default` and as fast, where all are timed."""
    said: dict[str, list[str]] = {}
    for ratio in group.lines:
        default, published = group.named(ratio, "default"), group.of(ratio, "published")
        for text in group.dense if default else ():
            judged = group.against(default, published, text)
            lower = [line for line in published if judged[line.name].said == "significantly higher"]
            if all(line.minutes > 0 for line in (*lower, *[default] * bool(lower))):
                column = f"{group.title}, {percent(ratio)}, {text}"
                said[column] = [line.name for line in lower if line.minutes <= default.minutes]
    return said


def standing(comparisons: Sequence[Comparison]) -> list[str]:
    """Say in how many comparisons which row is lowest, and which is significantly below all of the other side."""
    name = str if len({each.group.title for each in comparisons}) > 1 else Comparison.of_group
    said = [f"Lowest: {counted({name(each): each.lowest() for each in comparisons})}."] if comparisons else []
    for kind, other, side in (("ours", "published", "published row that ran there"), ("published", "ours", "of ours")):
        last = {name(each): each.below(kind, other, interim=False) for each in comparisons}
        if not any(last.values()):
            continue
        many = sorted({len(each.group.of(each.ratio, other)) for each in comparisons})
        them = " to ".join(map(str, dict.fromkeys((many[0], many[-1]))))
        planned = {name(each): each.below(kind, other) for each in comparisons}
        where = counted(planned) if any(planned.values()) else f"none in {counting(len(planned), 'comparison')}"
        said.append(f"Significantly lower than every {side} ({them}), {PLANNED}: {where}.")
        if planned != last:
            said.append(f"At 5 % undivided: {counted(last)}.")
    return said


def answer(found: Sequence[Group]) -> dict[str, str]:
    """Answer in a paragraph each: repair and choice apart, how ours stand, after training, and with more text."""
    first = of_least_text(found)
    now = newest(first)
    parts = {"": now, "On windows of before": [group for group in first if group not in now]}
    parts["After LoRA"] = [trained(group) for group in first]
    for group in found[len(first) :]:
        parts.setdefault(f"Calibrated on {group.examples} windows", []).append(group)
    paragraphs = {"repair": apart(now)}
    for which, some in parts.items():
        comparisons = [Comparison(group, ratio, text) for group in some for ratio in group.lines
                       if group.of(ratio, "published") for text in group.dense]  # fmt: skip
        said = standing(comparisons)
        if not which and (judged := [names for group in now for names in faster(group).values()]):
            above = f"In {sum(map(bool, judged)) or 'none'} of {counting(len(judged), 'comparison')}"
            said.append(f"{above} a published row that takes as long or less is significantly lower than `default`.")
            said += [SEEN] * any(group.title == MODELS["gemma3-270m"] for group in now)
        titles = {each.group.title.removesuffix(AFTER) for each in comparisons}
        lead = f"{which}, {titles.pop()}" if len(titles) == 1 else which
        paragraphs[which] = " ".join([f"{lead}."] * bool(which) + said) if said else ""
    if left := [title for title in MODELS.values() if title not in {group.model for group in found}]:
        paragraphs["left"] = f"**{', '.join(left)}** has no rows yet."
    return {which: said for which, said in paragraphs.items() if said}


class Parts(NamedTuple):
    """What our repair and our choice add in a comparison, apart."""

    comparison: Comparison
    repair: dict[str, Verdict]
    """By published method: repaired by ours, beside itself as published."""
    lowest: Line
    """The lowest of the methods so repaired."""
    choice: Verdict
    """`default` beside it."""
    below_all: bool
    """Whether `default` is significantly below all of them."""


def repaired_and_own(group: Group, ratio: float) -> list[tuple[Line, Line]]:
    """Pair published methods that ours repaired with themselves."""
    pairs = [(line, group.named(ratio, line.name.removesuffix(MIXED))) for line in group.of(ratio, "mixed")]
    return [(line, own) for line, own in pairs if own]


def parts_of(comparison: Comparison) -> Parts | None:
    """Take repair and choice apart; None where rows are missing."""
    group, ratio, text = comparison
    default, pairs = group.named(ratio, "default"), repaired_and_own(group, ratio)
    if not (default and pairs):
        return None
    found = verdicts([group.beside(line, own, text) for line, own in pairs])
    repair = {own.name: verdict for (_, own), verdict in zip(pairs, found, strict=True)}
    mixed = [line for line, _ in pairs]
    lowest = min(mixed, key=lambda line: group.log_perplexity(line, text))
    choice = group.against(default, mixed, text)[lowest.name]
    below_all = default.name in comparison.below("ours", "mixed")
    return Parts(comparison, repair, lowest, choice, below_all)


def span(values: Sequence[float]) -> str:
    """Write the least and the greatest of some numbers."""
    return " to ".join(dict.fromkeys(f"{each:+.1f}" for each in (min(values), max(values))))


def all_parts(found: Sequence[Group]) -> list[Parts]:
    """Take repair and choice apart in each comparison that has the rows."""
    every = [Comparison(group, ratio, text) for group in found for ratio in group.lines for text in group.dense]
    return [parts for each in every if (parts := parts_of(each))]


def apart(found: Sequence[Group]) -> str:
    """Say what our repair adds to published methods, and what our choice adds to the lowest of them; or nothing."""
    every = all_parts(found)
    if not every:
        return ""
    repairs = [verdict for parts in every for verdict in parts.repair.values()]
    lower = sum(each.said == "significantly lower" for each in repairs)
    methods = dict.fromkeys(name for parts in every for name in parts.repair)
    below = sum(parts.below_all for parts in every)
    changes = span([each.difference.percent[0] for each in repairs])
    choices = span([parts.choice.difference.percent[0] for parts in every])
    return (
        "Repair and choice, apart. Our repair, `reconstruct`, follows any chain, as in `modegpt-mlp > reconstruct`: "
        f"after {counting(len(methods), 'published method')} it changes their perplexity by {changes} % "
        f"(significantly lower in {lower} of {len(repairs)}). What is left is our choice: `default` is {choices} % "
        f"from the lowest of those so repaired, and significantly lower than all of them, {PLANNED}, in {below} of "
        f"{counting(len(every), 'comparison')}."
    )


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
    """Make tables of published choices with our repair: beside themselves as published, and `default` beside them."""
    said: list[str] = []
    for ratio in group.lines:
        default, pairs = group.named(ratio, "default"), repaired_and_own(group, ratio)
        if not (default and pairs):
            continue
        found = {text: [verdicts([group.beside(*pair, text) for pair in pairs]),
                        verdicts([group.beside(default, line, text) for line, _ in pairs])]
                 for text in group.dense}  # fmt: skip
        title = f"chosen by, {percent(ratio)}, {group.title}, {group.examples} windows"
        said += [f"| {title} | " + " | ".join(f"{t} | from its own, % | `default` from it, %" for t in found) + " |"]
        said += ["|---" * (1 + 3 * len(found)) + "|"]
        for at, (line, own) in enumerate(pairs):
            cells = [own.name]
            for text, both in found.items():
                cells += [group.perplexity(line, text), *(difference(each[at]) for each in both)]
            said.append(f"| {' | '.join(cells)} |")
        said.append("")
    return said


def trained(group: Group, slot: str = "after") -> Group:
    """Take what was found after training in place of what was found before.

    Args:
        slot: where in a row it is.
    """
    lines: dict[float, list[Line]] = {}
    for ratio, line in ((ratio, line) for ratio, some in group.lines.items() for line in some):
        after = {s: each | {"tasks": None} | each[slot] for s, each in line.found.items() if slot in each}
        if len(after) >= FEWEST_SEEDS:
            lines.setdefault(ratio, []).append(line._replace(found=after))
    return group._replace(lines=lines, title=f"{group.title}{AFTER}")


def by_training(group: Group, slot: str = "after") -> list[str]:
    """Make tables of what training changes, each row beside itself before, on the seeds that were trained."""
    said: list[str] = []
    after = trained(group, slot)
    for ratio, lines in after.lines.items():
        pairs = [(line, line._replace(found={seed: own.found[seed] for seed in line.found}))
                 for line in lines if (own := group.named(ratio, line.name))]  # fmt: skip
        before = group._replace(lines={ratio: [own for _, own in pairs]})
        found = {text: verdicts([group.beside(*pair, text) for pair in pairs]) for text in group.dense}
        title = f"trained, {percent(ratio)}, {group.title}, {group.examples} windows"
        said += [f"| {title} | " + " | ".join(f"{text} before | after | changes, %" for text in found) + " |"]
        said += ["|---" * (1 + 3 * len(found)) + "|"]
        for at, (line, own) in enumerate(pairs):
            cells = [line.name]
            for text, judged in found.items():
                cells += [before.perplexity(own, text), after.perplexity(line, text), difference(judged[at])]
            said.append(f"| {' | '.join(cells)} |")
        said.append("")
        answers = [line for line in lines if line.values("tasks")]
        if answers:
            said += [f"| {title} | accuracy before, % | after | from unpruned |", "|---|---|---|---|"]
        for line in answers:
            known = line.values("tasks")
            earlier = [own for own in group.lines[ratio] if own.name == line.name]
            cells = [line.name, accuracy(earlier[0].values("tasks")), accuracy(known)]
            cells.append(accuracy(known, [group.tasks] * len(known)))
            said.append(f"| {' | '.join(cells)} |")
        said += [""] * bool(answers)
    return said


def that_ran(group: Group) -> list[str]:
    """Say, for each ratio, which published rows ran on enough seeds; the others did not."""
    known = [name for name, each in rows().items() if each.kind == "published"]
    said = []
    for ratio in group.lines:
        ran = [line.name for line in group.of(ratio, "published")]
        few = [line.name for line in group.few if line.ratio == ratio and line.kind == "published"]
        left = [name for name in known if name not in (*ran, *few)]
        cells = [f"{group.title}, {group.examples} windows", f"{100 * ratio:.0f}", str(len(ran))]
        cells += [", ".join(f"`{name}`" for name in some) or "–" for some in (few, left)]
        said.append(written(*cells))
    return said


RECOVERY = """\
SAAP's paper fine-tunes by group-wise adapters on 4-bit weights, and claims accuracy after that. `saap-in-groups` is
`saap` with widths that are multiples of 32, which the groups divide. Steps, text and rate are those of LoRA here.
"""
RAN = ["| model | gone, % | ran | on fewer seeds, and so not judged | did not run |", "|---|---:|---:|---|---|"]


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
    for line in sorted(group.few, key=lambda line: (line.ratio, line.name)):
        if line.kind != "part":
            figures = " / ".join(group.perplexity(line, text) for text in group.dense)
            where = listed([*line.found]) + ", by the unpruned model" * group.by_unpruned(line)
            said.setdefault(line.ratio, []).append(f"`{line.name}` {figures} ({where})")
    about = f"of {group.title}, calibrated on {group.examples} windows (seeds in brackets)"
    return [f"- {percent(ratio)} {about}: {', '.join(rows)}" for ratio, rows in said.items()]


def newest(found: Sequence[Group]) -> list[Group]:
    """Choose the groups of each model that are judged on the newest windows; the others are history."""
    last = {group.model: max(each.fresh for each in found if each.model == group.model) for group in found}
    return [group for group in found if group.fresh == last[group.model]]


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
    now = newest(of_least_text(found))
    said = [TITLE, "", *listing([*answer(found).values(), COMPARISON, READING]), "", FIGURE.format(""), ""]
    said += [HINT, "", *table(found), ""]
    above = [f"- {each}: {', '.join(names)}" for group in now for each, names in faster(group).items() if names]
    said += appendix(
        "What is significantly lower than `default` and takes no longer",
        above or ["Nothing." if any(map(faster, now)) else "The rows that are significantly lower are not timed yet."],
    )
    ran = [line for group in found for line in that_ran(group)]
    said += appendix("Which published rows ran", [COUNTED, "", *RAN, *ran])
    said += appendix("What each step adds", [STEPS, "", *(line for group in found for line in ablation(group))])
    if ours := [line for group in found for line in repaired(group)]:
        said += appendix("Repair and choice, apart", [BOTH, "", *ours])
    if changed := [line for group in found for line in by_training(group, GROUPWISE)]:
        said += appendix("What the recovery of SAAP's paper changes", [RECOVERY, *changed])
    if changed := [line for group in found for line in by_training(group)]:
        said += appendix("What LoRA changes", changed)
    said += appendix("Protocol", [PROTOCOL, *(line for group in found for line in about(group))])
    few = [line for group in every for line in on_few_seeds(group)]
    tried = {line.name for group in found for lines in group.lines.values() for line in lines}
    tried |= {line.name for group in every for line in group.few}
    missing = [f"On fewer than {FEWEST_SEEDS} seeds, and so not judged:", "", *few, ""] if few else []
    names = [name for name, each in rows().items() if each.kind not in ("part", "floor") and name not in tried]
    missing += ["Not run:", "", *(f"- `{name}`" for name in names)]
    missing += [f"- `{of}`: `{name}` stands in its place" for name, (of, *_) in FEWER.items()]
    missing += [f"- `{name}` cannot be run here: {each.missing}" for name, each in RECIPES.items() if each.missing]
    return "\n".join([*said, *appendix("What has no row", missing)]).rstrip() + "\n", readme_block(found)


def readme_block(found: Sequence[Group]) -> str:
    """Make what README.md says: figure, sentences, and ours beside the paper's method and the lowest published row."""
    paragraphs = answer(found)
    said, found = [paragraphs[which] for which in SAID if which in paragraphs], newest(of_least_text(found))
    names = [name for name in SHORT if any(group.named(ratio, name) for group in found for ratio in group.lines)]
    heads = ["unpruned", *(f"`{name}`" for name in names), "lowest published", "`default` from it, % (95 %)"]
    several = all_parts(found)
    if several:
        heads += ["our repair after published methods, %", "`default` from the lowest of those, % (95 %)"]
    made = [f"| {' / '.join(found[0].dense)} | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    made += [readme_row(group, ratio, names, bool(several)) for group in found for ratio in group.lines]
    lines = [line for group in found for some in group.lines.values() for line in some]
    counts = sorted({len(line.found) for line in lines})
    seeds = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    fewest = min(len(each) for line in lines for losses in line.values("losses") for each in losses.values())
    whole = max(len(losses) for losses in found[0].dense.values())
    windows = " to ".join(map(str, dict.fromkeys((fewest, whole))))
    how = (
        f"{COMPARISON} Figures are ppl@128, calibrated on {found[0].examples} windows of C4; a row has {seeds} of "
        f"{len(SEEDS)} seeds and {windows} windows of each text. {SCALED} {READING} "
        "[All methods, and how it was measured](docs/arena.md)."
    )
    return "\n".join([FIGURE.format("docs/"), "", *listing([*said, how]), "", *made])


def readme_row(group: Group, ratio: float, names: Sequence[str], parted: bool) -> str:
    """Make a row of README.md's table: a model at a ratio, on all texts."""
    lines = [[group.named(ratio, name)] * len(group.dense) for name in names]
    published, default = group.of(ratio, "published"), group.named(ratio, "default")
    best = [group.lowest(published, text) for text in group.dense]
    cells = [" / ".join(f"{math.exp(losses.mean()):.1f}" for losses in group.dense.values())]
    for some in (*lines, best):
        figures = zip(some, group.dense, strict=True)
        cells.append(" / ".join(group.perplexity(line, text) if line else "–" for line, text in figures))
    cells[-1] += f" (`{'`, `'.join(dict.fromkeys(line.name for line in best if line))}`)"
    judged = [group.against(default, published, text)[line.name] if default and line else None
              for line, text in zip(best, group.dense, strict=True)]  # fmt: skip
    cells.append(" / ".join(map(interval, judged)))
    if parted:
        parts = [parts_of(Comparison(group, ratio, text)) for text in group.dense]
        repairs = [[each.difference.percent[0] for each in one.repair.values()] if one else [] for one in parts]
        cells.append(" / ".join(span(each) if each else "–" for each in repairs))
        cells.append(" / ".join(interval(one.choice if one else None) for one in parts))
    return f"| {group.title}, {percent(ratio)} | {' | '.join(cells)} |"


def interval(verdict: Verdict | None) -> str:
    """Write a difference with its interval, or that there is none."""
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*verdict.difference.percent) if verdict else "–"


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
        drawn(newest(of_least_text(found)), docs / "arena" / f"{name}.svg")
    (docs / "arena.md").write_text(made[0])
    readme.write_text(f"{before}{begin}\n{made[1]}\n{END}{rest.partition(END)[2]}")
