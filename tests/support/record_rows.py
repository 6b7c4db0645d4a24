"""Records of toy rows, written where a test says."""

import time

from cats.records import record as records

MODEL = {"id": "toy", "parameters": 10, "weights": "random"}
DATA = {"corpus": "none", "documents": 0}


def row(experiment: str, **values) -> dict:
    return {**dict.fromkeys(records.COLUMNS[experiment]), **values}


def write(folder, slug="a", experiment="perplexity", *, rows=None, model=MODEL, ops=(), **parameters):
    return records.write(
        experiment,
        slug,
        parameters=parameters,
        rows=[row(experiment)] if rows is None else rows,
        model=model,
        data=DATA,
        started=time.time() - 2,
        ops=ops,
        folder=folder,
    )
