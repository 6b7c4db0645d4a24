"""A decoder block by block: the hidden states that reach each block, and the arguments it is called with."""

from dataclasses import dataclass

from torch import Tensor, nn

from cats.calibration.stream import evaluating, read
from cats.errors import CatsError


@dataclass
class BatchState:
    """One batch on its way through the blocks.

    `hidden` [B, T, d]: its hidden states before the next block; `valid` [B, T] bool, False for padding;
    `arguments`: what the model passes to each block besides the hidden states.
    """

    hidden: Tensor
    valid: Tensor
    arguments: list[tuple[tuple, dict]]

    def output(self, block: nn.Module, number: int) -> Tensor:
        """What block `number` makes of the hidden states, [B, T, d]."""
        arguments, options = self.arguments[number]
        output = block(self.hidden, *arguments, **options)
        return output[0] if isinstance(output, tuple) else output

    def advance(self, block: nn.Module, number: int) -> None:
        """Go on to what comes behind block `number`."""
        self.hidden = self.output(block, number)


def blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder's blocks in order; CatsError where the model keeps them elsewhere."""
    layers = getattr(model.get_decoder(), "layers", None) if hasattr(model, "get_decoder") else None
    if not isinstance(layers, nn.ModuleList):
        raise CatsError(
            f"{type(model).__name__} cannot be read block by block: its decoder has no list of layers."
        )
    return layers


def block_inputs(model: nn.Module, blocks: nn.ModuleList, batches) -> list[BatchState]:
    """Hidden states before the first block, and the arguments with which the model calls each block."""
    states: list[BatchState] = []
    calls: list[tuple[tuple, dict]] = []

    def note(module, args, kwargs):
        calls.append((args, kwargs))

    hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    try:
        with evaluating(model):
            for ids, mask in read(batches, model.device, progress=False):
                calls.clear()
                model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False)
                arguments = [
                    (args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"})
                    for args, kwargs in calls
                ]
                args, kwargs = calls[0]
                hidden = args[0] if args else kwargs["hidden_states"]
                states.append(BatchState(hidden, mask.bool().cpu(), arguments))
    finally:
        for hook in hooks:
            hook.remove()
    return states
