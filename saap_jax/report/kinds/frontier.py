"""What `saap frontier` finds: how far each variant can go, as a table, a figure and a sentence."""

import math
from collections.abc import Sequence
from pathlib import Path

from saap_jax.evaluation.crossing import Estimate, Found, found_variants
from saap_jax.evaluation.resample import FEWEST, LEVEL
from saap_jax.evaluation.scales import format_figure, scale_of
from saap_jax.report.figures.frontier import format_estimate, frontier_plot
from saap_jax.report.kinds.common import cost_section, files_of, reproduce_section, suggestions_section
from saap_jax.report.kinds.variants import candidate_data
from saap_jax.report.page.blocks import Block, Bullets, Data, Detail, Picture, Section, Table, Words, text_table
from saap_jax.report.page.formats import BEST, TIED, format_percent
from saap_jax.runs.reading import read_rows
from saap_jax.runs.records import Row, RunRecord
from saap_jax.runs.standing import DENSE
from saap_jax.runtime.words import plural, some


def frontier_sections(path: Path, run: RunRecord, detail: Detail) -> list[Section]:
    """Return the sections of a run, finished or not."""
    said, blocks = "Nothing is found yet.", []
    if run.get("frontier"):
        candidates = read_rows(path, run, "frontier")
        found = found_variants(run, candidates)
        said, blocks = summary(run, found), frontier_blocks(run, candidates, found, detail)
    return [
        Section("summary", "Summary", [Bullets([said])]),
        *suggestions_section(run),
        *([Section("frontier", "How far each variant goes", blocks)] if blocks else []),
        *cost_section(run),
        reproduce_section(run),
    ]


def frontier_files(run: RunRecord, candidates: Sequence[Row]) -> dict[str, str]:
    """Return the files of a run: figure, table, results of each seed, and every candidate that was measured."""
    found = found_variants(run, candidates)
    said = Words(summary(run, found), soft=False)
    return files_of("frontier", [said, *frontier_blocks(run, candidates, found, Detail())])


def frontier_blocks(run: RunRecord, candidates: Sequence[Row], found: Sequence[Found], detail: Detail) -> list[Block]:
    """Return figure and table of what was found, and the CSV files."""
    blocks: list[Block] = []
    if detail.drawn:
        plot = frontier_plot(run, candidates, found)
        blocks.append(Picture(plot.title, plot))
    blocks.append(frontier_table(run, found))
    if detail.downloads:
        measured = candidate_data(run, candidates, "curve.csv")
        blocks += [frontier_data(run, candidates), measured]
    return blocks


def summary(run: RunRecord, found: Sequence[Found]) -> str:
    """Say who can be pruned furthest within the limit, and where the knee of its curve is; or why that is not known."""
    best, frontier = found[0], run["frontier"]
    limit = f"+{frontier['percent']:g} % of {frontier['metric']}"
    if not best.ratio.mean > 0:
        return f"No variant keeps within {limit} at a ratio of {100 * frontier['tolerance']:g} %."
    seeds = f"{best.seeds} seeds" if best.seeds > 1 else "1 seed"
    tied, tested = [each.variant for each in found if each.tied], best.windows >= FEWEST
    if len(found) == 1 or not tested:
        lead = f"{best.variant} reaches"
    elif tied:
        lead = f"No variant is known to go furthest within {limit}: {best.variant} reaches"
    else:
        lead = f"{best.variant} goes furthest within {limit}:"
    scale = scale_of(frontier["metric"])
    said = (
        f"{lead} {format_estimate(best.ratio)} % of the prunable parameters ({seeds})"
        f"{'' if limit in lead else f' within {limit}'}, at a {scale.noun} of {format_figure(best.ppl, scale)} of "
        f"at most {format_figure(frontier['limit'], scale)}"
    )
    if tied:
        said += f", from which cannot be told apart {some(tied)}"
    if not tested:
        return f"{said}. Whether another goes as far is not known, nor where the knee is: {untested(found)}."
    if math.isnan(best.knee.mean):
        return f"{said}; its curve has no knee between 0 and {100 * max(frontier['ratios']):g} %."
    return f"{said}; the knee of its curve is at {format_estimate(best.knee)} %."


def untested(found: Sequence[Found]) -> str:
    """Say why there are no intervals; empty where the windows suffice."""
    windows = found[0].windows
    return "" if windows >= FEWEST else f"{plural(windows, 'window')}, where an interval takes {FEWEST}"


def notes(run: RunRecord, found: Sequence[Found]) -> list[str]:
    """Say what the numbers mean, and what is special about some of them."""
    frontier, ties = run["frontier"], any(each.tied for each in found)
    scale = scale_of(frontier["metric"])
    chord = "log perplexity" if scale.logarithmic else "loss"
    said = [
        f"limit: {frontier['metric']} at most {format_figure(frontier['limit'], scale)}, the unpruned model's "
        f"{format_figure(run[DENSE]['ppl'][frontier['metric']], scale)} +{frontier['percent']:g} %",
        f"ratio: the first crossing from below on the grid {', '.join(f'{100 * r:g}' for r in frontier['ratios'])} %, "
        f"bisected to {100 * frontier['tolerance']:g} % ({frontier['rounds']} rounds)",
        f"knee: furthest below the chord of {chord} against ratio, a point of the grid",
        f"± standard deviation over seeds; no intervals: {why}"
        if (why := untested(found))
        else "± standard deviation over seeds; [95 % interval, bootstrap over seeds and windows]",
        f"{BEST} largest ratio"
        + (f"   {TIED} cannot be told apart from it (paired bootstrap, Holm, {100 * LEVEL:g} %)" if ties else ""),
    ]
    for each in found:
        of = f" for {each.everywhere} of {each.seeds} seeds" if each.everywhere < each.seeds else ""
        if each.everywhere:
            said.append(f"{each.variant} holds the limit up to the largest ratio that its search can meet{of}")
        if each.again:
            again = ", ".join(f"{100 * ratio:g}" for ratio in each.again)
            said.append(f"{each.variant} is not monotone: it holds the limit again at {again} %, above the crossing")
    return said


def frontier_table(run: RunRecord, found: Sequence[Found]) -> Table:
    """Return a line a variant, the largest ratio first."""
    header = [
        "variant",
        "largest ratio %",
        "interval",
        "actual %",
        f"{scale_of(run['frontier']['metric']).short} there",
        "knee %",
        "interval",
    ]
    lines = []
    for each in found:
        mark = BEST if each is found[0] and each.ratio.mean > 0 else TIED if each.tied else ""
        ratio, knee = ((format_estimate(e), format_interval(e)) for e in (each.ratio, each.knee))
        there = (format_percent(each.actual), format_figure(each.ppl, scale_of(run["frontier"]["metric"])))
        lines.append([f"{each.variant} {mark}".rstrip(), *ratio, *there, *knee])
    title = f"largest ratio within +{run['frontier']['percent']:g} % of {run['frontier']['metric']}"
    return text_table(title, header, lines, notes=notes(run, found))


def frontier_data(run: RunRecord, candidates: Sequence[Row]) -> Data:
    """Return what was found of each variant and seed in full precision; an empty cell for what there is not."""
    rows = {candidate["candidate"]: candidate for candidate in candidates} | {DENSE: run[DENSE]}
    names = [metric["name"] for metric in run["metrics"]]
    keys = ["variant", "seed", "ratio", "breaks_at", "largest_possible", "rounds", "candidate"]
    lines = []
    for line in run["frontier"]["lines"]:
        row = rows[line["candidate"]]
        measured = [row.get("ratio_actual", 0.0), row["parameters"], *map(row["ppl"].get, names)]
        lines.append([*(line[key] for key in keys), " ".join(map(str, line["again"])), *measured])
    header = [*keys, "again", "ratio_actual", "parameters", *names]
    return Data("CSV of each seed, full precision", "frontier.csv", header, lines)


def format_interval(estimate: Estimate) -> str:
    """Return the interval of a ratio in percent, without the sign."""
    if math.isnan(estimate.low):
        return "n/a"
    return f"[{format_percent(estimate.low)}, {format_percent(estimate.high)}]"
