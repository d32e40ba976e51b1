"""Tables: order, marks, numbers, and that they fit a terminal."""

import csv
import io
import math

import pytest

from saap_jax.evaluation.scales import format_ppl
from saap_jax.report.kinds.variants import csv_table, cut_rows, cut_table, headline, variant_table
from saap_jax.report.page.markdown import markdown_text
from saap_jax.runs.standing import comparison_rows, labels
from tests.report import conftest as fake
from tests.report.shown import cells, printed


def table_of(run: dict, lines: list[dict]):
    return variant_table(run, comparison_rows(run, lines))


def rendered(run: dict, lines: list[dict], width: int = 100) -> list[str]:
    return printed(table_of(run, lines), width=width).splitlines()


class TestRows:
    def test_dense_first_then_by_ratio_and_out_of_domain_perplexity(self):
        rows = comparison_rows(fake.fields(), fake.candidates())
        assert rows[0].candidate == "dense"
        assert (rows[0].ppl_in, rows[0].ppl_out, rows[0].parameters) == pytest.approx((22.4, 34.7, 134_515_008))
        assert [row.asked for row in rows[1:]] == [0.2] * 8 + [0.5] * 8
        for group in (rows[1:9], rows[9:]):
            ppl = [row.ppl_out if math.isfinite(row.ppl_out) else math.inf for row in group]
            assert ppl == sorted(ppl)
        assert math.isnan(rows[-1].ppl_out)

    def test_marks_the_best_of_each_ratio_out_of_domain(self):
        lines = [fake.candidate("a", 0.2, (1.0, 9.0)), fake.candidate("b", 0.2, (9.0, 1.0)),
                 fake.candidate("c", 0.5, (math.inf, math.nan))]  # fmt: skip
        assert [row.candidate for row in comparison_rows(fake.fields(), lines) if row.best] == ["b@0.2"]

    def test_falls_back_to_the_only_domain(self):
        run = fake.fields() | {"metrics": [{"name": fake.METRICS[0], "domain": "in"}]}
        lines = [fake.candidate("a", 0.2, (1.0, 9.0)), fake.candidate("b", 0.2, (9.0, 1.0))]
        assert [row.candidate for row in comparison_rows(run, lines) if row.best] == ["a@0.2"]
        assert table_of(run, lines).header == ["variant", "ppl in", "asked %", "actual %", "params (M)"]
        assert headline(run) == "ppl@128: in = builtin:reference"

    def test_names_the_allocation_only_where_it_differs(self):
        lines = [fake.older(fake.candidate(name, 0.2, (1.0, 1.0))) for name in ("a", "b")]
        assert labels(lines) == ["a", "b"]
        lines[1]["allocation"] = "uniform"
        assert labels(lines) == ["a (global)", "b (uniform)"]

    def test_a_run_that_has_only_begun(self):
        assert comparison_rows({}, []) == []
        assert cut_rows({}) == []


class TestTerminal:
    def test_fits_a_hundred_columns_with_every_name_and_number_whole(self):
        run, lines = fake.fields(), fake.candidates()
        text = rendered(run, lines)
        assert max(map(len, text)) <= 100
        assert not any("…" in line for line in text)
        body = [line.split() for line in text if line.split()]
        for cell in cells(table_of(run, lines)):
            assert " ".join(cell).split() in body  # one line a row: nothing wrapped, nothing cut
        assert text[0].strip() == "ppl@128: in = builtin:reference, out = builtin:descriptions"

    def test_the_check_for_width_can_fail(self):
        text = rendered(fake.fields(), fake.candidates(), width=34)
        words = ["taylor_element_second", "49.64"]
        assert any(line.split()[:2] == words for line in rendered(fake.fields(), fake.candidates())), "at full width"
        assert not any(line.split()[:2] == words for line in text)  # the name is folded

    def test_fits_with_allocations_in_the_names(self):
        lines = [fake.older(line) for line in fake.candidates()]
        lines[0]["allocation"] = "adaptive"
        text = rendered(fake.fields(), lines)
        assert not any("…" in line for line in text)
        assert any("taylor_element_second (global)" in line for line in text)

    def test_marks_without_colour(self):
        text = rendered(fake.fields(), fake.candidates())
        assert [line.split()[:2] for line in text if " * " in line and "lowest" not in line] == [
            ["activation_frequency", "*"]
        ] * 2

    def test_names_are_no_markup(self):
        text = rendered(fake.fields(), [fake.candidate("[red]x[/]", 0.2, (1.0, 1.0))])
        assert any("[red]x[/]" in line for line in text)

    def test_cut_model(self):
        text = printed(cut_table(fake.fields()))
        for word in ("gate_fisher@0.2", "134.5", "113.0", "−16.0 %", "+22.6 %", "3,303"):
            assert word in text


class TestCut:
    def test_values(self):
        rows = {row.label: row[1:] for row in cut_rows(fake.fields())}
        assert rows["forward pass (ms)"] == ("380.0", "310.0", "−18.4 %")
        assert rows["tokens a second"] == ("2,695", "3,303", "+22.6 %")
        assert rows[f"{fake.METRICS[1]} (out)"] == ("34.70", "52.70", "+51.9 %")

    def test_leaves_out_what_was_not_recorded(self):
        run = fake.fields()
        del run["best"]["forward_tokens"], run["best"]["bytes"]
        labels = [row.label for row in cut_rows(run)]
        assert "tokens a second" not in labels
        assert "weights (MiB)" not in labels
        assert "forward pass (ms)" in labels


class TestText:
    def test_csv_holds_full_precision(self):
        lines = sorted(fake.candidates(), key=lambda line: (line["ratio_asked"], line["candidate"]))
        found = list(csv.DictReader(io.StringIO(csv_table(fake.fields(), lines))))
        assert [row["candidate"] for row in found] == ["dense", *(line["candidate"] for line in lines)]
        for row, line in zip(found[1:], lines, strict=True):
            assert float(row["ratio_actual"]) == line["ratio_actual"]
            assert int(row["parameters"]) == line["parameters"]
            for name in fake.METRICS:
                assert float(row[name]) == line["ppl"][name] or math.isnan(line["ppl"][name])
        (last,) = [row for row in found if row["candidate"] == "random@0.5"]
        assert math.isnan(float(last[fake.METRICS[1]]))

    def test_markdown_has_equal_columns_and_escapes_bars(self):
        lines = [*fake.candidates(), fake.candidate("odd|name", 0.2, (1.0, 1.0))]
        text = markdown_text([table_of(fake.fields(), lines)])
        body = [line for line in text.splitlines() if line.startswith("|")]
        assert len(body) == 2 + 1 + 17
        assert {line.replace("\\|", "").count("|") for line in body} == {7}
        assert "odd\\|name" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(7.2, "7.20"), (999.99, "999.99"), (1000.4, "1000"), (99_999.4, "99999"), (99_999.6, "1e5"), (123_456.0, "1.2e5"),
     (math.inf, "inf"), (math.nan, "n/a")],
)  # fmt: skip
def test_perplexities_stay_readable(value, text):
    assert format_ppl(value) == text
