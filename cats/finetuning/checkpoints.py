"""Checkpoints of a run: sealed when whole, checked before a run goes on from one, swept when stale."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

from tqdm.auto import tqdm

from cats.models.fetch import sha256_of
from cats.paths import write_atomically

_SEAL = "sealed.json"


def write_note(path: Path, content: dict) -> None:
    """Write a JSON object with the sha256 of its content; CatsError where it cannot be written."""
    write_atomically(path, json.dumps({"sha256": _digest(content), **content}, indent=1).encode())


def read_note(path: Path) -> dict:
    """What `write_note` wrote; {} where the file is missing, damaged or of another kind."""
    try:
        content = json.loads(path.read_bytes())
        return content if content.pop("sha256") == _digest(content) else {}
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return {}


def seal(checkpoint: Path, run: dict) -> None:
    """Note the sha256 of every file of a checkpoint that is written whole, and of what the run is."""
    found = {file.relative_to(checkpoint).as_posix(): file for file in sorted(checkpoint.rglob("*"))}
    files = {name: sha256_of(file) for name, file in found.items() if file.is_file() and name != _SEAL}
    write_note(checkpoint / _SEAL, {"run": _digest(run), "files": files})


def last_checkpoint(folder: Path, processes: int = 1) -> Path | None:
    """The newest checkpoint of a run whose files are those that were sealed, for as many processes.

    One that is damaged is named on stderr; one without a seal was interrupted.
    """
    states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=_step, reverse=True):
        files = read_note(checkpoint / _SEAL).get("files", {})
        if not all(name in files for name in states):
            continue
        if all(map(_whole, with_best(checkpoint))):
            return checkpoint
        tqdm.write(f"{checkpoint} is damaged and left out.", file=sys.stderr)
    return None


def with_best(checkpoint: Path) -> set[Path]:
    """A checkpoint, and the best one before it, whose model the run may end with."""
    try:
        best = json.loads((checkpoint / "trainer_state.json").read_bytes())["best_model_checkpoint"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        best = None
    return {checkpoint, checkpoint.with_name(Path(best).name)} if best else {checkpoint}


def strangers(folder: Path, run: dict) -> list[Path]:
    """Checkpoints in a folder that are sealed as another run's."""
    seals = {path: read_note(path / _SEAL).get("run") for path in sorted(folder.glob("checkpoint-*"))}
    return [path for path, sealed in seals.items() if sealed not in (None, _digest(run))]


def sweep(folder: Path, keep: set[Path]) -> None:
    """Remove the checkpoints but those to `keep`, and what an interrupted run left half-written."""
    for path in folder.glob("checkpoint-*"):
        if path not in keep:
            shutil.rmtree(path)
    shutil.rmtree(folder / "gathered", ignore_errors=True)
    for path in folder.glob(".*.tmp"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _whole(checkpoint: Path) -> bool:
    files = read_note(checkpoint / _SEAL).get("files", {})
    try:
        return bool(files) and all(sha256_of(checkpoint / name) == files[name] for name in files)
    except OSError:
        return False


def reason(error: Exception) -> str:
    """Why something could not be written, as a part of a sentence."""
    said = getattr(error, "strerror", None) or str(error).splitlines()[0].rstrip(".")
    return said[0].lower() + said[1:]


def _step(checkpoint: Path) -> int:
    step = checkpoint.name.rpartition("-")[2]
    return int(step) if step.isascii() and step.isdigit() else -1


def _digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
