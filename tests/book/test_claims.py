import csv

import pytest

from cats import paths
from cats.book import chapters
from cats.book.analysis import claims, findings
from cats.book.analysis.findings import Finding
from cats.records import paper

TABLE = paper.table("claims").astype(object).fillna("")


def _claim(kind="ordering", holds=(), model="smollm2-135m-instruct", **row):
    row = {"kind": kind, "table": "", "tolerance": "", **row}
    measured, value = row.pop("measured", None), row.pop("value", None)
    return claims.Claim(row, value, measured, tuple(Finding(model, "1.0", each) for each in holds))


def test_every_claim_says_what_it_is_where_it_stands_and_what_would_count():
    assert TABLE.id.is_unique and len(TABLE) > 80
    assert set(TABLE.kind) == {*claims.KINDS, claims.CHECK}
    for column in ("where", "claim", "holds_if", "made_on", "evidence", "source"):
        assert (TABLE[column] != "").all(), column
    assert set(TABLE.chapter) <= set(chapters.names())


def test_a_claim_has_a_number_evidence_or_a_reason_why_not():
    for row in TABLE.to_dict("records"):
        told = row["table"] or row["id"] in claims.TESTS or row["instead"]
        assert told or row["kind"] == claims.CHECK, row["id"]
    assert set(claims.TESTS) <= set(TABLE.id)


@pytest.mark.parametrize(
    "row", [row for row in TABLE.to_dict("records") if row["table"]], ids=lambda r: r["id"]
)
def test_a_number_is_one_value_of_the_published_tables(row):
    assert claims.published(row) is not None


def test_every_published_average_and_score_is_a_claim():
    for name in ("zero_shot", "generation"):
        values = sorted(paper.table(name).value)
        assert values == sorted(
            claims.published(row) for row in TABLE.to_dict("records") if row["table"] == name
        )


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ((), findings.NOT_TESTED),
        ((True, True), findings.HOLDS),
        ((True, None), findings.IN_PART),
        ((True, False), findings.IN_PART),
        ((False, None), findings.HOLDS_NOT),
        ((False,), findings.HOLDS_NOT),
        ((None, None), findings.OPEN),
    ],
)
def test_findings_add_up_to_one_verdict(marks, expected):
    assert findings.overall([Finding("a model", "1.0", mark) for mark in marks]) == expected


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(1, 2, True), (-2, -1, False), (-1, 1, None), (0, 1, True)]
)
def test_an_interval_decides_where_all_of_it_is_on_one_side(low, high, expected):
    assert findings.at_least(low, high, 0) is expected


def test_the_two_verdicts_are_never_mixed():
    elsewhere = _claim(holds=(True,))
    assert (elsewhere.setting, elsewhere.elsewhere) == ("not measured", findings.HOLDS)
    own = _claim(holds=(False,), model="meta-llama/Llama-2-7b-hf")
    assert (own.setting, own.elsewhere) == ("not reproduced", findings.NOT_TESTED)
    number = _claim("number", table="zero_shot", tolerance="0.003", value=0.6589, measured=0.6580)
    assert (number.setting, number.elsewhere) == ("reproduced", "")
    check = _claim(claims.CHECK)
    assert (check.setting, check.elsewhere) == ("", "")


def test_the_scoreboard_counts_every_claim_once_and_no_check():
    board = claims.scoreboard([_claim("shape", (True,)), _claim("number", table="x"), _claim(claims.CHECK)])
    total = board.set_index("kind").loc["all"]
    assert total.claims == 2 and total[[*claims.SETTING]].sum() == 2 and total[[*claims.ELSEWHERE]].sum() == 1
    assert (board.iloc[:-1].drop(columns="kind").sum() == total).all()


def test_every_entry_of_the_bibliography_is_cited():
    keys = [
        line.split("{")[1].rstrip(",\n") for line in paths.DATA.joinpath("refs.bib").open() if line[0] == "@"
    ]
    pages = "".join(file.read_text() for suffix in ("md", "ipynb") for file in paths.BOOK.glob(f"*.{suffix}"))
    assert [key for key in keys if f"`{key}`" not in pages] == []


def test_the_csv_has_a_cell_for_every_column():
    with (paths.PAPER / "claims.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert {len(row) for row in rows} == {len(rows[0])}
