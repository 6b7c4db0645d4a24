"""Text that the dense model writes itself: a corpus of its own kind that needs no download."""

import hashlib
import json
from pathlib import Path

import torch
from tqdm.auto import tqdm

from cats.errors import CatsError
from cats.models.load import LoadedModel
from cats.paths import write_atomically

SAMPLED = "sampled:"
_AT_ONCE = {"cpu": 16, "cuda": 512}  # a GPU's time for a step hardly depends on it


def sampled(
    loaded: LoadedModel, documents: int, length: int, folder: Path, *, seed: int = 0
) -> tuple[Path, dict]:
    """A .jsonl file of `documents` texts that the dense model wrote, at temperature 1 from its first token.

    `length`: tokens of each, at most. The text is written once: the file's name says what it came from.
    Returns the file and what a record says about it. Raises CatsError for a model without a first token.
    """
    about = {
        "sampled_from": {key: loaded.info.get(key) for key in ("id", "revision", "sha256", "dtype")},
        "temperature": 1.0,
        "tokens_at_most": length,
        "seed": seed,
    }
    known = hashlib.sha256(json.dumps([about, documents], sort_keys=True).encode()).hexdigest()[:12]
    path = folder / f"sampled-{known}.jsonl"
    if path.is_file():
        return path, about
    tokenizer, model = loaded.tokenizer, loaded.model
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise CatsError("This tokenizer has neither BOS nor EOS to start a text from: train on a corpus.")
    lines: list[str] = []
    at_once = _AT_ONCE[model.device.type]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), tqdm(total=documents, desc="sampling", disable=None) as bar:
        torch.manual_seed(seed)
        while len(lines) < documents:
            prompt = torch.full((min(at_once, documents - len(lines)), 1), first, device=model.device)
            ids = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=length - 1,
                pad_token_id=tokenizer.pad_token_id,
            )
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
            lines += [json.dumps({"text": text}) for text in texts]
            bar.update(len(texts))
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(line + "\n" for line in lines).encode())
    return path, about


def number(name: str) -> int:
    """Texts asked for by a corpus named "sampled:500"; CatsError where it does not say how many."""
    count = name.removeprefix(SAMPLED)
    if not count.isdigit() or int(count) < 1:
        raise CatsError(f"{name} does not say how many texts to sample: sampled:500, for example.")
    return int(count)
