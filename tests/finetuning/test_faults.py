"""Kills, full disks and damaged files while a model is fine-tuned: nothing is lost, nothing counts twice."""

import json
import random
import resource
import shutil
import signal
from contextlib import contextmanager

import killed
import pytest
from filelock import FileLock
from finetuning_toys import CATS, COMMAND, curve
from transformers import AutoModelForCausalLM

import cats_cli
from cats.errors import CatsError
from cats.finetuning.checkpoints import last_checkpoint, read_note

SHORT = [*COMMAND.split(), "--steps", "4", "--grid", "2", "--method", "cats:0.5", "--batch", "2"]
KILLS = 3


@contextmanager
def files_of_at_most(size: int):
    """The limit of `ulimit -f`, which a full disk is like."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def result(folder):
    return read_note(folder / "cats-0.5-seed0" / "result.json")


def stale(folder) -> list[str]:
    """What is left of an interrupted command."""
    names = [path.name for path in folder.rglob("*")]
    return [name for name in names if name.endswith(".tmp") or name == "gathered"]


def test_a_command_killed_anywhere_and_begun_again_has_one_record_and_its_model(here):
    """At changes of files drawn over the whole command, from the first folder to the record."""
    draw = random.Random(24)
    names = ["whole", *(f"cut-{number}" for number in range(KILLS))]
    whole, *cut = ([*SHORT, "--save", "--output", f"runs/{name}"] for name in names)
    statuses, said = killed.commands(
        (whole, None, 0), *((each, s, signal.SIGKILL) for each in cut for s in (draw.random(), None))
    )
    assert statuses == [0, *[signal.SIGKILL, 0] * KILLS], said
    expected = result(here / "runs" / "whole" / "toy")["points"]
    for name in names:
        folder = here / "runs" / name
        assert len(list(folder.glob("finetuning-toy*.json"))) == 1, said
        assert result(folder / "toy")["points"] == expected, said
        AutoModelForCausalLM.from_pretrained(folder / "toy" / "cats-0.5-seed0" / "model")
        assert not stale(folder / "toy"), said


def test_a_model_that_is_asked_for_later_is_saved_without_training_again(here, capsys):
    assert cats_cli.main(SHORT) == 0
    run = here / "runs" / "toy" / "cats-0.5-seed0"
    points = result(here / "runs" / "toy")["points"]
    assert not (run / "model").exists()
    assert cats_cli.main([*SHORT, "--save"]) == 0
    assert result(here / "runs" / "toy")["points"] == points
    AutoModelForCausalLM.from_pretrained(run / "model")
    shutil.rmtree(run / "model")  # and one that was lost is made again
    assert cats_cli.main([*SHORT, "--save"]) == 0
    AutoModelForCausalLM.from_pretrained(run / "model")
    fewer = [word if word != "4" else "3" for word in SHORT]
    shutil.rmtree(run / "model")
    capsys.readouterr()
    assert cats_cli.main([*fewer, "--save"]) == 2
    assert "its model was not kept: save it at 4 steps" in capsys.readouterr().err


def test_a_second_command_in_the_same_folder_is_refused(here, capsys):
    (here / "runs" / "toy").mkdir(parents=True)
    with FileLock(here / "runs" / "toy" / ".lock"):
        assert cats_cli.main(SHORT) == 2
    assert "Another `cats finetune` trains in runs/toy" in capsys.readouterr().err
    assert not list(here.glob("runs/toy/cats*"))


@pytest.mark.parametrize("largest", [1_000, 40_000, 150_000])
def test_a_file_size_limit_is_said_in_a_sentence_and_the_run_goes_on_behind_it(here, capsys, largest):
    with files_of_at_most(largest):
        assert cats_cli.main([*SHORT, "--save"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("cats: ") and "cannot be written" in said and "too large" in said.lower()
    assert cats_cli.main([*SHORT, "--save"]) == 0
    AutoModelForCausalLM.from_pretrained(here / "runs" / "toy" / "cats-0.5-seed0" / "model")
    assert not stale(here / "runs")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("optimizer.pt", lambda data: data[: len(data) // 2]),
        ("adapter_model.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        ("trainer_state.json", lambda data: b"[" * 100_000),
        ("rng_state.pth", lambda data: b""),
    ],
)
def test_a_damaged_newest_checkpoint_is_left_out_for_the_one_before(run, tmp_path, capsys, name, change):
    settings = CATS | {"save_every": 2, "grid": (3, 4)}
    whole = run("whole", **settings, steps=5)
    run("run", **settings, steps=4)
    shutil.copytree(tmp_path / "run" / "checkpoint-4", tmp_path / "kept")
    run("other", **settings, steps=5)
    shutil.move(tmp_path / "kept", tmp_path / "other" / "checkpoint-4")
    newest = tmp_path / "other" / "checkpoint-5" / name
    newest.write_bytes(change(newest.read_bytes()))
    assert last_checkpoint(tmp_path / "other").name == "checkpoint-4"
    assert "checkpoint-5 is damaged and left out" in capsys.readouterr().err
    assert curve(run("other", **settings, steps=5)) == curve(whole)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"recipe": 5}', b"\xff\xfe", b"[" * 100_000])
def test_damaged_notes_of_a_run_are_made_again(here, damage):
    assert cats_cli.main(SHORT) == 0
    folder = here / "runs" / "toy"
    points, about = result(folder)["points"], read_note(folder / "data.json")
    for note in ("data.json", "cats-0.5-seed0/run.json", "cats-0.5-seed0/result.json"):
        (folder / note).write_bytes(damage)
    (here / "runs" / "finetuning-toy.json").unlink()
    assert cats_cli.main(SHORT) == 0
    assert result(folder)["points"] == points and read_note(folder / "data.json") == about
    assert json.loads((here / "runs" / "finetuning-toy.json").read_text())["rows"]


def test_checkpoints_of_another_run_are_not_gone_on_from_where_the_note_is_damaged(run, tmp_path):
    run(**CATS)
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(CatsError, match=r"no readable run\.json and checkpoint-6 of another run"):
        run(**CATS, lr=0.5)
    assert run(**CATS).finished
