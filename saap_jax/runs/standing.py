"""What a comparison found: one row a variant and ratio, over its seeds, who is the best, and how surely.

The best of a ratio is the variant with the lowest perplexity, out of the calibration domain where that was measured; of
a race, the lowest of those that are left. Every other one is compared with it on the windows that both have, by the
interval of `evaluation.evidence`, corrected for how many others there are. Where that holds 0, the two are *tied*, but
for a variant that left a race, which was surely worse than some other. Of fewer than `FEWEST` windows nothing is
tested, nor tied. `saap ab` of two variants of a run says the same.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, NamedTuple, cast

import numpy as np

from saap_jax.evaluation.differences import Difference, paired_difference
from saap_jax.evaluation.resample import too_few
from saap_jax.evaluation.scales import scale_of
from saap_jax.records import Metric, Row, RunRecord

DENSE: Final = "dense"
"""Label of the row of the unpruned model."""


Losses = Sequence[float | None]
"""Of windows, None where a race left one out."""

FAR = 0.005
"""A row that lost more than this beyond what was asked for, a share, is named with what it lost."""


class Variant(Row):
    """A variant at a ratio over its seeds: the record of the first one, with means of some fields."""

    label: str
    seeds: int
    spread: dict[str, float]
    """Standard deviation of `ppl` over the seeds; NaN of one."""
    losses_by_seed: dict[str, list[list[float | None]]]
    """A row a seed, where all have losses of as many windows; None for windows that a race left out."""


class ComparisonRow(NamedTuple):
    """One line of the comparison; a number that was not recorded is NaN."""

    candidate: str
    """Name of the candidate, unique, without the seed where there are several; or "dense"."""
    label: str
    """The candidate without its ratio, or "dense"."""
    asked: float
    """Fraction of the prunable parameters that was asked to go."""
    actual: float
    """Fraction that went; like what follows, a mean over the seeds."""
    parameters: float
    ppl_in: float
    """Perplexity on the first metric of the calibration domain; of several seeds, exp of the mean loss."""
    ppl_out: float
    """Perplexity on the first metric of another domain."""
    spread_in: float
    """Standard deviation of `ppl_in` over the seeds; NaN where there is one seed."""
    spread_out: float
    seeds: int
    raced: int
    """Windows by which a race judged it, where it left before the end; its figures are then estimates. Else 0."""
    best: bool
    """True for the lowest perplexity among variants of the same asked ratio, out of domain where there is one."""
    tied: bool
    """True where the difference from the best of its ratio may be chance, on the text by which the best is chosen."""
    windows: int
    """Windows of each seed by which it is compared; 0 where their losses were not recorded."""
    against: dict[str, Difference]
    """By metric, its difference from the best of its ratio, above 0 where the best is better; empty for the best."""

    @property
    def named(self) -> str:
        """The label, with what went where that is not what was asked for: see `named`."""
        return named(self.label, self.asked, self.actual)


def named(label: str, asked: float, actual: float) -> str:
    """Name what lost another share than it was asked to, as what removes whole layers does, with that share.

    >>> named("shortgpt", 0.35, 0.3667), named("wanda", 0.35, 0.3501)
    ('shortgpt (36.7 % gone)', 'wanda')
    """
    if abs(actual - asked) > FAR:
        return f"{label} ({100 * actual:.1f} % gone)"
    return label


def metrics(run: RunRecord) -> list[Metric]:
    """List the metrics of a run, each with `name` and `domain` ("in" or "out"); none of a run that has just begun."""
    return run.get("metrics", [])


def first_metric(run: RunRecord, domain: str) -> str | None:
    """Name the first metric of a domain ("in" or "out"), None if the run has none."""
    return next((metric["name"] for metric in metrics(run) if metric["domain"] == domain), None)


def primary_domain(run: RunRecord) -> str:
    """Name the domain of the text by which the best is chosen."""
    return "out" if first_metric(run, "out") else "in"


def merged(candidates: Sequence[Row]) -> list[Variant]:
    """Make one record a variant and ratio, over its seeds; what was of one seed stays as it is.

    `ppl` is exp of the mean loss over the seeds; ratios, parameters and units kept are means.
    """
    groups: dict[tuple[str, float], list[Row]] = {}
    for candidate in candidates:
        groups.setdefault((candidate.get("variant", DENSE), candidate["ratio_asked"]), []).append(candidate)
    found = []
    for (label, asked), members in groups.items():
        first = members[0]
        several = len(members) > 1
        names = first.get("ppl", {})
        ppl = {name: np.array([number(each.get("ppl", {}).get(name)) for each in members]) for name in names}
        losses = {name: [each.get("losses", each.get("seen", {})).get(name, []) for each in members] for name in names}
        record: dict[str, Any] = first | {
            "candidate": f"{label}@{asked:g}" if several else first["candidate"],
            "label": label,
            "ppl": {name: mean_figure(name, values) if several else float(values[0]) for name, values in ppl.items()},
            "spread": {  # NaN of one seed, or of a figure that is not finite
                name: float(np.std(values, ddof=1)) if several and np.isfinite(values).all() else math.nan
                for name, values in ppl.items()
            },
            "losses_by_seed": {name: rows for name, rows in losses.items() if rows[0] and len({*map(len, rows)}) == 1},
            "seeds": len(members),
        }
        if several:
            for name in ("ratio_actual", "parameters"):
                record[name] = float(np.mean([number(each.get(name)) for each in members]))
        kept = [each.get("kept", {}) for each in members]
        if several and len({tuple((name, len(units)) for name, units in each.items()) for each in kept}) == 1:
            record["kept"] = {name: np.mean([each[name] for each in kept], axis=0).tolist() for name in kept[0]}
        found.append(cast(Variant, record))
    return found


def mean_figure(metric: str, values: Iterable[float]) -> float:
    """Compute the figure of the mean loss over seeds."""
    scale = scale_of(metric)
    return scale.value(float(np.mean([scale.loss(value) for value in values])))


def comparison_rows(run: RunRecord, candidates: Sequence[Row]) -> list[ComparisonRow]:
    """List the dense model and then the variants by asked ratio and perplexity (out of domain, else in domain).

    Perplexities that are not finite come last within their ratio, and are never the best. The best is the same on every
    text; others may be below it in domain.
    """
    primary = first_metric(run, primary_domain(run)) or ""
    races = {race["ratio"]: race for race in run.get("race", [])}

    def quality(record: Variant) -> float:
        ppl = number(record.get("ppl", {}).get(primary))
        return ppl if math.isfinite(ppl) else math.inf

    groups: dict[float, list[Variant]] = {}
    for record in merged(candidates):
        groups.setdefault(record["ratio_asked"], []).append(record)
    rows = []
    if "dense" in run:
        dense: Row = {"ratio_asked": 0.0, "ratio_actual": 0.0, **run["dense"], "candidate": DENSE}
        rows += [_row(run, each) for each in merged([dense])]
    for asked, group in sorted(groups.items()):
        race = races.get(asked, {})
        left = race.get("left", [each["label"] for each in group])
        group.sort(key=lambda record: (record["label"] not in left, quality(record), record["label"]))
        found = {metric["name"]: _against(run, metric["name"], group) for metric in metrics(run)}
        found = found if quality(group[0]) < math.inf else {}
        for record in group:
            best = quality(record) == quality(group[0]) < math.inf
            against = {name: each[record["label"]] for name, each in found.items() if record["label"] in each}
            row = _row(run, record, best, against)
            rows.append(row if record["label"] in left else row._replace(tied=False))
    return rows


def _row(
    run: RunRecord,
    record: Variant,
    best: bool = False,
    against: Mapping[str, Difference] = MappingProxyType({}),
) -> ComparisonRow:
    names = [first_metric(run, domain) or "" for domain in ("in", "out")]
    primary = first_metric(run, primary_domain(run)) or ""
    losses = record["losses_by_seed"].get(primary, [[]])
    return ComparisonRow(
        record["candidate"],
        record["label"],
        *(number(record.get(key)) for key in ("ratio_asked", "ratio_actual", "parameters")),
        *(number(values.get(name)) for values in (record.get("ppl", {}), record["spread"]) for name in names),
        seeds=record["seeds"],
        raced=record.get("windows", 0),
        best=best,
        tied=not best and primary in against and against[primary].tied,
        windows=sum(loss is not None for loss in losses[0]) if record["candidate"] != DENSE else 0,
        against={**against},
    )


def _against(run: RunRecord, metric: str, group: Sequence[Variant]) -> dict[str, Difference]:
    """Compare the variants of a ratio with the first, the best, on one text, by label, as far as losses are known."""
    losses = {each["label"]: each["losses_by_seed"].get(metric, []) for each in group}
    base, *others = losses
    articles = run.get("articles", {}).get(metric, ())
    found = {label: beside(losses[label], losses[base], metric, len(others), articles) for label in others}
    return {label: each for label, each in found.items() if each}


def differences_from_dense(run: RunRecord, variants: Sequence[Variant], metric: str) -> dict[str, Difference]:
    """Measure the distance of each variant above the unpruned model on a text, by candidate, as far as losses are on
    record; corrected for the number of others at its ratio, as all is that is said of it.
    """
    dense = run.get(DENSE, {}).get("losses", {}).get(metric, ())
    asked = [each["ratio_asked"] for each in variants]
    articles = run.get("articles", {}).get(metric, ())
    found = {}
    for each, ratio in zip(variants, asked, strict=True):
        losses = each["losses_by_seed"].get(metric, [])
        found[each["candidate"]] = beside(losses, [dense] * len(losses), metric, asked.count(ratio) - 1, articles)
    return {candidate: each for candidate, each in found.items() if each}


def beside(
    a: Sequence[Losses], b: Sequence[Losses], metric: str, others: int, articles: Sequence[int] = ()
) -> Difference | None:
    """Compare losses, a row a seed, on windows that no race left out; None where they are not of the same windows."""
    if not a or [*map(len, a)] != [*map(len, b)]:
        return None
    seen = np.array([None not in window for window in zip(*a, *b, strict=True)], bool)
    of_a, of_b = (np.array(rows, np.float64)[:, seen] for rows in (a, b))
    known = ()
    if len(articles) == len(seen):
        known = np.asarray(articles)[seen].tolist()
    if seen.any():
        return paired_difference(of_a, of_b, others=others, scale=scale_of(metric), articles=known)
    return None


def leading(rows: Sequence[ComparisonRow], limit: int) -> list[str]:
    """Name so many variants, those that are best at some ratio first of all.

    They come in the order of the highest ratio, those that were not evaluated there after them.
    """
    groups: dict[float, list[str]] = {}
    for row in rows:
        if row.candidate != DENSE:
            groups.setdefault(row.asked, []).append(row.label)
    descending = [group for _, group in sorted(groups.items(), reverse=True)]
    turns = dict.fromkeys(label for turn in itertools.zip_longest(*descending) for label in turn if label is not None)
    chosen = {*itertools.islice(turns, limit)}
    return [label for label in dict.fromkeys(itertools.chain(*descending)) if label in chosen]


def untested(rows: Sequence[ComparisonRow]) -> str:
    """Say why nothing of a comparison is tested: too few windows, or none on record; empty where they suffice."""
    windows = max((row.windows for row in rows if row.candidate != DENSE), default=0)
    if windows:
        return too_few(windows)
    return "the losses are not on record"


def number(value: Any) -> float:
    """Read a recorded number, NaN where there is none."""
    return math.nan if value is None else float(value)
