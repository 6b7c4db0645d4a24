"""Records: written whole and once, found by their parameters, refused when damaged, marked when stale."""

import json
import math
import random
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from record_rows import MODEL, row, write

from cats import CatsError, paths
from cats.records import identity, origin
from cats.records import record as records
from cats.records.packing import pack, unpack


@pytest.mark.parametrize("experiment", records.COLUMNS)
def test_every_experiment_reads_back(experiment, tmp_path):
    path = write(tmp_path, experiment=experiment, rows=[row(experiment, note="x"), row(experiment, note="y")])
    assert path.name == f"{experiment}-a.json"
    record = records.read(experiment, folder=tmp_path)
    assert record.rows.note.tolist() == ["x", "y"]
    assert set(records.COLUMNS[experiment]) <= set(record.rows.columns)
    assert record.content["schema"] == 2 and record.content["model"] == MODEL
    assert record.rows.columns.tolist().count("origins") == 0
    (run,) = record.origins
    assert [each["origins"] for each in record.content["rows"]] == [[0], [0]]
    assert run["kind"] == "own" and 1.9 < run["seconds"] < 60 and run["seed"] is None
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", run["begin"]) and {"commit", "dirty"} <= set(run)
    assert {"device", "driver", "memory_gb"} <= set(run["hardware"])
    assert {"python", "torch", "triton", "transformers", "lm_eval", "cuda"} <= set(run["software"])


def test_values_become_plain_json(tmp_path):
    rows = pd.DataFrame(
        {
            **{name: [None] for name in records.COLUMNS["perplexity"]},
            "nll_nats": [np.float32(1.5)],
            "tokens": [torch.tensor(7)],
            "perplexity": [math.nan],
            "corpus": [Path("/srv/someone/books/text.jsonl")],
        }
    )
    path = write(tmp_path, rows=rows, model={"id": Path("mine")}, sparsities=(0.3, 0.5))
    content = json.loads(path.read_text())
    assert content["rows"][0]["nll_nats"] == 1.5 and content["rows"][0]["tokens"] == 7
    assert content["rows"][0]["perplexity"] is None and content["parameters"]["sparsities"] == [0.3, 0.5]
    assert content["rows"][0]["corpus"] == "text.jsonl" and content["model"]["id"] == "mine"


def _content(draw: random.Random, depth: int = 0):
    """Arbitrary JSON-like content, of strings that look like paths, numbers and packed scores too."""
    makers = [
        lambda: None,
        lambda: draw.random() < 0.5,
        lambda: draw.randint(-(2**53), 2**53),
        lambda: draw.uniform(-1, 1) * 10.0 ** draw.randint(-300, 300),
        lambda: "".join(draw.choices('/~.\\ aé\n"+=0\u2028😀', k=draw.randint(0, 12))),
        lambda: draw.choice(["/", "~/", "//"]) + "".join(draw.choices("ab/+=", k=8)),
        lambda: pack(np.array(draw.choices([0.0, 1.0], k=draw.randint(1, 200)))),
        lambda: pack(np.array([draw.uniform(-9, 9) for _ in range(5)])),
    ]
    if depth < 3:
        makers += [
            lambda: [_content(draw, depth + 1) for _ in range(draw.randint(0, 4))],
            lambda: {
                draw.choice(["/", "a/b", "~", "x", "é"]): _content(draw, depth + 1)
                for _ in range(draw.randint(0, 4))
            },
        ]
    return draw.choice(makers)()


@pytest.mark.parametrize("seed", range(40))
def test_what_is_written_is_read_back_equal(seed, tmp_path):
    draw = random.Random(seed)
    rows = [row("perplexity", **{f"value{k}": _content(draw) for k in range(8)}) for _ in range(3)]
    parameters = {key: _content(draw) for key in ("one", "two", "/three")}
    path = write(tmp_path, rows=rows, model={"id": "/a/model", "more": _content(draw)}, **parameters)
    content = records.read("perplexity", folder=tmp_path).content
    assert content["parameters"] == parameters and content["model"]["id"] == "/a/model"
    kept = [{key: value for key, value in each.items() if key in rows[0]} for each in content["rows"]]
    assert kept == rows and path.exists()


def test_packed_scores_that_begin_with_a_slash_are_kept(tmp_path):
    scores = np.array([1.0] * 8 + [0.0, 1.0] * 46)
    packed = pack(scores)
    assert packed["bits"].startswith("/")
    write(tmp_path, rows=[row("perplexity", correct=packed)])
    read = records.read("perplexity", folder=tmp_path).rows.correct[0]
    assert np.array_equal(unpack(read), scores)


def test_nothing_is_overwritten(tmp_path):
    paths_ = [write(tmp_path, seed=seed) for seed in range(3)]
    assert [path.name for path in paths_] == [f"perplexity-a{end}.json" for end in ("", "-2", "-3")]
    assert json.loads(paths_[0].read_text())["parameters"] == {"seed": 0}
    assert len(list(tmp_path.iterdir())) == 3, "no temporary file is left"


def test_newest_that_matches_is_read(tmp_path):
    for number, (slug, seed) in enumerate([("a", 0), ("b", 1), ("a", 1)]):
        path = write(tmp_path, slug, seed=seed, model={"id": f"model-{seed}"})
        content = json.loads(path.read_text())
        content["written"] = f"2026-01-0{number + 1}T00:00:00Z"
        path.write_text(json.dumps(content))
    assert records.read("perplexity", folder=tmp_path).path.name == "perplexity-a-2.json"
    assert records.read("perplexity", folder=tmp_path, seed=0).path.name == "perplexity-a.json"
    assert (
        records.read("perplexity", folder=tmp_path, model="model-1", slug="b").path.name
        == "perplexity-b.json"
    )
    assert records.read("perplexity", folder=tmp_path, slug="a").path.name == "perplexity-a-2.json"
    device = records.read("perplexity", folder=tmp_path).device
    assert records.read("perplexity", folder=tmp_path, device=device[:5].upper())
    with pytest.raises(CatsError, match=r"No record of perplexity has seed=7 \(3 records looked at\)"):
        records.read("perplexity", folder=tmp_path, seed=7)
    with pytest.raises(CatsError, match="has any parameters"):
        records.read("decode", folder=tmp_path)


def test_of_one_second_the_later_record_is_read(tmp_path):
    for _ in range(2):
        path = write(tmp_path, "a")
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "written": "2026-01-01T00:00:00Z"}))
    assert records.read("perplexity", folder=tmp_path).path.name == "perplexity-a-2.json"
    assert [record.path.name for record in records.every(folder=tmp_path)][-1] == "perplexity-a-2.json"


def test_wrong_records_are_not_written(tmp_path):
    with pytest.raises(CatsError, match="Unknown experiment 'speed': use one of mlp_latency"):
        records.write("speed", "a", parameters={}, rows=[{}], model={}, data={}, started=0.0, folder=tmp_path)
    with pytest.raises(CatsError, match="lower-case letters"):
        write(tmp_path, "Bad Name")
    with pytest.raises(CatsError, match="There are no rows"):
        write(tmp_path, rows=[])
    with pytest.raises(CatsError, match="lack the columns nll_nats, perplexity"):
        incomplete = row("perplexity")
        del incomplete["nll_nats"], incomplete["perplexity"]
        write(tmp_path, rows=[row("perplexity"), incomplete])
    assert not list(tmp_path.iterdir())


def test_damaged_records_are_refused(tmp_path):
    path = write(tmp_path)
    text = path.read_text()
    content = json.loads(text)
    for damaged, reason in [
        (text[: len(text) // 2], "truncated or no JSON"),
        ("[]", "it is no object of names and values"),
        (json.dumps({**content, "schema": 1}), "is not of schema 2"),
        (json.dumps({**content, "experiment": "decode"}), "is of the experiment 'decode'"),
        (json.dumps({key: value for key, value in content.items() if key != "origins"}), "lacks origins"),
    ]:
        path.write_text(damaged)
        with pytest.raises(CatsError, match=reason):
            records.read("perplexity", folder=tmp_path)


def test_a_record_is_stale_where_an_op_that_it_measured_has_changed(tmp_path):
    path = write(tmp_path, experiment="decode", ops=["one_row", "decoding"])
    record = records.read("decode", folder=tmp_path)
    ops = record.origins[0]["ops"]
    assert ops == {op: identity.today(op) for op in ("one_row", "decoding")} and not record.stale
    assert "WARNING" not in record.provenance()
    content = json.loads(path.read_text())
    content["origins"][0]["ops"]["decoding"] = "0" * 64
    path.write_text(json.dumps(content))
    record = records.read("decode", folder=tmp_path)
    assert record.changed == ["decoding"] and record.stale
    assert record.provenance().endswith("WARNING: changed since this was measured: decoding")
    with pytest.raises(CatsError, match="Unknown op 'mlp'"):
        write(tmp_path, experiment="decode", ops=["mlp"])


def test_rows_of_several_runs_keep_the_origin_of_each(tmp_path):
    first = origin.ended(origin.begin(seed=0, started=0.0), 5)
    later = origin.ended(origin.begin(seed=1, started=86400.0), 7)
    longer = origin.ended(first, 9)
    rows = [row("perplexity", origins=runs) for runs in ([first], [later], [longer], [first, later], [])]
    write(tmp_path, rows=rows)
    record = records.read("perplexity", folder=tmp_path)
    assert [each["seconds"] for each in record.origins] == [9, 7]
    assert [each["seed"] for each in record.origins] == [0, 1]
    assert [each["origins"] for each in record.content["rows"]] == [[0], [1], [0], [0, 1], []]
    assert "4 results of 2 runs, 1 to 2 January 1970, commit" in record.provenance()
    assert record.provenance().endswith("origin of the run not kept for 1 result") and not record.traced


def test_provenance_is_one_line_without_paths_or_host(tmp_path):
    import platform

    write(tmp_path)
    line = records.read("perplexity", folder=tmp_path).provenance()
    assert (
        "\n" not in line
        and "toy, random weights" in line
        and f"torch {torch.__version__.split('+')[0]}" in line
    )
    assert str(paths.ROOT) not in line and platform.node() not in line


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises((CatsError, NotADirectoryError, FileExistsError)):
        write(tmp_path / "file" / "records")
