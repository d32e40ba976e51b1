"""Figures for papers: as files, the same numbers, nothing clipped, text large enough."""

import io
import json
import re

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

from saap_jax.evaluation.crossing import found_variants
from saap_jax.report.figures.draw import COLUMN, ON_PAPER, WIDTH, on_paper, painted
from saap_jax.report.figures.frontier import frontier_plot
from saap_jax.report.figures.paper import plots
from saap_jax.report.figures.ratio import Curve, ratio_panels, ratio_plot
from saap_jax.report.kinds.against import percent_ends
from saap_jax.report.page.blocks import Plot
from saap_jax.report.page.html import legend_html
from saap_jax.report.write import read_views, report_page, write_reports
from saap_jax.runs.directory import RunDirectory
from tests.evaluation.test_crossing import records, steep
from tests.fake_runs import fake_run
from tests.report import conftest as fake
from tests.report.sweeps import write_run
from tests.report.test_intervals import sweep


@pytest.fixture(scope="module")
def views(tmp_path_factory) -> list:
    directory = tmp_path_factory.mktemp("runs")
    return read_views([write_run(directory / name, seed, 24) for seed, name in enumerate(("one", "two"))])


@pytest.fixture(scope="module")
def figures(views) -> dict:
    return {stem: painted(plot, ON_PAPER) for stem, plot in plots(report_page(views, folded=False))}


def texts(figure) -> list[Text]:
    """Return the texts that are drawn; ticks beyond the end of an axis are not."""
    beyond = set()
    for axes in figure.axes:
        for axis, (low, high) in ((axes.xaxis, sorted(axes.get_xlim())), (axes.yaxis, sorted(axes.get_ylim()))):
            beyond |= {tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
    found = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    return [text for text in found if text not in beyond]


def clipped(figure) -> list[str]:
    """Return the texts that leave the figure by more than a pixel."""
    renderer, box = FigureCanvasAgg(figure).get_renderer(), figure.bbox
    shown = []
    for text in texts(figure):
        extent = text.get_window_extent(renderer)
        inside = extent.x0 >= -1 and extent.y0 >= -1 and extent.x1 <= box.x1 + 1 and extent.y1 <= box.y1 + 1
        shown += [] if inside else [text.get_text()]
    return shown


@pytest.mark.slow
class TestFigures:
    def test_of_a_comparison_and_of_several(self, figures):
        assert list(figures) == [
            *(f"{run}-{name}" for run in ("one", "two") for name in (
                "frontier", "intervals-20", "intervals-50", "kept-20", "kept-50", "scores-attention", "scores-mlp",
                "fusion")),
            "runs-frontier-1", "runs-frontier-2",
        ]  # fmt: skip

    def test_clip_nothing(self, figures):
        for stem, figure in figures.items():
            assert clipped(figure) == [], stem

    def test_that_something_is_clipped_is_seen(self, figures):
        def paint(figure):
            figure.text(0.5, 0.5, "long " * 60)

        assert len(clipped(painted(Plot("p", "t", "", paint, 2.0), ON_PAPER))) == 1

    def test_have_letters_of_seven_points_or_more(self, figures):
        for figure in figures.values():
            assert min(text.get_fontsize() for text in texts(figure)) >= 7
            assert figure.get_figwidth() == WIDTH

    def test_narrow_ones_are_as_wide_as_a_column(self):
        assert (
            painted(Plot("p", "t", "", lambda figure: figure.subplots(), 2.0, 4.0), ON_PAPER).get_figwidth() == COLUMN
        )

    def test_show_the_numbers_of_the_records(self, views, figures):
        compared = views[0].compared
        drawn = {tuple(np.round(line.get_ydata(), 6)) for line in figures["one-frontier"].axes[0].get_lines()}
        metric, best = compared.run["metrics"][0]["name"], compared.rows[1].label
        points = sorted((v["ratio_actual"], v["ppl"][metric]) for v in compared.variants if v["label"] == best)
        values = [compared.run["dense"]["ppl"][metric], *(ppl for _, ppl in points)]
        assert tuple(np.round(values, 6)) in drawn
        assert tuple(np.round([1.01 * value for value in values], 6)) not in drawn

    def test_charts_show_what_the_page_shows(self, views, figures):
        compared = views[0].compared
        group = [one for one in compared.against if one.asked == 0.2 and one.domain == "in"][:10]
        axis = figures["one-intervals-20"].axes[0]
        whiskers = [sorted(line.get_xdata()) for line in axis.get_lines() if len(line.get_xdata()) == 2]
        low, high = axis.get_xlim()
        wanted = [[max(ends[1], low), min(ends[2], high)] for ends in (percent_ends(one.difference) for one in group)]
        for ends in wanted:
            assert any(line == pytest.approx(ends) for line in whiskers)
        assert not any(line == pytest.approx([wanted[0][0] - 1, wanted[0][1]]) for line in whiskers)
        kept = figures["one-kept-20"].axes[0].get_images()[0].get_array()
        best = next(v for v in compared.variants if v["label"] == compared.rows[1].label and v["ratio_asked"] == 0.2)
        np.testing.assert_allclose(kept[0], 100 * np.array(best["kept"]["attention"]) / 32)

    def test_long_names_and_many_variants(self, tmp_path):
        run = RunDirectory.open(tmp_path / "run", {})
        for line in sweep(shifts={f"{number} {'wide ' * 20}": 0.1 * number for number in range(30)}):
            run.append(line)
        run.update(**fake.fields())
        page = report_page(read_views([run.path]), folded=False)
        drawn = {stem: painted(plot, ON_PAPER) for stem, plot in plots(page)}
        assert list(drawn) == ["run-frontier", "run-intervals-20", "run-kept-20"]
        for stem, figure in drawn.items():
            assert clipped(figure) == [], stem
            assert sum("wide" in text.get_text() for text in texts(figure)) >= 10


def looks(lines: list) -> set[tuple[str, str]]:
    return {(line.get_color(), str(line._unscaled_dash_pattern)) for line in lines}


def test_no_two_of_forty_lines_look_alike(tmp_path):
    """On the page, on paper (more runs than one figure takes) and in the figure of a frontier."""
    names = [f"line {number}" for number in range(40)]
    found = [Curve(name, [(0.0, 20.0), (0.5, 30.0 + place)]) for place, name in enumerate(names)]
    page = ratio_plot("x", found, names)
    assert page is not None
    assert len(looks([line for line in painted(page).axes[0].get_lines() if line.get_markevery()])) == 40
    assert len(set(re.findall(r'class="(k\d)".*?class="curve"(.*?)/>', legend_html(names)))) == 40
    paper = [painted(plot, ON_PAPER) for plot in ratio_panels("x", [("x", found)], names)]
    assert len(paper) == 2
    assert len(looks([line for figure in paper for line in figure.axes[0].get_lines() if line.get_markevery()])) == 40
    run, rows = records({name: [steep(0.1)] for name in names}, 0.0, windows=8)
    run |= {"seeds": {"calibration": [0]}}
    figure = painted(frontier_plot(run, rows, found_variants(run, rows)))
    curves = [line for line in figure.axes[0].get_lines() if line.get_label().startswith("line ")]
    assert len(looks(curves)) == len(curves) == 40


@pytest.mark.parametrize("shift", [0.0, 40.0])
def test_a_frontier_of_losses_of_0_and_below_is_on_a_linear_axis(shift):
    run, rows = records({"line": [steep(0.1)]}, 0.0, windows=8)
    metric = run["frontier"]["metric"]
    new = json.loads(json.dumps([run | {"seeds": {"calibration": [0]}}, rows]).replace(metric, "loss held_out"))
    run, rows = new
    for row in (run["dense"], *rows):
        row["ppl"] = {name: ppl - shift for name, ppl in row["ppl"].items()}
    run["frontier"]["limit"] -= shift
    plot = frontier_plot(run, rows, found_variants(run, rows))
    axis = painted(plot).axes[0]
    assert axis.get_yscale() == ("linear" if shift else "log")
    assert ("on a linear axis" in plot.description) == bool(shift)
    low, high = axis.get_ylim()
    assert all(low <= row["ppl"]["loss held_out"] <= high for row in rows[:3])


class TestFiles:
    @pytest.mark.slow
    def test_are_made_alike_whatever_the_users_settings(self, views):
        _, plot = plots(report_page(views[:1], folded=False))[0]
        first = on_paper(plot)
        assert set(first) == {"svg", "png", "pdf"}
        with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "figure.dpi": 40}):
            assert on_paper(plot) == first
        assert all(content != first[ending] for ending, content in on_paper(plot._replace(paper=4.0)).items())

    @pytest.mark.slow
    def test_are_what_their_names_say(self, tmp_path):
        run = fake_run(tmp_path / "run")
        written = [path for path in write_reports([run], figures=tmp_path / "figures") if path.parent.name == "figures"]
        names = {"run-frontier.pdf", "run-frontier.png", "run-frontier.svg"}
        assert names <= {path.name for path in written}
        written = [path for path in written if path.name in names]
        contents = {path.suffix: path.read_bytes() for path in written}
        assert contents[".pdf"].startswith(b"%PDF")
        assert b"/FontFile2" in contents[".pdf"], "text stays text"
        assert Image.open(io.BytesIO(contents[".png"])).size[0] == round(300 * WIDTH)
        assert not re.search(rb"https?://(?!www\.w3\.org|purl\.org|creativecommons\.org)", contents[".svg"])

    @pytest.mark.slow
    def test_that_are_not_ours_are_never_replaced(self, tmp_path):
        run = fake_run(tmp_path / "run")
        (tmp_path / "run-frontier.pdf").write_bytes(b"mine")
        with pytest.raises(ValueError, match=r"run-frontier\.pdf is no figure of saap; pass --overwrite"):
            write_reports([run], figures=tmp_path)
        assert not (run / "report.html").exists(), "nothing is written at all"
        write_reports([run], figures=tmp_path, overwrite=True)
        write_reports([run], figures=tmp_path)
        assert (tmp_path / "run-frontier.pdf").read_bytes().startswith(b"%PDF")
