"""What a run measures of a model besides its loss: zero-shot tasks on the curve."""

from collections.abc import Sequence

import torch
from torch import nn


def zero_shot(
    tokenizer, names: Sequence[str], *, documents: int | None, data_dir: str | None, crew, bf16: bool
):
    """A function of a model, sparse or dense, with adapters or not: its mean accuracy over tasks."""
    from cats.criteria.masking import Masking
    from cats.evaluation import tasks
    from cats.evaluation.hflm import MaskedHFLM
    from cats.evaluation.result import summarise
    from cats.evaluation.scoring import answer

    listed = tasks.names(list(names))
    tasks.check(listed, data_dir)
    loaded = [tasks.load(name, data_dir=data_dir, documents=documents, seed=0) for name in listed]

    def measure(model: nn.Module) -> float:
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        scores = []
        with Masking(model) as masking, torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            lm = MaskedHFLM(model, tokenizer, masking=masking)
            for task in loaded:
                lm.label = task.name
                scores.append(summarise(answer(task, lm, crew)[0])["acc"])
        return sum(scores) / len(scores)

    return measure
