"""The commands of `cats` and their options; `cats.cli` has what they do."""

import argparse
from functools import partial

from cats_cli import measure
from cats_cli.options import (
    Parser,
    Version,
    count,
    described,
    minutes,
    model,
    options,
    rule,
    sparsity,
    text,
    thresholds,
)


def parser() -> Parser:
    """The whole command line."""
    about = "CATS: contextually-aware thresholding for sparsity in language models."
    top = Parser(prog="cats", description=about)
    top.add_argument("--version", action=Version, nargs=0, help="show the version and end")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = partial(described, commands)
    sub = command(
        "calibrate",
        "measure a model's gate activations once, for thresholds at every sparsity",
        "cats calibrate --corpus python-docs --tokens 60000 --output thresholds.json",
    )
    rule(sub, "cats")
    model(sub)
    text(sub, split="train", tokens=60_000)
    sub.add_argument(
        "--batch-size", type=count, default=4, metavar="N", help="sequences a batch (default: 4)"
    )
    sub.add_argument("--output", required=True, metavar="FILE", help="thresholds file to write (.json)")

    sub = command(
        "inspect",
        "show a thresholds file, or what CATS saves on a model, as a table",
        "cats inspect thresholds.json --sparsity 0.5 0.7\n  cats inspect random:llama-2-7b",
    )
    sub.add_argument("target", help="a thresholds file (.json) or a model's name")
    sparsity(sub, default=[0.3, 0.5, 0.7, 0.9], several=True)

    sub = command(
        "perplexity",
        "compare the dense model with CATS, document by document",
        "cats perplexity --thresholds thresholds.json --sparsity 0.5 0.7 --documents 20",
    )
    model(sub)
    text(sub, split="test", tokens=None)
    rule(sub, None)
    thresholds(sub)
    sparsity(sub, default=[0.5], several=True)
    sub.add_argument("--documents", type=count, metavar="N", help="take N documents (default: all)")

    sub = command(
        "generate",
        "continue a prompt with the sparse model",
        'cats generate "Sparsity is" --thresholds thresholds.json --sparsity 0.5',
    )
    sub.add_argument("prompt", help="text to continue")
    model(sub)
    rule(sub, None)
    thresholds(sub)
    sparsity(sub, default=0.5, several=False)
    sub.add_argument("--new-tokens", type=count, default=64, metavar="N", help="tokens to add (default: 64)")

    _evaluate(command)
    _finetune(command)
    measure.declare(
        command(
            "measure", "time kernels, a layer or decoding, sparse against dense", "cats measure mlp --help"
        )
    )
    sub = command(
        "reproduce",
        "run chapters of the book with a profile of parameters",
        "cats reproduce --profile gpu\n  cats reproduce 03_perplexity -p seed=1 --output runs/",
    )
    sub.add_argument("chapters", nargs="*", metavar="CHAPTER", help="by name or number (default: all)")
    options(
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
    model(sub)
    sub.add_argument(
        "--tasks", nargs="+", metavar="T", default=["paper"], help="paper, or by name (default: paper)"
    )
    sub.add_argument(
        "--rule", nargs="+", metavar="R", default=["cats"], help="of cats.criteria (default: cats)"
    )
    sparsity(sub, default=[0.5], several=True)
    options(
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
    sub.add_argument("--thresholds", metavar="FILE", help="from `cats calibrate` (default: calibrate anew)")
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
    model(sub)
    options(
        sub,
        ("steps", int, 20, "N", "optimizer steps; 0 trains nothing"),
        ("batch", count, 4, "N", "sequences a step, over all processes"),
        ("rows-at-once", count, None, "N", "sequences in one pass of one process; without it, 4 at most"),
        ("sequence-length", count, 64, "N", "tokens a sequence"),
        ("lr", float, 1e-4, "X", "learning rate; the paper's is 1e-5"),
        ("tuning", str, "lora", "T", "lora or full"),
        ("train", str, "python-docs", "TEXT", "a corpus, task:<name>, sampled:<texts>, or a file"),
        ("heldout", str, "shakespeare", "TEXT", "text of another source, to measure on"),
        ("heldout-rows", count, 64, "N", "sequences to measure on, 60 or more to tell methods apart"),
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
    thresholds(sub)
    for option, what in (("plan", "run a plan instead (.yml)"), ("data-dir", "local mirrors of the tasks")):
        sub.add_argument(f"--{option}", metavar="PATH", help=what)
    sub.add_argument("--records", metavar="DIR", help="where records go (default: the output folder)")
    sub.add_argument("--minutes", type=minutes, metavar="N", help="stop after so long; the next call goes on")
    sub.add_argument("--dry-run", action="store_true", help="check everything and say what would run")
