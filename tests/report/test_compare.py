"""The page of a comparison: its numbers are those of the rows, intervals and ties as evaluation computes them."""

import csv
import io
import math

import numpy as np
import pytest

from saap_jax.config.use import AbConfig
from saap_jax.evaluation.differences import differences_against, paired_difference
from saap_jax.jobs.ab import ab
from saap_jax.report.blocks import Figure, Table, Words
from saap_jax.report.figures import painted
from saap_jax.report.pages.compare import candidate_table, comparison_table, cut_tables, summary
from saap_jax.report.render import table_csv
from saap_jax.report.write import read_view, render_report
from saap_jax.runs.standing import comparison_rows, leading
from tests import fake_runs as fake
from tests.report.shown import blocks_of, cells, curves

OUT = fake.METRICS[1]


def rows_of(table: Table) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(table_csv(table))))


def two(first: float, second: float, **more) -> list[dict]:
    return [fake.candidate("a", 0.2, (first, first), **more), fake.candidate("b", 0.2, (second, second), **more)]


class TestRows:
    def test_csv_parsed_back_is_what_the_run_measured(self):
        lines = fake.candidates()
        found = {row["candidate"]: row for row in rows_of(comparison_table(fake.fields(), lines))}
        assert found.keys() == {"dense", *(line["candidate"] for line in lines)}
        for line in lines:
            row = found[line["candidate"]]
            for domain, name in zip(("in", "out"), fake.METRICS, strict=True):
                assert float(row[f"ppl_{domain}"] or "nan") == pytest.approx(line["ppl"][name], nan_ok=True, rel=1e-15)
            assert float(row["ratio_actual"]) == line["ratio_actual"]
            assert float(row["parameters"]) == line["parameters"]
        best = {row["ratio_asked"]: name for name, row in found.items() if row["best"] == "1"}
        assert best == {"0.2": "wanda > uniform > bias@0.2", "0.5": "wanda > uniform > bias@0.5"}

    def test_intervals_are_those_of_the_differences_and_decide_who_is_tied(self):
        lines = [line for line in fake.candidates() if line["ratio_asked"] == 0.2]
        losses = {line["candidate"]: np.array([line["losses"][OUT]]) for line in lines}
        base = losses.pop("wanda > uniform > bias@0.2")
        found = {row["candidate"]: row for row in rows_of(comparison_table(fake.fields(), lines))}
        wanted = dict(zip(losses, differences_against(base, np.stack(list(losses.values()))), strict=True))
        for name, difference in wanted.items():
            shown = [float(found[name][field]) for field in ("change_out", "low_out", "high_out")]
            assert shown == pytest.approx(difference.percent)
            assert found[name]["tied"] == str(int(not difference.sure))

    def test_ab_says_of_two_variants_what_the_table_says(self, tmp_path):
        """One verdict, raced or not: the same interval, corrected for the same number."""
        figures = {"a": 50.0, "b": 51.0, "c": 56.0, "d": 60.0}
        lines = [fake.candidate(name, 0.2, (ppl, ppl)) for name, ppl in figures.items()]
        race = {"ratio": 0.2, "metric": OUT, "left": ["a", "b"], "windows": dict.fromkeys("abcd", 24)}
        articles = {"articles": {metric: [number // 2 for number in range(24)] for metric in fake.METRICS}}
        for name, more in (("plain", {}), ("raced", {"race": [race]}), ("articles", articles)):
            run = fake.kept_run(tmp_path / name, lines, **more)
            rows = {row.label: row for row in comparison_rows(run.record, lines)}
            for label in "bcd":
                beside = ab(AbConfig(a=f"{run.path}:{label}@0.2", b=f"{run.path}:a@0.2"))
                for one in beside.metrics:
                    assert one.difference == rows[label].against[one.name]
                    assert one.difference.windows == (12 if name == "articles" else 24)
                assert rows[label].tied == (not beside.metrics[1].difference.sure)
                assert beside.others == 3
            assert [rows[label].tied for label in "bcd"] == [True, False, False]

    def test_marks(self):
        near = two(50.0, 50.001)
        assert [row[0] for row in cells(comparison_table(fake.fields(), near))] == ["dense", "a *", "b ≈"]
        far = two(50.0, 90.0)
        assert [row[0] for row in cells(comparison_table(fake.fields(), far))] == ["dense", "a *", "b"]
        few = [{**line, "losses": {name: each[:7] for name, each in line["losses"].items()}} for line in near]
        table = comparison_table(fake.fields(), few)
        assert [row[0] for row in cells(table)] == ["dense", "a *", "b"], "of seven windows nothing is tied"
        assert any("7 windows, where it takes 8" in note for note in table.notes)

    def test_several_seeds_are_one_row_with_their_spread(self):
        lines = [fake.candidate("a", 0.2, (40.0, ppl), seed) for seed, ppl in enumerate((50.0, 52.0, 57.0))]
        table = comparison_table(fake.fields(), lines)
        row = rows_of(table)[1]
        assert float(row["ppl_out"]) == pytest.approx(math.exp(np.log([50.0, 52.0, 57.0]).mean()))
        assert float(row["spread_out"]) == pytest.approx(np.std([50.0, 52.0, 57.0], ddof=1))
        assert row["seeds"] == "3"
        assert any("± standard deviation over 3 seeds" in note for note in table.notes)
        each = rows_of(candidate_table(fake.fields(), lines))
        assert sorted((row["seed"], row[OUT]) for row in each[1:]) == [("0", "50.0"), ("1", "52.0"), ("2", "57.0")]

    def test_of_a_seed_that_is_infinite_there_is_no_spread(self):
        """Nor a warning of numpy's in front of the table."""
        lines = [fake.candidate("a", 0.2, (40.0, ppl), seed) for seed, ppl in enumerate((50.0, math.inf))]
        assert cells(comparison_table(fake.fields(), lines))[1][1:3] == ["40.00 ± 0.00", "inf"]

    def test_who_left_a_race_is_judged_by_the_windows_that_it_took(self):
        lines = two(50.0, 70.0)
        losses = lines[1].pop("losses")
        lines[1] |= {"windows": 12, "seen": {name: [*each[:12], *[None] * 12] for name, each in losses.items()}}
        race = {"ratio": 0.2, "metric": OUT, "left": ["a"], "windows": {"a": 12, "b": 12}}
        race |= {"budget": 24, "evaluated": 36, "keep_sets": 2}
        run = fake.fields() | {"race": [race]}
        table = comparison_table(run, lines)
        assert cells(table)[2][:3] == ["b", "~70.00", "~70.00"]
        assert [row["windows"] for row in rows_of(table)] == ["", "24", "12"]
        wanted = paired_difference(*(np.array([each[OUT][:12]]) for each in (losses, lines[0]["losses"])))
        assert [float(rows_of(table)[2][end]) for end in ("low_out", "high_out")] == pytest.approx(wanted.percent[1:])
        notes = " ".join(table.notes)
        assert "75 % of the windows were evaluated; verdicts are of these pruned models on such text" in notes
        said = summary(run, comparison_rows(run, lines))[0]
        assert said.startswith("At 20 % asked, a is best out of domain")
        assert "28.6 % below b" in said, "50 of 70"
        lines[0]["ratio_actual"] = 0.2333
        said = summary(run, comparison_rows(run, lines))[0]
        assert said.startswith("At 20 % asked, a (23.3 % gone) is best out of domain"), "named with what it lost"

    def test_the_first_variants_of_a_figure_are_the_best_somewhere(self):
        rows = comparison_rows(fake.fields(), fake.candidates())
        assert leading(rows, 2) == ["wanda > uniform > bias", "gate_fisher"]
        assert set(leading(rows, 99)) == set(fake.VARIANTS)


class TestWords:
    def test_of_two_that_are_equal_none_is_called_best(self):
        first = fake.candidate("a", 0.2, (50.0, 50.0))
        same = first | {"candidate": "b@0.2", "variant": "b"}
        for more, said in (
            ([], "a has the lowest perplexity out of domain, 50.00 (dense 34.70), level with b."),
            ([90.0], "a has the lowest perplexity out of domain, 50.00 (dense 34.70), level with b."),
            ([50.001], "a has the lowest perplexity out of domain, 50.00 (dense 34.70), and 2 others cannot be told "
                       "apart from it: b, c."),
        ):  # fmt: skip
            lines = [first, same, *(fake.candidate("c", 0.2, (ppl, ppl)) for ppl in more)]
            assert summary(fake.fields(), comparison_rows(fake.fields(), lines))[0] == f"At 20 % asked, {said}"

    def test_the_protocol_says_that_windows_are_of_each_text(self):
        for texts, said in ((["a"], "on 32 windows of 128 tokens of a, seed 0;"),
                            (["a", "b"], "on 32 windows of 128 tokens of each of a, b, seed 0;")):  # fmt: skip
            calibration = {"scenarios": texts, "examples": 32, "length": 128}
            run = fake.fields() | {"config": fake.CONFIG | {"calibration": calibration}}
            assert any(said in note for note in comparison_table(run, two(50.0, 60.0)).notes)

    def test_how_far_a_loss_below_zero_is_below_another(self):
        lines = [
            {"candidate": f"{name}@0.2", "variant": name, "ratio_asked": 0.2, "ratio_actual": 0.2,
             "ppl": {"loss test": loss}, "losses": {"loss test": [loss + 0.01 * n * scale for n in range(-4, 5)]}}
            for name, loss, scale in (("a", -2.0, 1.0), ("b", -1.0, 2.0))
        ]  # fmt: skip
        run = {"metrics": [{"name": "loss test", "domain": "in"}]}
        said = "At 20 % asked, a is best in domain with loss -2, 100.0 % below b."
        assert summary(run, comparison_rows(run, lines)) == [said]

    def test_losses_of_zero_differ_by_nothing(self):
        """As a share of wrong answers may be 0, of the masked and of the cut model."""
        run = {"metrics": [{"name": "loss test", "domain": "in"}], "dense": {"ppl": {"loss test": 0.0}}}
        for masked, said in ((0.0, "0.0e+00"), (1e-9, "1.0e-03")):
            best = {"ppl": {"loss test": 0.0}, "ppl_masked": {"loss test": masked}}
            (table,) = cut_tables({**run, "best": best})
            assert table.notes == [f"Loss with masks instead of cuts differs by at most {said} (relative)."]


class TestPage:
    def test_sections(self, run):
        view = read_view(run.path)
        assert [section.title for section in view.sections] == [
            "Summary", "Perplexity against ratio", "Comparison", "What is kept where", "The cut model",
            "Time, memory and cost", "To reproduce",
        ]  # fmt: skip
        page = render_report(run.path)
        assert "113.0" in page
        assert "−16.0 %" in page
        assert f"{fake.PARAMETERS:,} parameters" in page
        assert "differs by at most 8.7e-09 (relative)" in page

    def test_curves_and_their_intervals(self, run):
        view = read_view(run.path)
        _, figure = blocks_of(view, Figure, "Perplexity against ratio")
        shown = curves(figure)
        first = next(iter(fake.candidates()))
        assert [points[0] for points in shown.values()] == [(0.0, fake.DENSE[1])] * len(fake.VARIANTS)
        assert shown["gate_fisher"][1] == pytest.approx((0.2003, 34.0 * (2.4 - 0.17 * 4)))
        line = next(line for line in fake.candidates() if line["candidate"] == "gate_fisher@0.2")
        dense = fake.fields()["dense"]["losses"][OUT]
        difference = paired_difference(np.array([line["losses"][OUT]]), np.array([dense]), others=5)
        whiskers = [path for each in painted(figure).axes[0].collections for path in each.get_paths()]
        ends = [path.vertices[:, 1].tolist() for path in whiskers if path.vertices[0, 0] == pytest.approx(0.2003)]
        wanted = [fake.DENSE[1] * math.exp(end) for end in (difference.low, difference.high)]
        assert any(end == pytest.approx(wanted) for end in ends)
        assert first["variant"] == "random"
        assert max(value for _, value in shown["magnitude > uniform"]) < 1000, "drawn on the upper edge"

    def test_widths_kept(self, run):
        view = read_view(run.path)
        figures = blocks_of(view, Figure, "What is kept where")
        assert [figure.title for figure in figures] == ["20 % asked", "50 % asked"]
        attention, mlp = painted(figures[0]).axes[:2]
        rows = [row["candidate"] for row in view.rows if row["ratio_asked"] == 0.2]
        named = {line["candidate"]: line["kept"] for line in fake.candidates()}
        for axis, structure in ((attention, "attention"), (mlp, "mlp")):
            wanted = [np.array(named[name][structure]) / fake.UNITS[structure] for name in rows]
            np.testing.assert_allclose(axis.collections[0].get_array(), 100 * np.array(wanted))

    def test_unfinished_runs(self, tmp_path):
        begun = fake.kept_run(tmp_path / "begun", [], status="running")
        view = read_view(begun.path)
        assert view.status == "running"
        assert "No candidate is finished yet." in [block.text for block in blocks_of(view, Words, "Summary")]
        killed = fake.kept_run(tmp_path / "killed")
        before = render_report(killed.path)
        with open(killed.path / "metrics.jsonl", "a") as file:
            file.write('{"candidate": "b')
        assert render_report(killed.path) == before
