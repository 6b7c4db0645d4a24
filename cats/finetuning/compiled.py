"""A model's layers compiled for training, by Accelerate."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.state import AcceleratorState
from accelerate.utils import TorchDynamoPlugin

BACKEND = "inductor"


@contextmanager
def layers(state: AcceleratorState) -> Iterator[None]:
    """Let Accelerate compile the layers of the models that it prepares meanwhile: one graph for all."""
    before = state.dynamo_plugin
    state.dynamo_plugin = TorchDynamoPlugin(backend=BACKEND, use_regional_compilation=True)
    try:
        yield
    finally:
        state.dynamo_plugin = before
