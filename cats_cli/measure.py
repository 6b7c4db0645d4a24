"""The programs of `cats measure` and their options; each is a module of that name in cats.benchmarking."""

import argparse
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from cats_cli.options import count, described, options, share

_positive = partial(count, kind=float, least=0)
_natural = partial(count, least=0)
_SHAPE = "hidden x intermediate size, random weights"
_MODELS = "geometries or trained models"
_DENSE = "dense variants to time"
_CALIBRATION = "calibration tokens of a trained model"


def _matching(pattern: str, advice: str) -> Callable[[str], str]:
    """The type of an option whose value is a text of a form; what is wrong is said before all measuring."""

    def checked(text: str) -> str:
        if not re.fullmatch(pattern, text, re.ASCII):
            raise argparse.ArgumentTypeError(f"{text!r} is {advice}")
        return text

    return checked


_shape = _matching(
    "[1-9][0-9]{0,6}[xX][1-9][0-9]{0,6}", "no shape: write hidden x intermediate size, as in 4096x11008"
)
_dtype = _matching("bfloat16|float16|float32", "no dtype here: use bfloat16, float16 or float32")
_slug = _matching(
    "[A-Za-z0-9][A-Za-z0-9 ._-]{0,99}", "no name for a record: use 100 letters and digits at most"
)


@dataclass(frozen=True)
class Program:
    """What a program measures, for `--help`; an example; and a function that declares its options."""

    what: str
    example: str
    declare: Callable[[argparse.ArgumentParser], None]


def declare(sub: argparse.ArgumentParser) -> None:
    """Declare a subcommand for each of PROGRAMS."""
    programs = sub.add_subparsers(dest="program", required=True, metavar="PROGRAM")
    for name, program in PROGRAMS.items():
        program.declare(described(programs, name, program.what, program.example))


def _several(sub: argparse.ArgumentParser, *rows: tuple) -> None:
    for option, kind, default, metavar, what in rows:
        shown = "all" if default is None else " ".join(map(str, default)) or "none"
        sub.add_argument(
            f"--{option}", type=kind, nargs="+" if default != [] else "*", default=default, metavar=metavar,
            help=f"{what} (default: {shown})",
        )  # fmt: skip


def _common(sub: argparse.ArgumentParser, *, dtype: str = "bfloat16", record: bool = True) -> None:
    options(
        sub,
        ("dtype", _dtype, dtype, "T", "bfloat16, float16, float32"),
        ("seed", _natural, 0, "N", "of random choices"),
    )
    if record:
        sub.add_argument(
            "--slug", type=_slug, metavar="NAME", help="name of the record (default: the device's)"
        )
        sub.add_argument("--output", metavar="DIR", help="folder of the record (default: data/records)")
    sub.add_argument(
        "--quick", action="store_true", help="few runs, also on a CPU; no record without --output"
    )


def _mlp(sub: argparse.ArgumentParser) -> None:
    shapes = ["4096x11008", "4096x14336", "5120x13824", "8192x28672"]
    _several(
        sub,
        ("shapes", _shape, shapes, "DxM", _SHAPE),
        ("sparsity", share, [0.0, 0.3, 0.5, 0.7, 0.9], "S", "share of gate activations to drop"),
        ("dense", str, None, "V", _DENSE),
        ("variants", str, None, "V", "sparse variants to time"),
    )
    _trained(sub)
    _common(sub)


def _trained(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--model", metavar="NAME", help="weights, inputs and thresholds of this trained model instead"
    )
    options(sub, ("tokens", count, 16_384, "N", "calibration tokens for --model"))


def _batch(sub: argparse.ArgumentParser) -> None:
    options(sub, ("shape", _shape, "4096x11008", "DxM", _SHAPE))
    _several(
        sub,
        ("batch-sizes", count, [1, 2, 4, 8, 16], "B", "tokens in one call"),
        ("sparsity", share, [0.5, 0.7, 0.9], "S", "share of gate activations to drop"),
        ("correlation", share, [0.0, 0.9], "R", "of random inputs, pairwise"),
        ("dense", str, ["dense_eager", "dense_max_autotune", "dense_coordinate_descent"], "V", _DENSE),
    )
    _trained(sub)
    _common(sub)


def _centred(sub: argparse.ArgumentParser) -> None:
    _several(
        sub,
        ("shapes", _shape, ["4096x11008", "4096x14336", "1536x8960"], "DxM", _SHAPE),
        ("sparsity", share, [0.3, 0.5, 0.7], "S", "sparsity of CATS that reads the same bytes"),
        ("dense", str, None, "V", _DENSE),
    )
    _common(sub)


def _decode(sub: argparse.ArgumentParser) -> None:
    _several(
        sub,
        ("models", str, ["llama-2-7b", "mistral-7b", "llama-2-13b"], "NAME", _MODELS),
        ("sparsity", share, [0.5, 0.7, 0.9], "S", "share of gate activations to drop"),
        ("new", count, [128, 512, 2048], "N", "tokens to decode"),
        ("dense", str, ["generate_eager", "generate_static", "loop"], "V", _DENSE),
        ("sparse", str, None, "V", "sparse variants to time"),
    )
    options(
        sub,
        ("prompt", count, 128, "N", "tokens of the prompt"),
        ("layers", count, None, "N", "keep so many layers of a geometry"),
        ("tokens", count, 32_768, "N", _CALIBRATION),
        ("runs", count, 3, "N", "of each variant"),
        ("repeat-limit", count, 512, "N", "longest output that is run repeatedly"),
        ("generate-limit", count, 128, "N", "longest output of generate()"),
    )
    _common(sub)


def _step(sub: argparse.ArgumentParser) -> None:
    _several(
        sub,
        ("models", str, ["llama-2-7b"], "NAME", _MODELS),
        ("sparsity", share, [0.5, 0.9], "S", "share of gate activations to drop"),
        ("new", count, [32], "N", "tokens that the cache has room for"),
    )
    options(
        sub,
        ("prompt", count, 128, "N", "tokens of the prompt"),
        ("layers", count, None, "N", "keep so many layers of a geometry"),
        ("tokens", count, 32_768, "N", _CALIBRATION),
    )
    sub.set_defaults(dense=["loop"])
    _common(sub)


def _overlap(sub: argparse.ArgumentParser) -> None:
    options(
        sub,
        ("model", str, "smollm2-135m-instruct", "NAME", "a trained model"),
        ("corpus", str, "python-docs", "NAME", "to calibrate on and to measure with"),
        ("tokens", count, 32_768, "N", "calibration tokens"),
        ("length", count, 192, "N", "tokens of a held-out sequence"),
        ("sequences", count, 64, "N", "held-out sequences"),
    )
    _several(
        sub,
        ("sparsity", share, [0.5, 0.7, 0.9], "S", "share of gate activations to drop"),
        ("batch-sizes", count, [1, 2, 4, 8, 16, 32, 64], "B", "masks that are united"),
    )
    _common(sub)


def _tune(sub: argparse.ArgumentParser) -> None:
    options(
        sub,
        ("shape", _shape, "4096x11008", "DxM", _SHAPE),
        ("correlation", share, 0.0, "R", "of the inputs, pairwise"),
    )
    _several(
        sub,
        ("batch-sizes", count, [2, 8], "B", "tokens in one call"),
        ("sparsity", share, [0.5, 0.9], "S", "share of gate activations to drop"),
    )
    _common(sub, record=False)


def _cpu(sub: argparse.ArgumentParser) -> None:
    cores = os.cpu_count() or 1
    sub.add_argument(
        "--shapes", type=_shape, nargs="*", default=["576x1536", "2048x5632", "4096x11008"], metavar="DxM",
        help=f"{_SHAPE}; none with no value (default: 576x1536 2048x5632 4096x11008)",
    )  # fmt: skip
    sub.add_argument(
        "--models", nargs="*", default=["smollm2-135m-instruct"], metavar="NAME",
        help=f"{_MODELS}; none with no value (default: smollm2-135m-instruct)",
    )  # fmt: skip
    _several(
        sub,
        ("sparsity", share, [0.0, 0.5, 0.7], "S", "share of gate activations to drop"),
        ("threads", count, sorted({1, cores}), "N", "threads of PyTorch"),
    )
    options(
        sub,
        ("batch-size", count, 1, "B", "tokens of one call of the MLP"),
        ("seconds", _positive, 15.0, "S", "to measure a shape for"),
        ("prompt", count, 64, "N", "tokens of the prompt"),
        ("new", count, 64, "N", "tokens to decode"),
        ("rounds", count, 7, "N", "of dense and sparse decoding in turns"),
        ("layers", count, None, "N", "keep so many layers of a geometry"),
        ("tokens", count, 8192, "N", "calibration tokens where no thresholds are shipped"),
    )
    sub.add_argument("--compiled", action="store_true", help="also torch.compile (needs a C++ compiler)")
    _common(sub, dtype="float32")


def _checks(sub: argparse.ArgumentParser) -> None:
    _several(sub, ("tools", str, None, "TOOL", "plain, memcheck, racecheck"))
    options(sub, ("jobs", count, 1, "N", "processes of the plain tests"))
    sub.add_argument(
        "--select", metavar="WORDS", help="pytest's -k (default: all, the small ones under compute-sanitizer)"
    )
    _common(sub)


def _book(sub: argparse.ArgumentParser) -> None:
    _several(sub, ("targets", str, ["book", "book", "test"], "TARGET", "targets of make, one after another"))
    sub.add_argument("--slug", metavar="NAME", help="name of the record (default: the device's)")
    sub.add_argument("--output", metavar="DIR", help="folder of the record (default: data/records)")
    sub.set_defaults(quick=False)


PROGRAMS = {
    "mlp": Program(
        "latency of one gated MLP, CATS against dense",
        "cats measure mlp --shapes 4096x11008 --sparsity 0.5",
        _mlp,
    ),
    "batch": Program(
        "latency of one gated MLP against the batch size", "cats measure batch --batch-sizes 1 4 16", _batch
    ),
    "centred": Program(
        "latency of the centred rule beside CATS at the same bytes",
        "cats measure centred --shapes 4096x11008",
        _centred,
    ),
    "decode": Program(
        "tokens per second of greedy decoding, CATS against dense",
        "cats measure decode --models llama-2-7b --new 128",
        _decode,
    ),
    "step": Program(
        "the time of each kernel of one decoding step", "cats measure step --models llama-2-7b", _step
    ),
    "overlap": Program(
        "how many neurons several tokens need together", "cats measure overlap --sparsity 0.5", _overlap
    ),
    "tune": Program(
        "launch settings of the batch kernels, from fast to slow",
        "cats measure tune --batch-sizes 8 16",
        _tune,
    ),
    "cpu": Program(
        "latency and decoding on this machine's CPU", "cats measure cpu --shapes 576x1536 --threads 1 2", _cpu
    ),
    "book": Program(
        "what the two commands of the README take in a fresh clone",
        "cats measure book --targets book test",
        _book,
    ),
    "checks": Program(
        "the tests of the kernels on a GPU, also under compute-sanitizer",
        "cats measure checks --tools plain",
        _checks,
    ),
}
