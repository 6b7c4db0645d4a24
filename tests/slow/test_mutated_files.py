"""10,000 damaged files: each is refused in one sentence, or read as what it says."""

import logging
import random
import traceback
from collections import Counter

import damaged_documents as documents
import damaged_models as models
import damaged_texts as texts
import hardening
import mutations
import pytest

from cats import CatsError


def damaged_header(data: bytes, draw: random.Random) -> bytes:
    """Of a GGUF file: all before its tensors' numbers."""
    end = 4000
    return mutations.changed_bytes(data[:end], draw) + data[end:]


def damaged_config(data: bytes, draw: random.Random) -> bytes:
    """Without large sizes: Transformers would make a model of as many layers."""
    return mutations.damaged(data, draw, mutations.SMALL)


# files in all ten parts, what writes a whole one, what damages it, what reads it
KINDS = {
    "thresholds": (1300, documents.write_thresholds, mutations.damaged, documents.thresholds),
    "thresholds per neuron": (
        300, documents.write_thresholds_per_neuron, mutations.damaged, documents.thresholds
    ),
    "values beside thresholds": (
        200, lambda folder: next(documents.write_thresholds_per_neuron(folder).parent.glob("*.safetensors")),
        mutations.damaged_safetensors, documents.thresholds_beside,
    ),
    "records": (1300, documents.write_record, mutations.damaged, documents.record),
    "plans of evaluate": (700, documents.write_evaluation_plan, mutations.damaged, documents.evaluation),
    "plans of finetune": (700, documents.write_finetuning_plan, mutations.damaged, documents.finetuning),
    "params files": (600, documents.write_parameters, mutations.damaged, documents.parameters),
    "notebooks": (700, documents.write_notebook, mutations.damaged, documents.notebook),
    "checkpoints": (600, documents.write_checkpoint, mutations.damaged_safetensors, documents.checkpoint),
    "mirrors": (800, texts.write_mirror, mutations.damaged, texts.mirror),
    "txt corpora": (500, texts.write_text, mutations.damaged, texts.text),
    "jsonl corpora": (600, texts.write_lines, mutations.damaged, texts.lines),
    "gz corpora": (500, texts.write_compressed, mutations.damaged_gzip, texts.lines),
    "instructions": (500, texts.write_instructions, mutations.damaged, texts.instructions),
    "sparse models' configurations": (300, models.write_sparse_config, damaged_config, models.sparse),
    "sparse models' weights": (
        200, models.write_sparse_weights, mutations.damaged_safetensors, models.sparse
    ),
    "GGUF files": (200, models.write_gguf, damaged_header, models.gguf_file),
}  # fmt: skip


@pytest.mark.parametrize("part", hardening.PARTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_is_refused_in_a_sentence_or_read_as_it_is(
    kind, part, tmp_path, monkeypatch, record_property
):
    count, write, damage, read = KINDS[kind]
    # nbformat logs what is wrong in a notebook, halves of characters too, which xdist cannot send.
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)
    path = write(tmp_path)
    read(path)
    whole, outcomes, faults = path.read_bytes(), Counter(), []
    for number in hardening.numbers(count, part):
        path.write_bytes(damage(whole, random.Random(f"{kind}:{number}")))
        outcome = "read"
        try:
            read(path)
        except CatsError as error:
            outcome = "refused in a sentence"
            if not str(error) or "\n" in str(error) or len(str(error)) > 600:
                faults.append(f"{number}: no sentence: {str(error)[:300]!r}")
        except Exception as error:  # what else a reader raises is what is looked for
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{place.name}, line {place.lineno}"
            faults.append(f"{number}: {type(error).__name__} in {where}: {str(error)[:200]}")
        outcomes[outcome] += 1
    path.write_bytes(whole)
    read(path)
    record_property("files", dict(outcomes))
    assert not faults, f"{len(faults)} of {outcomes.total()}:\n" + "\n".join(map(ascii, faults))
