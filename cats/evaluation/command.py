"""The command `cats evaluate`: one model from the command line, or a plan."""

import time
from argparse import Namespace
from pathlib import Path

from cats import paths
from cats.core.thresholds import Thresholds
from cats.corpora import Calibration
from cats.criteria.masking import Policy
from cats.errors import CatsError
from cats.evaluation import intervals, plan, tasks
from cats.evaluation.distributed import Processes, join
from cats.evaluation.evaluator import Evaluator
from cats.evaluation.method import methods
from cats.evaluation.plan import Run
from cats.evaluation.table import load_results, results_table
from cats.models import load as model_loading
from cats.models import memory
from cats.records.text_table import text_table


def main(given: Namespace) -> None:
    """Check everything first, then evaluate; `given` as `cats_cli` parses it."""
    thresholds = Thresholds.load(Path(given.thresholds)) if given.thresholds else None
    runs = _runs(given)
    output, records = Path(given.output), Path(given.records or given.output)
    for folder in (output, records):
        paths.check_writable(folder)
    checked = plan.check(runs, given.data_dir)
    if given.dry_run:
        print("\n".join(checked))
        return
    processes = join(runs[0].device if runs else "cpu")
    paths.made(output)
    if given.plan:
        done = plan.execute(
            runs,
            output,
            processes=processes,
            data_dir=given.data_dir,
            minutes=given.minutes,
            records=paths.made(records),
            so_far=given.so_far,
        )
        if processes.leads:
            print("Everything is recorded." if done else "Something is left: the same command goes on.")
    else:
        _one(runs[0], given, thresholds, processes, output)
    processes.leave()


def _one(
    run: Run, given: Namespace, thresholds: Thresholds | None, processes: Processes, output: Path
) -> None:
    memory.check(run.model, model_loading.config(run.model), run.dtype, processes.device)
    loaded = model_loading.load(run.model, dtype=run.dtype, device=processes.device, seed=run.seed)
    if loaded.tokenizer is None:
        raise CatsError(
            f"{run.model} has random weights and no tokenizer, so it reads no text: name another model."
        )
    started = time.time()
    evaluator = Evaluator(
        loaded,
        output,
        processes=processes,
        data_dir=given.data_dir,
        documents=run.documents,
        seed=run.seed,
        calibration=run.calibration,
        thresholds=thresholds,
        chat=run.chat,
        batch_tokens=run.batch_tokens,
    )
    files = evaluator.run(run.tasks, run.methods, minutes=given.minutes)
    if processes.leads:
        show(results_table(load_results(files)))
        left = len(run.tasks) * len(run.methods) - len(files)
        print(
            f"{len(files)} result{'s' * (len(files) != 1)} in {output}, {time.time() - started:.0f} s"
            + (f"; {left} left" if left else "")
        )


def show(rows) -> None:
    """Print the columns that matter on a terminal."""
    header = ("task", "method", "target", "realised", "of model", "score", "± se", "to dense [95 %]")
    lines = []
    for row in rows.to_dict("records"):
        score, error, delta = _score(row)
        lines.append(
            (
                row.get("corpus") if row["experiment"] == "perplexity" else row["task"],
                row["method"],
                _number(row["gate_sparsity"], ".2f"),
                _number(row["realised_sparsity"], ".3f"),
                _number(row["realised_model_sparsity"], ".3f"),
                _number(score, ".4f"),
                _number(error, ".4f"),
                intervals.as_text(delta, row.get("delta_low"), row.get("delta_high")),
            )
        )
    print(text_table(header, lines))


def _score(row: dict) -> tuple:
    if row["experiment"] == "perplexity":
        return row["nll_nats"], None, row.get("delta_nll")
    if row["experiment"] == "generation":
        return row["exact_match"], row["exact_match_se"], row.get("delta")
    return row["acc"], row["acc_se"], row.get("delta_acc")


def _number(value, form: str) -> str:
    return "-" if value is None or value != value else format(value, form)


def _runs(given: Namespace) -> list[Run]:
    if given.plan:
        return plan.read(Path(given.plan), device=given.device)
    policy = Policy(given.prefill, given.first_token, given.last_share)
    run = Run(
        model=given.model,
        record=given.model.replace("/", "-").lower(),
        tasks=tasks.names(given.tasks),
        methods=methods(given.rule, given.sparsity, policy, given.level),
        dtype=given.dtype,
        device=given.device,
        calibration=Calibration(given.corpus, tokens=given.tokens, seed=given.seed),
        documents=given.documents,
        seed=given.seed,
        chat=given.chat,
        batch_tokens=given.batch_tokens,
    )
    return [run]
