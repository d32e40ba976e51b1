"""`saap report`: what is written where, what is never replaced, several runs side by side, and how large it is."""

import csv
import io
import json
import math
import re

import pytest

from saap_jax.cli import main
from saap_jax.report.kinds.overview import (
    CSV_HEADER,
    best_rows,
    differences,
    joint_curves,
    overview_sections,
    run_table,
)
from saap_jax.report.kinds.views import read_view
from saap_jax.report.page.blocks import Detail
from saap_jax.report.page.blocks import Page as Page_
from saap_jax.report.page.html import render_page
from saap_jax.report.write import is_ours, read_views, report_page, write_reports
from saap_jax.runs.directory import RunDirectory, read_run
from tests.fake_runs import fake_run
from tests.report.sweeps import write_run
from tests.report.test_html import Page

METRICS = ("ppl@128 builtin:reference", "ppl@128 builtin:descriptions")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list:
    """Three comparisons of 12 candidates each, the third of another name of text, and a fidelity run."""
    directory = tmp_path_factory.mktemp("runs")
    paths = [write_run(directory / name, seed, 12) for seed, name in enumerate(("one", "two", "three"))]
    run = RunDirectory.open(directory / "judged", {"channels_per_layer": 4})
    run.update(kind="fidelity", status="finished")
    return [*paths, run.path]


@pytest.fixture(scope="module")
def text(runs, tmp_path_factory) -> str:
    page, *_ = write_reports(runs, tmp_path_factory.mktemp("out") / "all.html")
    return page.read_text()


class TestFiles:
    def test_of_one_run_lie_in_its_directory(self, tmp_path):
        run = fake_run(tmp_path / "run")
        assert write_reports([run]) == [run / "report.html", run / "report.md", run / "report.csv"]
        assert write_reports([run])[0].exists(), "our own are replaced"

    def test_of_several_lie_in_the_working_directory(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        paths = [fake_run(tmp_path / "a"), fake_run(tmp_path / "b")]
        write_reports(paths)
        assert {path.name for path in tmp_path.glob("report.*")} == {"report.html", "report.md", "report.csv"}
        assert not (tmp_path / "a" / "report.html").exists()

    def test_lie_where_they_are_asked_for(self, tmp_path):
        written = write_reports([fake_run(tmp_path / "a")], tmp_path / "new" / "x.html")
        assert [path.name for path in written] == ["x.html", "x.md", "x.csv"]
        assert all(path.parent == tmp_path / "new" for path in written)

    def test_of_runs_without_a_comparison_have_no_csv(self, runs, tmp_path):
        assert [path.suffix for path in write_reports(runs[3:], tmp_path / "x.html")] == [".html", ".md"]

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["x.html", "x.md", "x.csv"])
    def test_that_are_not_ours_are_never_replaced(self, tmp_path, name):
        run = fake_run(tmp_path / "a")
        (tmp_path / name).write_text("<html>my own, about saap_jax</html>")
        with pytest.raises(ValueError, match=rf"{name} is no report of saap; pass --overwrite"):
            write_reports([run], tmp_path / "x.html")
        assert len(list(tmp_path.glob("x.*"))) == 1, "nothing is written at all"
        write_reports([run], tmp_path / "x.html", overwrite=True)
        assert is_ours(tmp_path / name)

    def test_of_an_older_version_are_ours(self, tmp_path):
        (tmp_path / "old.html").write_text("<!DOCTYPE html><title>quickstart - saap_jax</title>")
        assert is_ours(tmp_path / "old.html")
        assert is_ours(tmp_path / "nothing")
        assert not is_ours(tmp_path)

    def test_go_when_a_run_starts_anew(self, tmp_path):
        run = fake_run(tmp_path / "a")
        write_reports([run])
        RunDirectory.open(run, read_run(run)["config"], overwrite=True).begin()
        assert list(run.glob("report.*")) == []

    def test_no_run_and_no_page(self, tmp_path):
        with pytest.raises(ValueError, match="expected at least one run directory, got none"):
            write_reports([])
        with pytest.raises(FileNotFoundError, match=r"no run\.json in"):
            write_reports([tmp_path])
        with pytest.raises(ValueError, match=r"--out: expected a file that ends in \.html, got .*x\.pdf"):
            write_reports([fake_run(tmp_path / "a")], tmp_path / "x.pdf")


class TestSeveralRuns:
    def test_every_run_is_shown_under_a_name_of_its_own(self, tmp_path):
        paths = [fake_run(tmp_path / folder / "run") for folder in ("a", "b")]
        assert [view.name for view in read_views(paths)] == ["a/run", "b/run"]

    def test_identifiers_are_unique_and_references_resolve(self, text):
        page = Page(text)
        ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
        assert len(ids) == len(set(ids))
        assert {attrs["aria-labelledby"] for _, attrs in page.tags if "aria-labelledby" in attrs} <= set(ids)
        assert set(re.findall(r'(?:url\(|href=")#([^")]+)', text)) <= set(ids)

    @pytest.mark.slow
    def test_the_overview_has_the_best_of_each_run_and_ratio(self, runs, text):
        views = read_views(runs)
        for view in views[:3]:
            for row in best_rows(view):
                assert re.search(rf'#{view.id}">{view.name}</a></th><td>{re.escape(row.label)}</td>', text)
        assert [[cell.text for cell in line.cells][:2] for line in run_table(views).lines] == [
            ["one", "compare"], ["two", "compare"], ["three", "compare"], ["judged", "fidelity"],
        ]  # fmt: skip

    @pytest.mark.slow
    def test_the_joint_frontier_has_a_curve_a_run_of_a_shared_text(self, runs, tmp_path):
        views = read_views(runs)
        found = joint_curves(views)
        assert list(found) == [f"{metric}, 64 windows" for metric in METRICS]
        for lines, domain in zip(found.values(), ("in", "out"), strict=True):
            assert [curve.name for curve in lines] == ["one", "two", "three"]
            wanted = sorted((row.actual, getattr(row, f"ppl_{domain}")) for row in best_rows(views[0]))
            assert lines[0].points[1:] == wanted
        assert joint_curves(read_views([runs[0], fake_run(tmp_path / "other")])) == {}

    @pytest.mark.slow
    def test_says_where_the_configurations_differ(self, runs):
        _, table = differences(read_views(runs[:3]))
        assert list(table.header) == ["run", "calibration.examples", "calibration.seed", "search.multiple_of.mlp"]  # pyright: ignore[reportAttributeAccessIssue]
        assert differences(read_views([runs[0], runs[0]])) == []

    @pytest.mark.slow
    @pytest.mark.parametrize("what", ["windows", "digest"])
    def test_runs_of_other_windows_or_text_are_not_connected(self, tmp_path, what):
        """The name of the text is the same; in the second pair the text behind it is not."""
        paths = [write_run(tmp_path / name, 0, 4) for name in ("a", "b", "c", "d")]
        for path in paths:
            record, other = json.loads((path / "run.json").read_text()), path in paths[2:]
            record["config"]["evaluation"] = {"windows": 5 if other and what == "windows" else 64}
            if other and what == "windows":
                losses = {name: each[:5] for name, each in record["dense"]["losses"].items()}
                record["dense"] |= {
                    "losses": losses,
                    "ppl": {name: math.exp(sum(each) / 5) for name, each in losses.items()},
                }
            if other and what == "digest":
                record["inputs"] = {f"evaluation text of {name!r}": "f00d" * 16 for name in METRICS}
            (path / "run.json").write_text(json.dumps(record))
        views = read_views(paths)
        found = joint_curves(views)
        assert [[curve.name for curve in lines] for lines in found.values()] == [["a", "b"]] * 2 + [["c", "d"]] * 2
        text = render_page(report_page(views, folded=True))
        assert "a text of each run" in text
        assert not any(len(lines) > 2 for lines in found.values())
        _, table = differences(views)
        assert table.header[1] == "evaluated out of domain"
        assert ("evaluation.windows" in table.header) == (what == "windows")
        assert joint_curves(views[:2]).keys() == found.keys() - joint_curves(views[2:]).keys()
        assert "evaluated" not in str(differences(views[:2])), "negative control: they are alike"

    def test_fields_of_the_evaluation_come_first(self, tmp_path):
        paths = [fake_run(tmp_path / name) for name in ("a", "b")]
        for number, path in enumerate(paths):
            record = json.loads((path / "run.json").read_text())
            fields = {f"field{place}": number for place in range(20)}
            record["config"] = fields | record["config"] | {"evaluation": {"windows": 8, "batch_size": 2 + number}}
            (path / "run.json").write_text(json.dumps(record))
        _, table = differences(read_views(paths))
        assert table.header[1:3] == ["evaluation.batch_size", "field0"]

    def test_a_single_run_has_no_overview(self, runs):
        assert overview_sections(read_views(runs[:1])) == []

    @pytest.mark.slow
    def test_many_runs_are_closed_and_few_are_open(self, runs, text, tmp_path):
        assert text.count('<details class="run"') == 4
        assert not re.search(r'<details class="run" id="[^"]*" open', text)
        page, *_ = write_reports(runs[:3], tmp_path / "x.html")
        assert len(re.findall(r'<details class="run" id="[^"]*" open', page.read_text())) == 3

    def test_names_are_escaped(self, tmp_path):
        odd = fake_run(tmp_path / "<img src=x>", model="<script>alert(1)</script>")
        page, *_ = write_reports([odd, fake_run(tmp_path / "b")], tmp_path / "x.html")
        assert "<script>alert" not in page.read_text()
        assert "<img" not in page.read_text()


class TestCsv:
    @pytest.mark.slow
    def test_has_every_variant_ratio_and_text_of_every_run(self, runs, tmp_path):
        *_, path = write_reports(runs[:2], tmp_path / "x.html")
        lines = list(csv.DictReader(io.StringIO(path.read_text())))
        assert tuple(lines[0]) == CSV_HEADER
        assert len(lines) == 2 * 2 * (12 + 1)
        for view in read_views(runs[:2]):
            assert view.compared is not None
            against = {(one.label, one.asked, one.metric): one for one in view.compared.against}
            for line in lines:
                if line["run"] == view.name and line["variant"] != "dense" and line["best"] == "0":
                    one = against[line["variant"], float(line["ratio_asked"]), line["metric"]]
                    assert float(line["percent_from_best"]) == one.difference.percent[0]
                    assert float(line["p_adjusted"]) == one.p_value
                    assert line["tied"] == str(int(one.tied))
        dense = next(line for line in lines if line["variant"] == "dense")
        assert (dense["percent_from_best"], dense["spread"]) == ("", "")


@pytest.mark.slow
def test_markdown_has_all_words_and_tables(runs, tmp_path):
    page, path, _ = write_reports(runs, tmp_path / "x.html")
    text = path.read_text()
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    assert headings[:3] == ["4 runs side by side", "Overview", "Best perplexity against ratio"]
    assert {"one", "judged", "Comparison", "To reproduce"} <= set(headings)
    tables = [block.splitlines() for block in re.findall(r"(?:^\|.*\n)+", text, re.M)]
    assert len(tables) == page.read_text().count('<table class="w')
    for table in tables:
        assert len({line.replace("\\|", "").count("|") for line in table}) == 1
    assert "<svg" not in text


class TestSize:
    @pytest.mark.slow
    def test_a_run_of_two_hundred_candidates_takes_a_twentieth_of_three_megabytes(self, tmp_path):
        """The page of twenty runs is that of one, in the detail of many, twenty times over, but one style."""
        run = write_run(tmp_path / "sweep", 0, 200)
        brief, full = (
            len(render_page(Page_("x", [], [read_view(run, detail, id="run")], folded=True)).encode())
            for detail in (Detail(6, drawn=False, downloads=False), Detail())
        )
        frame = len(render_page(Page_("x", [], [], folded=True)).encode())
        assert brief - frame < 3_000_000 / 20 < full - frame

    @pytest.mark.slow
    def test_twelve_runs_of_two_hundred_candidates_weigh_less_than_their_share_of_three_megabytes(self, tmp_path):
        """That share is of twenty runs; more than ten are shown alike, however many."""
        paths = [write_run(tmp_path / f"sweep-{number}", number, 200) for number in range(12)]
        page, *_ = write_reports(paths, tmp_path / "x.html")
        text = page.read_text()
        assert page.stat().st_size < 3_000_000 * 12 / 20
        assert text.count("<tr") > 12 * 200
        for path in paths[:2]:  # the losses of windows stay where they are
            losses = re.search(r'"losses": \{"[^"]*": \[([\d.]+)', (path / "metrics.jsonl").read_text())
            assert losses is not None
            assert losses[1] not in text
        assert "data:text/csv" not in text

    @pytest.mark.slow
    def test_a_single_run_shows_more(self, runs, tmp_path):
        page, *_ = write_reports(runs[:1], tmp_path / "x.html")
        assert "data:text/csv" in page.read_text()


class TestCommand:
    def test_writes_and_says_where(self, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        fake_run(tmp_path / "run")
        assert main.main(["report", "run", "--out", "x.html"]) == 0
        assert "report: x.html   x.md   x.csv" in capsys.readouterr().out
        assert (tmp_path / "x.html").exists()

    def test_bad_input_is_one_line(self, tmp_path, capsys):
        for words in (["report"], ["report", str(tmp_path)], ["report", str(tmp_path / "none")]):
            assert main.main(words) == 2
            assert capsys.readouterr().err.count("\n") == 1
