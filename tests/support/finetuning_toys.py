"""A recipe, texts and a plan for runs of fine-tuning that take seconds."""

import random

import evaluation_toys
import torch
from torch.nn import functional

from cats.finetuning import load
from cats.finetuning.data import collate

TOY = dict(
    steps=6, grid=(3,), batch=4, rows_at_once=2, sequence_length=32, lr=1e-2, dtype="float32", lora_r=4
)
CATS = dict(rule="cats", sparsity=0.5)
COMMAND = "finetune --model toy --train train.txt --heldout other.txt --heldout-rows 6 --sequence-length 32"
PLAN = """
defaults: {device: cpu, dtype: float32, train: train.txt, heldout: other.txt, heldout_rows: 8, batch: 4,
           rows_at_once: 4, sequence_length: 32, lora_r: 4, steps: 3, grid: [2], lr: 0.01,
           calibration: {corpus: train.txt, split: all, tokens: 1024, sequence_length: 64}}
runs:
  - {model: toy, record: toy, methods: [dense, cats: [0.5, 0.7], relufication], recalibrate: 512, save: true}
"""


def sentences(count: int, seed: int) -> str:
    draw = random.Random(seed)
    return "\n\n\n".join(" ".join(draw.choices(evaluation_toys.WORDS, k=40)) for _ in range(count))


def read(loaded, files, rows: int = 24, **options):
    given = dict(rows=rows, sequence_length=32, heldout_rows=6) | options
    return load(str(files / "train.txt"), str(files / "other.txt"), loaded.tokenizer, **given)


def heldout_nll(model, rows) -> float:
    """Mean nats a token, straight from the definition."""
    batch = collate(list(rows), 0)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    return float(functional.cross_entropy(logits.flatten(0, 1).float(), batch["labels"][:, 1:].flatten()))


def curve(outcome) -> list[float]:
    return [point["heldout_nll"] for point in outcome.points]
