"""What tests of rules share: logits under a Masking, and what the MLP of a layer computes."""

import torch
import toys
from torch import nn

from cats.criteria.masking import Masking

IDS = toys.tokens(4, 48, seed=9)


def logits(model, ids=IDS):
    with Masking(model) as masking, torch.no_grad():
        masking.begin("prefill", torch.ones_like(ids, dtype=torch.bool))
        return model(input_ids=ids).logits


def gate_of(model, layer=1):
    """z = SiLU(x W_gate) and x W_up of a layer, and the output of the MLP, as the model runs on IDS."""
    mlp = model.model.layers[layer].mlp
    seen = {}
    hooks = [
        getattr(mlp, name).register_forward_hook(lambda module, args, out, n=name: seen.update({n: out}))
        for name in ("gate_proj", "up_proj")
    ]
    hooks.append(mlp.down_proj.register_forward_hook(lambda module, args, out: seen.update(h=args[0])))
    logits(model)
    for hook in hooks:
        hook.remove()
    return nn.functional.silu(seen["gate_proj"]), seen["up_proj"], seen["h"]
