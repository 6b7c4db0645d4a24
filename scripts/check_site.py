"""Exit 1 with one sentence where a built site lacks a picture of a page, or a page in its search index.

python scripts/check_site.py FOLDER. Standard library only: it runs within a second.
"""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Pictures(HTMLParser):
    """The addresses of the pictures of a page."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.found.append(dict(attrs).get("src") or "")


def faults(site: Path) -> list[str]:
    """What is wrong with the site in a folder, a phrase each; none if it is whole."""
    pages = [file for file in site.rglob("*.html") if "_static" not in file.relative_to(site).parts]
    if not (site / "index.html").is_file():
        return ["there is no index.html"]
    return [fault for page in pages for fault in _missing_pictures(page)] + _unsearchable(site)


def _missing_pictures(page: Path) -> list[str]:
    parser = _Pictures()
    parser.feed(page.read_text(encoding="utf-8"))
    local = [unquote(url.path) for url in map(urlsplit, parser.found) if not url.scheme and not url.netloc]
    return [
        f"{page.name} shows {name or 'a picture without an address'}, which is not there"
        for name in local
        if not name or not (page.parent / name).is_file() or not (page.parent / name).stat().st_size
    ]


def _unsearchable(site: Path) -> list[str]:
    try:
        text = (site / "searchindex.js").read_text(encoding="utf-8")
        indexed = set(
            json.loads(re.fullmatch(r"Search\.setIndex\((.*)\);?\s*", text, re.DOTALL)[1])["docnames"]
        )
    except (OSError, ValueError, TypeError, KeyError):
        return ["its search index cannot be read"]
    # Sphinx keeps the source of each page that was written from a document.
    sources = {
        file.relative_to(site / "_sources") for file in (site / "_sources").rglob("*") if file.is_file()
    }
    written = {source.as_posix().split(".")[0] for source in sources}
    return [f"its search index lacks the page {name}" for name in sorted(written - indexed)]


if __name__ == "__main__":
    found = faults(Path(sys.argv[1]))
    if found:
        more = f" and {len(found) - 1} more faults" if len(found) > 1 else ""
        sys.exit(f"make: the site is not whole: {found[0]}{more}; run this again, or `make clean` before it.")
