"""The parser of `cats`, and the options that several of its commands have."""

import argparse
import difflib
import math
import re
from collections.abc import Iterable
from functools import partial

_MOST = 2**31 - 1  # of a count; no tensor that a command makes has more rows


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one sentence: the usage is a `--help` away. `known`: the options it has."""

    def parse_known_args(self, args=None, namespace=None):
        self.set_defaults(known=list(self._option_string_actions))
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        self.exit(2, f"cats: {one_line(message)} (`{self.prog} --help` shows how).\n")

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            one_of = ", ".join(map(str, action.choices))
            message = f"invalid choice: {value!r}{near(value, action.choices)}, choose from {one_of}"
            raise argparse.ArgumentError(action, message)


def near(word: str, known: Iterable[str]) -> str:
    """The text " (did you mean X?)" of `cats.errors`, here without the seconds that the library takes."""
    found = difflib.get_close_matches(word.partition("=")[0], list(known), n=1)
    return f" (did you mean {found[0]}?)" if found else ""


def one_line(text: str) -> str:
    """A text that a terminal shows as one line: no control characters, no word of more than 200 letters."""
    shown = "".join(letter if letter.isprintable() else " " for letter in text)
    words = (word if len(word) <= 200 else f"{word[:100]}…{word[-20:]}" for word in shown.split(" "))
    return " ".join(filter(None, words))


class Version(argparse.Action):
    """Looks the version up when it is asked for: that takes longer than all else here."""

    def __call__(self, parser, *_):
        from importlib import metadata

        try:
            print("cats", metadata.version("cats-companion"))
        except metadata.PackageNotFoundError:
            parser.error("this clone is not installed: pip install -e . gives it a version")
        parser.exit()


def count(text: str, kind: type = int, least: int = 1) -> float:
    """A number of at least `least`, as an option's value."""
    value = number(text, kind)
    if not value >= least:  # as nan is not
        raise argparse.ArgumentTypeError(f"{text} is no {'whole ' * (kind is int)}number of at least {least}")
    if value > _MOST:
        raise argparse.ArgumentTypeError(f"{text} is more than {_MOST:,}")
    return value


def share(text: str) -> float:
    """A number in [0, 1), as an option's value."""
    value = number(text, float)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is no share from 0 to below 1")
    return value


def number(text: str, kind: type) -> float:
    """The value of a decimal number, nan for any other text: Python's own int and float take "1_0" too."""
    pattern = r"[-+]?\d+" if kind is int else r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?"
    if not re.fullmatch(pattern, text, re.ASCII):
        return math.nan
    return kind(text) if len(text) < 400 else math.inf


minutes = partial(count, kind=float, least=0)


def described(commands, name: str, what: str, example: str) -> argparse.ArgumentParser:
    """A command of the group `commands`, with what it does and an example in its help."""
    return commands.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def options(sub: argparse.ArgumentParser, *rows: tuple) -> None:
    """Add options of one value: (name, kind, default, metavar, what it is)."""
    for option, kind, default, metavar, what in rows:
        shown = "none" if default in (None, "") else default
        sub.add_argument(
            f"--{option}",
            type=kind,
            default=default,
            metavar=metavar,
            help=f"{what} (default: {shown})",
        )


def model(sub: argparse.ArgumentParser) -> None:
    options(
        sub,
        ("model", str, "smollm2-135m-instruct", "NAME", "embedded name, hub id, folder or random:<geometry>"),
        ("dtype", str, "float32", "T", "float32, bfloat16, float16"),
    )
    sub.add_argument("--device", metavar="D", help="cpu or cuda (default: cpu, or what a plan says)")
    natural = partial(count, least=0)
    sub.add_argument("--seed", type=natural, default=0, metavar="N", help="of random choices (default: 0)")


def text(sub: argparse.ArgumentParser, *, split: str, tokens: int | None) -> None:
    known = "python-docs, package-docs, shakespeare, refinedweb, c4, wikitext2, a path"
    options(
        sub,
        ("corpus", str, "python-docs", "NAME", known),
        ("split", str, split, "S", "of the corpus"),
        ("bos", str, "auto", "POLICY", "auto, always or never"),
        ("sequence-length", count, 512, "N", "tokens a sequence"),
        *([("tokens", count, tokens, "N", "to take")] if tokens else []),
    )


def thresholds(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--thresholds", metavar="FILE", help="from `cats calibrate` (default: the one shipped)")


def rule(sub: argparse.ArgumentParser, default: str | None) -> None:
    shown = default or "that of the thresholds, else cats"
    sub.add_argument("--rule", choices=["cats", "centred"], default=default, help=f"(default: {shown})")


def sparsity(sub: argparse.ArgumentParser, *, default, several: bool) -> None:
    shown = " ".join(map(str, default)) if several else default
    sub.add_argument(
        "--sparsity",
        type=float,
        nargs="+" if several else None,
        default=default,
        metavar="S",
        help=f"share of gate activations to drop, in [0, 1) (default: {shown})",
    )
