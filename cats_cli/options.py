"""The parser of `cats`, and the options that several of its commands have."""

import argparse
from functools import partial


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one sentence: the usage is a `--help` away."""

    def error(self, message: str):
        self.exit(2, f"cats: {message} (`{self.prog} --help` shows how).\n")


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
    try:
        number = kind(text.replace("_", ""))
    except ValueError:
        number = least - 1
    if not number >= least:  # as nan is not
        raise argparse.ArgumentTypeError(f"{text} is no {'whole ' * (kind is int)}number of at least {least}")
    return number


def share(text: str) -> float:
    """A number in [0, 1), as an option's value."""
    try:
        number = float(text)
    except ValueError:
        number = 1.0
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{text} is no share from 0 to below 1")
    return number


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
