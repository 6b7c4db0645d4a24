"""The paper's claims with the two verdicts on each: in its own setting, and on other models."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd

from cats.book.analysis import claims_quality, claims_speed, claims_training
from cats.book.analysis.findings import HOLDS, HOLDS_NOT, IN_PART, NOT_TESTED, OPEN, Finding, overall
from cats.book.comparison import NOT_MEASURED, NOT_REPRODUCED, REPRODUCED, verdict
from cats.book.words import tidy
from cats.errors import CatsError
from cats.evaluation.table import AVERAGE
from cats.records import paper
from cats.records import record as records

KINDS = ("number", "ordering", "shape")
CHECK = "check"  # a definition held against itself; never counted
SETTING = (REPRODUCED, NOT_REPRODUCED, NOT_MEASURED)
ELSEWHERE = (HOLDS, IN_PART, HOLDS_NOT, OPEN, NOT_TESTED)
TESTS = claims_quality.TESTS | claims_training.TESTS | claims_speed.TESTS
_KEYS = ("model", "method", "gate_sparsity", "unit", "item", "quantity", "new_tokens")
_RULES = {"dense": "dense", "CATS": "cats", "ReLUfication": "relufication", "Wanda (50% of weights)": "wanda"}
# of a record's rows: which of them the paper's number is about, its column, and the paper's unit
_MEASURED = {
    "zero_shot": ("task", AVERAGE, "acc", 1.0),
    "generation": ("task", "gsm8k", "exact_match", 100.0),
    "perplexity": ("corpus", "refinedweb", "nll_nats", 1.0),
}


@dataclass(frozen=True)
class Claim:
    """A row of data/paper/claims.csv with what was found: `value` as published, `measured` in its setting."""

    row: dict
    value: float | None
    measured: float | None
    findings: Sequence[Finding] = field(default_factory=tuple)

    @property
    def setting(self) -> str:
        """Reproduced or not, on the paper's own models; NOT_MEASURED unless they were run."""
        if self.row["kind"] == CHECK:
            return ""
        if self.measured is not None and self.row["tolerance"]:
            return verdict(self.value, self.measured, float(self.row["tolerance"]))
        own = [each for each in self.findings if each.model in paper.MODELS]
        if not own:
            return NOT_MEASURED
        return REPRODUCED if overall(own) == HOLDS else NOT_REPRODUCED

    @property
    def words(self) -> str:
        """Every finding with its model, in one line; empty where there is none."""
        return tidy("; ".join(f"{each.model}: {each.words}" for each in self.findings))

    @property
    def elsewhere(self) -> str:
        """What the findings on other models say; empty for a check and for a number of one model."""
        if self.row["kind"] == CHECK or (self.row["kind"] == "number" and not self.findings):
            return ""
        return overall([each for each in self.findings if each.model not in paper.MODELS])


def every() -> list[Claim]:
    """All claims in the order of the file; CatsError where evidence is kept for a claim that is not there."""
    table = paper.table("claims").astype(object).fillna("")
    unknown = set(TESTS) - set(table.id)
    if unknown:
        raise CatsError(f"data/paper/claims.csv has no claim {sorted(unknown)[0]!r}: add its row.")
    claims = []
    for row in table.to_dict("records"):
        test = TESTS.get(row["id"])
        claims.append(Claim(row, published(row), measured(row), tuple(test()) if test else ()))
    return claims


def published(row: dict) -> float | None:
    """The number that a claim is about, from its table in data/paper."""
    if not row["table"]:
        return None
    keys = {key: _number(row[key]) for key in _KEYS if row[key] != ""}
    return float(paper.reported(row["table"], **keys))


def measured(row: dict) -> float | None:
    """The same number from the newest record of the paper's own trained model, None where there is none."""
    if row["table"] not in _MEASURED or row["method"] not in _RULES:
        return None
    column, wanted, score, unit = _MEASURED[row["table"]]
    for record in reversed(records.every(row["table"])):
        model = record.content["model"]
        if paper.MODELS.get(model.get("id")) != row["model"] or model.get("weights") == "random":
            continue
        rows = record.rows
        rows = rows[(rows[column] == wanted) & (rows.rule == _RULES[row["method"]])]
        if row["gate_sparsity"] != "":
            rows = rows[rows.gate_sparsity == float(row["gate_sparsity"])]
        if len(rows):
            return unit * float(rows[score].iloc[0])
    return None


def scoreboard(claims: Sequence[Claim]) -> pd.DataFrame:
    """Counts of both verdicts for each kind of claim and for all; checks are left out."""
    counted = [each for each in claims if each.row["kind"] != CHECK]
    rows = []
    for kind in (*KINDS, "all"):
        part = [each for each in counted if kind in (each.row["kind"], "all")]
        tested = [each for each in part if each.elsewhere]
        rows.append(
            {"kind": kind, "claims": len(part)}
            | {name: sum(each.setting == name for each in part) for name in SETTING}
            | {name: sum(each.elsewhere == name for each in tested) for name in ELSEWHERE}
        )
    return pd.DataFrame(rows)


def shown(claims: Sequence[Claim]) -> pd.DataFrame:
    """The claims as the page shows them, one row each, with the findings as words."""
    rows = []
    for each in claims:
        row = each.row
        rows.append(
            {
                "claim": row["claim"],
                "where": row["where"],
                "published": None if each.value is None else f"{each.value:g} {_UNITS[row['unit']]}".strip(),
                "counts as holding": row["holds_if"],
                "made on": row["made_on"],
                "in its setting": each.setting,
                "on other models": each.elsewhere,
                "what was found": each.words or row["instead"] or None,
                "page": row["chapter"],
                "letter": row["evidence"],
            }
        )
    return pd.DataFrame(rows)


_UNITS = {"fraction": "", "tasks": "of 8", "percent": "%", "nats": "nats", "x": "×"}


def _number(text):
    try:
        return float(text)
    except ValueError:
        return text
