"""Every link of a built site that leads to a place of the site does: files and anchors. Needs no Sphinx."""

import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors |= {value for name in ("id", "name") if (value := given.get(name))}
        self.links += [value for name in ("href", "src") if (value := given.get(name)) and tag != "base"]


def _read(page: Path) -> _Page:
    content = _Page()
    content.feed(page.read_text("utf-8"))
    return content


def broken_links(site: Path) -> Iterator[str]:
    """Yield a line for each link to a file or an anchor that the site does not have."""
    site = site.resolve()
    pages = {page: _read(page) for page in sorted(site.rglob("*.html")) if "_static" not in page.parts}
    for page, content in pages.items():
        for link in dict.fromkeys(content.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                yield f"{page.relative_to(site)}: link to {link}: expected a file of the site, found none"
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                yield f"{page.relative_to(site)}: link to {link}: expected an anchor, found none"


def main(site: str) -> int:
    """Print the broken links of a site; return 1 if there are any."""
    found = [*broken_links(Path(site))]
    for line in found:
        print(line, file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
