"""100 kills of long commands: behind each the same command runs through to the same result, and clears up."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import evaluation_toys
import hardening
import killed
import pytest
from finetuning_toys import COMMAND, sentences

from cats import paths

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
STALE = (".tmp", ".part", ".checkpoint", "gathered")
COMMANDS = {
    "calibrate": "calibrate --model toy --corpus train.txt --split all --tokens 2048 --sequence-length 64 "
    "--batch-size 2 --output",
    "evaluate": "evaluate --model toy --tasks piqa arc_easy --rule cats --sparsity 0.5 --data-dir mirrors "
    "--corpus train.txt --tokens 1024 --output",
    "finetune": f"{COMMAND} --steps 3 --grid 2 --method cats:0.5 --batch 2 --save --output",
}
KILLS = {"calibrate": 30, "evaluate": 30, "finetune": 30}
BUILDS = 10
TIMED = ("_s", "_s_step", "_gb", "seconds", "_per_step")
VOLATILE = {"seconds", "tokens_per_s", "speed", "begin", "written", "origins", "model"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to type commands in: a toy as a saved model, texts, and mirrors."""
    monkeypatch.chdir(tmp_path)
    loaded = evaluation_toys.loaded(num_hidden_layers=1)
    loaded.model.save_pretrained("toy")
    loaded.tokenizer.save_pretrained("toy")
    for seed, name in enumerate(("train.txt", "other.txt")):
        (tmp_path / name).write_text(sentences(40, seed))
    evaluation_toys.mirrors(tmp_path / "mirrors")
    return tmp_path


def results(folder: Path) -> dict:
    """What a command wrote, by file, without times and without what only an interrupted run goes on from."""
    found = {}
    for path in sorted(folder.rglob("*")):
        checkpoint = any(parent.name.startswith("checkpoint-") for parent in path.parents)
        if not path.is_file() or checkpoint or path.name == "origins.json":
            continue
        name = str(path.relative_to(folder))
        if path.suffix == ".json":
            found[name] = without_times(json.loads(path.read_text()))
            found[name].pop("sha256", None)  # of a note as a whole, with its times
        elif path.suffix == ".safetensors":
            found[name] = path.read_bytes()
    return found


def without_times(value):
    if isinstance(value, dict):
        return {
            key: without_times(item)
            for key, item in value.items()
            if not (key in VOLATILE or key.endswith(TIMED))
        }
    return [without_times(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("part", hardening.PARTS)
@pytest.mark.parametrize("name", KILLS)
def test_a_killed_command_runs_through_behind_it(name, part, here, record_property):
    draw = random.Random(f"{name}:{part}")
    suffix = "/t.json" if name == "calibrate" else ""
    folders = ["whole", *(f"cut-{number}" for number in hardening.numbers(KILLS[name], part))]
    whole, *cut = ([*COMMANDS[name].split(), f"runs/{folder}{suffix}"] for folder in folders)
    for folder in folders:  # calibrate makes none
        (here / "runs" / folder).mkdir(parents=True)
    kills = [(draw.random(), draw.choice(SIGNALS)) for _ in cut]
    wanted = [(whole, None, 0)]
    for command, (share, how) in zip(cut, kills, strict=True):
        wanted += [(command, share, int(how)), (command, None, 0)]
    statuses, said = killed.commands(*wanted)
    assert statuses[::2] == [0] * (len(cut) + 1), said
    expected = results(here / "runs" / "whole")
    assert expected, said
    for folder in folders:
        found = results(here / "runs" / folder)
        other = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        assert not other, f"{folder} of {kills} differs in {other}: {said[-2000:]}"
        left = [path.name for path in (here / "runs" / folder).rglob("*") if path.name.endswith(STALE)]
        assert not left, f"{folder} of {kills} left {left}"
    record_property("kills", {f"of {name}": len(cut)})


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The site's scripts beside a book of two pages."""
    root = tmp_path_factory.mktemp("clone")
    shutil.copytree(paths.ROOT / "scripts", root / "scripts")
    for name in ("requirements.lock", "pyproject.toml"):
        shutil.copy2(paths.ROOT / name, root / name)
    programs = root / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "jupyter-book"):
        (programs / name).symlink_to(Path(sys.executable).with_name(name))
    (root / "_config.yml").write_text("title: Toy\nexecute: {execute_notebooks: 'off'}\n")
    book = root / "book"
    book.mkdir()
    (book / "_toc.yml").write_text("format: jb-book\nroot: index\nchapters:\n- file: one\n")
    (book / "index.md").write_text("# Toy\n\n![A line](line.svg)\n")
    (book / "one.md").write_text("# One\n\nA word.\n")
    (book / "line.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"><path d="M0 0L9 9"/></svg>')
    return root


def build(clone: Path, kill_after: float | None = None, how: int = 0) -> tuple[int, float, str]:
    """The exit status, the seconds, and what was said; the whole group is killed, as a terminal does."""
    begun = time.perf_counter()
    process = subprocess.Popen(
        ["bash", "scripts/site.sh"],
        cwd=clone,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"HOME": str(clone)},
    )
    if kill_after is not None:
        time.sleep(kill_after)
        if process.poll() is None:
            os.killpg(process.pid, how)
    _, said = process.communicate()
    return process.returncode, time.perf_counter() - begun, said


def pages(clone: Path) -> set[str]:
    site = clone / "_build" / "html"
    return {str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()}


@pytest.mark.parametrize("part", hardening.PARTS)
def test_a_killed_site_build_runs_through_behind_it(part, clone, record_property):
    draw = random.Random(f"site:{part}")
    status, seconds, said = build(clone)
    assert status == 0, said
    expected = pages(clone)
    count = len(hardening.numbers(BUILDS, part))
    for _ in range(count):
        moment, how = draw.random() * seconds, draw.choice(SIGNALS)
        build(clone, moment, how)
        status, _, said = build(clone)
        assert status == 0, f"{how} after {moment:.1f} s: {said}"
        assert pages(clone) == expected
        assert [path.name for path in (clone / "_build").iterdir()] == ["html"]
    record_property("kills", {"of the site build": count})
