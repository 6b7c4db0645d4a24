import re

import pandas as pd
import pytest

from cats import paths
from cats.errors import CatsError
from cats.records import paper

NUMERIC = [name for name in paper.names() if name not in ("claims", "contradictions", "protocol")]


@pytest.mark.parametrize("name", NUMERIC)
def test_every_reported_value_is_a_number_with_unit_source_and_evidence(name):
    table = paper.table(name)
    assert tuple(table.columns) == paper.COLUMNS
    assert pd.api.types.is_numeric_dtype(table.value) and table.value.notna().all()
    assert table[["item", "quantity", "unit", "source", "evidence"]].notna().all().all()


@pytest.mark.parametrize("name", paper.names())
def test_evidence_is_of_the_known_kinds_and_nothing_is_unverified(name):
    for tags in paper.table(name).evidence:
        assert set(tags.split("+")) <= set(paper.EVIDENCE), tags


@pytest.mark.parametrize("name", NUMERIC)
def test_no_two_rows_are_the_same_quantity_from_the_same_source(name):
    table = paper.table(name)
    keys = [column for column in table.columns if column not in ("value", "evidence")]
    steps = table.quantity.str.contains("steps|union")  # one row for each step or batch size
    assert not table[~steps].duplicated(keys).any()


@pytest.mark.parametrize(
    ("name", "keys", "value"),
    [
        ("zero_shot", {"model": "Llama-2-7B", "method": "dense"}, 0.6589),
        ("zero_shot", {"model": "Llama-2-13B", "gate_sparsity": 0.7}, 0.6616),
        ("generation", {"gate_sparsity": 0.9}, 1.21),
        ("perplexity", {"model": "Mistral-7B", "method": "CATS", "unit": "nats"}, 2.261),
        ("decoding", {"model": "Llama-2-7B", "new_tokens": 512, "unit": "x"}, 1.1854),
        ("mlp_latency", {"model": "Mistral-7B", "method": "CATS kernel", "gate_sparsity": 0.5391}, 0.7544),
        ("accounting", {"unit": "fraction", "model": "Llama-2-7B", "gate_sparsity": 0.7}, 0.312),
    ],
)
def test_published_values_are_found_by_their_keys(name, keys, value):
    assert float(paper.reported(name, **keys)) == value


def test_reported_nats_and_their_exponentials_agree():
    table = paper.table("perplexity")
    nats = table[table.unit == "nats"].set_index(["model", "method"]).value
    exponentials = table[table.unit == "perplexity"].set_index(["model", "method"]).value
    for key, value in nats.items():
        assert exponentials[key] == pytest.approx(2.718281828**value, abs=0.006)


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("zero_shots", {}, "There is no table 'zero_shots'"),
        ("zero_shot", {"modle": "Llama-2-7B"}, "has no column 'modle'"),
        ("zero_shot", {"model": "GPT-2"}, "reports nothing for model='GPT-2' here: it has Llama-2-7B"),
        ("zero_shot", {"model": "Llama-2-7B"}, "say which"),
    ],
)
def test_a_value_that_cannot_be_told_is_one_clear_sentence(name, keys, message):
    with pytest.raises(CatsError, match=re.escape(message)):
        paper.reported(name, **keys)


def test_the_tables_are_those_of_the_folder():
    assert set(paper.names()) == {file.stem for file in paths.PAPER.glob("*.csv")}
