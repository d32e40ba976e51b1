"""Patterns over scenarios: hand-computed numbers, properties, and tables and heat maps that are true to them."""

import csv
import functools
import io
import math
import re
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import colormaps

from saap_jax.report.figures.draw import on_screen, painted
from saap_jax.report.figures.patterns import _cells, pattern_plot
from saap_jax.report.kinds.patterns import (
    Patterns,
    pattern_data,
    pattern_notes,
    pattern_section,
    pattern_table,
    patterns,
    unimportant,
)
from saap_jax.report.page.blocks import Detail, Plot
from saap_jax.report.page.csv_text import data_text
from tests.report.shown import cells, printed, words

SVG = "{http://www.w3.org/2000/svg}"
NAN = np.nan

IMPORTANCE = {
    "web": np.array([[1.0, 5.0, 3.0], [4.0, 2.0, NAN]]),
    "code": np.array([[10.0, 40.0, 50.0], [20.0, 30.0, NAN]]),
}
"""Five units. Orders of web 1 5 3 4 2 and of code 1 4 5 2 3: Σ d² = 10, so Spearman's ρ is 1 - 60 / 120."""

USAGE = {
    "web": np.array([[0.0, 1.0, 0.4], [0.6, 0.2, NAN]]),  # as importance
    "code": np.array([[1.0, 0.4, 0.2], [0.8, 0.6, NAN]]),  # the opposite
}


def example(*scenarios: str, usage: str | None = "used", share: float = 0.4) -> Patterns:
    """Return the patterns of the numbers above, of all scenarios or those named."""
    scores = {name: {"i": {"mlp": IMPORTANCE[name]}, "used": {"mlp": USAGE[name]}} for name in scenarios or IMPORTANCE}
    return patterns(scores, "i", usage, share)


def plot(found: Patterns, structure: str = "mlp") -> Plot:
    return pattern_plot(found, structure, " ".join(pattern_notes(found, structure)))


DRAWN = functools.cache(lambda: on_screen(plot(example())))


def drawn(many: int, seed: int = 0, shape: tuple[int, int] = (4, 6)) -> dict[str, dict]:
    """Return random scores `i` and frequencies `u` of so many scenarios; layers have unequal widths."""
    random = np.random.default_rng(seed)
    gone = np.arange(shape[1]) >= random.integers(0, shape[1] + 1, shape[0])[:, None]

    def one(low: float, high: float) -> dict[str, np.ndarray]:
        values = random.uniform(low, high, shape)
        return {"attention": values[:, :2], "mlp": np.where(gone, NAN, values)}

    return {f"s{number}": {"i": one(1, 9), "u": one(0, 1)} for number in range(many)}


class TestUnimportant:
    @pytest.mark.parametrize(("share", "units", "count"), [(0.29, 100, 29), (0.2, 15, 3), (0.7, 10, 7), (0.199, 10, 1)])
    def test_counts_without_rounding_errors(self, share, units, count):
        assert unimportant({"mlp": np.arange(float(units))[None]}, share)["mlp"].sum() == count

    def test_floats_alone_would_miscount(self):
        assert math.floor(0.29 * 100) == 28

    def test_ties_go_by_layer_then_index(self):
        mask = unimportant({"mlp": np.array([[2.0, 1.0, 1.0], [1.0, 1.0, NAN]])}, 0.6)["mlp"]
        assert mask.tolist() == [[False, True, True], [True, False, False]]

    def test_structures_are_ranked_apart_and_layers_together(self):
        scores = {"attention": np.array([[100.0, 200.0]]), "mlp": np.array([[1.0, 2.0], [8.0, 9.0]])}
        masks = unimportant(scores, 0.5)
        assert masks["attention"].tolist() == [[True, False]]
        assert masks["mlp"].tolist() == [[True, True], [False, False]]

    def test_ends(self):
        values = {"mlp": IMPORTANCE["web"]}
        assert not unimportant(values, 0.0)["mlp"].any()
        np.testing.assert_array_equal(unimportant(values, 1.0)["mlp"], ~np.isnan(IMPORTANCE["web"]))

    @pytest.mark.parametrize("share", [-0.1, 1.1, NAN])
    def test_refuses_what_is_no_share(self, share):
        with pytest.raises(ValueError, match=r"patterns: expected a share in \[0, 1\], got"):
            unimportant({"mlp": np.ones((1, 2))}, share)


class TestNumbers:
    def test_by_hand(self):
        part = example().structures["mlp"]
        assert (part.units, part.lowest) == (5, 2)
        assert part.consistent.tolist() == [[True, False, False], [False, False, False]]
        assert (part.agreed, part.share, part.layers) == (1, 0.2, [1, 0])
        assert part.chance == pytest.approx(0.16)
        assert part.task_specific == 1  # the first of layer 1: second lowest in code, second highest in web
        assert part.agreement == pytest.approx({"web": 0.5, "code": 0.5})
        assert part.usage == pytest.approx({"web": 0.44, "code": 0.6})
        assert part.usage_importance == pytest.approx({"web": 1.0, "code": -1.0})
        np.testing.assert_allclose(part.ranks["web"], [[0.1, 0.9, 0.5], [0.7, 0.3, NAN]])
        np.testing.assert_allclose(part.ranks["code"], [[0.1, 0.7, 0.9], [0.3, 0.5, NAN]])
        assert example().indices == {"mlp": [[0, 0]]}

    def test_equal_scores_share_their_rank(self):
        scores = {"web": {"i": {"mlp": np.array([[1.0, 1.0, 3.0, NAN]])}}}
        np.testing.assert_allclose(patterns(scores, "i").structures["mlp"].ranks["web"], [[1 / 3, 1 / 3, 5 / 6, NAN]])

    def test_one_scenario_has_nothing_to_agree_with(self):
        part = example("web").structures["mlp"]
        assert np.isnan(part.agreement["web"])
        assert (part.agreed, part.task_specific, part.chance) == (2, 0, 0.4)

    def test_agreement_is_the_mean_over_the_others(self):
        order = np.array([[1.0, 2.0, 3.0]])
        scores = {name: {"i": {"mlp": values}} for name, values in {"a": order, "b": order, "c": -order}.items()}
        assert patterns(scores, "i").structures["mlp"].agreement == pytest.approx({"a": 0.0, "b": 0.0, "c": -1.0})

    def test_a_model_without_units_of_a_structure(self):
        scores = {s: {"i": {"attention": np.full((2, 3), NAN), "mlp": np.zeros((2, 0))}} for s in "ab"}
        found = patterns(scores, "i")
        for name, part in found.structures.items():
            assert (part.units, part.lowest, part.agreed, part.task_specific) == (0, 0, 0, 0)
            assert np.isnan([part.share, part.chance, *part.agreement.values()]).all()
            assert pattern_notes(found, name) == [f"No {name} units."]
        assert pattern_section(found, Detail()) == []
        assert len(data_text(pattern_data(found)).splitlines()) == 1

    def test_float32_does_as_well(self):
        single = {s: {"i": {"mlp": v.astype(np.float32)}} for s, v in IMPORTANCE.items()}
        assert patterns(single, "i", share=0.4).indices == {"mlp": [[0, 0]]}


class TestProperties:
    @pytest.mark.parametrize("share", [0.2, 0.5, 0.7, 1.0])
    def test_equal_scenarios_agree_on_everything(self, share):
        one = drawn(1)["s0"]
        for name, part in patterns({"a": one, "b": one}, "i", "u", share).structures.items():
            np.testing.assert_array_equal(part.consistent, unimportant(one["i"], share)[name])
            assert part.task_specific == 0
            assert part.agreement == pytest.approx({"a": 1.0, "b": 1.0})

    def test_opposite_scenarios_agree_on_nothing(self):
        up = {"mlp": np.arange(10.0).reshape(2, 5)}
        part = patterns({"a": {"i": up}, "b": {"i": {"mlp": -up["mlp"]}}}, "i", share=0.3).structures["mlp"]
        assert (part.agreed, part.task_specific) == (0, 6)
        assert part.agreement == pytest.approx({"a": -1.0, "b": -1.0})

    @settings(max_examples=20, deadline=None)
    @given(seed=st.integers(0, 1000), share=st.floats(0, 1))
    def test_a_further_scenario_takes_away_only(self, seed, share):
        scores = drawn(3, seed)
        fewer = patterns({name: scores[name] for name in ("s0", "s1")}, "i", share=share)
        more = patterns(scores, "i", share=share)
        for name, part in more.structures.items():
            assert not (part.consistent & ~fewer.structures[name].consistent).any()
            assert part.agreed <= part.lowest <= part.units
            assert part.task_specific <= part.units

    def test_moves_with_the_units_and_knows_no_unit_of_measure(self):
        scores, order = drawn(2), np.array([5, 0, 3, 1, 4, 2])
        changed = {
            s: {
                e: {"attention": v["attention"], "mlp": (v["mlp"] if e == "u" else 1e-9 * v["mlp"] ** 3)[:, order]}
                for e, v in by.items()
            }
            for s, by in scores.items()
        }
        before, after = (patterns(each, "i", "u", 0.4).structures["mlp"] for each in (scores, changed))
        assert before.agreed > 0
        np.testing.assert_array_equal(after.consistent, before.consistent[:, order])
        assert after.consistent.tolist() != before.consistent.tolist()
        assert after._replace(consistent=0, ranks=0, frequencies=0, usage=0) == before._replace(
            consistent=0, ranks=0, frequencies=0, usage=0
        )

    def test_independent_orders_come_near_chance(self):
        part = patterns(drawn(2, shape=(40, 500)), "i", share=0.3).structures["mlp"]
        assert part.chance == pytest.approx(0.09, abs=1e-3)
        assert part.share == pytest.approx(part.chance, abs=0.015)
        assert abs(part.share - 0.3) > 0.1  # of equal orders


class TestRefusals:
    def test_no_scenario(self):
        with pytest.raises(ValueError, match="at least one scenario, got none"):
            patterns({}, "i")

    @pytest.mark.parametrize(("importance", "usage"), [("j", None), ("i", "j")])
    def test_an_unknown_estimator(self, importance, usage):
        with pytest.raises(ValueError, match="expected scores of j in scenario s0, got those of: i, u"):
            patterns(drawn(2), importance, usage)

    def test_other_units(self):
        scores = drawn(2)
        scores["s1"]["i"]["attention"] = np.where(np.arange(8).reshape(4, 2) == 5, NAN, scores["s1"]["i"]["attention"])
        with pytest.raises(ValueError, match="expected i in scenario s1 to score the units that i scores in s0"):
            patterns(scores, "i")
        del scores["s1"]["i"]["attention"]
        with pytest.raises(ValueError, match="expected i in scenario s1 to score the units"):
            patterns(scores, "i")

    @pytest.mark.parametrize("value", [-0.01, 1.01])
    def test_a_usage_that_is_no_frequency(self, value):
        scores = drawn(2)
        scores["s1"]["u"]["attention"][2, 1] = value
        with pytest.raises(ValueError, match=f"of u in scenario s1, attention, got .*{value}"):
            patterns(scores, "i", "u")

    def test_rounding_is_no_reason(self):
        scores = drawn(2)
        scores["s1"]["u"]["attention"][2] = (-1e-7, 1 + 1e-7)
        patterns(scores, "i", "u")


class TestTables:
    def test_cells(self):
        table = pattern_table(example(), "mlp")
        assert table.header == ["scenario", "mean usage %", "usage ~ importance", "importance ~ other scenarios"]
        assert cells(table) == [["web", "44.0", "1.00", "0.50"], ["code", "60.0", "−1.00", "0.50"]]
        assert pattern_table(example(usage=None), "mlp").header == ["scenario", "importance ~ other scenarios"]
        alone = pattern_table(example("web"), "mlp")
        assert alone.header == ["scenario", "mean usage %", "usage ~ importance"]
        assert cells(alone) == [["web", "44.0", "1.00"]]

    def test_notes(self):
        assert pattern_notes(example(), "mlp") == [
            "1 of 5 mlp units (20.0 %) are among the lowest 40 % by i in all 2 scenarios; independent orders would "
            "give 16.0 %, equal ones 40.0 %.",
            "1 unit is among the lowest in one scenario and in the upper half of another.",
        ]
        assert pattern_notes(example("web"), "mlp") == [
            "2 of 5 mlp units (40.0 %) are the lowest 40 % by i: with one scenario, consistently unimportant is no "
            "more than that."
        ]

    def test_a_small_chance_is_not_said_to_be_none(self):
        (said, _) = pattern_notes(patterns(drawn(6, shape=(10, 100)), "i"), "attention")
        assert "independent orders would give 0.006 %, equal ones 20.0 %" in said
        (said, _) = pattern_notes(patterns(drawn(6, shape=(10, 100)), "i", share=0.0), "attention")
        assert "independent orders would give 0.0 %, equal ones 0.0 %" in said

    def test_fits_a_terminal_and_takes_names_as_they_are(self):
        scores = {("[red]s & <b> of a long, long name " * 3)[:70] + str(n): s for n, s in enumerate(drawn(2).values())}
        text = printed(pattern_table(patterns(scores, "i", "u"), "mlp"))
        assert max(map(len, text.splitlines())) <= 100
        assert text.count("[red]s & <b>") >= 2

    def test_csv(self):
        header, *lines = csv.reader(io.StringIO(data_text(pattern_data(example(), only_consistent=False))))
        assert header == ["structure", "layer", "unit", "rank web", "rank code", "usage web", "usage code",
                          "consistently_unimportant"]  # fmt: skip
        assert lines == [
            ["mlp", "0", "0", "0.1", "0.1", "0", "1", "1"],
            ["mlp", "0", "1", "0.9", "0.7", "1", "0.4", "0"],
            ["mlp", "0", "2", "0.5", "0.9", "0.4", "0.2", "0"],
            ["mlp", "1", "0", "0.7", "0.3", "0.6", "0.8", "0"],
            ["mlp", "1", "1", "0.3", "0.5", "0.2", "0.6", "0"],
        ]
        assert data_text(pattern_data(example())).splitlines()[1:] == ["mlp,0,0,0.1,0.1,0,1,1"]
        assert data_text(pattern_data(example(usage=None))).splitlines()[1] == "mlp,0,0,0.1,0.1,1"

    def test_csv_quotes_names(self):
        scores = {'a,"b"': drawn(1)["s0"], "c": drawn(1)["s0"]}
        (header, *_) = csv.reader(io.StringIO(data_text(pattern_data(patterns(scores, "i")))))
        assert header[3:5] == ['rank a,"b"', "rank c"]


def images(found: Patterns, structure: str, shape: tuple[int, int]) -> list[np.ndarray]:
    """Return the colours of the heat maps of a figure, in order; colour bars have another shape."""
    drawn = [image for axis in painted(plot(found, structure)).axes for image in axis.get_images()]
    shown = [image.to_rgba(image.get_array(), bytes=True) for image in drawn if image.get_array().shape == shape]
    return [np.asarray(image) for image in shown]


class TestFigure:
    def test_heat_maps_show_the_numbers(self):
        found = example()
        ordered = found._replace(structures={"attention": found.structures["mlp"]})  # units in their order
        shown = images(ordered, "attention", (2, 3))
        assert len(shown) == 5  # importance, usage of both, and what they agree on
        part = found.structures["mlp"]
        for image, values, scale in [
            (shown[0], part.ranks["web"], colormaps["viridis"].resampled(64)),
            (shown[1], part.ranks["code"], colormaps["viridis"].resampled(64)),
            (shown[3], part.frequencies["web"], colormaps["cividis"].resampled(64)),
            (shown[4], part.frequencies["code"], colormaps["cividis"].resampled(64)),
        ]:
            wanted = np.where(np.isnan(values)[..., None], 0, scale(np.nan_to_num(values), bytes=True))
            np.testing.assert_array_equal(image, wanted)
        agreed = shown[2]
        assert (agreed[0, 0] == (0xC4, 0x4A, 0x00, 255)).all()
        (rest,) = {tuple(colour) for colour in agreed[part.ranks["web"] > 0.1].tolist()}
        assert 0 < rest[3] < 64  # so faint that it suits a light and a dark page
        assert not agreed[1, 2].any()  # no unit, no colour

    def test_channels_are_sorted_by_mean_rank_within_their_layer(self):
        web, code, agreed = images(example(usage=None), "mlp", (2, 3))
        scale = colormaps["viridis"].resampled(64)
        np.testing.assert_array_equal(web[0], scale([0.1, 0.5, 0.9], bytes=True))  # mean ranks 0.1, 0.7, 0.8
        np.testing.assert_array_equal(code[0], scale([0.1, 0.9, 0.7], bytes=True))
        np.testing.assert_array_equal(web[1, :2], scale([0.3, 0.7], bytes=True))  # mean ranks 0.4, 0.5
        assert not web[1, 2].any()
        assert agreed[0, 0].tolist() == [0xC4, 0x4A, 0x00, 255]

    def test_many_units_are_averaged(self):
        values = np.stack([np.arange(400.0), np.where(np.arange(400) < 399, 7.0, NAN), np.full(400, NAN)])
        cells = _cells(values)
        assert cells.shape == (3, 200)
        np.testing.assert_array_equal(cells[0], np.arange(200) * 2 + 0.5)
        np.testing.assert_array_equal(cells[1], 7.0)
        assert np.isnan(cells[2]).all()
        np.testing.assert_array_equal(_cells(values[:, :200]), values[:, :200])
        assert _cells(np.ones((1, 201))).tolist() == [[1.0] * 200]

    @pytest.mark.slow
    @pytest.mark.parametrize(("many", "usage", "panels"), [(1, "u", 3), (5, None, 6)], ids=str)
    def test_a_panel_a_scenario(self, many, usage, panels):
        found = patterns(drawn(many), "i", usage)
        assert len(images(found, "mlp", (4, 6))) == panels
        figure = painted(plot(found))
        shown = words(figure)
        for number in range(many):
            assert shown.count(f"s{number}") == (2 if usage else 1)
        assert ("the lowest 20 %" in shown, "unimportant in all" in shown) == (many == 1, many > 1)
        assert ("usage by layer" in shown) == (usage is not None)
        panes = [axis for axis in figure.axes if axis.get_visible() and axis.get_title(loc="left")]
        lefts = {round(axis.get_position().x0, 3) for axis in panes}
        assert len(lefts) == (3 if many == 1 else 4)  # five scenarios: three, two below, and what they agree on

    def test_one_layer_of_one_unit_has_one_tick_a_side(self):
        scores = {"web": {"i": {"attention": np.ones((1, 1))}}}
        svg = ElementTree.fromstring(on_screen(plot(patterns(scores, "i"), "attention")))
        shown = ["".join(text.itertext()) for text in svg.iter(f"{SVG}text")]
        ticks = [text for text in shown if re.fullmatch(r"[−\d.]+", text)]
        assert sorted(ticks) == sorted(["0"] * 3 + ["0", "20", "40", "60", "80", "100"] * 2)

    def test_has_a_text_alternative(self):
        svg = ElementTree.fromstring(DRAWN())
        assert (svg.attrib["role"], svg.attrib["aria-label"]) == ("img", "Patterns by scenario: mlp")
        said = svg.findtext(f"{SVG}desc") or ""
        assert said.startswith("Percentile rank of importance by i and frequency by used of each unit by layer")
        assert said.endswith(" ".join(pattern_notes(example(), "mlp")))

    def test_equal_input_gives_equal_bytes_whatever_the_settings(self):
        with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "image.cmap": "gray"}):
            assert on_screen(plot(example())) == DRAWN()
        assert on_screen(plot(example("web"))) != DRAWN()

    def test_identifiers_are_unique_and_references_resolve(self):
        each = [DRAWN(), on_screen(plot(patterns(drawn(2), "i"), "attention"))]
        page = ElementTree.fromstring(f"<div>{''.join(each)}</div>")
        ids = [element.attrib["id"] for element in page.iter() if "id" in element.attrib]
        used = set(re.findall(r'(?:url\(|href=")#([^")]+)', "".join(each)))
        assert len(ids) == len(set(ids)) > 0
        assert used == set(ids)

    def test_names_stay_text(self):
        odd = ['<b>&"x"</b> $a_1$', "-->]]></svg>", "日本語", "url(#x) #010203"]
        scores = {name: {odd[0]: by["i"]} for name, by in zip(odd, drawn(4).values(), strict=True)}
        svg = ElementTree.fromstring(on_screen(plot(patterns(scores, odd[0]))))
        assert {*odd, f"by {odd[0]}"} <= {"".join(text.itertext()) for text in svg.iter(f"{SVG}text")}
        assert svg.find(f".//{SVG}b") is None
