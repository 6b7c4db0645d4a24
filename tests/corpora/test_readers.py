"""Files of text as people have them: marks of their editors, halves of characters, and damage."""

import gzip
import json

import pytest

from cats import corpora
from cats.corpora.readers import read_rows
from cats.errors import CatsError
from cats.finetuning.data import examples

MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t.txt"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    content = MARK + (b"a row of text" if name.endswith(".txt") else b'{"text": "a row of text"}\r\n')
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert corpora.load(str(tmp_path / name), split="all").documents == ["a row of text"]


@pytest.mark.parametrize(
    ("text", "read", "halves"),
    [
        ("half \ud83d one", "half \ufffd one", 1),
        ("\ude00\ud83d the wrong way", "\ufffd\ufffd the wrong way", 2),
        ("a whole \U0001f600", "a whole \U0001f600", 0),
    ],
)
def test_halves_of_surrogate_pairs_are_replaced_counted_and_said_once(tmp_path, capsys, text, read, halves):
    lines = json.dumps({"text": text}) + "\n" + json.dumps({"text": "plain"}) + "\n"
    (tmp_path / "t.jsonl").write_text(lines)
    corpus = corpora.load(str(tmp_path / "t.jsonl"), split="all")
    assert sorted(corpus.documents) == sorted([read, "plain"])
    assert corpus.info.get("replaced_characters", 0) == halves
    assert capsys.readouterr().err.count("surrogate") == (halves > 0)


def test_instructions_with_half_a_character_are_read(tmp_path):
    path = tmp_path / "i-instructions.jsonl"
    path.write_bytes(MARK + json.dumps({"prompt": "p \ud83d", "response": "r \ude00"}).encode())
    [found], about = examples(str(path), "train", None)
    assert (found.prompt, found.response) == ("p \ufffd", "r \ufffd") and about["replaced_characters"] == 2


def _cut_in_the_middle(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _other_bits(data: bytes) -> bytes:
    return data[:20] + bytes(byte ^ 255 for byte in data[20:60]) + data[60:]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", b'{"text": ' + b"[" * 100_000, "Line 1 of t.jsonl is not JSON"),
        ("t.jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "Line 1 of t.jsonl is not JSON"),
        ("t.txt", "a row".encode("utf-16"), "cannot be read as UTF-8"),
        ("t.jsonl.gz", _cut_in_the_middle(gzip.compress(b'{"text": "a"}\n' * 99)), "cannot be read"),
        ("t.jsonl.gz", _other_bits(gzip.compress(bytes(range(256)) * 99)), "cannot be read"),
        ("t.jsonl.gz", b'{"text": "not compressed"}', "cannot be read"),
        ("t.jsonl", b'{"text": 5}', "no text field 'text'"),
        ("t.txt", MARK, "is empty"),
    ],
)
def test_damage_is_said_in_one_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CatsError, match=message):
        read_rows(tmp_path / name, "text")
