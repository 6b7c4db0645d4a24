"""The command line: what a user gets wrong is one sentence and a failure; what works prints its table."""

import importlib
import json
import resource
import shlex
import shutil
from contextlib import contextmanager
from importlib import metadata

import pytest

import cats_cli
from cats import restore, sparsify
from cats.calibration import checkpoint as checkpoints
from cats.core.thresholds import Thresholds
from cats.models import load as models
from cats_cli import measure


@pytest.fixture
def here(tmp_path, monkeypatch, thresholds_file):
    """A working directory with broken files of each kind, and good thresholds."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(thresholds_file, tmp_path / "good.json")
    good = json.loads(thresholds_file.read_text())
    texts = {
        "truncated.json": thresholds_file.read_text()[:2000],
        "later.json": json.dumps(good | {"schema": 99}),
        "list.json": "[]",
        "empty.txt": "",
        "blank.txt": "\n \n",
        "short.txt": "Only a few words.\n",
        "broken.jsonl": '{"text": "whole"}\n{"text": \n',
        "other.jsonl": '{"body": "text under another name"}\n',
        "list.yml": "- a\n",
        "odd.yml": "zzz: 1\n",
        "broken.yml": "a: [\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00text")
    (tmp_path / "truncated.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(40))
    (tmp_path / "empty-folder").mkdir()
    (tmp_path / "broken-folder").mkdir()
    (tmp_path / "broken-folder" / "config.json").write_text('{"model_type": "llama", ')
    return tmp_path


def run(capsys, line: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command line."""
    capsys.readouterr()
    try:
        status = cats_cli.main(shlex.split(line))
    except SystemExit as exit_:
        status = exit_.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


WRONG = {
    "perplexity --sparsity 1.2": "outside [0, 1)",
    "perplexity --sparsity 1": "outside [0, 1)",
    "perplexity --sparsity -0.1": "outside [0, 1)",
    "perplexity --sparsity nan": "outside [0, 1)",
    "perplexity --sparsity half": "invalid float",
    "inspect random:llama-2-7b --sparsity 2": "outside [0, 1)",
    "generate hi --thresholds good.json --model nosuch": "Unknown model 'nosuch'",
    "generate hi --thresholds good.json --model smollm2-135m-instrukt": "did you mean smollm2-135m-instruct",
    "generate hi --thresholds good.json --model empty-folder": "no config.json",
    "generate hi --thresholds good.json --model broken-folder": "truncated or incomplete",
    "generate hi --thresholds good.json --model truncated.gguf": "truncated or incomplete",
    "generate hi --thresholds good.json --model absent.gguf": "no model folder or .gguf file",
    "generate hi --thresholds good.json --model random:llama-2-70b": "no tokenizer",
    "generate hi --thresholds good.json --dtype fp8": "Unknown dtype",
    "generate hi --thresholds good.json --device gpu": "Unknown device",
    "generate '' --thresholds good.json": "prompt is empty",
    "generate hi --new-tokens 0": "at least 1",
    "inspect nosuch": "Unknown model",
    "inspect random:llama-9": "Unknown geometry",
    "inspect truncated.json": "may be truncated",
    "inspect later.json": "schema 99",
    "inspect list.json": "is no object of names and values",
    "inspect absent.json": "cannot be read",
    "perplexity --thresholds good.json --model random:smollm2-135m-instruct --documents 2": "other weights",
    "perplexity --thresholds truncated.json": "may be truncated",
    "perplexity --thresholds good.json --documents 99999": "fewer than",
    "perplexity --thresholds good.json --documents 0": "at least 1",
    "perplexity --thresholds good.json --corpus short.txt": "no text in its split",
    "calibrate --output t.json --corpus nosuch": "Unknown corpus",
    "calibrate --output t.json --corpus absent.txt": "no corpus file",
    "calibrate --output t.json --corpus empty.txt": "is empty",
    "calibrate --output t.json --corpus blank.txt": "is empty",
    "calibrate --output t.json --corpus short.txt": "fewer than the 60,000",
    "calibrate --output t.json --corpus broken.jsonl": "Line 2 of broken.jsonl",
    "calibrate --output t.json --corpus other.jsonl": "no text field",
    "calibrate --output t.json --corpus binary.txt": "UTF-8",
    "calibrate --output t.json --split nosplit": "no split",
    "calibrate --output t.json --bos perhaps": "BOS policy",
    "calibrate --output t.json --tokens 0": "at least 1",
    "calibrate --output t.json --sequence-length 100000000": "is outside 2 … 8192",
    "perplexity --sequence-length 1": "--sequence-length 1 is outside 2",
    "calibrate --output t.json --tokens 99999999": "fewer than",
    "calibrate --output t.json --batch-size 0": "at least 1",
    "calibrate --output t.txt": "must end in .json",
    "calibrate --output absent/t.json": "does not exist",
    "calibrate": "--output",
    "calibrate --output t.json --tokns 5": "--tokns 5 (`cats calibrate --help` shows how)",
    "evaluate --tokens 0": "at least 1",
    "evaluate --tokens many": "no whole number",
    "evaluate --batch-tokens -4": "at least 1",
    "evaluate --documents -4": "at least 1",
    "evaluate --minutes -1": "no number of at least 0",
    "evaluate --minutes nan": "no number of at least 0",
    "evaluate --seed -1": "no whole number of at least 0",
    "evaluate --plan p.yml": "The plan p.yml cannot be read",
    "evaluate --plan p.yml --sparsity=0.7": "--sparsity is nothing beside --plan",
    "evaluate --plan p.yml --tasks piqa": "--tasks is nothing beside --plan",
    "finetune --plan p.yml": "The plan p.yml cannot be read",
    "finetune --lr 1 --plan=p.yml": "--lr is nothing beside --plan",
    "finetune --minutes -1": "at least 0",
    "measure nosuch": "invalid choice",
    "measure mlp --sparsity 1.2": "1.2 is no share from 0 to below 1",
    "measure mlp --quick --shapes 12": "is no shape",
    "measure mlp --quick --dense dense_eagre": "did you mean dense_eager",
    "measure decode --new 1": "--new must be at least 2",
    "reproduce nosuch": "no chapter",
    "reproduce --profile nosuch": "no profile",
    "reproduce --profile absent.yml": "no profile",
    "reproduce --profile list.yml": "must map",
    "reproduce --profile broken.yml": "not valid YAML",
    "reproduce -p nosuch=1": "Unknown parameter 'nosuch' in -p: the nearest of",
    "reproduce 3 --profile odd.yml": "Unknown parameter 'zzz' in the profile odd.yml: the nearest of",
    "reproduce -p sed=1": "did you mean seed",
    "reproduce -p seed": "name=value",
    "reproduce -p seed=many": "The parameter seed",
    "reproduce --in-place --output runs": "not allowed with",
    "frobnicate": "invalid choice",
    "": "required",
}


@pytest.mark.parametrize(("line", "words"), WRONG.items())
def test_bad_input_is_one_sentence(here, capsys, line, words):
    before = sorted(here.rglob("*"))
    status, _, err = run(capsys, line)
    assert status == 2
    [sentence] = err.strip().splitlines()
    assert sentence.startswith("cats: ")
    assert sentence.endswith(".")
    assert words in sentence
    assert sorted(here.rglob("*")) == before  # nothing half-made is left


def test_a_gpu_that_is_not_there(here, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    status, _, err = run(capsys, "generate hi --thresholds good.json --device cuda")
    assert (status, "sees no GPU" in err, len(err.strip().splitlines())) == (2, True, 1)


def test_no_network(here, capsys, monkeypatch):
    """A proxy that refuses: a hub model and a hub corpus are one sentence each, within seconds."""
    for name in ("HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for line in (
        "generate hi --thresholds good.json --model some/model",
        "calibrate --corpus c4 --output t.json",
    ):
        status, _, err = run(capsys, line)
        [sentence] = err.strip().splitlines()
        assert status == 2
        assert "hub" in sentence
        assert "connect" in sentence


def test_a_reader_that_has_seen_enough(here, capsys, monkeypatch):
    """`cats inspect good.json | head -1` ends quietly."""

    def closed(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    status, _, err = run(capsys, "inspect good.json")
    assert status == 2
    assert err == ""


CALIBRATE = "calibrate --tokens 512 --sequence-length 64 --batch-size 2 --output t.json"


def test_an_interrupted_calibration_goes_on(here, capsys, monkeypatch):
    """Control-C after two batches, then the same command: as if it had never been interrupted."""
    counted = checkpoints.Checkpoint.counted
    batches = []

    def counting(self, tokens):
        counted(self, tokens)
        batches.append(tokens)
        if len(batches) == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "SECONDS", 0.0)  # a checkpoint after each batch
    monkeypatch.setattr(checkpoints.Checkpoint, "counted", counting)
    stop = None
    assert run(capsys, CALIBRATE.replace("t.json", "whole.json"))[0] == 0
    total = len(batches)
    assert total > 3

    batches, stop = [], 2
    status, _, err = run(capsys, CALIBRATE)
    assert status == 130
    assert err.strip().splitlines()[-1].startswith("cats: interrupted; the same command goes on")
    assert not (here / "t.json").exists()
    assert (here / "t.checkpoint").exists()

    batches, stop = [], None
    assert run(capsys, CALIBRATE)[0] == 0
    assert len(batches) == total - 2
    assert not (here / "t.checkpoint").exists()
    whole, resumed = Thresholds.load(here / "whole.json"), Thresholds.load(here / "t.json")
    assert whole.at(0.5).tolist() == resumed.at(0.5).tolist()
    assert whole.tokens == resumed.tokens == 512


@contextmanager
def files_limited_to(size: int):
    """No file may grow beyond `size` bytes: as good as a full disk, for any user."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_nothing_half_written(here, capsys):
    before = sorted(here.iterdir())
    with files_limited_to(1000):
        status, _, err = run(capsys, CALIBRATE)
    assert status == 2
    assert len(err.strip().splitlines()) == 1
    assert "t.json" in err or "t.checkpoint" in err
    assert sorted(here.iterdir()) == before


def test_the_version_is_the_distributions(capsys):
    assert run(capsys, "--version") == (0, f"cats {metadata.version('cats-companion')}\n", "")


def test_help_names_every_command(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    programs = [f"measure {program}" for program in measure.PROGRAMS]
    for command in ("calibrate", "inspect", "perplexity", "generate", "measure", "reproduce", *programs):
        assert command.split()[0] in out
        status, shown, _ = run(capsys, f"{command} --help")
        assert status == 0
        assert "example:" in shown


def test_every_program_of_measure_is_a_module_of_its_name():
    for name in measure.PROGRAMS:
        assert callable(importlib.import_module(f"cats.benchmarking.{name}").measure)


def test_inspect_shows_thresholds_by_layer(here, capsys):
    status, out, err = run(capsys, "inspect good.json --sparsity 0.5 0.9")
    assert (status, err) == (0, "")
    rows = [line.split() for line in out.splitlines() if line.strip() and line.split()[0].isdigit()]
    assert [int(row[0]) for row in rows] == list(range(30))
    assert all(0 < float(low) < float(high) for _, low, high in rows)
    assert "smollm2-135m-instruct" in out


def test_perplexity_compares_dense_and_sparse(here, capsys):
    line = "perplexity --thresholds good.json --sparsity 0.5 0.9 --documents 2 --sequence-length 128"
    status, out, err = run(capsys, line)
    assert (status, err) == (0, "")
    rows = [line.split() for line in out.splitlines()[-3:]]
    assert [row[0] for row in rows] == ["0", "0.5", "0.9"]
    nll = [float(rows[0][3]), float(rows[1][2]), float(rows[2][2])]
    assert nll[0] < nll[2]
    assert abs(float(rows[1][1]) - 0.5) < 0.1


def test_generate_continues_the_prompt(here, capsys):
    line = "generate 'The capital of France is' --thresholds good.json --sparsity 0.3 --new-tokens 4"
    status, out, err = run(capsys, line)
    assert status == 0
    assert out.startswith("The capital of France is")
    assert len(out.strip()) > len("The capital of France is")
    assert "tokens in" in err


def test_every_command_takes_the_rule_centred(here, capsys):
    assert run(capsys, f"{CALIBRATE} --rule centred")[0] == 0
    assert [file.name for file in here.glob("t.*")] == ["t.json"]
    status, out, err = run(capsys, "inspect t.json --sparsity 0.3 0.9")
    assert (status, err) == (0, "") and "centred" not in err
    rows = [line for line in out.splitlines() if line.strip() and line.split()[0].isdigit()]
    assert len(rows) == 30 and any(" c" in row for row in rows)
    assert not any(row.endswith(" c") for row in rows), "at 0.9 A would take more than is left"
    for options in ("--thresholds t.json", "--thresholds t.json --rule centred", "--rule centred"):
        status, out, _ = run(capsys, f"generate 'The capital of France is' {options} --new-tokens 2")
        assert status == 0 and out.startswith("The capital of France is")
    line = "perplexity --rule centred --sparsity 0.5 --documents 2 --sequence-length 128"
    status, out, _ = run(capsys, line)
    sparse = out.splitlines()[-1].split()
    assert status == 0 and abs(float(sparse[1]) - 0.5) < 0.1
    for options in ("--thresholds t.json --rule cats", "--thresholds good.json --rule centred"):
        status, _, err = run(capsys, f"generate hi {options}")
        assert status == 2 and "are for the rule" in err and len(err.strip().splitlines()) == 1


def test_a_model_that_is_sparse_already_is_measured_dense_too(here, capsys, monkeypatch, smollm):
    monkeypatch.setattr(models, "load", lambda *_, **__: smollm)
    lines = (
        "perplexity --thresholds good.json --sparsity 0.9 --documents 2 --sequence-length 64",
        "generate 'The capital of France is' --sparsity 0 --new-tokens 4",
    )
    expected = [run(capsys, line)[1] for line in lines]
    try:
        for line, out in zip(lines, expected, strict=True):
            sparsify(smollm.model, Thresholds.load("good.json"), 0.9)
            assert run(capsys, line)[1] == out
    finally:
        restore(smollm.model)
