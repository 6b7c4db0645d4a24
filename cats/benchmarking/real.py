"""The MLPs of a trained model with their own hidden states: masks as they come, not random ones."""

import torch

from cats import corpora
from cats.benchmarking.workload import Layer, clear_threshold, make_layer
from cats.calibration.calibrate import calibrate
from cats.core import structure
from cats.core.sparsify import sparsify
from cats.errors import CatsError
from cats.models import load as models


class RealModel:
    """A trained model, calibrated once: its MLPs at any sparsity; `model` and `data` are its provenance."""

    def __init__(
        self, name: str, *, dtype: str, device: str, corpus: str = corpora.DEFAULT, tokens: int = 16384,
        length: int = 512,
    ):  # fmt: skip
        loaded = models.load(name, dtype=dtype, device=device)
        if loaded.tokenizer is None:
            raise CatsError(f"{name} has no tokenizer: real masks need a trained model with its text.")
        self.net, self.tokenizer, self.model = loaded.model, loaded.tokenizer, loaded.info
        self.length = length
        train = self.batches(corpora.load(corpus), tokens)
        self.data = train.info
        self.thresholds = calibrate(self.net, train, source={"corpus": train.info})
        self.held_out = corpora.load(corpus, split="test")

    def batches(self, corpus, tokens: int):
        return corpora.batches(
            corpus, self.tokenizer, tokens=tokens, sequence_length=self.length, batch_size=1, pad=False
        )

    @torch.no_grad()
    def layers(self, sparsity: float, *, batch_size: int = 1, texts: bool = False) -> list[Layer]:
        """Every MLP at `sparsity`, its x [batch_size, d] the last tokens of one held-out text or of several.

        The thresholds are those of the calibration, so the sparsity that these tokens realise varies.
        """
        batches = self.batches(self.held_out, self.length * (batch_size if texts else 1))
        modules = structure.cats_mlps(sparsify(self.net, self.thresholds, sparsity))
        seen = [[] for _ in modules]
        hooks = [
            module.register_forward_pre_hook(lambda _, args, i=i: seen[i].append(args[0][0]))
            for i, module in enumerate(modules)
        ]
        for batch in batches:
            self.net(input_ids=batch["input_ids"].to(self.net.device), use_cache=False)
        for hook in hooks:
            hook.remove()
        inputs = [torch.stack([x[-1] for x in xs]) if texts else xs[0][-batch_size:].clone() for xs in seen]
        return [
            clear_threshold(make_layer(*_weights(module), x, module.activation, module.threshold.clone()))
            for module, x in zip(modules, inputs, strict=True)
        ]


def _weights(module) -> list[torch.Tensor]:
    return [weight.detach() for weight in (module.w_gate, module.w_up, module.w_down_t)]
