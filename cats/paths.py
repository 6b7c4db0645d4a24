"""Where things are, from this file and never from the working directory."""

import hashlib
import os
import tempfile
from pathlib import Path

from cats.errors import CatsError, explained

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"
DATA = ROOT / "data"
PAPER = DATA / "paper"
RECORDS = DATA / "records"
THRESHOLDS = DATA / "thresholds"
_IN_CLONE = (ROOT / "pyproject.toml").is_file()
KERNELS = ROOT / "kernels" / "cats_kernels" if _IN_CLONE else ROOT / "cats_kernels"

CACHE = Path(os.environ.get("CATS_CACHE") or "~/.cache/cats-companion").expanduser().absolute()


def made(folder: Path) -> Path:
    """`folder`, made if it is not there; CatsError where it cannot be."""
    with explained(f"The folder {folder} cannot be made", "name another"):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def named(name: str | os.PathLike) -> Path:
    """The path of a name that a user gave, "~" expanded; CatsError for one that no file can have."""
    with explained(f"The name {str(name)[:100]!r} is no path", "check it"):
        path = Path(name).expanduser()
        path.exists()  # raises where a name is too long, or in a folder that is not to be read
    return path


def check_writable(folder: Path) -> None:
    """CatsError where `folder` could not be made or written to; nothing is made for it."""
    folder = named(folder)
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        why = "file exists" if there == folder.absolute() else "not a directory"
        raise CatsError(f"The folder {folder} cannot be made ({why}): name another.")
    with explained(f"The folder {there} cannot be written to", "name another"):
        tempfile.TemporaryFile(dir=there).close()


def in_clone(path: Path) -> Path:
    """`path`, one of the above; CatsError where the library is installed without the repository around it."""
    if not _IN_CLONE:
        raise CatsError(
            f"The library is installed without the project's {path.relative_to(ROOT)}: "
            "clone the project and `pip install -e .` there."
        )
    return path


def without_folders(names: str) -> str:
    """Names joined by "+" as records hold them: of an absolute path the last part, no folder of a machine."""
    return "+".join(
        Path(name).name if Path(name).expanduser().is_absolute() else name for name in names.split("+")
    )


def write_atomically(path: Path, data: bytes) -> None:
    """Write to a temporary name, then rename: nothing half-written is ever read as whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        raise CatsError(f"{path} cannot be written: {(error.strerror or str(error)).lower()}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
