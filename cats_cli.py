"""What a shell user types: `cats --help` answers at once because this module imports nothing of the library."""

import argparse
import sys

RESUME = {
    "calibrate": "the same command goes on from the last checkpoint",
    "reproduce": "the same command keeps the chapters that are done",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns 0, 2 after an error of the user's (one sentence on stderr), 130 if interrupted."""
    arguments = parser().parse_args(argv)
    try:
        from cats import cli
        from cats.errors import CatsError
    except KeyboardInterrupt:
        return _interrupted(arguments)
    except ImportError as error:
        print(f"cats: {error.name} is missing: install this project's requirements.lock.", file=sys.stderr)
        return 2
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


def _interrupted(arguments: argparse.Namespace) -> int:
    print(f"cats: interrupted; {RESUME.get(arguments.command, 'nothing was changed')}.", file=sys.stderr)
    return 130


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="cats", description="CATS: contextually-aware thresholding for sparsity in language models."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, what: str, example: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=what,
            description=f"{what[0].upper()}{what[1:]}.",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    sub = command(
        "calibrate",
        "measure a model's gate activations once, for thresholds at every sparsity",
        "cats calibrate --corpus python-docs --tokens 60000 --output thresholds.json",
    )
    _model(sub)
    _text(sub, split="train", tokens=60_000)
    sub.add_argument("--batch-size", type=int, default=4, metavar="N", help="rows a batch (default: 4)")
    sub.add_argument("--output", required=True, metavar="FILE", help="thresholds file to write (.json)")

    sub = command(
        "inspect",
        "show a thresholds file, or what CATS saves on a model, as a table",
        "cats inspect thresholds.json --sparsity 0.5 0.7\n  cats inspect random:llama-2-7b",
    )
    sub.add_argument("target", help="a thresholds file (.json) or a model's name")
    _sparsity(sub, default=[0.3, 0.5, 0.7, 0.9], several=True)

    sub = command(
        "perplexity",
        "compare the dense model with CATS, document by document",
        "cats perplexity --thresholds thresholds.json --sparsity 0.5 0.7 --documents 20",
    )
    _model(sub)
    _text(sub, split="test", tokens=None)
    _thresholds(sub)
    _sparsity(sub, default=[0.5], several=True)
    sub.add_argument("--documents", type=int, default=None, metavar="N", help="take N documents (default: all)")

    sub = command(
        "generate",
        "continue a prompt with the sparse model",
        'cats generate "Sparsity is" --thresholds thresholds.json --sparsity 0.5',
    )
    sub.add_argument("prompt", help="text to continue")
    _model(sub)
    _thresholds(sub)
    _sparsity(sub, default=0.5, several=False)
    sub.add_argument("--new-tokens", type=int, default=64, metavar="N", help="tokens to add (default: 64)")

    sub = command(
        "reproduce",
        "run chapters of the book with a profile of parameters",
        "cats reproduce --profile gpu\n  cats reproduce 03_perplexity -p seed=1 --output runs/",
    )
    sub.add_argument("chapters", nargs="*", metavar="CHAPTER", help="by name or number (default: all)")
    sub.add_argument("--profile", default="cpu", metavar="NAME", help="of book/params, or a .yml (default: cpu)")
    sub.add_argument("-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE", help="over the profile")
    where = sub.add_mutually_exclusive_group()
    where.add_argument("--output", metavar="FOLDER", help="for the executed notebooks (default: _build/live/book)")
    where.add_argument("--in-place", action="store_true", help="replace the committed notebooks")
    sub.add_argument("--force", action="store_true", help="run again what is up to date")
    return top


def _model(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--model",
        default="smollm2-135m-instruct",
        metavar="NAME",
        help="embedded name, hub id, folder or random:<geometry> (default: smollm2-135m-instruct)",
    )
    sub.add_argument("--device", default="cpu", metavar="D", help="cpu or cuda (default: cpu)")
    sub.add_argument("--dtype", default="float32", metavar="T", help="float32, bfloat16, float16 (default: float32)")
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="of random choices (default: 0)")


def _text(sub: argparse.ArgumentParser, *, split: str, tokens: int | None) -> None:
    sub.add_argument(
        "--corpus",
        default="python-docs",
        metavar="NAME",
        help="python-docs, shakespeare, a .txt or .jsonl path, refinedweb, c4, wikitext2 (default: python-docs)",
    )
    sub.add_argument("--split", default=split, metavar="S", help=f"of the corpus (default: {split})")
    sub.add_argument("--bos", default="auto", metavar="POLICY", help="auto, always or never (default: auto)")
    sub.add_argument("--sequence-length", type=int, default=512, metavar="N", help="tokens a row (default: 512)")
    if tokens:
        sub.add_argument("--tokens", type=int, default=tokens, metavar="N", help=f"to take (default: {tokens})")


def _thresholds(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--thresholds", metavar="FILE", help="from `cats calibrate` (default: the one shipped for the model)")


def _sparsity(sub: argparse.ArgumentParser, *, default, several: bool) -> None:
    shown = " ".join(map(str, default)) if several else default
    sub.add_argument(
        "--sparsity",
        type=float,
        nargs="+" if several else None,
        default=default,
        metavar="S",
        help=f"share of gate activations to drop, in [0, 1) (default: {shown})",
    )
