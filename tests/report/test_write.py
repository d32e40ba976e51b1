"""`saap report`: what it writes where, several runs side by side, and one line for what it cannot read."""

import csv
import io

import pytest

from saap_jax.cli import main
from saap_jax.report.blocks import Figure, Table
from saap_jax.report.pages.several import joint_curves, overview_sections
from saap_jax.report.write import read_view, read_views, render_report, write_report, write_reports
from saap_jax.runs.directory import RunDirectory
from tests import fake_runs as fake
from tests.report.shown import cells, leaves


@pytest.fixture
def three(tmp_path):
    """Two runs of one text, and one of other text of that name."""
    fewer = [line for line in fake.candidates() if line["variant"] != "gate_fisher"]
    inputs = {f"evaluation text of {name!r}": "0123456789" for name in fake.METRICS}
    return [
        fake.kept_run(tmp_path / "a" / "x").path,
        fake.kept_run(tmp_path / "b" / "x", fewer).path,
        fake.kept_run(tmp_path / "other", inputs=inputs).path,
    ]


class TestOneRun:
    def test_page_markdown_and_csv_lie_side_by_side(self, run, capsys):
        written = write_reports([run.path])
        assert [path.name for path in written] == ["report.html", "report.md", "report.csv"]
        header, *lines = csv.reader(io.StringIO(written[2].read_text()))
        assert header[:3] == ["run", "kind", "model"]
        assert len(lines) == 1 + len(fake.candidates())
        assert written[0].read_text() == render_report(run.path)
        assert main.main(["report", str(run.path)]) == 0, "an earlier report is replaced"
        assert "report.md" in capsys.readouterr().out

    def test_a_command_writes_the_page_before_the_record_says_finished(self, run):
        run.update(status="running")
        assert "compare of invented-135M, finished" in write_report(run.path, status="finished").read_text()
        assert "compare of invented-135M, running" in render_report(run.path)

    @pytest.mark.slow
    def test_what_is_not_ours_stays(self, run, tmp_path, capsys):
        for name in ("page.html", "page.md", "page.csv"):
            (tmp_path / name).write_text("mine")
            assert main.main(["report", str(run.path), "--out", str(tmp_path / "page.html")]) == 2
            assert f"{name} is no report of saap" in capsys.readouterr().err
            assert (tmp_path / name).read_text() == "mine"
            (tmp_path / name).unlink()
        with pytest.raises(ValueError, match=r"expected a file that ends in \.html"):
            write_reports([run.path], tmp_path / "page.pdf")
        before = sorted(run.path.iterdir())
        with pytest.raises(ValueError, match=r"run.json: expected a directory, found a file; name another place"):
            write_reports([run.path], figures=run.path / "run.json")
        assert sorted(run.path.iterdir()) == before, "nothing is half written"
        with pytest.raises(ValueError, match="expected at least one run directory"):
            write_reports([])

    @pytest.mark.slow
    def test_figures_for_papers(self, run, tmp_path):
        lines = [line for line in fake.candidates() if line["ratio_asked"] == 0.2][:2]
        small = fake.kept_run(tmp_path / "small", lines)
        written = write_reports([small.path], figures=tmp_path / "figures")[3:]
        stems = {"small-ratio", "small-ratio-2", "small-kept-20"}
        assert {path.name for path in written} == {f"{stem}.{end}" for stem in stems for end in ("svg", "png", "pdf")}
        assert all(path.stat().st_size > 1000 for path in written)
        (tmp_path / "figures" / "small-ratio.svg").write_text("mine")
        with pytest.raises(ValueError, match="is no report of saap"):
            write_reports([small.path], figures=tmp_path / "figures")


class TestSeveralRuns:
    def test_names_rows_and_joint_curves(self, three):
        views = read_views(three)
        assert [view.name for view in views] == ["a/x", "b/x", views[2].name]
        overview = {section.title: section for section in overview_sections(views)}
        best, runs = [block for block in overview["Overview"].blocks if isinstance(block, Table)]
        assert [row[0] for row in cells(best)] == ["a/x", "a/x", "b/x", "b/x", *[views[2].name] * 2]
        assert len(cells(runs)) == 3
        assert [row[-1] for row in cells(best)] == ["0"] * 6, "all others were told apart from the lowest"
        drawn = joint_curves(views)
        assert len(drawn) == 2, "in and out of domain"
        for text, curves in drawn.items():
            assert "24 windows" in text
            assert [curve.name for curve in curves] == ["a/x", "b/x"], "the third has another text"
        assert len([b for b in leaves(overview["Best perplexity against ratio"].blocks) if isinstance(b, Figure)]) == 2

    def test_how_many_are_tied_with_the_best(self, tmp_path):
        near = [fake.candidate(name, 0.2, (ppl, ppl)) for name, ppl in (("a", 50.0), ("b", 50.001), ("c", 90.0))]
        near.append(near[0] | {"candidate": "d@0.2", "variant": "d"})
        few = [{**line, "losses": {name: each[:7] for name, each in line["losses"].items()}} for line in near]
        paths = [fake.kept_run(tmp_path / "near", near).path, fake.kept_run(tmp_path / "few", few, dense={}).path]
        (section, *_) = overview_sections(read_views(paths))
        best = next(block for block in section.blocks if isinstance(block, Table))
        assert [[row[0], row[-1]] for row in cells(best)] == [["near", "2"], ["few", "-"]]
        assert [row[-3:-1] for row in cells(best)] == [["34.70", "1.44"], ["n/a", "-"]], "one is not on record"

    @pytest.mark.slow
    def test_a_page_of_few_is_open_and_of_many_closed_and_small(self, three, tmp_path):
        few = write_reports(three, tmp_path / "few.html")[0].read_text()
        assert few.count('<details class="run"') == few.count("open>") == 3
        assert 'href="#run-1"' in few
        assert 'id="run-1"' in few
        many = write_reports([*three, three[0]], tmp_path / "many.html")
        page = many[0].read_text()
        assert page.count("open>") == 0
        assert page.count("<figure") == 2, "those of all runs together"
        rows = sum(len(view.rows) for view in read_views([*three, three[0]]))
        assert len(many[2].read_text().splitlines()) == 1 + rows
        assert "x (2)" in page

    def test_where_configurations_differ(self, tmp_path):
        paths = []
        for number in (0, 1):
            run = RunDirectory.open(tmp_path / f"r{number}", {"search": {"seed": number}, "limit": 3})
            run.update(**fake.fields())
            paths.append(run.path)
        (section,) = [each for each in overview_sections(read_views(paths)) if "differ" in each.title]
        assert cells(section.blocks[1]) == [["r0", "0"], ["r1", "1"]]
        assert section.blocks[1].header == ["run", "search.seed"]


@pytest.mark.parametrize("kind", ["fidelity", "frontier", "recover", "score", "sensitivity", "other"])
def test_a_run_of_any_kind_that_has_only_begun_has_a_page(kind, tmp_path):
    run = RunDirectory.open(tmp_path / kind, {})
    run.update(kind=kind, status="running")
    view = read_view(run.path)
    assert [section.title for section in view.sections] == ["Summary", "To reproduce"]
    assert f"{kind}, running" in render_report(run.path)
