"""200 random sequences of what is done with sparse models, each equal to a mask that is written by hand."""

import copy
import random
from collections import Counter

import hardening
import peft
import pytest
import torch
from toys import FAMILIES, constant_thresholds, tokens, toy
from transformers import AutoModelForCausalLM

from cats import Thresholds, cats_mlps, restore, set_sparsity, sparsify

STEPS = 6
MOST = 0.8  # a threshold is this times the sparsity
PARTS_OF_MLP = {"gate_proj", "up_proj", "down_proj", "gate_up_proj", "q_proj"}


class ByHand:
    """A model and what is known of it: the gate sparsity of each layer, or None where it is dense."""

    def __init__(self, draw: random.Random, folder):
        self.draw, self.folder = draw, folder
        self.family = draw.choice(sorted(FAMILIES))
        self.model = toy(self.family, seed=draw.randrange(100))
        thresholds = constant_thresholds(self.model, most=MOST)
        del thresholds.model["gate_signs"]  # training changes the weights, which would be refused
        self.thresholds = self.file(thresholds)
        self.levels: list[float] | None = None
        self.adapted = False

    def file(self, thresholds: Thresholds) -> Thresholds:
        thresholds.save(self.folder / "thresholds.json")
        return Thresholds.load(self.folder / "thresholds.json")

    def level(self) -> float | list[float]:
        """One for all layers, or one for each; 0 drops nothing."""
        several = [self.draw.choice((0.0, 0.3, 0.5, 0.9)) for _ in range(3)]
        given = self.draw.choice((several, self.draw.choice(several)))
        self.levels = given if isinstance(given, list) else [given] * 3
        return given

    def sparsify(self):
        sparsify(self.model, self.thresholds, self.level())

    def set_sparsity(self):
        if self.levels is not None:
            set_sparsity(self.model, self.thresholds, self.level())

    def restore(self):
        restore(self.model)
        self.levels = None

    def save_and_load(self):
        if not self.adapted:
            path = self.folder / f"saved{self.draw.randrange(1 << 30)}"
            self.model.save_pretrained(path)
            self.model = AutoModelForCausalLM.from_pretrained(path, dtype=self.model.dtype)

    def train(self):
        """A step on every weight that has a gradient, in training mode."""
        self.model.train()
        self.model(tokens(2, 8), labels=tokens(2, 8)).loss.backward()
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter -= 1e-3 * parameter.grad.sign()
                    parameter.grad = None
        self.model.eval()

    def cast(self):
        self.model = self.model.to(self.draw.choice((torch.float32, torch.float64, torch.bfloat16)))

    def copy(self):
        self.model = copy.deepcopy(self.model)

    def adapt(self):
        """LoRA with weights that are not zero on the MLP and on attention, then merged or taken out."""
        names = {name.split(".")[-1] for name, _ in self.model.named_modules()} & PARTS_OF_MLP
        config = peft.LoraConfig(r=2, target_modules=sorted(names), init_lora_weights=False)
        adapted = peft.get_peft_model(self.model, config)
        adapted(tokens(1, 4))
        self.model = adapted.merge_and_unload() if self.draw.random() < 0.5 else adapted.unload()
        self.model.eval()
        for parameter in self.model.parameters():
            parameter.requires_grad_(True)

    def check(self) -> None:
        """Logits as those of the dense model whose activations are masked by a hook of our own."""
        modules = [module for module in self.model.modules() if type(module).__name__ == "CatsMLP"]
        assert len(modules) == (0 if self.levels is None else 3)
        found = self.model(tokens()).logits
        dense = toy(self.family, dtype=self.model.dtype)
        state = {
            key: value for key, value in self.model.state_dict().items() if not key.endswith("threshold")
        }
        dense.load_state_dict(state)
        buffers = dict(self.model.named_buffers())  # the frequencies of rotary positions, which a cast rounds
        for name, buffer in dense.named_buffers():
            buffer.data = buffers[name].clone()
        if self.levels is not None:
            assert [module.sparsity for module in cats_mlps(self.model)] == self.levels
            for layer, level in zip(dense.model.layers, self.levels, strict=True):
                mask_by_hand(layer.mlp, float(torch.tensor(MOST).double() * level))
        expected = dense(tokens()).logits
        if self.levels is None:
            assert torch.equal(found, expected)
        else:
            torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
            wide = dense.dtype != torch.bfloat16
            assert not wide or (found - expected).abs().max() < 1e-4


def mask_by_hand(mlp, threshold: float) -> None:
    """Zero where the activation of the gate is below the threshold, nothing else."""
    activation = mlp.activation_fn if hasattr(mlp, "activation_fn") else mlp.act_fn

    class Masked(torch.nn.Module):
        def forward(self, gate):
            exact = activation(gate.float() if gate.dtype == torch.bfloat16 else gate)
            return activation(gate).masked_fill(exact.abs().double() < threshold, 0)

    setattr(mlp, "activation_fn" if hasattr(mlp, "activation_fn") else "act_fn", Masked())


OPERATIONS = {
    "sparsify": ByHand.sparsify,
    "set_sparsity": ByHand.set_sparsity,
    "restore": ByHand.restore,
    "save and load": ByHand.save_and_load,
    "train": ByHand.train,
    "cast": ByHand.cast,
    "deepcopy": ByHand.copy,
    "PEFT": ByHand.adapt,
}


@pytest.mark.parametrize("part", hardening.PARTS)
def test_a_sequence_of_operations_leaves_the_mask_that_was_asked_for(part, tmp_path, record_property):
    outcomes: Counter = Counter()
    for number in hardening.numbers(200, part):
        draw = random.Random(f"sequence:{number}")
        by_hand = ByHand(draw, tmp_path)
        done = ["sparsify", *draw.choices(list(OPERATIONS), k=STEPS)]
        for place, name in enumerate(done):
            try:
                OPERATIONS[name](by_hand)
                by_hand.check()
            except Exception as error:
                sequence = ", ".join(done[: place + 1])
                raise AssertionError(f"sequence {number}, {by_hand.family}: {sequence}") from error
        outcomes["equal to a mask by hand"] += 1
    record_property("model sequences", dict(outcomes))
