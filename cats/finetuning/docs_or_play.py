"""A task that needs no download: does a line come from a play, or from documentation?"""

import json
import random
from pathlib import Path

from cats import corpora
from cats.finetuning.data import ANSWERS, TEMPLATE
from cats.paths import write_atomically

SOURCES = ("python-docs", "shakespeare")  # answers no and yes
INSTRUCTION = "Is this line from a play?"


def write(folder: Path, *, rows: int, test: int, words: int = 12, seed: int = 0) -> dict[str, str]:
    """Files of instructions "train" (`rows`) and "test" (`test` rows), half from each source, by name.

    A row is `words` successive words of a random place. The two files share no document of a source.
    """
    paths = {}
    for split, count in (("train", rows), ("test", test)):
        draw = random.Random(f"{seed}:{split}")
        texts = [" ".join(corpora.load(source, split=split).documents).split() for source in SOURCES]
        lines = []
        for number in range(count):
            text = texts[number % 2]
            start = draw.randrange(len(text) - words)
            shown = " ".join(text[start : start + words])
            prompt = TEMPLATE.format(instruction=INSTRUCTION, text=shown)
            lines.append(json.dumps({"prompt": prompt, "response": ANSWERS[number % 2]}) + "\n")
        path = folder / f"docs-or-play-instructions-{split}.jsonl"
        write_atomically(path, "".join(lines).encode())
        paths[split] = str(path)
    return paths
