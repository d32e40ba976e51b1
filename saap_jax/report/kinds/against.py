"""How every variant stands to the best of its ratio: difference, interval, wins and p-value, as rows and as a chart.

All by the paired bootstrap over seeds and windows. The reference of a ratio is its best variant, see `rows`, on every
text the same: where the best was chosen out of domain, others may be below it in domain.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from saap_jax.evaluation.differences import Difference, differences_against
from saap_jax.evaluation.resample import LEVEL, few, holm, resamples_for, smallest_p_value
from saap_jax.evaluation.scales import format_ppl, scale_of
from saap_jax.report.page.blocks import Axis, Chart, Column, Interval, Note, Strip
from saap_jax.report.page.formats import BEST, format_p, short_name
from saap_jax.report.page.strips import nice_axis
from saap_jax.runs.records import RunRecord
from saap_jax.runs.standing import ComparisonRow, Variant, metrics
from saap_jax.runtime.words import MINUS

_BEYOND = 3.0
"""How many times the middle one of the upper ends the axis may reach; what is larger is an arrow."""


_FACTOR = math.log(11.0)
"""Differences from here on, in nats, are written as factors."""


class Against(NamedTuple):
    """A variant beside the best of its ratio on one text."""

    candidate: str
    label: str
    asked: float
    metric: str
    domain: str
    """ "in" or "out"."""
    best: str
    """Label of the variant that it is compared with."""
    difference: Difference
    """Above 0: the best is better."""
    p_value: float
    """Adjusted for the number of variants that are compared with the best on this text (Holm)."""
    floor: bool = False
    """Whether it is the smallest that so many resamples can give, an upper bound."""

    @property
    def tied(self) -> bool:
        """True where the difference may be chance."""
        return self.p_value >= LEVEL

    @property
    def sure(self) -> bool:
        """True where it is not; neither is true where nothing was tested."""
        return self.p_value < LEVEL


def against_best(run: RunRecord, variants: Sequence[Variant], rows: Sequence[ComparisonRow]) -> list[Against]:
    """Return each variant beside the best of its ratio, on every text of which the losses of windows were recorded.

    On the text that judged a race, p-values are the race's.

    Args:
        variants: the records of variants over their seeds, see `rows.merged`.
        rows: the same as rows, best first within a ratio.
    """
    losses = {variant["candidate"]: variant["losses_by_seed"] for variant in variants}
    races = {(race["ratio"], race.get("metric")): race["p_values"] for race in run.get("race", [])}
    found = []
    for asked in dict.fromkeys(row.asked for row in rows):
        group = [row for row in rows if row.asked == asked and row.candidate in losses]
        best = next((row for row in group if row.best), None)
        if best is None:
            continue
        for metric in metrics(run):
            name = metric["name"]
            base = np.atleast_2d(losses[best.candidate].get(name, ()))
            each = {row: np.atleast_2d(losses[row.candidate].get(name, ())) for row in group if row is not best}
            each = {row: values for row, values in each.items() if values.shape == base.shape}
            if not each or not base.size:
                continue
            others = np.stack(list(each.values())).astype(np.float64)
            resamples = resamples_for(len(each))
            differences = differences_against(
                base.astype(np.float64), others, resamples=resamples, scale=scale_of(name)
            )
            floors = [difference.p_value <= smallest_p_value(resamples) for difference in differences]
            adjusted = holm([difference.p_value for difference in differences]).tolist()
            if known := races.get((asked, name)):  # who is left was chosen by looking: its tests are those that count
                adjusted, floors = [known.get(row.label, math.nan) for row in each], [False] * len(each)
            found += [
                Against(row.candidate, row.label, asked, name, metric["domain"], best.label, difference, p, floor)
                for row, difference, p, floor in zip(each, differences, adjusted, floors, strict=True)
            ]
    return found


def format_difference(difference: Difference) -> str:
    """Return a difference in percent; from a thousand on, as a factor.

    >>> format_difference(Difference(math.log(1.031), 0.0, 0.0)), format_difference(Difference(math.log(22), 0.0, 0.0))
    ('+3.1', '× 22')
    """
    if not difference.scale.logarithmic:
        return _share(difference.percent[0], _digits(difference))
    factor = difference.value >= _FACTOR
    return ("× " if factor else "") + _written(difference.value, factor, _digits(difference))


def format_interval(difference: Difference) -> str:
    """Return the interval of a difference, written as the difference is; empty where there is none.

    >>> format_interval(Difference(math.log(1.031), math.log(1.012), math.log(1.05)))
    '[+1.2, +5.0]'
    """
    if math.isnan(difference.low) or math.isnan(difference.high):
        return ""
    factor, digits = difference.value >= _FACTOR, _digits(difference)
    if not difference.scale.logarithmic:
        low, high = (_share(end, digits) for end in difference.percent[1:])
        return f"[{low}, {high}]"
    return f"[{_written(difference.low, factor, digits)}, {_written(difference.high, factor, digits)}]"


def forest(found: Sequence[Against], limit: int) -> Chart:
    """Return the variants of one ratio as a chart, a line each and a column a text, closest to the best first.

    `found` are of one ratio; texts are columns in the order of the record.
    """
    texts = {against.metric: against.domain for against in found}
    by_label: dict[str, dict[str, Against]] = {}
    for against in found:
        by_label.setdefault(against.label, {})[against.metric] = against
    shown, best, asked = list(by_label.items())[:limit], found[0].best, f"{100 * found[0].asked:g}"
    columns, axes = [], {}
    for metric, domain in texts.items():
        axes[metric] = percent_axis([each[metric].difference for _, each in shown if metric in each])
        columns += [Column(f"{domain} of domain" if domain == "out" else "in domain", axes[metric]), Column("%")]
    reference = Interval(0.0, math.nan, math.nan, f"{best}: the reference")
    strips = [Strip(f"{best} {BEST}", [reference, Note("0")] * len(axes), "best")]
    for label, each in shown:
        cells: list[Interval | Note] = []
        for metric in axes:
            if metric not in each:
                cells += [Note(""), Note("n/a")]
                continue
            one = each[metric]
            cells.append(Interval(*percent_ends(one.difference), said=_said(one), sure=one.sure))
            cells.append(Note(format_difference(one.difference), format_interval(one.difference)))
        strips.append(Strip(label, cells))
    below = f"{found[0].difference.scale.noun} above that of {short_name(best, 60)}, %"
    return Chart(f"intervals-{asked}", f"Differences from the best, {asked} % asked", "variant", columns, strips,
                 below=below)  # fmt: skip


def _said(one: Against) -> str:
    difference = one.difference
    said = f"{one.label} on {one.metric}: {format_difference(difference)} % against {one.best}"
    if math.isfinite(difference.value) and math.isnan(difference.low):
        said += f", {few(difference.windows)}"
    elif not math.isnan(difference.low):
        said += f" {format_interval(difference)}, wins {100 * difference.win_rate:.0f} % of the windows, "
        said += f"adjusted p {format_p(one.p_value, floor=one.floor)}{', tied' if one.tied else ''}"
    return said


def percent_axis(differences: Sequence[Difference]) -> Axis:
    """Return an axis in percent that shows most intervals whole, and all values that are not far above most."""
    ends = [[end for end in percent_ends(difference) if math.isfinite(end)] for difference in differences]
    highs = sorted(max(each) for each in ends if each)
    low = min((end for each in ends for end in each), default=0.0)
    farthest = _BEYOND * highs[(len(highs) - 1) // 2] if highs else 0.0
    high = max((end for each in ends for end in each if end <= max(farthest, -low)), default=0.0)
    low, high = min(low, 0.0), max(high, 0.0)
    margin = 0.04 * ((high - low) or 1.0)
    return nice_axis(low - margin, high + margin, most=4)


def percent_ends(difference: Difference) -> tuple[float, float, float]:
    """Return value, low and high in percent."""
    value, low, high = (difference.scale.percent(end, difference.base) for end in difference[:3])
    return value, low, high


def _digits(difference: Difference) -> int:
    """Return the decimals of a percentage and of its interval, fewer where they are wide."""
    size = max((abs(end) for end in percent_ends(difference) if not math.isnan(end)), default=0.0)
    return 0 if size >= 100 else 1 if size >= 1 else 2


def _share(percent: float, digits: int) -> str:
    return "n/a" if math.isnan(percent) else f"{percent:+,.{digits}f}".replace("-", MINUS)


def _written(nats: float, factor: bool, digits: int) -> str:
    """Return a difference of losses as percent, or as a factor."""
    if math.isnan(nats):
        return "n/a"
    ratio = math.exp(min(nats, 700.0)) if nats < math.inf else math.inf
    if not factor:
        return f"{100 * (ratio - 1):+,.{digits}f}".replace("-", MINUS)
    return format_ppl(ratio) if ratio >= 1e5 else f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.3g}"
