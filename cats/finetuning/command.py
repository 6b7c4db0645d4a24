"""The command `cats finetune`: one comparison from the command line, or a plan."""

import re
from argparse import Namespace
from pathlib import Path

from cats import paths
from cats.evaluation.distributed import join
from cats.finetuning import compare, plan

_RECIPE = (
    "steps", "grid", "batch", "rows_at_once", "sequence_length", "lr", "tuning", "dtype", "distil", "anneal",
    "recalibrate", "best", "learn_thresholds", "checkpointing", "compile", "unequal",
)  # fmt: skip
_OWN = ("model", "device", "train", "heldout", "heldout_rows", "data_dir", "save")


def main(given: Namespace) -> None:
    """Check everything first, then train; `given` as `cats_cli` parses it."""
    wanted = _wanted(given)
    output = Path(given.output)
    folder = Path(given.records) if given.records else output
    for each in (output, folder, *(output / comparison.record for comparison in wanted)):
        paths.check_writable(each)
    for line in plan.check(wanted):
        if given.dry_run:
            print(line)
    if given.dry_run:
        return
    processes = join(wanted[0].device)
    paths.made(output)
    paths.made(folder)
    done = compare.execute(wanted, output, processes=processes, minutes=given.minutes, records_folder=folder)
    if processes.leads:
        print("Everything is recorded." if done else "Time is up: the same command goes on.")
    processes.leave()


def _wanted(given: Namespace) -> list[plan.Comparison]:
    if given.plan:
        return plan.read(Path(given.plan), device=given.device, data_dir=given.data_dir)
    values = {name: getattr(given, name) for name in (*_RECIPE, *_OWN)}
    slug = re.sub(r"[^a-z0-9._-]+", "-", given.model.lower())[-80:].strip("-._") or "model"
    values |= {"record": slug, "methods": given.method, "seeds": [given.seed]}
    if given.rows_at_once is None:
        halved = (1, 2, 8) if given.unequal else (1,)  # what some methods' batches are divided by
        batches = [max(1, given.batch // by) for by in halved]
        values["rows_at_once"] = next(n for n in (4, 3, 2, 1) if all(batch % n == 0 for batch in batches))
    values["save_every"] = max(5, given.steps // 20)
    if given.thresholds:
        values["thresholds"] = given.thresholds
    else:
        values |= plan.shipped_thresholds(given.model, tokens=8192)
    return [plan.comparison(values, "the command line")]
