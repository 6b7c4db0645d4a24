"""The built site: no warnings, every page opens in a browser without a fault, links lead somewhere."""

import asyncio
import functools
import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

import chromium
import pytest
import yaml
from bs4 import BeautifulSoup

from cats import paths

PHONE, DESKTOP = 400, 1280
needs_browser = pytest.mark.skipif(
    chromium.find() is None, reason="no Chromium or Chrome here: apt install chromium, or set CHROME to one"
)


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """The folder of the built site: CATS_SITE if set (say, what `make book` built), else built anew."""
    if os.environ.get("CATS_SITE"):
        return Path(os.environ["CATS_SITE"]).absolute()
    output = tmp_path_factory.mktemp("site")
    program = Path(sys.executable).with_name("jupyter-book")
    command = [program, "build", "-W", "--keep-going", "--path-output", output, paths.BOOK]
    built = subprocess.run(command, capture_output=True, text=True, cwd=output)
    assert built.returncode == 0, "\n".join((built.stdout + built.stderr).splitlines()[-40:])
    assert "WARNING" not in built.stdout + built.stderr
    folder = output / "_build" / "html"
    assert (folder / "index.html").is_file()
    return folder


@pytest.fixture(scope="session")
def toc() -> list[str]:
    """The pages of the table of contents, in reading order, without suffix."""

    def files(node) -> list[str]:
        if isinstance(node, list):
            return [name for item in node for name in files(item)]
        if not isinstance(node, dict):
            return []
        return [node[key] for key in ("root", "file") if key in node] + files(list(node.values()))

    return files(yaml.safe_load((paths.BOOK / "_toc.yml").read_text(encoding="utf-8")))


@pytest.fixture(scope="session")
def documents(site) -> dict[str, BeautifulSoup]:
    """Each HTML file of the site, by its path below the site's folder."""
    files = sorted(file for file in site.rglob("*.html") if "_static" not in file.parts)
    return {
        file.relative_to(site).as_posix(): BeautifulSoup(file.read_text(encoding="utf-8"), "lxml")
        for file in files
    }


@pytest.fixture(scope="session")
def visits(site, toc) -> list[chromium.Visit]:
    """Every page, on a phone and on a desktop, and a search, as the browser saw them."""

    async def look(address: str) -> list[chromium.Visit]:
        async with chromium.Chromium() as browser:
            seen = [
                await browser.visit(f"{address}/{page}.html", width=width)
                for page in toc
                for width in (PHONE, DESKTOP)
            ]
            search = f"{address}/search.html?q=calibration"
            found = "document.querySelectorAll('#search-results li').length > 0"
            return [*seen, await browser.visit(search, width=DESKTOP, until=found)]

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        return asyncio.run(look(f"http://127.0.0.1:{server.server_port}"))
    finally:
        server.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def _none(faults) -> None:
    faults = sorted(faults)
    assert not faults, "\n".join(faults)


def _name(visit: chromium.Visit) -> str:
    return f"{urlsplit(visit.url).path} at {visit.width} px"


def test_every_page_of_the_toc_is_built(site, toc):
    _none([page for page in toc if not (site / f"{page}.html").is_file()])


def test_internal_links_resolve(site, documents):
    """Every relative href and src names a file of the site and, after '#', an element of that page."""
    anchors = {
        page: {tag[key] for key in ("id", "name") for tag in document.find_all(attrs={key: True})}
        for page, document in documents.items()
    }
    broken = []
    for page, document in documents.items():
        for tag in document.find_all(["a", "link", "img", "script", "source"]):
            target = tag.get("href") or tag.get("src") or ""
            url = urlsplit(target)
            if url.scheme or url.netloc:
                continue
            file = (site / page).parent / unquote(url.path) if url.path else site / page
            known = anchors.get(os.path.relpath(file, site), {""})
            if not file.is_file() or (url.fragment and known and unquote(url.fragment) not in known):
                broken.append(f"{page}: {target}")
    _none(broken)


def test_source_links_name_files_of_the_repository(documents):
    """What the launch, source and edit buttons point at below /blob/, /edit/ or /tree/ exists here."""
    missing, found = set(), set()
    for page, document in documents.items():
        for link in document.find_all("a", href=True):
            parts = [part for part in unquote(link["href"]).split("?")[0].split("/") if part]
            for kind in {"blob", "edit"} & set(parts):
                file = "/".join(parts[parts.index(kind) + 2 :])
                found.add(file)
                if not (paths.ROOT / file).is_file():
                    missing.add(f"{page}: {file}")
    assert found
    _none(missing)


def test_nothing_is_fetched_from_elsewhere(documents):
    """No script, style, font or picture of any page has an address of its own: the site works offline."""
    external = {
        f"{page}: {tag[key]}"
        for page, document in documents.items()
        for names, key in [(("script", "img", "iframe", "source"), "src"), (("link",), "href")]
        for tag in document.find_all(names, attrs={key: True})
        if urlsplit(tag[key]).scheme not in {"", "data"} and "canonical" not in tag.get("rel", [])
    }
    _none(external)


@needs_browser
def test_pages_open_without_errors(visits):
    _none(f"{_name(visit)}: {error}" for visit in visits for error in visit.errors)


@needs_browser
def test_pages_request_only_the_site_itself(visits):
    urls = [urlsplit(url) for visit in visits for url in visit.requests]
    assert {url.hostname for url in urls if url.scheme not in {"data", "blob"}} == {"127.0.0.1"}


@needs_browser
def test_images_are_whole(visits):
    _none(f"{_name(visit)}: {image}" for visit in visits for image in visit.facts["broken"])


@needs_browser
def test_pages_fit_a_phone_and_a_desktop(visits):
    """Nothing makes a page scroll sideways; wide tables scroll within themselves."""
    _none(
        f"{_name(visit)}: {visit.facts['width']} px wide, because of {visit.facts['wide']}"
        for visit in visits
        if visit.facts["width"] > visit.width or visit.facts["wide"]
    )


@needs_browser
def test_pages_have_content(visits):
    _none(f"{_name(visit)} is nearly empty" for visit in visits if visit.facts["text"] < 200)


@needs_browser
def test_search_finds_pages(visits):
    [search] = [visit for visit in visits if "search.html" in visit.url]
    assert search.facts["until"]
