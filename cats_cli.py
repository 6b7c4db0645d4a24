"""What a shell user types: `cats --help` answers at once, as this module imports nothing of the library."""

import argparse
import contextlib
import signal
import sys
from functools import partial

WITH_PLAN = {
    *("--plan", "--device", "--data-dir", "--output", "--records", "--minutes", "--so-far", "--dry-run"),
}
RESUME = {
    "calibrate": "the same command goes on from the last checkpoint",
    "reproduce": "the same command keeps the chapters that are done",
    "evaluate": "the same command goes on with the next task",
    "finetune": "the same command goes on from the last checkpoint",
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


minutes = partial(count, kind=float, least=0)


def parser() -> Parser:
    """The whole command line."""
    about = "CATS: contextually-aware thresholding for sparsity in language models."
    top = Parser(prog="cats", description=about)
    top.add_argument("--version", action=Version, nargs=0, help="show the version and end")
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
    sub.add_argument("--batch-size", type=count, default=4, metavar="N", help="rows a batch (default: 4)")
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
    sub.add_argument("--documents", type=count, metavar="N", help="take N documents (default: all)")

    sub = command(
        "generate",
        "continue a prompt with the sparse model",
        'cats generate "Sparsity is" --thresholds thresholds.json --sparsity 0.5',
    )
    sub.add_argument("prompt", help="text to continue")
    _model(sub)
    _thresholds(sub)
    _sparsity(sub, default=0.5, several=False)
    sub.add_argument("--new-tokens", type=count, default=64, metavar="N", help="tokens to add (default: 64)")

    _evaluate(command)
    _finetune(command)
    sub = command(
        "reproduce",
        "run chapters of the book with a profile of parameters",
        "cats reproduce --profile gpu\n  cats reproduce 03_perplexity -p seed=1 --output runs/",
    )
    sub.add_argument("chapters", nargs="*", metavar="CHAPTER", help="by name or number (default: all)")
    _options(
        sub,
        ("profile", str, "cpu", "NAME", "of book/params, or a .yml"),
        ("jobs", count, 2, "N", "chapters at a time"),
    )
    sub.add_argument(
        "-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE", help="over the profile"
    )
    where = sub.add_mutually_exclusive_group()
    where.add_argument(
        "--output", metavar="FOLDER", help="for the executed notebooks (default: _build/live/book)"
    )
    where.add_argument("--in-place", action="store_true", help="replace the committed notebooks")
    sub.add_argument("--force", action="store_true", help="run again what is up to date")
    return top


def _evaluate(command) -> None:
    sub = command(
        "evaluate",
        "score a model, dense and sparse, on the paper's tasks",
        "cats evaluate --tasks paper --rule cats chess --sparsity 0.5 0.7 --data-dir mirrors --output runs\n"
        "  cats evaluate --plan data/plans/three-models.yml --output runs --minutes 20\n"
        "  accelerate launch --num_processes 2 -m cats_cli evaluate --device cuda --tasks paper",
    )
    _model(sub)
    sub.add_argument(
        "--tasks", nargs="+", metavar="T", default=["paper"], help="paper, or by name (default: paper)"
    )
    sub.add_argument(
        "--rule", nargs="+", metavar="R", default=["cats"], help="of cats.criteria (default: cats)"
    )
    _sparsity(sub, default=[0.5], several=True)
    _options(
        sub,
        ("level", str, "rule", "L", "what --sparsity is of: rule or model"),
        ("prefill", str, "masked", "P", "masked or dense prompts"),
        ("first-token", str, "masked", "P", "masked or dense"),
        ("last-share", float, 1.0, "X", "mask only this last share of a prompt"),
        ("corpus", str, "python-docs", "NAME", "to calibrate on"),
        ("tokens", count, 60_000, "N", "to calibrate on"),
        ("output", str, "runs", "DIR", "result files, one a task"),
    )
    sub.add_argument(
        "--data-dir", metavar="DIR", help="mirrors of the tasks (default: $CATS_EVAL_DATA, then the hub)"
    )
    sub.add_argument("--documents", type=count, metavar="N", help="a seeded draw of N a task (default: all)")
    sub.add_argument("--chat", action="store_true", help="render prompts with the model's chat template")
    sub.add_argument(
        "--batch-tokens", type=count, metavar="N", help="tokens a batch (default: found automatically)"
    )
    sub.add_argument("--plan", metavar="FILE", help="run a plan instead (.yml); start it twice to share it")
    sub.add_argument(
        "--records", metavar="DIR", help="of a plan: where its records go (default: the output folder)"
    )
    sub.add_argument("--minutes", type=minutes, metavar="N", help="begin no task after so long")
    sub.add_argument("--so-far", action="store_true", help="of a plan: only record what is finished")
    sub.add_argument("--dry-run", action="store_true", help="check everything and say what would run")
    sub = command(
        "lm_eval",
        "run lm-eval's own command line, which then loads sparse models that save_pretrained wrote",
        "cats lm_eval --model hf --model_args pretrained=FOLDER --tasks piqa,arc_easy --batch_size 8",
    )
    sub.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on to lm-eval")


def _finetune(command) -> None:
    sub = command(
        "finetune",
        "fine-tune with the mask on, each method alike, and record the curves",
        "cats finetune --method dense cats:0.5 relufication --steps 20 --output runs\n"
        "  cats finetune --plan data/plans/finetuning/general.yml --output runs --minutes 20\n"
        "  accelerate launch --num_processes 2 -m cats_cli finetune --device cuda --plan PLAN.yml",
    )
    _model(sub)
    _options(
        sub,
        ("steps", int, 20, "N", "optimizer steps; 0 trains nothing"),
        ("batch", count, 4, "N", "rows a step, over all processes"),
        ("rows-at-once", count, None, "N", "rows in one pass of one process; without it, 4 at most"),
        ("sequence-length", count, 64, "N", "tokens a row"),
        ("lr", float, 1e-4, "X", "learning rate; the paper's is 1e-5"),
        ("tuning", str, "lora", "T", "lora or full"),
        ("train", str, "python-docs", "TEXT", "a corpus, task:<name>, sampled:<texts>, or a file"),
        ("heldout", str, "shakespeare", "TEXT", "text of another source, to measure on"),
        ("heldout-rows", count, 8, "N", "rows to measure on"),
        ("distil", float, 0.0, "W", "weight of the KL divergence from the dense model"),
        ("anneal", float, 0.0, "X", "share of the steps over which sparsity rises"),
        ("recalibrate", int, 0, "N", "tokens to estimate thresholds on once more at the end"),
        ("best", str, "", "B", "loss or accuracy: keep the best checkpoint, not the last"),
        ("output", str, "runs", "DIR", "one folder a run, and the record"),
    )
    sub.add_argument("--method", nargs="+", default=["dense", "cats:0.5"], metavar="M", help="rule:sparsity")
    sub.add_argument("--grid", nargs="+", type=int, default=[], metavar="N", help="steps to measure at")
    sub.add_argument("--learn-thresholds", action="store_true", help="by a straight-through estimator")
    sub.add_argument("--checkpointing", action="store_true", help="recompute activations: less memory")
    sub.add_argument("--compile", action="store_true", help="compile the layers: faster steps on a GPU")
    sub.add_argument("--unequal", action="store_true", help="the reference code's unequal batches")
    sub.add_argument("--save", action="store_true", help="keep each model, merged")
    _thresholds(sub)
    for option, what in (("plan", "run a plan instead (.yml)"), ("data-dir", "local mirrors of the tasks")):
        sub.add_argument(f"--{option}", metavar="PATH", help=what)
    sub.add_argument("--records", metavar="DIR", help="where records go (default: the output folder)")
    sub.add_argument("--minutes", type=minutes, metavar="N", help="stop after so long; the next call goes on")
    sub.add_argument("--dry-run", action="store_true", help="check everything and say what would run")


def _options(sub: argparse.ArgumentParser, *rows: tuple) -> None:
    for option, kind, default, metavar, what in rows:
        shown = f"{what} (default: {default or 'none'})"
        sub.add_argument(f"--{option}", type=kind, default=default, metavar=metavar, help=shown)


def _model(sub: argparse.ArgumentParser) -> None:
    _options(
        sub,
        ("model", str, "smollm2-135m-instruct", "NAME", "embedded name, hub id, folder or random:<geometry>"),
        ("dtype", str, "float32", "T", "float32, bfloat16, float16"),
    )
    sub.add_argument("--device", metavar="D", help="cpu or cuda (default: cpu, or what a plan says)")
    natural = partial(count, least=0)
    sub.add_argument("--seed", type=natural, default=0, metavar="N", help="of random choices (default: 0)")


def _text(sub: argparse.ArgumentParser, *, split: str, tokens: int | None) -> None:
    known = "python-docs, package-docs, shakespeare, refinedweb, c4, wikitext2, a path"
    _options(
        sub,
        ("corpus", str, "python-docs", "NAME", known),
        ("split", str, split, "S", "of the corpus"),
        ("bos", str, "auto", "POLICY", "auto, always or never"),
        ("sequence-length", count, 512, "N", "tokens a row"),
        *([("tokens", count, tokens, "N", "to take")] if tokens else []),
    )


def _thresholds(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--thresholds", metavar="FILE", help="from `cats calibrate` (default: the one shipped)")


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


if __name__ == "__main__":
    sys.exit(main())
