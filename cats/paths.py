"""Where files are, from this one and never from the working directory; written whole, read to the letter."""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Sequence
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


def parse_json(data: bytes) -> dict:
    """The object in UTF-8 JSON, with or without a byte order mark.

    Raises ValueError, whose text is a phrase, for text that is no JSON object, a key that stands twice,
    NaN or Infinity, numbers that no float holds, halves of characters, and nesting that is too deep.
    """
    try:
        document = json.loads(
            data.decode("utf-8-sig"),
            object_pairs_hook=_unique,
            parse_constant=_refuse,
            parse_float=_finite,
            parse_int=_bounded,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it may be truncated, line {error.lineno}") from None
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    if not isinstance(document, dict):
        raise ValueError("it is no object of names and values")
    if b"\\u" in data:
        _refuse_halves(document)
    return document


def _unique(pairs: Sequence[tuple[str, object]]) -> dict:
    document = dict(pairs)
    if len(document) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} stands in it twice")
    return document


def _refuse_halves(document: dict) -> None:
    """ValueError where a text holds half of a surrogate pair, which JSON can write and UTF-8 cannot."""
    try:
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("it has half of a character") from None


def _refuse(name: str):
    raise ValueError(f"{name} is no number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:20]} is out of range")
    return value


def _bounded(digits: str) -> int:
    if len(digits) > 19:  # more than 64 bits
        raise ValueError(f"{digits[:20]}… is out of range")
    return int(digits)


def json_field(document: dict, name: str, kind: type):
    """The value of a field, of exactly this type; ValueError, naming the field, where it is not.

    `float` takes whole numbers too; `bool` is no number.
    """
    if name not in document:
        raise ValueError(f"it lacks {name!r}")
    value = document[name]
    kinds = (int, float) if kind is float else (kind,)
    if type(value) not in kinds:
        raise ValueError(f"{name!r} is not {'a number' if kind in (int, float) else 'a ' + kind.__name__}")
    return kind(value)


def json_count(document: dict, name: str) -> int:
    """A whole number of at least 0; ValueError, naming the field, for anything else."""
    value = json_field(document, name, int)
    if value < 0:
        raise ValueError(f"{name!r} is negative")
    return value
