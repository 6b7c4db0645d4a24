"""Curves of fine-tuning as tidy rows, each beside the dense run of its seed, and as a record."""

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from cats import criteria, paths
from cats.evaluation import intervals
from cats.finetuning.plan import Comparison
from cats.finetuning.recipe import Recipe
from cats.records import record as records


def recorded(each: Comparison, done: list, folder: Path) -> bool:
    """Whether a record in `folder` holds these very runs: a command may end between a record and all else."""
    runs = [found["after"] for _, found in done]
    for path in folder.glob(f"finetuning-{each.record}*.json"):
        try:
            if json.loads(path.read_bytes())["parameters"]["runs"] == json.loads(json.dumps(runs)):
                return True
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            continue  # not one of ours, or damaged: what is asked is whether a whole one is there
    return False


def record(each: Comparison, done: list, info: dict, folder: Path) -> Path:
    """Write the record of finished runs and return its path."""
    runs = {(recipe.method, recipe.seed): found.get("origins", []) for recipe, found in done}
    parameters = {
        **each.recipes[0].describe(),
        "methods": list(dict.fromkeys(recipe.method for recipe, _ in done)),
        "seeds": sorted({recipe.seed for recipe, _ in done}),
        "zero_shot": each.zero_shot,
        "calibration": paths.without_folders(each.thresholds) if each.thresholds else _calibration(each),
        "runs": [found["after"] for _, found in done],
    }
    return records.write(
        "finetuning",
        each.record,
        parameters=parameters,
        rows=[
            {**row, "origins": runs[row["method"].removesuffix(" recalibrated"), row["seed"]]}
            for row in rows(each.model, done)
        ],
        model=info["model"],
        data=info["data"],
        folder=folder,
    )


def rows(model: str, done: Sequence[tuple[Recipe, dict]]) -> list[dict]:
    """Tidy rows of finished runs; `delta_nll` is held-out loss minus the dense run's of that seed and step.

    Its interval is paired over held-out rows, as is that of `delta_acc` where there are answers. A row whose
    `method` ends in "recalibrated" has the thresholds that were estimated once more after training.
    """
    dense = {
        (recipe.seed, point["step"]): point
        for recipe, found in done
        if not recipe.sparse
        for point in found["points"]
    }
    table = []
    for recipe, found in done:
        points = [(recipe.method, point) for point in found["points"]]
        if "recalibrated" in found["after"]:
            last = {**found["after"]["recalibrated"], "step": recipe.steps}
            points.append((f"{recipe.method} recalibrated", last))
        for method, point in points:
            delta = {key: None for key in ("delta_nll", "delta_low", "delta_high")}
            delta |= {key: None for key in ("delta_acc", "delta_acc_low", "delta_acc_high")}
            base = dense.get((recipe.seed, point["step"]))
            if base and len(base["heldout_rows"]) > 1:
                delta |= intervals.paired_interval(_scores(base), _scores(point))
                delta |= _accuracy_difference(base, point)
            realised = point.get("heldout_realised")
            table.append(
                {
                    "model": model,
                    "method": method,
                    "sparsity": recipe.sparsity,
                    "seed": recipe.seed,
                    "step": point["step"],
                    "heldout_nll_nats": point["heldout_nll"],
                    "zero_shot_avg": point.get("zero_shot"),
                    "realised_sparsity": _mean(realised),
                    "indomain_nll_nats": point["indomain_nll"],
                    "indomain_realised_sparsity": _mean(point.get("indomain_realised")),
                    "realised_by_layer": realised,
                    "indomain_realised_by_layer": point.get("indomain_realised"),
                    "accuracy": point.get("heldout_accuracy"),
                    "indomain_accuracy": point.get("indomain_accuracy"),
                    "train_loss": point["train_loss"],
                    "rows_trained": point["rows_trained"],
                    **delta,
                }
            )
    return table


def _calibration(each: Comparison) -> dict:
    corpus = each.calibration.get("corpus")
    return each.calibration | ({"corpus": paths.without_folders(corpus)} if corpus else {})


def ends(table: Sequence[dict], runs: Sequence[dict] = ()) -> list[str]:
    """The last point of every curve, a line each, and what a step of it took where `runs` say so."""
    last = {(row["method"], row["seed"]): row for row in table}
    taken = {(row["method"], row["seed"]): row for row in costs(runs)}
    lines = [
        f"{'method':<24}{'seed':>5}{'step':>6}{'held-out, nats':>16}{'- dense':>9}{'realised':>10}"
        f"{'s/step':>9}{'x dense':>9}{'GB':>7}{'x dense':>9}"
    ]
    for (method, seed), row in last.items():
        cost = taken.get((method, seed), {})
        shown = (
            (row["delta_nll"], "+.4f", 9),
            (row["realised_sparsity"], ".3f", 10),
            (cost.get("step_s"), ".3f", 9),
            (cost.get("time_ratio"), ".3f", 9),
            (cost.get("peak_memory_gb"), ".1f", 7),
            (cost.get("memory_ratio"), ".3f", 9),
        )
        columns = "".join(f"{'-' if v is None else format(v, form):>{width}}" for v, form, width in shown)
        lines.append(f"{method:<24}{seed:>5}{row['step']:>6}{row['heldout_nll_nats']:>16.4f}{columns}")
    for gap in over_seeds(table):
        if gap["low"] is not None and gap["method"] != criteria.DENSE:
            within = f"[{gap['low']:+.4f}, {gap['high']:+.4f}]"
            lines.append(
                f"{gap['method']}: {gap['delta']:+.4f} nats from dense {within} over {gap['seeds']} seeds"
            )
    return lines


def over_seeds(table: Sequence[dict]) -> list[dict]:
    """The gap to dense at the end of every method: method, seeds, and delta, low and high over its seeds.

    In nats a token; the interval is Student's over the runs, 95 %, and None for a single seed.
    """
    last = {(row["method"], row["seed"]): row["delta_nll"] for row in table}
    gaps: dict[str, list[float]] = {}
    for (method, _), gap in last.items():
        if gap is not None:
            gaps.setdefault(method, []).append(gap)
    return [
        {"method": method, "seeds": len(found), **intervals.over_seeds(found)}
        for method, found in gaps.items()
    ]


def costs(runs: Sequence[dict]) -> list[dict]:
    """What a training step took: `runs` of a record's parameters, each beside the dense run.

    method, seed, step_s (median), peak_memory_gb (of a GPU), and both over those of the dense run of that
    seed, or of the first dense run: time_ratio, memory_ratio; None where it was not measured.
    """
    dense = {run["seed"]: run for run in runs if run["method"] == criteria.DENSE}
    table = []
    for run in runs:
        base = dense.get(run["seed"]) or next(iter(dense.values()), {})
        row = {"method": run["method"], "seed": run["seed"]}
        for key, ratio in (("step_s", "time_ratio"), ("peak_memory_gb", "memory_ratio")):
            row[key] = run.get(key)
            row[ratio] = run[key] / base[key] if run.get(key) and base.get(key) else None
        table.append(row)
    return table


def kept(curve: pd.DataFrame, *, reference_sign: bool = False) -> int:
    """The step whose checkpoint a run by accuracy keeps, from the rows of one curve: the first best one.

    With `reference_sign` that of the reference code, which takes the smallest accuracy for the best.
    """
    trained = curve[curve.step > 0].sort_values("step")
    best = trained.indomain_accuracy.min() if reference_sign else trained.indomain_accuracy.max()
    return int(trained[trained.indomain_accuracy == best].step.iloc[0])


def _accuracy_difference(base: dict, point: dict) -> dict:
    first, second = ([row[2] for row in each["heldout_rows"] if len(row) > 2] for each in (base, point))
    if not first:
        return {}
    found = intervals.difference(first, second)
    return {"delta_acc": found["delta"], "delta_acc_low": found["low"], "delta_acc_high": found["high"]}


def _scores(point: dict) -> pd.DataFrame:
    table = pd.DataFrame([row[:2] for row in point["heldout_rows"]], columns=["nll_nats", "tokens"])
    return table.assign(document=range(len(table)), tokens=table.tokens.astype(int))


def _mean(values: list | None) -> float | None:
    return None if values is None else sum(values) / len(values)
