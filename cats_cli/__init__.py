"""What a shell user types: `cats --help` answers at once, as nothing here imports the library.

A package beside `cats`, not in it: importing anything of `cats` imports PyTorch and Transformers first.
"""

import argparse
import contextlib
import signal
import sys

from cats_cli.commands import parser

WITH_PLAN = {
    *("--plan", "--device", "--data-dir", "--output", "--records", "--minutes", "--so-far", "--dry-run"),
}
RESUME = {
    "calibrate": "the same command goes on from the last checkpoint",
    "reproduce": "the same command keeps the chapters that are done",
    "evaluate": "the same command goes on with the next task",
    "finetune": "the same command goes on from the last checkpoint",
    "measure": "no record was written of what it was measuring",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns 0, 2 after a user's error (one sentence on stderr), 130 if interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    with contextlib.suppress(ValueError):  # where this is not the main thread
        signal.signal(signal.SIGTERM, _terminate)
    if argv[:1] == ["lm_eval"]:  # argparse would take lm-eval's options for its own
        argv = [argv[0], "--", *argv[1:]]
    arguments = _parsed(argv)
    try:
        from cats import cli
        from cats.errors import CatsError
    except KeyboardInterrupt:
        return _interrupted(arguments)
    except ImportError as error:
        print(f"cats: {error.name} is missing: install this project's requirements.lock.", file=sys.stderr)
        return 2
    if "device" in arguments and not getattr(arguments, "plan", None):
        arguments.device = arguments.device or "cpu"
    try:
        getattr(cli, arguments.command)(arguments)
        sys.stdout.flush()
        return 0
    except CatsError as error:
        print(f"cats: {error}", file=sys.stderr)
    except BrokenPipeError:
        sys.stdout = None  # the reader, `head` say, has seen enough
    except (OSError, MemoryError) as error:
        print(f"cats: {error or 'this needs more memory than there is'}.", file=sys.stderr)
    except KeyboardInterrupt:
        return _interrupted(arguments)
    return 2


def _parsed(argv: list[str]) -> argparse.Namespace:
    """The arguments; one that no command has, or that a plan says itself, is an error."""
    top = parser()
    arguments, unknown = top.parse_known_args(argv)
    top.prog = f"cats {arguments.command}"
    if unknown:
        top.error(f"unrecognized arguments: {' '.join(unknown)}")
    for typed in (each.partition("=")[0] for each in argv if getattr(arguments, "plan", None)):
        if typed.startswith("--") and not any(option.startswith(typed) for option in WITH_PLAN):
            top.error(f"{typed} is nothing beside --plan, whose file says it: leave one of the two out")
    return arguments


def _terminate(*_) -> None:
    """SIGTERM ends a command as Ctrl-C does, so that it cleans up behind itself."""
    raise SystemExit(128 + signal.SIGTERM)


def _interrupted(arguments: argparse.Namespace) -> int:
    print(f"cats: interrupted; {RESUME.get(arguments.command, 'nothing was changed')}.", file=sys.stderr)
    return 130
