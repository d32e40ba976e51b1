"""The figures of a report for papers: SVG, PNG and PDF of a column's or a page's width."""

from collections.abc import Iterator, Sequence

from saap_jax.report.figures.charts import chart_plot
from saap_jax.report.figures.draw import on_paper
from saap_jax.report.page.blocks import Chart, Detail, Page, Picture, Pictures, Plot, Section, leaves
from saap_jax.report.page.formats import slug

LIMIT = 10
"""Variants of a figure."""


def paper_figures(page: Page) -> Iterator[tuple[str, bytes]]:
    """Return every figure of a report as (name of the file, content)."""
    for stem, plot in plots(page):
        for ending, content in on_paper(plot).items():
            yield f"{stem}.{ending}", content


def plots(page: Page) -> list[tuple[str, Plot]]:
    """Return the figures of all runs, and of several runs together, with the stems of their files."""
    found = []
    for view in page.views:
        sections = view.at(Detail(LIMIT)) if view.at else view.sections
        found += [(f"{slug(view.name)}-{plot.name}", plot) for plot in plots_of(sections)]
    return found + [(plot.name, plot) for plot in plots_of(page.overview)]


def plots_of(sections: Sequence[Section]) -> Iterator[Plot]:
    """Return the figures of sections as they are on paper."""
    for block in (block for section in sections for block in leaves(section.blocks)):
        if isinstance(block, Picture):
            yield block.plot
        elif isinstance(block, Pictures):
            yield from block.paper
        elif isinstance(block, Chart) and block.strips:
            yield chart_plot(block)
