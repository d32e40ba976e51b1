"""What `saap frontier` finds: how far each variant can go, as a table, a figure and a sentence."""

import math
from collections.abc import Sequence

from saap_jax.evaluation.crossing import Found, found_variants
from saap_jax.evaluation.resample import format_interval, too_few
from saap_jax.evaluation.scales import format_figure, scale_of
from saap_jax.records import Row, RunRecord
from saap_jax.report.blocks import Column, Figure, Findings, Table, folded
from saap_jax.report.figures import Curve, Limit, ratio_figure
from saap_jax.report.formats import BEST, TIED_LEGEND, format_estimate, format_percent, marked
from saap_jax.report.pages.common import metric_columns, share_evaluated
from saap_jax.report.pages.compare import candidate_table
from saap_jax.runs.directory import RunDirectory
from saap_jax.runs.standing import DENSE, mean_figure
from saap_jax.runtime.words import plural, some


def frontier_findings(directory: RunDirectory) -> Findings:
    """Show figure and table of what was found, then each seed and all that was measured."""
    run = directory.record
    candidates = directory.candidates()
    title = "How far each variant goes"
    if not run.get("frontier"):
        return Findings(["Nothing is found yet."], title, [])
    found = found_variants(run, candidates)
    more = [folded(_seed_table(run, candidates)), folded(candidate_table(run, candidates, "curve"))]
    return Findings([summary(run, found)], title, [_figure(run, candidates, found), frontier_table(run, found), *more])


def summary(run: RunRecord, found: Sequence[Found]) -> str:
    """Say who can be pruned furthest within the limit, or why that is not known."""
    best = found[0]
    frontier = run["frontier"]
    limit = f"+{frontier['percent']:g} % of {frontier['metric']}"
    if not best.ratio.mean > 0:
        return f"No variant keeps within {limit} at a ratio of {100 * frontier['tolerance']:g} %."
    tied = [each.variant for each in found if each.tied]
    untested = too_few(best.windows)
    if len(found) == 1 or untested:
        lead = f"{best.variant} reaches"
    elif tied:
        lead = f"No variant is known to go furthest within {limit}: {best.variant} reaches"
    else:
        lead = f"{best.variant} goes furthest within {limit}:"
    scale = scale_of(frontier["metric"])
    text = (
        f"{lead} {format_estimate(*best.ratio[:2])} % of the prunable parameters ({plural(best.seeds, 'seed')})"
        f"{'' if limit in lead else f' within {limit}'}, at a {scale.noun} of {format_figure(best.ppl, scale)} of "
        f"at most {format_figure(frontier['limit'], scale)}"
    )
    if tied:
        text += f", from which cannot be told apart {some(tied)}"
    if untested and len(found) > 1:
        return f"{text}. Whether another goes as far is not known: {untested}."
    return f"{text}."


def notes(run: RunRecord, found: Sequence[Found]) -> list[str]:
    """Say what the numbers mean, and what is special about some of them."""
    frontier = run["frontier"]
    why = too_few(found[0].windows)
    scale = scale_of(frontier["metric"])
    windows = len(run[DENSE]["losses"][frontier["metric"]])
    if found[0].windows == windows:
        units = "windows"
    else:
        units = "articles"
    at_least = ""
    if found[0].seeds > 1:
        at_least = ", no narrower than Student's over seeds"
    interval = f"[95 % interval, bootstrap over seeds and {units}{at_least}]"
    lines = [
        f"limit: {frontier['metric']} at most {format_figure(frontier['limit'], scale)}, the unpruned model's "
        f"{format_figure(run[DENSE]['ppl'][frontier['metric']], scale)} +{frontier['percent']:g} %",
        f"ratio: the first crossing from below on the grid {', '.join(f'{100 * r:g}' for r in frontier['ratios'])} %, "
        f"bisected to {100 * frontier['tolerance']:g} %",
        f"± standard deviation over seeds; {f'no intervals: {why}' if why else interval}",
        f"{BEST} largest ratio" + (f"   {TIED_LEGEND}" if any(each.tied for each in found) else ""),
    ]
    if "raced" in run:
        lines.append(
            f"{share_evaluated(run['raced'])}a point is evaluated until it is sure on which side of the limit it is, "
            "and the ends of a bracket on all windows; figures of other points are of the windows that they took"
        )
    for each in found:
        if each.everywhere < each.seeds:
            of = f" for {each.everywhere} of {each.seeds} seeds"
        else:
            of = ""
        if each.everywhere:
            lines.append(f"{each.variant} holds the limit up to the largest ratio that its search can meet{of}")
        if each.again:
            again = ", ".join(f"{100 * ratio:g}" for ratio in each.again)
            lines.append(f"{each.variant} is not monotone: it holds the limit again at {again} %, above the crossing")
    return lines


def frontier_table(run: RunRecord, found: Sequence[Found]) -> Table:
    """List the variants, the largest ratio first."""
    scale = scale_of(run["frontier"]["metric"])

    def interval(low: float, high: float) -> str:
        return format_interval(low, high, format_percent) or "n/a"

    columns = [
        Column("variant", ("variant", "best", "tied", "seeds"), marked, True),
        Column("largest ratio %", ("ratio", "ratio_spread"), format_estimate),
        Column("interval", ("ratio_low", "ratio_high"), interval),
        Column("actual %", ("ratio_actual",), format_percent),
        Column(f"{scale.short} there", ("ppl",), lambda value: format_figure(float(value), scale)),
    ]
    rows = []
    for each in found:
        best = each is found[0] and each.ratio.mean > 0
        row = {"variant": each.variant, "best": best, "tied": each.tied, "seeds": each.seeds, "ppl": each.ppl,
               "ratio_actual": each.actual, "mark": "best" * best}  # fmt: skip
        rows.append(row | dict(zip(("ratio", "ratio_spread", "ratio_low", "ratio_high"), each.ratio, strict=True)))
    title = f"largest ratio within +{run['frontier']['percent']:g} % of {run['frontier']['metric']}"
    return Table(title, columns, rows, notes(run, found))


def _seed_table(run: RunRecord, candidates: Sequence[Row]) -> Table:
    """List what was found of each variant and seed."""
    measured = {candidate["candidate"]: candidate for candidate in candidates} | {DENSE: run[DENSE]}
    rows = []
    for line in run["frontier"]["lines"]:
        row = measured[line["candidate"]]
        again = " ".join(map(str, line["again"]))
        actual = row.get("ratio_actual", 0.0)
        rows.append({**line, "again": again, "ratio_actual": actual, "parameters": row["parameters"], **row["ppl"]})
    columns = [
        Column("variant", ("variant",), words=True),
        Column("seed", ("seed",)),
        Column("largest ratio %", ("ratio",), format_percent),
        Column("breaks at %", ("breaks_at",), format_percent),
        Column("largest possible %", ("largest_possible",), format_percent),
        Column("rounds", ("rounds",)),
        Column("candidate", ("candidate",)),
        Column("again at", ("again",)),
        Column("actual %", ("ratio_actual",), format_percent),
        Column("parameters", ("parameters",), "{:,}".format),
        *metric_columns(run),
    ]
    return Table("Each seed", columns, rows, file="frontier")


def _figure(run: RunRecord, candidates: Sequence[Row], found: Sequence[Found]) -> Figure | None:
    """Draw the curves of variants, by asked ratio, with the limit and the largest ratios.

    A curve is the mean over the seeds of log perplexity, on the grid and where bisection tried the same ratio for all
    of them; its upright lines go from the lowest seed to the highest.
    """
    frontier = run["frontier"]
    scale = scale_of(run["frontier"]["metric"])
    metric = frontier["metric"]
    seeds = len(run["seeds"]["calibration"])
    curves = []
    for each in found:
        values: dict[float, list[float]] = {}
        for candidate in candidates:
            if candidate["variant"] == each.variant:
                values.setdefault(candidate["ratio_asked"], []).append(float(candidate["ppl"][metric]))
        whole = {r: ppl for r, ppl in sorted(values.items()) if len(ppl) == seeds and all(map(math.isfinite, ppl))}
        points = [(0.0, float(run[DENSE]["ppl"][metric])), *((r, mean_figure(metric, ppl)) for r, ppl in whole.items())]
        ends = [(ratio, min(ppl), max(ppl)) for ratio, ppl in whole.items() if seeds > 1]
        if each.everywhere < each.seeds:
            crossing = each.ratio.mean
        else:
            crossing = math.nan
        curves.append(Curve(each.variant, points, ends, crossing))
    limit = Limit(frontier["limit"], f"limit +{frontier['percent']:g} % {format_figure(frontier['limit'], scale)}")
    return ratio_figure("frontier", f"How far each variant can be pruned: {metric}", curves, scale, limit)
