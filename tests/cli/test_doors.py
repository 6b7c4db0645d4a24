"""What every command refuses at its door: one sentence on stderr, an exit code, nothing written."""

import os
import subprocess
import sys

import pytest

import cats_cli
from cats import cli, paths
from cats.errors import CatsError

LONG = "x" * 5000
BOMB = "[&a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]" + "".join(
    f", &{name} [{', '.join(['*' + before] * 9)}]" for before, name in zip("abcdef", "bcdefg", strict=True)
) + "]"  # fmt: skip
TEXT = "calibrate --output t.json --corpus"

LINES = {
    # numbers out of range, and what Python alone takes for a number
    "calibrate --output t.json --tokens 1e999": "1e999 is no whole number",
    "calibrate --output t.json --tokens nan": "nan is no whole number",
    "calibrate --output t.json --tokens 1_0": "1_0 is no whole number",
    "calibrate --output t.json --tokens ٣": "is no whole number",
    f"calibrate --output t.json --tokens {10**400}": "is more than 2,147,483,647",
    f"calibrate --output t.json --batch-size {'9' * 5000}": "is more than 2,147,483,647",
    f"generate hi --seed {2**64}": "is more than 2,147,483,647",
    "generate hi --new-tokens 0x10": "0x10 is no whole number",
    "generate hi --sparsity 1e999": "outside [0, 1)",
    "perplexity --sparsity 0.5 nan": "outside [0, 1)",
    "evaluate --minutes 1e999": "is more than 2,147,483,647",
    "evaluate --last-share nan": "last_share",
    "measure mlp --sparsity 1e999": "no share from 0 to below 1",
    "measure cpu --seconds inf": "inf is no number of at least 0",
    "measure cpu --shapes 576x1536 0x5": "'0x5' is no shape",
    f"measure mlp --shapes {10**9}x8": "is no shape",
    "measure mlp --dtype float8": "'float8' is no dtype here",
    "measure cpu --slug ../up": "is no name for a record",
    f"measure cpu --slug {LONG}": "is no name for a record",
    "measure cpu --models smollm2-135m-instruct nosuch": "Unknown model 'nosuch'",
    # values left empty, as by an unset variable of a shell
    "evaluate --plan=": "--plan is empty",
    "finetune --plan=": "--plan is empty",
    "perplexity --thresholds=": "--thresholds is empty",
    "generate hi --model=": "--model is empty",
    "calibrate --output=": "--output is empty",
    f"{TEXT}=": "--corpus is empty",
    "evaluate --tasks piqa ''": "--tasks is empty",
    "evaluate --data-dir=": "--data-dir is empty",
    "measure cpu --slug=": "'' is no name for a record",
    "measure mlp --output=": "--output is empty",
    "inspect ''": "the target is empty",
    "reproduce ''": "a chapter is empty",
    "reproduce --profile=": "--profile is empty",
    "reproduce -p ''": "-p is empty",
    # names that no file has
    f"generate hi --model {LONG}": "file name too long",
    f"{TEXT} {LONG}.txt": "file name too long",
    f"inspect {LONG}.json": "file name too long",
    f"inspect {LONG}": "file name too long",
    f"perplexity --thresholds {LONG}": "file name too long",
    f"evaluate --plan {LONG}": "file name too long",
    f"evaluate --output {LONG} --tasks text:python-docs": "file name too long",
    f"reproduce --profile {LONG}": "name too long",
    f"reproduce --output {LONG} 01": "file name too long",
    f"calibrate --output {'y' * 240}.json": "too long for a file",
    "inspect ~nosuchuser/model": "is no path",
    f"{TEXT} ~nosuchuser/text.txt": "is no path",
    # outputs that cannot be, or are something else
    "calibrate --output folder.json": "is a folder",
    "calibrate --output config.json": "is no thresholds file and would be overwritten",
    "calibrate --output note.txt/t.json": "does not exist",
    "calibrate --output /proc/t.json": "cannot be written to",
    "evaluate --output note.txt --dry-run --tasks text:python-docs": "cannot be made",
    "evaluate --output note.txt/runs --tasks text:python-docs": "cannot be made",
    "evaluate --output /proc/runs --dry-run --tasks text:python-docs": "cannot be written to",
    "measure cpu --output note.txt": "cannot be made",
    "measure cpu --output note.txt/records": "cannot be made",
    "reproduce 01 --output note.txt": "cannot be made",
    f"reproduce 01 --output {paths.BOOK}": "use --in-place",
    # devices
    **{
        f"{command} --device {device}": "is not supported"
        for command in ("generate hi", "perplexity", "calibrate --output t.json", "evaluate --tasks text:c4")
        for device in ("meta", "mps")
    },
    "generate hi --device cuda:99": "cuda:99",
    "generate hi --device cpu:x": "Unknown device",
    # lengths and batches
    "generate hi --new-tokens 8192": "more than the 8,192 that smollm2-135m-instruct can read",
    "perplexity --sequence-length 9000": "is outside 2 … 8192",
    "calibrate --output t.json --tokens 2000000000 --batch-size 2000000000": "GB free",
    # parameters of chapters
    "reproduce 01 -p seed=2026-11-30": "The parameter seed is '2026-11-30'",
    "reproduce 01 -p seed=": "The parameter seed is empty",
    "reproduce 01 -p seed=1e999": "The parameter seed is",
    f"reproduce 01 -p seed={10**400}": "The parameter seed is",
    "reproduce 01 -p seed=*a": "is not valid YAML",
    f"reproduce 01 -p 'seed={BOMB}'": "more than 100,000 values",
    f"reproduce 01 -p seed={'[' * 5000}": "nested too deeply",
    "reproduce 01 -p 'seed=&a [*a]'": "an alias of what it is itself in",
    "reproduce 01 --profile empty-value.yml": "The parameter seed is empty",
    # foreign and damaged files
    "inspect note.txt": "Unknown model",
    "inspect config.json": "has schema None",
    "inspect nul.json": "is not valid JSON",
    "inspect deep.json": "is not valid JSON",
    "inspect folder.json": "cannot be read",
    "inspect weights.safetensors": "Unknown model",
    "perplexity --thresholds note.txt": "is not valid JSON",
    # names nearly right
    "calibrat": "did you mean calibrate?",
    "measure dekode": "did you mean decode?",
    "generate hi --new-token-s 3": "did you mean --new-tokens?",
    "measure cpu --shaeps 576x1536": "did you mean --shapes?",
    "evaluate --taks piqa": "did you mean --tasks?",
    # text that is none
    "generate caf\udce9": "is not UTF-8 text",
    "calibrate --output t\udcff.json": "is not UTF-8 text",
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with things that are no outputs and no models."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "note.txt").write_text("A note.\n")
    (tmp_path / "nul.json").write_bytes(bytes(100))
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "weights.safetensors").write_bytes(b"\xff" * 100)
    (tmp_path / "empty-value.yml").write_text("seed:\n")
    return tmp_path


def words(line: str) -> list[str]:
    """A command line without shlex, which takes minutes for names of thousands of characters."""
    parts = line.split("'")
    return [word for number, part in enumerate(parts) for word in ([part] if number % 2 else part.split())]


def said(capsys, arguments: list[str]) -> tuple[int, str]:
    """The exit code and the one line on stderr."""
    capsys.readouterr()
    status = cats_cli.main(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("cats: ") and lines[0].endswith(".") and len(lines[0]) < 1000
    return status, lines[0]


@pytest.mark.parametrize(("line", "expected"), LINES.items(), ids=range(len(LINES)))
def test_what_cannot_be_is_one_sentence(here, capsys, line, expected):
    before = sorted(here.rglob("*"))
    status, sentence = said(capsys, words(line))
    assert status == 2
    assert expected in sentence
    assert sorted(here.rglob("*")) == before


ERRORS = {
    OSError(28, "No space left on device", "t.json"): (2, "no space left on device: t.json"),
    PermissionError(13, "Permission denied"): (2, "permission denied"),
    ValueError("embedded null byte"): (70, "ValueError: embedded null byte"),
    MemoryError(): (2, "it needs more memory than there is"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] not enough memory"): (2, "more memory than there is"),
    RecursionError("maximum recursion depth exceeded"): (2, "nested too deeply"),
    OverflowError("int too large to convert to float"): (2, "a number out of range"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"): (2, "it is no UTF-8 text"),
    KeyError("layers"): (70, "fault of the project, not yours (KeyError: 'layers' is missing)"),
    AssertionError(): (70, "fault of the project, not yours (AssertionError: AssertionError)"),
    TypeError("several\nlines " + "long " * 1000): (70, "CATS_TRACEBACK=1"),
    ModuleNotFoundError("No module named 'peft'", name="peft"): (2, "peft is missing: install"),
    ImportError("cannot import name", name="cats.core"): (70, "fault of the project"),
}


def of_libraries() -> dict:
    import pyarrow
    import torch
    import yaml
    from jinja2 import TemplateError
    from safetensors import SafetensorError

    return {
        SafetensorError("header too small"): (2, "safetensors ended with header too small"),
        torch.OutOfMemoryError("Tried to allocate 20 GiB"): (2, "more memory than there is"),
        torch.AcceleratorError("CUDA error: an illegal access"): (2, "torch ended with CUDA error"),
        pyarrow.ArrowInvalid("not a file"): (2, "pyarrow ended with not a file"),
        yaml.YAMLError("no YAML"): (2, "yaml ended with no YAML"),
        TemplateError("no template"): (2, "jinja2 ended with no template"),
    }


@pytest.mark.parametrize("number", range(len(ERRORS) + len(of_libraries())))
def test_whatever_is_raised_below_is_one_sentence(here, capsys, monkeypatch, number):
    error, (code, expected) = [*ERRORS.items(), *of_libraries().items()][number]

    def fail(_):
        raise error

    monkeypatch.setattr(cli, "inspect", fail)
    status, sentence = said(capsys, ["inspect", "anything"])
    assert (status, expected in sentence) == (code, True), sentence


def test_the_traceback_is_shown_where_it_is_asked_for(here, capsys, monkeypatch):
    def fail(_):
        raise CatsError("Something is wrong.") from KeyError("below")

    monkeypatch.setattr(cli, "inspect", fail)
    monkeypatch.setenv("CATS_TRACEBACK", "1")
    assert cats_cli.main(["inspect", "anything"]) == 2
    printed = capsys.readouterr().err
    assert "Traceback" in printed and "KeyError: 'below'" in printed
    assert printed.splitlines()[-1] == "cats: Something is wrong."


def test_warnings_of_libraries_are_shown_where_they_are_asked_for(here, capsys, monkeypatch):
    import logging
    import warnings

    def warn(_):
        warnings.warn("from below", stacklevel=1)
        logging.getLogger("transformers").warning("from below")

    monkeypatch.setattr(cli, "inspect", warn)
    assert cats_cli.main(["inspect", "anything"]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys, "warnoptions", ["default"])
    with pytest.warns(UserWarning, match="from below"):
        assert cats_cli.main(["inspect", "anything"]) == 0


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_what_a_terminal_cannot_show_is_replaced(here, encoding):
    code = (
        "import cats_cli, sys\n"
        "sys.modules['cats'] = type(sys)('cats')\n"
        "sys.modules['cats'].cli = type('cli', (), {'inspect': lambda _: print('smile 😀')})\n"
        "sys.exit(cats_cli.main(['inspect', 'x']))"
    )
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(paths.ROOT)}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=True)
    assert ended.stdout.decode(encoding) == "smile ?\n"
