"""GRIFFIN (arXiv 2404.01365): one set of neurons for each sequence, those that its prompt uses most.

A prompt is read dense; a neuron's score is the norm over the prompt of its activation, each token's
activations divided by their norm first. Ambiguous in the source: what of a likelihood task is the prompt. The
released code scores one last token and chooses from all before it; here the set comes from the context but
for its last token, and holds wherever an output is scored. Running text has no prompt: the first half of a
window is taken for it, so that half of its tokens are masked. The set depends on one sequence alone, so it is
chosen for each row of a batch.
"""

import torch
from torch import Tensor

from cats.core.structure import find_gated_mlps
from cats.criteria.rule import register
from cats.criteria.sited import SitedRule, drop_lowest
from cats.criteria.sites import Call, Site
from cats.errors import CatsError

_ROWS = 1024  # sets kept for decoding: more than prompts are continued together


@register
class Griffin(SitedRule):
    """The rule `griffin`: its sparsity is the share of neurons dropped behind the prompt, whole ones."""

    name = "griffin"
    title = "GRIFFIN (one set a sequence)"
    what = "the neurons that matter least to the prompt are dropped for the whole sequence behind it"
    neurons = True

    def max_model_sparsity(self, shape):
        return shape.mlp_weights / shape.block_weights

    def measure(self, model, batches=None, progress=True) -> None:
        """Nothing: no text is read."""

    def sites(self, model, state, sparsity):
        return [
            Site(
                mlp.layer,
                "down",
                mlp.down,
                Choice(sparsity),
                3 * mlp.hidden_size,
                neurons=True,
                whole_sequence=True,
            )
            for mlp in find_gated_mlps(model)
        ]


class Choice:
    """What is kept of h [B, T, m], the input of W_down of one layer: sets of the last prompts."""

    def __init__(self, share: float):
        self.share = share
        self._sets: list[Tensor] = []
        self._decoding = False

    def __call__(self, h: Tensor, call: Call | None = None) -> Tensor:
        states = h if h.ndim == 3 else h[None]
        decoding = states.shape[1] == 1 if call is None else call.phase == "decode"
        keep = self._decode(states) if decoding else self._prefill(states, call)
        return keep.expand(states.shape).reshape(h.shape)

    def _decode(self, states: Tensor) -> Tensor:
        self._decoding = True
        rows = len(states)
        if sum(map(len, self._sets)) < rows:
            raise CatsError("griffin decodes behind a prompt that it has read: pass the prompt in one call.")
        self._sets = [torch.cat(self._sets)[-rows:]]
        return self._sets[0][:, None]

    def select(self, rows: Tensor) -> None:
        """Decoding goes on with these rows [B] of the last call alone."""
        self._sets = [self._sets[0][rows]]

    def _prefill(self, states: Tensor, call: Call | None) -> Tensor:
        if self._decoding:
            self._sets, self._decoding = [], False
        valid = None if call is None else call.valid
        valid = torch.ones(states.shape[:2], dtype=torch.bool) if valid is None else valid
        valid = valid.to(states.device)
        lengths = valid.sum(1)
        if call is None:
            prompt = lengths
        else:
            prompt = torch.zeros_like(lengths) if call.prompt is None else call.prompt.to(states.device)
            prompt = torch.where(prompt > 0, prompt, (lengths + 1) // 2)
        inside = (valid.cumsum(1) - 1 < prompt[:, None])[..., None]
        chosen = drop_lowest(neuron_scores(states, inside & valid[..., None]), self.share)
        self._sets.append(chosen)
        while len(self._sets) > 1 and sum(map(len, self._sets[1:])) >= _ROWS:
            self._sets.pop(0)
        return chosen[:, None] | inside


def neuron_scores(states: Tensor, inside: Tensor) -> Tensor:
    """[B, m]: the squared norm over tokens of h [B, T, m] over each token's norm; inside [B, T, 1] counts."""
    squares = states.float().square()
    shares = squares / squares.sum(-1, keepdim=True).clamp_min(1e-30)
    return (shares * inside).sum(1)
