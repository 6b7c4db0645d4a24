"""A plan: models, tasks and methods in one YAML file, run within time slices and recorded."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_type_hints

import torch
from filelock import FileLock

from cats import criteria, paths
from cats.core.accounting import account
from cats.corpora import Calibration
from cats.criteria.masking import Policy
from cats.errors import CatsError
from cats.evaluation import plan_file, tasks
from cats.evaluation.distributed import Processes
from cats.evaluation.evaluator import Evaluator
from cats.evaluation.method import Method
from cats.evaluation.table import load_results, write_records
from cats.models import load as model_loading
from cats.models import memory


@dataclass(frozen=True)
class Run:
    """One model with its tasks and methods; `record` is the slug of the records that it writes."""

    model: str
    record: str
    tasks: list[str]
    methods: list[Method]
    dtype: str = "bfloat16"
    device: str = "cuda"
    calibration: Calibration = field(default_factory=Calibration)
    documents: int | None = None
    seed: int = 0
    chat: bool = False
    batch_tokens: int | None = None
    text_tokens: int | None = None  # of each document of a text; None: all of them
    geometry: str | None = None  # of cats.models.geometries: sizes for a dry run without the hub

    def __post_init__(self):
        if self.dtype not in model_loading.DTYPES:
            raise CatsError(f"Unknown dtype {self.dtype!r}: use one of {', '.join(model_loading.DTYPES)}.")
        for name, least in {"documents": 1, "batch_tokens": 1, "text_tokens": 1, "seed": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise CatsError(f"{name}={value} is too small: use {least} or more.")

    def __str__(self) -> str:
        listed = ", ".join(dict.fromkeys(map(str, self.methods)))
        policies = len({each.policy for each in self.methods})
        under = f" under {policies} policies" if policies > 1 else ""
        tasks = f"{len(self.tasks)} task{'s' * (len(self.tasks) > 1)}"
        return f"{self.record}: {self.model} in {self.dtype}, {tasks} x {{{listed}}}{under}"


_TYPES = get_type_hints(Run) | {"calibration": dict, "rules": list[str | dict], "level": str}
_TYPES |= {"policy": dict, "policies": list[dict]}
del _TYPES["methods"]


def read(path: Path, *, device: str | None = None) -> list[Run]:
    """The runs of a plan file; `device` over what it says. Raises CatsError for anything unknown in it."""
    runs = plan_file.runs(path, "model, record, tasks and rules")
    return [_run(run, path.name, device) for run in runs]


def check(runs: Sequence[Run], data_dir: str | None = None) -> list[str]:
    """What a dry run finds, one line a run: estimated memory, tasks and methods. Loads no weights.

    Raises CatsError for unknown devices, models, tasks, rules and corpora, and for missing data.
    """
    lines = []
    for run in runs:
        memory.kind(run.device)
        run.calibration.check()
        tasks.check(run.tasks, data_dir)
        config = model_loading.config(f"{model_loading.RANDOM}{run.geometry}" if run.geometry else run.model)
        shape = account(config)
        for method in run.methods:
            method.rule_sparsity(shape)
        needed = memory.estimate(config, run.dtype, tokens=run.batch_tokens or 8192)
        lines.append(f"{run}; about {needed}")
    return lines


def execute(
    runs: Sequence[Run],
    output: Path,
    *,
    processes: Processes,
    data_dir: str | None = None,
    minutes: float | None = None,
    records: Path | None = None,
    so_far: bool = False,
) -> bool:
    """Run what is left of a plan, for `minutes` at most, and record each finished run in the folder
    `records`.

    Results go to one folder for each run below `output`, and are not measured twice; several processes with
    one `output` share the work. `so_far`: evaluate nothing, and record the methods that are finished;
    that needs no GPU.
    Returns whether all is done.
    """
    started = time.monotonic()
    complete = True
    for run in runs:
        left = None if minutes is None else minutes - (time.monotonic() - started) / 60
        if left is not None and processes.agree(left <= 0):
            return False
        folder = output / run.record
        stamp = folder / "recorded"
        if processes.agree(stamp.exists()):
            continue
        device = processes.device if processes.size > 1 else run.device
        if so_far and not torch.cuda.is_available():
            device = "cpu"
        memory.check(run.model, model_loading.config(run.model), run.dtype, device)
        loaded = model_loading.load(run.model, dtype=run.dtype, device=device)
        evaluator = Evaluator(
            loaded,
            folder,
            processes=processes,
            data_dir=data_dir,
            documents=run.documents,
            seed=run.seed,
            calibration=run.calibration,
            chat=run.chat,
            batch_tokens=run.batch_tokens,
            text_tokens=run.text_tokens,
        )
        if not so_far:
            evaluator.run(run.tasks, run.methods, minutes=left)
        done = evaluator.finished(run.tasks, run.methods)
        whole = len(done) == len(run.methods)
        complete = complete and whole
        if processes.leads and (whole or (so_far and len(done) > 1)):
            with FileLock(folder / "claims" / "record.lock"):
                if not stamp.exists():
                    _record(evaluator, replace(run, methods=done), records)
                    if whole:
                        stamp.touch()
        del evaluator, loaded
    return complete


def _record(evaluator: Evaluator, run: Run, folder: Path | None) -> None:
    files = [evaluator.path(method, name) for method in run.methods for name in run.tasks]
    parameters = describe(run)
    for path in write_records(load_results(files), run.record, parameters=parameters, folder=folder):
        print(f"Wrote {path}")


def describe(run: Run) -> dict:
    """The parameters of a run's records."""
    policies = {str(c.policy): c.policy.describe() for c in run.methods}
    calibration = run.calibration.describe()
    return {
        "tasks": run.tasks,
        "methods": [str(c) for c in run.methods],
        "policies": list(policies.values()),
        "calibration": calibration | {"corpus": paths.without_folders(calibration["corpus"])},
        "documents": run.documents,
        "text_tokens": run.text_tokens,
        "seed": run.seed,
        "chat": run.chat,
        "dtype": run.dtype,
    }


def _run(given: dict, where: str, device: str | None) -> Run:
    plan_file.check(given, _TYPES, where)
    missing = [key for key in ("model", "record", "tasks", "rules") if key not in given]
    if missing:
        raise CatsError(f"A run in {where} lacks {missing[0]}: give model, record, tasks and rules.")
    policies = [_made(Policy, each, where) for each in given.pop("policies", [given.pop("policy", {})])]
    calibration = _made(Calibration, given.pop("calibration", {}), where)
    names = tasks.names(given.pop("tasks"))
    level = given.pop("level", "rule")
    wanted = [
        method
        for rule in given.pop("rules")
        for policy in policies
        for method in _methods(rule, policy, level, where)
    ]
    wanted = list(dict.fromkeys(wanted))  # the dense model is one under every policy
    if device is not None:
        given["device"] = device
    return Run(**given, tasks=names, methods=wanted, calibration=calibration)


def _made(kind: type, given: dict, where: str):
    """The dataclass `kind` from plain values; CatsError for unknown ones."""
    plan_file.check(given, get_type_hints(kind), f"the {kind.__name__.lower()} of {where}")
    return kind(**given)


def _methods(rule: str | dict, policy: Policy, level: str, where: str) -> list[Method]:
    """A rule as a name, or as {name: [sparsities]}."""
    if isinstance(rule, str):
        return [Method(rule, None, policy)]
    if len(rule) != 1 or not isinstance(*rule, str):
        raise CatsError(f"A rule in {where} is a name, or a name with a list of sparsities, not {rule!r}.")
    ((name, levels),) = rule.items()
    if name != criteria.DENSE:
        criteria.rule(name)
    return [
        Method(name, sparsity, policy, level)
        for sparsity in (levels if isinstance(levels, list) else [levels])
    ]
