"""Figures for papers: as files, the same numbers, nothing clipped, text large enough."""

import io
import re

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from saap_jax.evaluation.frontier import found_variants
from saap_jax.report.figures.paper import WIDTH, _frontier, painted, plots, saved
from saap_jax.report.figures.ratio import Curve, frontier, legend
from saap_jax.report.kinds.frontier import _band, _paint
from saap_jax.report.records import RunDirectory
from saap_jax.report.write import read_views, write_reports
from tests.evaluation.test_frontier import records, steep
from tests.report import conftest as fake
from tests.report.sweeps import write_run
from tests.report.test_intervals import sweep
from tests.runs import fake_run


@pytest.fixture(scope="module")
def views(tmp_path_factory) -> list:
    directory = tmp_path_factory.mktemp("runs")
    return read_views([write_run(directory / name, seed, 24) for seed, name in enumerate(("one", "two"))])


@pytest.fixture(scope="module")
def figures(views) -> dict:
    return {stem: painted(height, paint) for stem, height, paint in plots(views)}


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


class TestFigures:
    def test_of_a_comparison_and_of_several(self, figures):
        assert list(figures) == [
            *(f"{run}-{name}" for run in ("one", "two") for name in (
                "frontier", "intervals-20", "kept-20", "intervals-50", "kept-50", "scores-attention", "scores-mlp")),
            "runs-frontier-1", "runs-frontier-2",
        ]  # fmt: skip

    def test_clip_nothing(self, figures):
        for stem, figure in figures.items():
            assert clipped(figure) == [], stem

    def test_that_something_is_clipped_is_seen(self, figures):
        def paint(figure):
            figure.text(0.5, 0.5, "long " * 60)

        assert len(clipped(painted(2.0, paint))) == 1

    def test_have_letters_of_seven_points_or_more(self, figures):
        for figure in figures.values():
            assert min(text.get_fontsize() for text in texts(figure)) >= 7
            assert figure.get_figwidth() == WIDTH

    def test_show_the_numbers_of_the_records(self, views, figures):
        compared = views[0].compared
        drawn = {tuple(np.round(line.get_ydata(), 6)) for line in figures["one-frontier"].axes[0].get_lines()}
        metric, best = compared.run["metrics"][0]["name"], compared.rows[1].label
        points = sorted((v["ratio_actual"], v["ppl"][metric]) for v in compared.variants if v["label"] == best)
        values = [compared.run["dense"]["ppl"][metric], *(ppl for _, ppl in points)]
        assert tuple(np.round(values, 6)) in drawn
        assert tuple(np.round([1.01 * value for value in values], 6)) not in drawn

    def test_long_names_and_many_variants(self, tmp_path):
        run = RunDirectory.open(tmp_path / "run", {})
        for line in sweep(shifts={f"{number} {'wide ' * 20}": 0.1 * number for number in range(30)}):
            run.append(line)
        run.update(**fake.fields())
        drawn = {stem: painted(height, paint) for stem, height, paint in plots(read_views([run.path]))}
        assert list(drawn) == ["run-frontier", "run-intervals-20", "run-kept-20"]
        for stem, figure in drawn.items():
            assert clipped(figure) == [], stem
            assert sum("wide" in text.get_text() for text in texts(figure)) >= 10


def test_no_two_of_forty_lines_look_alike(tmp_path):
    """On the page, on paper (more runs than one figure takes) and in the figure of a frontier."""
    names = [f"line {number}" for number in range(40)]
    found = [Curve(name, [(0.0, 20.0), (0.5, 30.0 + place)]) for place, name in enumerate(names)]
    page = re.findall(r'class="(k\d)"><title>.*?class="curve"(.*?)/>', frontier(found, names, "x"), re.DOTALL)
    assert len(page) == len(set(page)) == 40
    assert len(set(re.findall(r'class="(k\d)".*?class="curve"(.*?)/>', legend(names)))) == 40
    paper = painted(6.0, _frontier([("x", found)], names)).axes[0].get_lines()
    assert len({(line.get_color(), line.get_linestyle(), str(line._unscaled_dash_pattern)) for line in paper}) == 40
    run, rows = records({name: [steep(0.1)] for name in names}, 0.0, windows=8)
    run |= {"seeds": {"calibration": [0]}}
    figure = Figure()
    variants = found_variants(run, rows)
    _paint(figure, run, variants, {each.variant: _band(run, rows, each.variant) for each in variants})
    curves = [line for line in figure.axes[0].get_lines() if line.get_label().startswith("line ")]
    assert len({(line.get_color(), str(line._unscaled_dash_pattern)) for line in curves}) == len(curves) == 40


class TestFiles:
    def test_are_made_alike_whatever_the_users_settings(self, views):
        _, height, paint = plots(views[:1])[0]
        first = saved(painted(height, paint), "svg")
        with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "figure.dpi": 40}):
            assert saved(painted(height, paint), "svg") == first
        assert saved(painted(height + 1, paint), "svg") != first

    def test_are_what_their_names_say(self, tmp_path):
        run = fake_run(tmp_path / "run")
        written = [path for path in write_reports([run], figures=tmp_path / "figures") if path.parent.name == "figures"]
        assert sorted(path.name for path in written) == ["run-frontier.pdf", "run-frontier.png", "run-frontier.svg"]
        contents = {path.suffix: path.read_bytes() for path in written}
        assert contents[".pdf"].startswith(b"%PDF")
        assert b"/FontFile2" in contents[".pdf"], "text stays text"
        assert Image.open(io.BytesIO(contents[".png"])).size[0] == round(300 * WIDTH)
        assert not re.search(rb"https?://(?!www\.w3\.org|purl\.org|creativecommons\.org)", contents[".svg"])

    def test_that_are_not_ours_are_never_replaced(self, tmp_path):
        run = fake_run(tmp_path / "run")
        (tmp_path / "run-frontier.pdf").write_bytes(b"mine")
        with pytest.raises(ValueError, match=r"run-frontier\.pdf is no figure of saap; pass --overwrite"):
            write_reports([run], figures=tmp_path)
        assert not (run / "report.html").exists(), "nothing is written at all"
        write_reports([run], figures=tmp_path, overwrite=True)
        write_reports([run], figures=tmp_path)
        assert (tmp_path / "run-frontier.pdf").read_bytes().startswith(b"%PDF")
