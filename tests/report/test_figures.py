"""Figures: lines that can be told apart, the crossing of a limit, maps, ranks, learning curves."""

import math
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy.stats import rankdata

from saap_jax.evaluation.scales import LOSS
from saap_jax.report.blocks import Figure
from saap_jax.report.figures import (
    BASELINES,
    MOST,
    NAMED,
    Curve,
    Limit,
    change_figure,
    inline,
    learning_figure,
    line_style,
    painted,
    rank_figure,
    ratio_figure,
    saved,
    share_figure,
)
from tests.report.shown import curves

LINES = [Curve("wanda > uniform", [(0.0, 10.0), (0.2, 12.0), (0.4, 20.0)], [(0.2, 11.0, 13.0)], 0.22),
         Curve("random", [(0.0, 10.0), (0.2, 900.0), (0.4, math.inf)])]  # fmt: skip


def shown(figure: Figure | None) -> Figure:
    assert figure is not None
    return figure


class TestCurves:
    def test_first_lines_differ_and_baselines_are_grey(self):
        styles = [line_style(place) for place in range(MOST)]
        assert len({(each["color"], str(each["linestyle"]), each["marker"]) for each in styles}) == MOST
        grey = {line_style(place, name)["color"] for place, name in enumerate(BASELINES)}
        assert grey == {each["color"] for each in styles[NAMED:]}
        assert len(grey | {each["color"] for each in styles[:NAMED]}) == NAMED + 1

    def test_lines_are_named_once_at_their_ends_or_below(self):
        lines = [Curve(f"line {place}", [(0.0, 10.0), (0.2, 12.0 + 0.01 * place)]) for place in range(NAMED + 2)]
        drawing = painted(shown(ratio_figure("f", "t", lines)))
        (axis,), below = drawing.axes, drawing.axes[0].get_legend().get_texts()
        assert {text.get_text() for text in below} == {f"line {NAMED}", f"line {NAMED + 1}"}
        beside = {text.get_text(): text.xyann[1] for text in axis.texts if text.get_text().startswith("line")}
        assert [*beside] == [f"line {place}" for place in range(NAMED)]
        inches = axis.get_position().height * drawing.get_figheight()
        assert min(np.diff([*beside.values()])) * inches > 0.16, "none upon another, the lowest line lowest"

    def test_crossing_limit_and_interval_are_where_they_are(self):
        figure = shown(ratio_figure("f", "t", LINES, limit=Limit(14.0, "limit +40 % 14.00")))
        axis = painted(figure).axes[0]
        lines = {(*path.vertices[0], *path.vertices[1]) for each in axis.collections for path in each.get_paths()}
        assert (0.2, 11.0, 0.2, 13.0) in lines
        (crossing,) = [line for line in lines if line[0] == 0.22]
        assert crossing[3] == 14.0
        texts = {text.get_text() for text in axis.texts}
        assert texts == {"unpruned 10.00, limit +40 % 14.00", "wanda > uniform: 22.0 %"}
        assert list(curves(figure)) == ["random", "wanda > uniform: 22.0 %"]

    def test_what_explodes_does_not_squeeze_the_rest(self):
        axis = painted(shown(ratio_figure("f", "t", LINES))).axes[0]
        assert axis.get_ylim()[1] < 25
        assert axis.get_yscale() == "log"
        assert max(max(line.get_ydata()) for line in axis.get_lines()) <= axis.get_ylim()[1]

    def test_losses_below_zero_are_linear(self):
        axis = painted(shown(ratio_figure("f", "t", [Curve("a", [(0.0, -2.0), (0.2, -1.5)])]))).axes[0]
        assert axis.get_yscale() == "linear"
        assert ratio_figure("f", "t", []) is None

    def test_losses_that_are_all_zero_have_an_axis(self):
        """With a warning of matplotlib's otherwise."""
        axis = painted(shown(ratio_figure("f", "t", [Curve("a", [(0.0, 0.0), (0.2, 0.0)])], LOSS))).axes[0]
        assert axis.get_ylim()[0] < 0 < axis.get_ylim()[1]

    def test_what_is_not_finite_is_left_out_of_a_course(self):
        figure = learning_figure("f", "t", {"a": [(0, 2.0), (1, math.nan)], "b": [(0, math.inf)]}, "step", "loss")
        assert curves(figure) == {"a": [(0, 2.0)]}
        assert saved(figure).startswith(b"<?xml")

    def test_long_and_odd_names_stay_text(self):
        names = ["wanda > " * 30, '<b>&"x"</b> $a_1$', "日本"]
        figure = shown(ratio_figure("f", "t", [Curve(name, [(0.0, 1.0), (0.1, 2.0)]) for name in names]))
        root = ElementTree.fromstring(inline(figure))
        texts = {"".join(each.itertext()) for each in root.iter("{http://www.w3.org/2000/svg}text")}
        assert set(names[1:]) <= texts
        assert any("…" in text for text in texts)
        for ending, start in (("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")):
            assert saved(figure, ending).startswith(start)


class TestMaps:
    def test_cells_are_the_numbers_on_one_scale_about_zero(self):
        cells = {"attention": np.array([[0.1, np.nan], [-0.2, 3.0]]), "mlp": np.array([[0.0, 0.001], [0.5, 0.0]])}
        figure = painted(change_figure("f", "t", cells, ["10 %", "50 %"], "nats"))
        images = [axis.collections[0] for axis in figure.axes[:2]]
        for image, wanted in zip(images, cells.values(), strict=True):
            np.testing.assert_array_equal(image.get_array().filled(np.nan), wanted)
            assert (image.norm.vmin, image.norm.vmax) == (-3.0, 3.0)
        assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["10 %", "50 %"]

    @pytest.mark.parametrize("layers", [1, 30, 126])
    def test_shares_are_percent(self, layers):
        cells = np.linspace(0, 1, layers)[None]
        axis = painted(share_figure("f", "t", {"mlp": cells}, ["a"], "units kept")).axes[0]
        np.testing.assert_allclose(axis.collections[0].get_array(), 100 * cells)
        assert len(axis.get_xticks()) <= 16


def test_dots_are_the_ranks_of_the_scores_and_the_changes():
    dice = np.random.default_rng(0)
    exact = {"attention": dice.normal(size=(4, 3)), "mlp": np.full((4, 9), np.nan)}
    scores = {name: {"attention": dice.normal(size=(4, 3)), "mlp": np.ones((4, 9))} for name in ("a", "b")}
    panels = {"attention": [("a", "0.5"), ("b", "0.1")], "mlp": [("a", "n/a")]}
    drawing = painted(shown(rank_figure(scores, exact, panels)))
    dots = [axis.collections[0] for axis in drawing.axes if axis.get_visible()]
    assert len(dots) == 2
    np.testing.assert_allclose(dots[1].get_offsets()[:, 0], rankdata(scores["b"]["attention"].ravel()) / 13)
    np.testing.assert_array_equal(dots[1].get_offsets()[:, 1], exact["attention"].ravel())
    assert rank_figure(scores, {"mlp": exact["mlp"]}, panels) is None
