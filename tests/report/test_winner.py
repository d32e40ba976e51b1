"""The first look at a comparison: true to the records, with the intervals of the paired bootstrap; baselines aside."""

import math

import numpy as np
import pytest

from saap_jax.evaluation.differences import paired_difference
from saap_jax.evaluation.resample import smallest_p_value
from saap_jax.report.figures.draw import painted
from saap_jax.report.figures.palette import GREY
from saap_jax.report.figures.ratio import Curve, beyond, ratio_plot
from saap_jax.report.kinds.against import against_best
from saap_jax.report.kinds.common import reproduce_section
from saap_jax.report.kinds.compare import kept_map
from saap_jax.report.kinds.variants import variant_table
from saap_jax.report.kinds.winner import compared_facts, interval_ends, winner_table
from saap_jax.report.page.blocks import Code
from saap_jax.runs.standing import comparison_rows, merged
from tests.report import conftest as fake
from tests.report.shown import cells

IN, OUT = fake.METRICS
WINDOWS = 16
DENSE = np.random.default_rng(0).normal(3, 0.5, WINDOWS)


def run() -> dict:
    """Return the record of a run whose dense model has losses of windows."""
    dense = {
        "ppl": dict.fromkeys(fake.METRICS, math.exp(DENSE.mean())),
        "losses": dict.fromkeys(fake.METRICS, DENSE.tolist()),
    }
    return fake.fields() | {"dense": {"parameters": 1, **dense}}


def line(name: str, shift: float, noise: float = 0.05, ratio: float = 0.2) -> dict:
    """Return a candidate whose losses are those of the dense model and a shift, with noise."""
    losses = DENSE + shift + noise * np.random.default_rng(len(name)).normal(size=WINDOWS)
    about = {"losses": dict.fromkeys(fake.METRICS, losses.tolist())}
    return (
        fake.candidate(name, ratio, (1.0, 1.0)) | about | {"ppl": dict.fromkeys(fake.METRICS, math.exp(losses.mean()))}
    )


def table(lines: list[dict], record: dict | None = None) -> list[list[str]]:
    known = record or run()
    variants, rows = merged(lines), comparison_rows(known, lines)
    return cells(winner_table(known, variants, rows, against_best(known, variants, rows)))


class TestWinner:
    def test_a_line_a_ratio_with_figure_and_intervals(self):
        lines = [line("ab", 0.1), line("c", 0.9), line("def", 0.5, ratio=0.5)]
        first, second = table(lines)
        assert (first[0], second[0]) == ("20 %: ab *", "50 %: def *")
        assert first[1] == f"{lines[0]['ppl'][OUT]:.2f}"
        expected = paired_difference(np.array([lines[0]["losses"][OUT]]), DENSE[None])
        digits = [f"{value:+.1f}" for value in expected.percent]
        assert first[2] == f"{digits[0]} [{digits[1]}, {digits[2]}]"
        assert first[2] != second[2], "negative control"
        assert second[3] == "-", "it is alone"

    def test_names_what_is_tied(self):
        assert table([line("ab", 0.1, 0.2), line("c", 0.1001, 0.2)])[0][0] in ("20 %: ab ≈ c", "20 %: c ≈ ab")
        assert table([line("ab", 0.1, 0.0), line("c", 0.4, 0.0)])[0][0] == "20 %: ab *", "negative control"

    def test_without_losses_there_are_no_intervals(self):
        lines = [fake.older(fake.candidate(name, 0.2, (1.0, ppl))) for name, ppl in (("a", 40.0), ("b", 50.0))]
        assert table(lines, fake.fields()) == [["20 %: a *", "40.00", "-", "-"]]

    def test_nothing_finite_is_no_winner(self):
        assert table([fake.older(fake.candidate("a", 0.2, (math.inf, math.nan)))]) == []

    def test_says_what_was_compared(self):
        facts = compared_facts(run(), comparison_rows(run(), [line("ab", 0.1), line("c", 0.9, ratio=0.5)]))
        assert facts["removed"] == "20, 50 % of the prunable parameters"
        assert facts["variants compared"] == "2: ab, c"
        assert facts["texts"] == f"{IN} (in domain); {OUT} (out of domain)"


class TestCurves:
    def test_intervals_hold_the_point_and_are_those_of_the_difference(self):
        lines = [line("ab", 0.1), line("c", 0.9)]
        found = interval_ends(run(), merged(lines), OUT, ["ab"])
        [(ratio, low, high)] = found["ab"]
        assert ratio == lines[0]["ratio_actual"]
        assert low < lines[0]["ppl"][OUT] < high
        expected = paired_difference(np.array([lines[0]["losses"][OUT]]), DENSE[None])
        np.testing.assert_allclose(np.log([low, high]) - DENSE.mean(), expected[1:3], rtol=1e-6)
        assert interval_ends(run(), merged([line("c", 0.9)]), OUT, ["c"])["c"][0][1] > high, "negative control"

    def test_other_windows_have_none(self):
        short = line("ab", 0.1)
        short["losses"] = {name: values[:9] for name, values in short["losses"].items()}
        assert interval_ends(run(), merged([short]), OUT, ["ab"]) == {}

    @pytest.mark.parametrize(("name", "aside"), [("magnitude", True), ("random,global", True), ("other", False)])
    def test_a_baseline_does_not_squeeze_the_others(self, name, aside):
        found = [Curve("wanda", [(0.0, 20.0), (0.5, 40.0)]), Curve(name, [(0.0, 20.0), (0.5, 100.0)])]
        order = ["wanda", name]
        drawn = ratio_plot("title", found, order)
        assert drawn is not None
        figure = painted(drawn)
        assert (figure.axes[0].get_ylim()[1] < 50) == aside
        assert any(each.get_color() == GREY for each in figure.axes[0].get_lines()) == aside
        assert beyond(found, order) == ([f"{name}: 100.00 at 50.0 %"] if aside else [])


class TestKept:
    def test_what_is_equal_is_one_line_with_all_names(self):
        lines = [fake.candidate(name, 0.2, (1.0, 2.0)) for name in ("a", "b", "c")]
        lines[2]["kept"] = lines[0]["kept"]
        chart = kept_map(fake.fields(), lines)
        assert chart is not None
        assert [strip.name for strip in chart.strips] == ["a, c", "b"]
        assert len(chart.strips[0].cells) == 2


def test_a_p_at_the_floor_of_resampling_is_a_bound():
    lines = [line("ab", 0.1, 0.0), line("c", 0.9, 0.0), line("def", 0.16, 0.2)]
    variants, rows = merged(lines), comparison_rows(run(), lines)
    found = {one.label: one for one in against_best(run(), variants, rows) if one.metric == OUT}
    assert found["c"].floor
    assert found["c"].difference.p_value <= smallest_p_value(10_000)
    assert not found["def"].floor, "negative control"
    shown = {cells[0]: cells[-1] for cells in cells(variant_table(run(), rows, list(found.values())))}
    assert shown["c"].startswith("≤ 0.000")
    assert not any(text.startswith("≤") for name, text in shown.items() if name != "c")


def test_the_command_is_shown_where_it_is_on_record():
    def codes(record: dict) -> list[str]:
        return [block.text for block in reproduce_section(record).blocks if isinstance(block, Code)]

    assert codes(fake.fields() | {"command": "saap compare"}) == ["saap compare"]
    assert codes(fake.fields()) == [], "an older run"
