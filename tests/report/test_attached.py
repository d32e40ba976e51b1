"""Files of a run on the page: drawings that are nothing else, Markdown as it was written."""

import pytest

from saap_jax.report.kinds.attached import attached_sections, drawing, markdown_blocks
from saap_jax.report.page.blocks import Detail, Part, Table
from saap_jax.report.page.markdown import block_lines
from saap_jax.report.records import RunDirectory
from saap_jax.report.write import render_report
from tests.report.test_html import Page

SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1"><path d="M0 0h1" fill="url(#a)"/>{}</svg>'
GOOD = SVG.format('<image href="data:image/png;base64,AAAA" width="1" height="1"/><text>&lt;b&gt;</text>')
MARKDOWN = """Wanda goes furthest.

| variant | largest ratio % |
| :-- | --: |
| a\\|b | 20.0 |
| c | 30.0 |

## Suggestions

1. Do this.

## Notes

- one
- two
"""


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    run = RunDirectory.open(tmp_path / "run", {"name": "run"})
    run.update(kind="frontier", model={"name": "tiny"})
    run.save_text("frontier.svg", GOOD)
    run.save_text("frontier.md", MARKDOWN)
    run.save_text("frontier.csv", "variant\na\n")
    run.save_text("curve.csv", "candidate\na\n")
    return run


class TestDrawing:
    def test_is_taken_as_it_is(self, tmp_path):
        path = tmp_path / "x.svg"
        path.write_text('<?xml version="1.0"?>\n' + GOOD)
        assert drawing(path) == GOOD

    @pytest.mark.parametrize(
        "inside",
        [
            "<script>alert(1)</script>",
            '<path onclick="alert(1)"/>',
            '<image href="https://example.com/x.png"/>',
            '<use xmlns:xlink="http://www.w3.org/1999/xlink" xlink:href="other.svg#a"/>',
            '<path style="fill: url(https://example.com)"/>',
            "<style>@import 'x'</style>",
            "<foreignObject/>",
            '<a href="#x"/>',
            '<set attributeName="href"/>',
            "<unclosed>",
        ],
    )
    def test_with_more_in_it_is_refused(self, tmp_path, inside):
        path = tmp_path / "x.svg"
        path.write_text(SVG.format(inside))
        assert drawing(path) == ""

    @pytest.mark.parametrize("text", ["", "no drawing", f'<!DOCTYPE svg [<!ENTITY a "b">]>{GOOD}', f"<p>{GOOD}</p>"])
    def test_other_files_are_refused(self, tmp_path, text):
        path = tmp_path / "x.svg"
        path.write_text(text)
        assert drawing(path) == ""
        assert drawing(tmp_path / "none.svg") == ""


class TestMarkdown:
    def test_comes_back_as_it_was_written(self):
        written = [line for block in markdown_blocks(MARKDOWN) for line in block_lines(block, 2)]
        kept = [line for line in MARKDOWN.splitlines() if line]
        assert [line for line in written if line] == kept

    def test_numbers_stand_on_the_right(self):
        (table,) = [block for block in markdown_blocks(MARKDOWN) if isinstance(block, Table)]
        assert table.words == 1
        assert [cell.text for cell in table.lines[0].cells] == ["a|b", "20.0"]

    def test_parts_can_be_left_out(self):
        blocks = markdown_blocks(MARKDOWN, ("Suggestions",))
        assert [block.title for block in blocks if isinstance(block, Part)] == ["Notes"]
        assert "Do this." not in str(blocks)


class TestSections:
    def test_show_figure_table_and_files(self, run):
        (section,) = attached_sections(run.path, run.record, Detail())
        kinds = [block.kind for block in section.blocks]
        assert kinds == ["picture", "words", "table", "part", "words", "part", "bullets", "download", "download"]
        page = Page(render_report(run.path))
        assert [attrs.get("download") for attrs in page.of("a") if "download" in attrs] == ["frontier.csv", "curve.csv"]

    def test_suggestions_are_not_repeated(self, run):
        run.update(suggestions=[{"text": "Do this.", "effect": "measured: 1", "command": "saap prune"}])
        assert render_report(run.path).count("Do this.") == 1

    def test_large_drawings_are_left_out_of_pages_of_many_runs(self, run):
        (section,) = attached_sections(run.path, run.record, Detail(drawn=False, downloads=False))
        assert {block.kind for block in section.blocks} == {"words", "table", "part", "bullets"}
        assert "frontier.svg is in the run's own directory" in str(section.blocks[0])

    def test_a_drawing_with_a_script_is_not_shown(self, run):
        run.save_text("frontier.svg", SVG.format("<script>alert(1)</script>"))
        text = render_report(run.path)
        assert "alert(1)" not in text
        assert "is no plain drawing" in text

    def test_a_kind_without_any_file(self, tmp_path):
        run = RunDirectory.open(tmp_path / "new", {})
        run.update(kind="something")
        assert "A run of kind something, which has written no figure and no table yet." in render_report(run.path)
