"""How fused scores came about: table, CSV and figure are true to the records, and both pages show them."""

import ast
import base64
import csv
import functools
import io
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex
from saap_jax.selection.fusion import fuse

import saap_jax
from saap_jax.report import render_report
from saap_jax.report.figures.draw import on_screen, painted
from saap_jax.report.figures.fusion import fusion_plot
from saap_jax.report.kinds.fusion import FusionRow, fusion_data, fusion_rows, fusion_section, fusion_table
from saap_jax.report.page.blocks import Detail, Picture, Words, leaves
from saap_jax.report.page.csv_text import data_text
from saap_jax.runs.directory import RunDirectory, plain
from tests.report import conftest as fake
from tests.report.shown import cells, printed, words
from tests.report.shown import cells as cells_of
from tests.report.test_html import Page

SVG = "{http://www.w3.org/2000/svg}"
BLUE, ORANGE = "#0072b2", "#d55e00"


def record(sigmas: dict[str, dict[str, float]], trajectory: dict[str, list] | None = None) -> dict:
    """Return the record of a fusion with these σ."""
    weights = {m: {s: 1 / (2 * sigma**2) for s, sigma in of.items()} for m, of in sigmas.items()}
    return {"scores": None, "sigmas": sigmas, "weights": weights, "trajectory": trajectory, "loss": 0.0}


STRUCTURES = {"a": {"attention": 0.5, "mlp": 0.05}, "b": {"attention": 5.0, "mlp": 50.0}}
LAYERS = {
    "a": {"attention/0": 1.0, "attention/2": 2.0, "mlp/0": 0.1},
    "b": {"attention/0": 4.0, "attention/2": 8.0, "mlp/0": 10.0},
}
STEPS = {"a": [[8.0, 0.8], [2.0, 0.2], [0.5, 0.05]], "b": [[20.0, 800.0], [10.0, 200.0], [5.0, 50.0]]}
FUSIONS = {"web": {"a+b": record(STRUCTURES)}, "code": {"a+b": record(LAYERS)}}


def plot(fusions: dict):
    """Return the figure of a run's fusions."""
    (section,) = fusion_section({"fusions": fusions}, Detail())
    return next(block.plot for block in leaves(section.blocks) if isinstance(block, Picture))


def figure_of(one: dict):
    return painted(fusion_plot({"web": {"f": one}}, ""))


DRAWN = functools.cache(lambda: on_screen(plot(FUSIONS)))
PLAIN = functools.cache(lambda: figure_of(record(STRUCTURES)))


def curves(figure) -> list[tuple[str, bool, list[tuple[float, float]]]]:
    """Return (colour, dashed, points) of every line."""
    return [
        (to_hex(line.get_color()), line.is_dashed(), list(zip(line.get_xdata(), line.get_ydata(), strict=True)))
        for axis in figure.axes
        for line in axis.get_lines()
        if line.get_linestyle() != "None" and not np.isnan(line.get_ydata()).any()  # lines across are one line
    ]


def bars(figure) -> list[tuple[str, float, float]]:
    """Return (colour, left edge, value) of every bar, from the left."""
    found = [(to_hex(bar.get_facecolor()), bar.get_x(), bar.get_y() + bar.get_height())
             for axis in figure.axes for bar in axis.patches]  # fmt: skip
    return sorted(found, key=lambda bar: bar[1])


class TestTables:
    def test_rows_are_in_the_order_of_the_records(self):
        rows = fusion_rows(FUSIONS)
        assert rows[0] == FusionRow("web", "a+b", "a", "attention", 0.5, 2.0)
        assert rows[3] == FusionRow("web", "a+b", "b", "mlp", 50.0, 0.0002)
        assert [row.scope for row in rows[4:7]] == list(LAYERS["a"])
        assert len(rows) == 4 + 6

    def test_layers_of_a_structure_are_one_line(self):
        table = fusion_table(FUSIONS)
        assert table.header == ["scenario", "fused", "member", "scope", "σ", "weight"]
        assert cells(table) == [
            ["web", "a+b", "a", "attention", "0.5", "2"],
            ["web", "a+b", "a", "mlp", "0.05", "200"],
            ["web", "a+b", "b", "attention", "5", "0.02"],
            ["web", "a+b", "b", "mlp", "50", "0.0002"],
            ["code", "a+b", "a", "attention, 2 layers", "1 to 2", "0.125 to 0.5"],
            ["code", "a+b", "a", "mlp, 1 layer", "0.1", "50"],
            ["code", "a+b", "b", "attention, 2 layers", "4 to 8", "0.007812 to 0.03125"],
            ["code", "a+b", "b", "mlp, 1 layer", "10", "0.005"],
        ]

    def test_equal_neighbours_of_other_fusions_stay_apart(self):
        one = record({"a": {"global": 1.0}, "b": {"global": 1.0}})
        lines = cells(fusion_table({"web": {"f": one, "g": one}, "code": {"f": one}}))
        assert len(lines) == 6
        assert [line[:3] for line in lines[:3]] == [["web", "f", "a"], ["web", "f", "b"], ["web", "g", "a"]]

    def test_csv_keeps_every_bit(self):
        third = {"web": {"f": record({'a,"x"': {"global": 1 / 3}, "b": {"global": 1e-30}})}}
        header, *lines = csv.reader(io.StringIO(data_text(fusion_data(third))))
        assert header == ["scenario", "fused", "member", "scope", "sigma", "weight"]
        assert lines[0][:4] == ["web", "f", 'a,"x"', "global"]
        assert [float(cell) for line in lines for cell in line[4:]] == [1 / 3, 4.5, 1e-30, 1 / (2 * 1e-30**2)]

    def test_fits_a_terminal_and_takes_names_as_they_are(self):
        long = "[red]" + "taylor_element(reduction='max')" * 2
        text = printed(fusion_table({"web": {f"{long}+b": record({long: {"mlp": 1.0}, "b": {"mlp": 2.0}})}}))
        assert max(map(len, text.splitlines())) <= 100
        assert "[red]" in text

    def test_nothing_fused(self):
        for nothing in ({}, {"web": {}}):
            assert fusion_rows(nothing) == cells(fusion_table(nothing)) == []
            assert data_text(fusion_data(nothing)).count("\n") == 1
            assert fusion_section({"fusions": nothing}, Detail()) == []
        assert fusion_section({}, Detail()) == []


class TestFigure:
    def test_bars_are_weights_on_a_logarithmic_axis(self):
        assert [(colour, value) for colour, _, value in bars(PLAIN())] == [
            (BLUE, pytest.approx(2.0)), (ORANGE, pytest.approx(0.02)),
            (BLUE, pytest.approx(200.0)), (ORANGE, pytest.approx(0.0002)),
        ]  # fmt: skip
        assert {axis.get_yscale() for axis in PLAIN().axes} == {"log"}
        assert {"2", "200", "0.02", "0.0002"} <= set(words(PLAIN()))

    def test_points_are_sigma_where_there_were_no_steps(self):
        marks = [
            (to_hex(line.get_color()), list(line.get_ydata()))
            for line in PLAIN().axes[0].get_lines()
            if line.get_marker() == "o"
        ]
        assert marks == [(BLUE, [0.5, 0.05]), (ORANGE, [5.0, 50.0])]
        assert curves(PLAIN()) == [], "points only"

    def test_lines_are_the_way_of_sigma(self):
        figure = figure_of(record(STRUCTURES, STEPS))
        wanted = [(BLUE, False, STEPS["a"], 0), (BLUE, True, STEPS["a"], 1), (ORANGE, False, STEPS["b"], 0),
                  (ORANGE, True, STEPS["b"], 1)]  # fmt: skip
        assert curves(figure) == [
            (colour, dashed, [(step, values[scope]) for step, values in enumerate(steps)])
            for colour, dashed, steps, scope in wanted
        ]
        assert "gradient step" in words(figure)
        assert "gradient step" not in words(PLAIN())

    def test_layers_are_drawn_over_layers(self):
        figure = figure_of(record(LAYERS))
        lines = curves(figure)
        assert len(lines) == 2 * 2 * 2  # σ and weight, of two members and structures
        assert lines[0] == (BLUE, False, [(0, 1.0), (2, 2.0)])
        assert lines[4] == (BLUE, False, [(0, 0.5), (2, 0.125)])
        assert "gradient step" not in words(figure)
        assert words(figure).count("layer") == 2
        assert bars(figure) == []

    def test_many_lines_are_thinned_and_keep_their_ends(self):
        steps = np.geomspace(64, 1, 104)[:, None] * np.ones(6)
        scopes = {f"mlp/{layer}": 1.0 for layer in range(6)}
        lines = curves(figure_of(record({"a": scopes}, {"a": steps.tolist()})))[:6]
        few = curves(figure_of(record({"a": {"mlp": 1.0}}, {"a": steps[:, :1].tolist()})))[0][2]
        assert len(few) == 104
        for _, _, points in lines:
            assert 20 < len(points) < 60
            assert [points[0], points[-1]] == [few[0], few[-1]]
            assert set(points) <= set(few)

    def test_every_fusion_has_a_row(self):
        svg = ElementTree.fromstring(DRAWN())
        shown = ["".join(text.itertext()) for text in svg.iter(f"{SVG}text")]
        assert [text for text in shown if text.endswith(": a+b")] == ["web: a+b", "code: a+b"]
        assert shown.count("weight, 1 / (2 σ²)") == 2
        assert svg.attrib["height"] == "636"

    def test_many_members_can_be_told_apart(self):
        figure = figure_of(record({f"member {n}": {"mlp": 10.0**n} for n in range(13)}))
        assert len({bar.get_facecolor() for bar in figure.axes[1].patches}) == 13
        assert {f"member {n}" for n in range(13)} <= set(words(figure))

    def test_labels_of_many_bars_stay_below_the_title(self):
        figure = figure_of(record({f"m{n}": {"attention": 1.7 * 10.0**-n, "mlp": 1.0} for n in range(8)}))
        right = figure.axes[1]
        turned = [text for text in right.texts if text.get_rotation() == 90]
        assert len(turned) == 16
        for label in turned:
            assert label.get_window_extent().y1 < right.get_window_extent().y1

    def test_a_single_layer_and_equal_values(self):
        svg = ElementTree.fromstring(
            on_screen(fusion_plot({"w": {"f": record({m: {"mlp/7": 3.0} for m in "ab"})}}, ""))
        )
        shown = ["".join(text.itertext()) for text in svg.iter(f"{SVG}text")]
        assert shown.count("7") == 2
        assert not any(text.startswith(("6.", "7.")) for text in shown)

    def test_has_a_text_alternative(self):
        svg = ElementTree.fromstring(DRAWN())
        assert (svg.attrib["role"], svg.attrib["aria-label"]) == ("img", "Fusion: σ and weights")
        said = svg.findtext(f"{SVG}desc") or ""
        assert "web, a+b: b mlp σ 50, weight 0.0002." in said
        assert "code, a+b: a attention, 2 layers σ 1 to 2, weight 0.125 to 0.5." in said

    def test_equal_records_give_equal_bytes_whatever_the_settings(self):
        with matplotlib.rc_context({"font.size": 30, "axes.grid": True}):
            assert on_screen(plot(FUSIONS)) == DRAWN()
        assert on_screen(plot({"web": FUSIONS["web"]})) != DRAWN()

    def test_identifiers_are_unique_and_references_resolve(self):
        drawn = DRAWN() + on_screen(plot({"web": FUSIONS["web"]}))
        page = ElementTree.fromstring(f"<div>{drawn}</div>")
        ids = [element.attrib["id"] for element in page.iter() if "id" in element.attrib]
        assert len(ids) == len(set(ids)) > 0
        assert set(re.findall(r'(?:url\(|href=")#([^")]+)', drawn)) == set(ids)

    def test_odd_names_stay_text(self):
        odd = '<b>&"$x$"</b>'
        svg = ElementTree.fromstring(on_screen(plot({odd: {"日本": record({odd: {"mlp": 1.0}, "b": {"mlp": 2.0}})}})))
        assert {odd, f"{odd}: 日本"} <= {"".join(text.itertext()) for text in svg.iter(f"{SVG}text")}
        assert svg.find(f".//{SVG}b") is None

    @pytest.mark.parametrize(
        ("method", "scope"),
        [("closed_form", "global"), ("learned", "structure"), ("sampling", "layer")],
    )
    def test_draws_what_a_run_keeps(self, method, scope, tmp_path):
        random = np.random.default_rng(0)
        shapes = {"attention": (3, 2), "mlp": (3, 5)}
        each = {
            m: {n: unit * random.uniform(1, 2, (4, *shape)) for n, shape in shapes.items()}
            for m, unit in (("a", 1e-6), ("b", 1e3))
        }
        each["a"]["mlp"][:, 1, 3:] = each["b"]["mlp"][:, 1, 3:] = np.nan
        fused = fuse({m: {n: v.mean(axis=0) for n, v in of.items()} for m, of in each.items()}, method, scope,
                     per_example=each)  # fmt: skip
        run = RunDirectory.open(tmp_path / "run", {})
        run.update(fusions={"web": {"a+b": fused._asdict() | {"scores": None}}})
        kept = json.loads((run.path / "run.json").read_text())["fusions"]
        assert kept == plain(run.record["fusions"])
        assert {row.sigma for row in fusion_rows(kept)} == {s for of in fused.sigmas.values() for s in of.values()}
        lines = curves(painted(plot(kept)))
        scopes = len(next(iter(fused.sigmas.values())))
        trajectories = 2 * scopes if method == "learned" else 0
        layered = 4 * (1 if method == "learned" else 2) if scope == "layer" else 0
        assert len(lines) == trajectories + layered


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    """The page of a comparison with two fusions."""
    run = RunDirectory.open(tmp_path_factory.mktemp("runs") / "fused", {})
    run.update(**fake.fields(), fusions=FUSIONS)
    return render_report(run.path)


class TestPageOfAComparison:
    def test_shows_figure_table_and_csv(self, text):
        page = Page(text)
        assert DRAWN() in text
        assert any("How fused scores came about" in said for _, said in page.texts)
        cells = [cell for tag, cell in page.texts if tag in ("td", "th")]
        for line in cells_of(fusion_table(FUSIONS)):
            place = cells.index(line[3])
            assert cells[place - 3 : place + 3] == line
            del cells[place - 3 : place + 3]
        link = next(attrs for attrs in page.of("a") if attrs.get("download") == "fusions.csv")
        assert base64.b64decode(link["href"].partition("base64,")[2]).decode() == data_text(fusion_data(FUSIONS))

    @pytest.mark.parametrize("fields", [{}, {"fusions": {}}, {"fusions": {"web": {}}}], ids=str)
    def test_shows_nothing_where_nothing_was_fused(self, run, fields):
        run.update(**fields)
        text = render_report(run.path)
        assert "fused" not in text
        assert "σ" not in text

    def test_identifiers_are_unique_and_references_resolve(self, text):
        page = Page(text)
        ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
        assert len(ids) == len(set(ids))
        assert {attrs["aria-labelledby"] for _, attrs in page.tags if "aria-labelledby" in attrs} <= set(ids)
        assert "fusion" in ids

    def test_needs_no_network_and_no_images(self, text):
        assert set(re.findall(r"https?://[^\"'\s<)]*", text)) == {"http://www.w3.org/2000/svg"}
        assert Page(text).of("image") == Page(text).of("img") == []  # its security policy allows none

    def test_says_the_formula(self, text):
        assert "fused score is Σ I / (2 σ²) over the estimators" in text
        for constant, formula in [(False, "Σ I / (2 σ²)"), (True, "Σ I / (2 σ²) + Σ log σ")]:
            run = {"config": {"fusion": {"scope_constant": constant}}, "fusions": {"web": FUSIONS["web"]}}
            (section,) = fusion_section(run, Detail())
            said = section.blocks[0]
            assert isinstance(said, Words)
            assert f"fused score is {formula} over" in said.text

    def test_is_left_out_where_there_are_many_runs(self):
        run = {"fusions": FUSIONS}
        full, brief = (fusion_section(run, Detail(drawn=drawn, downloads=drawn))[0] for drawn in (True, False))
        assert [block.kind for block in full.blocks] == ["words", "picture", "table", "data"]
        assert [block.kind for block in brief.blocks] == ["words", "table"]

    def test_escapes_names(self, tmp_path):
        odd = "<script>alert('x')</script>"
        run = RunDirectory.open(tmp_path / "odd", {})
        run.update(**fake.fields(), fusions={odd: {odd: record({odd: {"mlp": 1.0}, "b": {"mlp": 2.0}})}})
        text = render_report(run.path)
        assert "<script>alert" not in text
        assert len(Page(text).of("script")) == 1  # our own
        assert [cell for tag, cell in Page(text).texts if tag in ("td", "th")].count(odd) == 5  # as text in the table


def imported_on_loading(source: str) -> set[str]:
    """Return the libraries that a module imports outside its functions."""
    found: set[str] = set()
    todo: list[ast.AST] = [ast.parse(source)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            todo += ast.iter_child_nodes(node)
    return found


def test_plotting_is_imported_only_by_who_plots():
    for path in Path(saap_jax.__file__).parent.rglob("*.py"):
        assert "matplotlib" not in imported_on_loading(path.read_text()), path
    assert "matplotlib" in imported_on_loading("if True:\n    from matplotlib.lines import Line2D")
    assert "matplotlib" not in imported_on_loading("def plot():\n    import matplotlib")
