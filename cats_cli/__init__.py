"""What a shell user types: `cats --help` answers at once, as nothing here imports the library.

A package beside `cats`, not in it: importing anything of `cats` imports PyTorch and Transformers first.
"""

import argparse
import contextlib
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator

from cats_cli.commands import parser
from cats_cli.options import near, one_line

WITH_PLAN = {
    *("--plan", "--device", "--data-dir", "--output", "--records", "--minutes", "--so-far", "--dry-run"),
}
_MAY_BE_EMPTY = {"best", "arguments", "known"}
_PLACES = {"prompt": "the prompt", "target": "the target", "chapters": "a chapter", "parameters": "-p"}
RESUME = {
    "calibrate": "the same command goes on from the last checkpoint",
    "reproduce": "the same command keeps the chapters that are done",
    "evaluate": "the same command goes on with the next task",
    "finetune": "the same command goes on from the last checkpoint",
    "measure": "no record was written of what it was measuring",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns 0, 2 after a user's error and 70 after our own (one sentence on stderr), 130
    if interrupted.

    CATS_TRACEBACK=1 in the environment shows the traceback before the sentence.
    """
    argv = sys.argv[1:] if argv is None else argv
    with contextlib.suppress(ValueError):  # where this is not the main thread
        signal.signal(signal.SIGTERM, _terminate)
    if hasattr(sys.stdout, "reconfigure"):  # a caller may have put something else in its place
        sys.stdout.reconfigure(errors="replace")  # what a terminal cannot show is no reason to end
    if argv[:1] == ["lm_eval"]:  # argparse would take lm-eval's options for its own
        argv = [argv[0], "--", *argv[1:]]
    try:
        arguments = _parsed(argv)
    except SystemExit as ended:  # argparse has said why
        return ended.code
    try:
        with _quiet(arguments.command):
            from cats import cli

            if "device" in arguments and not getattr(arguments, "plan", None):
                arguments.device = arguments.device or "cpu"
            getattr(cli, arguments.command)(arguments)
            print(end="", flush=True)
        return 0
    except BrokenPipeError:
        sys.stdout = None  # the reader, `head` say, has seen enough
        return 2
    except KeyboardInterrupt:
        return _interrupted(arguments)
    except Exception as error:
        return _explained(error)


def _parsed(argv: list[str]) -> argparse.Namespace:
    """The arguments; one that no command has, that is empty, or that a plan says itself, is an error."""
    top = parser()
    for word in argv:
        if any("\ud800" <= letter <= "\udfff" for letter in word):
            top.error(f"{word!r} is not UTF-8 text: write it in UTF-8")
    arguments, unknown = top.parse_known_args(argv)
    top.prog = " ".join(["cats", arguments.command, *filter(None, [getattr(arguments, "program", None)])])
    if unknown:
        top.error(f"unrecognized arguments{near(unknown[0], arguments.known)}: {' '.join(unknown)}")
    for name, value in vars(arguments).items():
        if name not in _MAY_BE_EMPTY and (value == "" or (isinstance(value, list) and "" in value)):
            what = _PLACES.get(name) or f"--{name.replace('_', '-')}"
            top.error(f"{what} is empty: give it a value, or leave it out")
    del arguments.known
    for typed in (each.partition("=")[0] for each in argv if getattr(arguments, "plan", None)):
        if typed.startswith("--") and not any(option.startswith(typed) for option in WITH_PLAN):
            top.error(f"{typed} is nothing beside --plan, whose file says it: leave one of the two out")
    return arguments


@contextlib.contextmanager
def _quiet(command: str) -> Iterator[None]:
    """Without the warnings of the libraries below, unless PYTHONWARNINGS or -W asks for them."""
    if sys.warnoptions or command == "lm_eval":  # lm-eval reports by its log
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _explained(error: Exception) -> int:
    """Say in one sentence what ended a command; returns its exit code."""
    try:
        from cats.errors import sentence

        said, status = sentence(error)
    except ImportError:  # of what `cats` itself needs
        said, status = f"{error}: install this project's requirements.lock.", 2
    if os.environ.get("CATS_TRACEBACK") == "1":
        traceback.print_exception(error)
    try:
        print(end="", flush=True)
    except OSError:
        sys.stdout = None  # what is left for it cannot be written, which Python would say once more
    print(f"cats: {one_line(said)}", file=sys.stderr)
    return status


def _terminate(*_) -> None:
    """SIGTERM ends a command as Ctrl-C does, so that it cleans up behind itself."""
    raise SystemExit(128 + signal.SIGTERM)


def _interrupted(arguments: argparse.Namespace) -> int:
    print(f"cats: interrupted; {RESUME.get(arguments.command, 'nothing was changed')}.", file=sys.stderr)
    return 130
