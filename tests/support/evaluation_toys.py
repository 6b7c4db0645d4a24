"""A tokenizer of single characters and mirrors of a few documents, for evaluations that take milliseconds."""

import gzip
import hashlib
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from toys import VOCABULARY, constant_thresholds, toy
from transformers import PreTrainedTokenizerFast

from cats.core.sparsify import sparsify
from cats.corpora import Calibration
from cats.evaluation.evaluator import Evaluator
from cats.models.load import LoadedModel

LENGTH = 1024  # tokens that a model reads: a prompt of gsm8k and its answer
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "birds", "fly", "over", "it", "again"]

KINDS = {
    "piqa": "loglikelihood",
    "arc_easy": "loglikelihood",
    "boolq": "loglikelihood",
    "lambada_openai": "loglikelihood",
    "wikitext": "loglikelihood_rolling",
    "gsm8k": "generate_until",
}
TEXT = Calibration(corpus="python-docs", tokens=2048, sequence_length=128)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character: its code, of 128; pad 0, BOS 1 (not added), EOS 2."""
    special = {"<pad>": 0, "<s>": 1, "</s>": 2}
    letters = {chr(code): code for code in range(3, VOCABULARY)}
    core = Tokenizer(models.WordLevel({**special, **letters}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=LENGTH
    )


def loaded(family: str = "llama", **changes) -> LoadedModel:
    model = toy(family, max_position_embeddings=LENGTH, **changes)
    info = {"id": f"toy-{family}", "revision": None, "sha256": None, "dtype": "float32", "weights": "random"}
    return LoadedModel(model, tokenizer(), info)


def thin(model, sparsity=0.5):
    """A toy model made sparse by thresholds that need no calibration."""
    return sparsify(model, constant_thresholds(model, most=0.6), sparsity)


def evaluator(folder: Path, output: Path, **options) -> Evaluator:
    """Of a toy model on mirrors in `folder`."""
    return Evaluator(loaded(), output, data_dir=folder, calibration=TEXT, batch_tokens=400, **options)


def mirrors(folder: Path, documents: int = 6) -> Path:
    """Folders of piqa, sciq without support, arc_easy, lambada_openai, gsm8k, wikitext and boolq, with
    SHA256SUMS.
    """
    sentences = [
        " ".join(WORDS[(n + k) % len(WORDS)] for k in range(3 + n % 4)) for n in range(2 * documents)
    ]
    rows = {
        "piqa/validation.jsonl": [
            {"goal": sentences[n], "sol1": sentences[n + 1], "sol2": sentences[n + 2][:-1], "label": n % 2}
            for n in range(documents)
        ],
        "sciq/test.jsonl.gz": [
            {
                "support": "",
                "question": sentences[n],
                "correct_answer": "mat",
                **{f"distractor{k}": WORDS[(n + k) % len(WORDS)] for k in (1, 2, 3)},
            }
            for n in range(documents)
        ],
        "arc_easy/test.jsonl": [
            {
                "question": sentences[n],
                "choices": {"text": WORDS[n : n + 4], "label": ["A", "B", "C", "D"]},
                "answerKey": "ABCD"[n % 4],
            }
            for n in range(documents)
        ],
        "lambada_openai/test.jsonl": [{"text": sentence} for sentence in sentences[:documents]],
        "gsm8k/train.jsonl": [{"question": f"{n}+1?", "answer": f"#### {n + 1}"} for n in range(8)],
        "gsm8k/test.jsonl": [{"question": f"{n}+2?", "answer": f"#### {n + 2}"} for n in range(documents)],
        "wikitext/test.jsonl": [{"page": f" {sentence} <unk> mat \n" * 3} for sentence in sentences[:3]],
        "boolq/validation.jsonl": [
            {"passage": f"Cats -- {sentences[n]}", "question": "is it a cat", "label": n % 2}
            for n in range(documents)
        ],
    }
    sums = []
    for name, content in rows.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = "".join(json.dumps(row) + "\n" for row in content).encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        sums.append(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {name}\n")
    (folder / "SHA256SUMS").write_text("".join(sums))
    return folder
