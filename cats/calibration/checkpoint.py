"""What an interrupted calibration has counted, on disk, tied to its model and to the batches it has seen."""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from cats.errors import CatsError
from cats.paths import write_atomically

SECONDS = 20.0  # between two writes: what an interruption can cost


class Checkpoint:
    """Keeps `tensors` in a file while batches are counted into them, and puts them back on the next start.

    `identity`: whatever JSON tells this calibration from others. `tokens`: counted so far. Raises CatsError
    where the file is damaged, or belongs to another model, other options or other batches.
    """

    def __init__(self, path: str | os.PathLike, tensors: Sequence[Tensor], identity: list):
        self.path = Path(path)
        self.tokens = 0
        self._tensors = tensors
        self._identity = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        self._batches = 0
        self._seen = hashlib.sha256()
        self._written = time.monotonic()
        self._changed = False

    def rest(self, batches: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """The batches that are not counted yet; those of the file are compared with the ones skipped."""
        done, seen = self._read()
        for batch in batches:
            for key in sorted(batch):
                self._seen.update(
                    f"{key}{list(batch[key].shape)}".encode() + batch[key].cpu().numpy().tobytes()
                )
            self._batches += 1
            if self._batches == done and self._seen.hexdigest() != seen:
                raise CatsError(self._foreign("other text"))
            if self._batches > done:
                yield batch
        if self._batches < done:
            raise CatsError(self._foreign("more text"))

    def counted(self, tokens: int) -> None:
        """Note that the last batch, of so many tokens, is in the tensors; write them from time to time."""
        self.tokens += tokens
        self._changed = True
        if time.monotonic() - self._written >= SECONDS:
            self.write()

    def write(self) -> None:
        if not self._changed:
            return
        state = {
            "identity": self._identity,
            "batches": str(self._batches),
            "tokens": str(self.tokens),
            "seen": self._seen.hexdigest(),
        }
        tensors = {str(number): tensor.cpu() for number, tensor in enumerate(self._tensors)}
        write_atomically(self.path, save_tensors(tensors, metadata=state))
        self._written = time.monotonic()
        self._changed = False

    def _read(self) -> tuple[int, str]:
        """Batches in the file and their hash; 0 and nothing where there is no file."""
        if not self.path.exists():
            return 0, ""
        try:
            data = self.path.read_bytes()
            length = int.from_bytes(data[:8], "little")
            state = json.loads(data[8 : 8 + length])["__metadata__"]
            identity, batches, tokens, seen = (
                state[key] for key in ("identity", "batches", "tokens", "seen")
            )
            if identity != self._identity:
                raise CatsError(self._foreign("another model or other options"))
            for name, tensor in load_tensors(data).items():
                self._tensors[int(name)].copy_(tensor)
            self.tokens = int(tokens)
            return int(batches), seen
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CatsError(
                f"The checkpoint {self.path} is damaged: delete it to calibrate from the start."
            ) from error

    def _foreign(self, what: str) -> str:
        return (
            f"The checkpoint {self.path} belongs to a calibration with {what}: "
            "delete it, or use another output."
        )
