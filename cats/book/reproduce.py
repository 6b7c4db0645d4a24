"""Run the chapters with papermill under a profile, from any working directory, and keep only good results."""

import contextlib
import functools
import hashlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import papermill
import psutil
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from tqdm import tqdm

from cats import paths
from cats.book import chapters, processes
from cats.errors import CatsError, explained
from cats.records import yaml_file

PARAMS = paths.BOOK / "params"
# What these print of times and memory is of a machine that does nothing else.
TIMED = {"08_kernels", "09_decoding", "10_batching"}
LIVE = paths.ROOT / "_build" / "live"  # a copy of the book's surroundings, so that its relative paths hold


@dataclass
class Run:
    """One chapter: its notebook, wall time in s and peak resident memory in GB; None if it was kept."""

    chapter: str
    file: Path
    seconds: float | None
    peak_gb: float | None

    def __str__(self) -> str:
        if self.seconds is None:
            return f"{self.chapter:<28} up to date"
        return f"{self.chapter:<28} {self.seconds:6.1f} s  {self.peak_gb:5.2f} GB"


def load_profile(profile: str) -> dict:
    """The parameters of book/params/<profile>.yml, or of a YAML file given by path.

    Raises CatsError where there is no such profile or the file is not a flat mapping of names to values.
    """
    file = Path(profile) if Path(profile).suffix in {".yml", ".yaml"} else PARAMS / f"{profile}.yml"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in PARAMS.glob("*.yml")))
        raise CatsError(f"There is no profile {profile!r}: use one of {known}, or a path that ends in .yml.")
    values = yaml_file.read(file, "profile") or {}
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise CatsError(f"{file} must map parameter names to values, one a line.")
    return values


def parse_parameters(pairs: Sequence[str]) -> dict:
    """Parameters from "name=value" strings, values read as YAML."""
    values = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise CatsError(f"The parameter {pair!r} has no value: write name=value.")
        with explained(f"The parameter {pair!r} is not valid YAML", "quote the value"):
            values[name] = yaml_file.parse(value)
    return values


def reproduce(
    wanted: Sequence[str] = (),
    *,
    profile: str = "cpu",
    parameters: Mapping | None = None,
    output: Path | None = None,
    in_place: bool = False,
    force: bool = False,
    jobs: int = 1,
) -> list[Run]:
    """Run the chapters `wanted` (all if empty) under a profile; `parameters` go over the profile's.

    Executed notebooks go to `output` (default: a copy of the book in _build/live, from which `make book`
    builds the site), or replace the committed ones (`in_place`). A chapter that was run before with the same
    cells, parameters, library and data is kept, unless `force`: an interrupted run goes on where it stopped.
    `jobs` chapters run at a time, each in a process of its own with its share of the cores, but for TIMED.
    Raises CatsError for an unknown chapter, profile or parameter before anything runs, and if one fails.
    """
    selected = chapters.select(wanted)
    notebooks = {name: chapters.read(chapters.path(name)) for name in selected}
    defaults = {name: chapters.parameters(notebook) for name, notebook in notebooks.items()}
    given = load_profile(profile)
    chapters.check_names(given, chapters.all_parameters(), f"the profile {profile}")
    chapters.check_names(parameters or {}, {key for known in defaults.values() for key in known}, "-p")
    given.update(parameters or {})
    for known in defaults.values():
        _check_types(given, known)
    if output:
        paths.check_writable(output)
        if output.resolve() == paths.BOOK:
            raise CatsError("The output is the book itself: use --in-place to replace its notebooks.")
    destination = paths.BOOK if in_place else output or _live_copy()
    work = {}
    for name in selected:
        changed = {k: given[k] for k, default in defaults[name].items() if given.get(k, default) != default}
        work[name] = (name, notebooks[name], changed, Path(destination), not (force or in_place))
    together = [name for name in selected if name not in TIMED] if jobs > 1 else []
    runs = {}
    try:
        for run in _side_by_side([work[name] for name in together], jobs):
            runs[run.chapter] = run
        for name in selected:
            if name not in runs:
                runs[name] = _run(*work[name])
                print(runs[name], flush=True)
    except (KeyboardInterrupt, SystemExit):
        processes.end_children()  # kernels would finish their chapter first
        raise
    return [runs[name] for name in selected]


def _side_by_side(work: list[tuple], jobs: int) -> Iterator[Run]:
    """Runs as they finish; after a failure no further one is begun."""
    if not work:
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    # spawned: a forked process would share sockets and locks of this one's event loop
    with (
        ProcessPoolExecutor(jobs, get_context("spawn"), _begin_worker, (threads,)) as pool,
        tqdm(total=len(work), unit="chapter", disable=None) as bar,
    ):
        try:
            for future in as_completed([pool.submit(_run, *each, progress=False) for each in work]):
                run = future.result()
                bar.write(str(run), file=sys.stdout)
                bar.update()
                yield run
        except (KeyboardInterrupt, SystemExit):
            processes.end_children()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _begin_worker(threads: int) -> None:
    processes.end_with_parent()
    os.environ["OMP_NUM_THREADS"] = str(threads)  # kernels inherit it


def _check_types(given: Mapping, defaults: Mapping) -> None:
    for name, default in defaults.items():
        if name not in given or default is None:
            continue
        if given[name] is None:
            raise CatsError(f"The parameter {name} is empty: give one such as {default!r}, or leave it out.")
        wanted = (int, float) if type(default) is float else type(default)
        value, kind = given[name], type(default).__name__
        article = "an" if kind[0] in "aeiou" else "a"
        finite = not isinstance(value, (int, float)) or abs(value) < 2**63
        fits = isinstance(value, wanted) and isinstance(value, bool) is isinstance(default, bool)
        if not (fits and finite):
            raise CatsError(
                f"The parameter {name} is {value!r}, but must be {article} {kind} such as {default!r}."
            )


def _live_copy() -> Path:
    """Lay out _build/live as the project root is for the book: the pages copied, config and data linked."""
    book = LIVE / "book"
    for source in sorted(paths.BOOK.rglob("*")):
        inside = source.relative_to(paths.BOOK)
        target = book / inside
        if source.is_file() and source.suffix != ".ipynb" and "_build" not in inside.parts:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    for name in ("_config.yml", "data"):
        link = LIVE / name
        if not link.is_symlink():
            link.symlink_to(paths.ROOT / name)
    return book


def _run(
    name: str, notebook, parameters: dict, destination: Path, keep: bool, *, progress: bool = True
) -> Run:
    """Execute one chapter into `destination`, where only a whole, good notebook replaces what is there."""
    file = destination / f"{name}.ipynb"
    bare = chapters.bare(notebook)
    identity = {"cells": chapters.cells_hash(bare), "inputs": _inputs_hash(), "parameters": parameters}
    if keep and file.exists() and chapters.read(file).metadata.get("cats", {}).get("identity") == identity:
        return Run(name, file, None, None)
    # Beside the output: nothing else need be writable. Not in the book, where it would be a page.
    folder = paths.ROOT / "_build" if destination == paths.BOOK else destination
    partial = folder / "partial" / f"{name}.ipynb"
    for needed in (partial.parent, destination):
        paths.made(needed)
    started = time.perf_counter()
    with _PeakMemory() as memory:
        executed = _execute(name, bare, partial, parameters, destination, progress)
    seconds = time.perf_counter() - started
    chapters.strip(executed)
    executed.metadata["cats"] = {"code_sha256": chapters.code_hash(executed), "identity": identity}
    chapters.write(executed, file)
    partial.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # another chapter's is in it
        partial.parent.rmdir()
    return Run(name, file, seconds, memory.peak_gb)


def _execute(name: str, notebook, partial: Path, parameters: dict, folder: Path, progress: bool):
    """papermill on one chapter, its current state after each cell in `partial`; failures as one sentence."""
    os.environ["CATS_CACHE"] = str(paths.CACHE)  # the kernel works in another folder
    # Waiting threads sleep: beside other work, spinning ones made a forward pass ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    run = functools.partial(
        papermill.execute_notebook,
        notebook,
        partial,
        parameters=parameters,
        kernel_name="python3",
        language="python",
        progress_bar=progress and sys.stderr.isatty(),
        start_timeout=600,  # seconds: a busy machine takes minutes to start one
        cwd=folder,
        extra_arguments=processes.kernel_arguments(),
    )
    try:
        with processes.own_kernel():
            try:
                return run()
            except RuntimeError as error:
                if isinstance(error, DeadKernelError) or "Kernel died before" not in str(error):
                    raise
                return run()  # kernels that start at once can draw the same port
    except PapermillExecutionError as error:
        first = next(line for line in error.source.splitlines() if line.strip())
        reason = f"{error.ename}: {error.evalue}" if error.ename != "CatsError" else error.evalue
        raise CatsError(
            f"The chapter {name} failed in its cell [{error.exec_count}], which starts {first.strip()!r}: "
            f"{' '.join(reason.split())} (as far as it got: {partial})"
        ) from error
    except DeadKernelError as error:
        raise CatsError(
            f"The chapter {name} was killed, probably for lack of memory: ask for less."
        ) from error


@functools.cache
def _inputs_hash() -> str:
    """sha256 over what a chapter's outputs rest on besides its cells: library, kernels, data, lock."""
    files = [paths.ROOT / "requirements.lock"]
    for folder, suffix in (("cats", "*.py"), ("kernels", "*.py"), ("data", "*")):
        files += sorted(file for file in (paths.ROOT / folder).rglob(suffix) if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(paths.ROOT)).encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


class _PeakMemory:
    """Peak resident memory of the processes started meanwhile, from the high-water marks that Linux keeps."""

    def __enter__(self):
        self.peak_gb = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()

    def _watch(self):
        while not self._done.wait(0.25):
            total = sum(map(_high_water_gb, psutil.Process().children(recursive=True)))
            self.peak_gb = max(self.peak_gb, total)


def _high_water_gb(process: psutil.Process) -> float:
    try:
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9
    except (OSError, IndexError):  # it ended in between
        return 0.0
