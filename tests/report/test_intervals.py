"""Intervals: those of the paired bootstrap, against the right reference, shown as they are."""

import math
import re

import numpy as np
import pytest

from saap_jax.evaluation.differences import Difference, paired_difference
from saap_jax.evaluation.resample import FEWEST, holm
from saap_jax.report.kinds.against import against_best, forest, format_difference, format_interval, percent_axis
from saap_jax.report.kinds.variants import legend
from saap_jax.report.page.strips import chart_html
from saap_jax.report.write import render_report
from saap_jax.runs.directory import RunDirectory
from saap_jax.runs.standing import comparison_rows, merged, untested
from tests.report import conftest as fake

SHIFTS = {"best": 0.0, "level": 0.002, "worse": 0.3, "lost": 4.0}


def sweep(seeds: int = 1, shifts: dict[str, float] = SHIFTS, windows: int = 16) -> list[dict]:
    """Return candidates at 20 % whose losses are those of `best` plus a shift and noise; in domain, others are best."""
    random = np.random.default_rng(0)
    base = {metric: random.normal(4, 1, windows) for metric in fake.METRICS}
    lines = []
    for seed in range(seeds):
        for name, shift in shifts.items():
            noise = 0.05 * random.normal(size=windows)
            losses = {
                fake.METRICS[0]: (base[fake.METRICS[0]] - shift / 2 + noise).tolist(),
                fake.METRICS[1]: (base[fake.METRICS[1]] + shift + (noise if shift else 0)).tolist(),
            }
            line = fake.candidate(name, 0.2, (1.0, 1.0))
            line |= {"candidate": f"{name},seed={seed}@0.2", "variant": name, "seed": seed, "losses": losses}
            lines.append(line | {"ppl": {metric: math.exp(np.mean(values)) for metric, values in losses.items()}})
    return lines


def found(lines: list[dict]):
    run = fake.fields()
    return against_best(run, merged(lines), comparison_rows(run, lines))


class TestAgainst:
    @pytest.mark.parametrize("seeds", [1, 3])
    def test_are_those_of_the_paired_bootstrap(self, seeds):
        lines = sweep(seeds)
        by_name = {line["candidate"]: line["losses"] for line in lines}
        for one in found(lines):
            mine, best = (
                np.array([by_name[f"{name},seed={seed}@0.2"][one.metric] for seed in range(seeds)])
                for name in (one.label, one.best)
            )
            wanted = paired_difference(mine, best)
            assert one.difference.value == pytest.approx(wanted.value)
            assert one.difference.win_rate == wanted.win_rate
            assert one.difference.low == pytest.approx(wanted.low, abs=0.01)
            assert one.difference.high == pytest.approx(wanted.high, abs=0.01)

    def test_p_values_are_adjusted_and_those_of_the_rows(self):
        lines = sweep()
        rows = {row.label: row for row in comparison_rows(fake.fields(), lines)}
        out = [one for one in found(lines) if one.domain == "out"]
        assert [one.p_value for one in out] == holm([one.difference.p_value for one in out]).tolist()
        for one in out:
            assert one.p_value == rows[one.label].p_value
            assert one.tied == rows[one.label].tied
        assert {one.label for one in out if one.tied} == {"level"}

    def test_the_reference_is_the_best_out_of_domain_on_every_text(self):
        lines = sweep()
        assert {one.best for one in found(lines)} == {"best"}
        assert {one.label for one in found(lines) if one.domain == "in" and one.difference.high < 0} == {
            "worse",
            "lost",
        }

    def test_losses_that_are_not_finite(self):
        lines = sweep()
        lines[2]["losses"][fake.METRICS[1]][0] = math.inf
        lines[2]["ppl"][fake.METRICS[1]] = math.inf
        worse = next(one for one in found(lines) if (one.label, one.domain) == ("worse", "out"))
        assert math.isnan(worse.p_value)
        assert not worse.tied
        assert format_interval(worse.difference) == ""

    def test_nothing_to_compare(self):
        assert found([fake.older(line) for line in fake.candidates()]) == []  # no losses
        assert found(sweep()[:1]) == []
        assert found([]) == []

    def test_of_few_windows_nothing_is_tested(self):
        for windows, tested in ((1, False), (FEWEST - 1, False), (FEWEST, True)):
            lines = sweep(windows=windows)
            rows = comparison_rows(fake.fields(), lines)
            for one in found(lines):
                assert (
                    (one.sure or one.tied)
                    == math.isfinite(one.p_value)
                    == (format_interval(one.difference) != "")
                    == tested
                )
                assert math.isfinite(one.difference.value)
            assert any(row.tied for row in rows) == tested
            assert bool(untested(rows)) != tested
            drawn, said = chart_html(forest(found(lines), 20)), " ".join(legend(fake.fields(), rows))
            assert ("whisker" in drawn) == ("adjusted p" in drawn) == ("\N{ALMOST EQUAL TO}" in said) == tested
            assert ("where a test takes 8" in said) != tested
            if not tested:
                assert 'class="point"' not in drawn.partition("level")[2], "hollow: nothing is sure"
                assert f"which takes 8 windows; here {'is' if windows == 1 else 'are'} {windows}" in drawn

    def test_a_page_of_few_windows_names_no_best(self, tmp_path):
        for windows, tested in ((4, False), (16, True)):
            run = RunDirectory.open(tmp_path / str(windows), {})
            for line in sweep(windows=windows, shifts={"best": 0.0, "worse": 0.9}):
                run.append(line)
            run.update(**fake.fields())
            page = render_report(run.path)
            assert ("best is best out of domain" in page) == tested
            assert ("best has the lowest perplexity out of domain" in page) != tested
            assert ("Nothing is tested: 4 windows, where a test takes 8." in page) != tested
            assert ("without intervals: 4 windows" in page) != tested

    def test_other_windows_are_left_out(self):
        lines = sweep()
        lines[1]["losses"] = {metric: values[:5] for metric, values in lines[1]["losses"].items()}
        assert {one.label for one in found(lines)} == {"worse", "lost"}


class TestForest:
    def test_a_line_a_variant_the_reference_first(self):
        drawn = chart_html(forest(found(sweep()), 20))
        names = re.findall(r'<th scope="row">(.*?)</th>', drawn)
        assert names == ["best *", "level", "worse", "lost"]
        assert drawn.count('class="open"') >= 1
        assert "adjusted p" in drawn

    def test_shows_so_many(self):
        assert len(re.findall(r'<th scope="row">', chart_html(forest(found(sweep()), 2)))) == 3

    def test_what_is_far_off_is_an_arrow_and_its_number_stays(self):
        drawn = chart_html(forest(found(sweep()), 20))
        lost = drawn.split("<tr>")[-1]
        assert "→" in lost
        assert "× 5" in lost  # e⁴ = 54.6
        assert "→" not in chart_html(forest(found(sweep(shifts={"best": 0.0, "worse": 0.3})), 20))


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((0.0306, 0.0117, 0.0488), ("+3.1", "[+1.2, +5.0]")),
        ((-0.04, -0.0695, -0.0069), ("−3.9", "[−6.7, −0.7]")),
        ((0.001, -0.0005, 0.0025), ("+0.10", "[−0.05, +0.25]")),
        ((0.9, 0.1, 1.2), ("+146", "[+11, +232]")),
        ((7.0, 6.0, 8.0), ("× 1,097", "[403, 2,981]")),
        ((math.inf, math.nan, math.nan), ("× inf", "")),
        ((math.nan, math.nan, math.nan), ("n/a", "")),
        ((0.0, 0.0, 0.0), ("+0.00", "[+0.00, +0.00]")),
    ],
)
def test_differences_stay_readable(numbers, said):
    difference = Difference(*numbers)
    assert (format_difference(difference), format_interval(difference)) == said


def test_the_axis_holds_zero_and_most_intervals():
    axis = percent_axis([Difference(0.1, 0.05, 0.15), Difference(0.2, 0.1, 0.3), Difference(5.0, 4.0, 6.0)])
    assert axis.low < 0 < 34.9 < axis.high < 400
    assert percent_axis([]).low < 0 < percent_axis([]).high
    assert percent_axis([Difference(math.nan, math.nan, math.nan)]).low < 0
