"""Evaluate one model by many methods on many tasks: a file for each result, none of them twice."""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from cats import criteria, paths
from cats.core.accounting import Accounting, account
from cats.core.thresholds import Thresholds
from cats.corpora import Calibration
from cats.corpora.sampled import sampled
from cats.criteria.masking import Masking
from cats.errors import CatsError
from cats.evaluation import tasks
from cats.evaluation.distributed import Processes
from cats.evaluation.hflm import MaskedHFLM
from cats.evaluation.intervals import summarise
from cats.evaluation.method import Method
from cats.evaluation.result import MethodNote, Result, Sparsity, Speed
from cats.evaluation.task import Task
from cats.models.load import LoadedModel
from cats.records import origin


class Evaluator:
    """One loaded model, its tasks and its calibrated rules, kept between methods.

    `output`: the folder of result files; what is there already is not evaluated again. `documents`: a draw of
    so many from each task, with `seed`. `chat`: prompts in the model's chat template. `batch_tokens`: tokens
    of a batch. `text_tokens` keeps the beginning of longer texts. `thresholds`: of the one rule that is then
    evaluated, in place of a calibration.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        output: Path,
        *,
        processes: Processes | None = None,
        data_dir: str | None = None,
        documents: int | None = None,
        seed: int = 0,
        calibration: Calibration | None = None,
        thresholds: Thresholds | None = None,
        chat: bool = False,
        batch_tokens: int | None = None,
        text_tokens: int | None = None,
    ):
        self.loaded = loaded
        self.output = output
        self.processes = processes or Processes(0, 1, str(loaded.model.device))
        self.data_dir = data_dir
        self.documents = documents
        self.seed = seed
        self.calibration = calibration or Calibration()
        self.thresholds = thresholds
        self.chat = chat
        self.batch_tokens = batch_tokens
        self.text_tokens = text_tokens
        self.shape: Accounting = account(loaded.model)
        self._tasks: dict[str, Task] = {}
        self._fits: dict[str, criteria.Fit] = {}
        self._batches = None

    def run(
        self,
        names: Sequence[str],
        wanted: Sequence[Method],
        *,
        minutes: float | None = None,
        progress: bool = True,
    ) -> list[Path]:
        """Evaluate every method on every task without a result yet; returns the result files there are.

        After `minutes` no further task begins; the next call goes on from there. Several processes may run on
        one folder: each takes a method that no other one has taken. Raises CatsError, before anything is
        measured, for unknown tasks, missing data and rules that do not apply.
        """
        deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.check(names, wanted)
        self._origin, self._begun = origin.begin(seed=self.seed), time.perf_counter()
        paths = {(each, name): self.path(each, name) for each in wanted for name in names}
        with tqdm(total=len(paths), unit="task", disable=None if progress else True) as bar:
            for method in wanted:
                if self._late(deadline):
                    break
                with self._claimed(method, names[0]) as claimed:
                    missing = [name for name in names if not paths[method, name].is_file()]
                    # where several look at one folder, the first process decides
                    missing = self.processes.gather(missing if claimed else [])[0]
                    bar.update(len(names) - len(missing))
                    if not missing:
                        continue
                    with self._applied(method) as lm:
                        for name in missing:
                            if self._late(deadline):
                                break
                            bar.set_description(f"{method}: {name}")
                            result = self._evaluate(method, name, lm)
                            if self.processes.leads:
                                result.save(paths[method, name])
                            bar.update()
        return [path for path in paths.values() if path.is_file()]

    def finished(self, names: Sequence[str], wanted: Sequence[Method]) -> list[Method]:
        """Those of `wanted` with a result of every task."""
        return [each for each in wanted if all(self.path(each, name).is_file() for name in names)]

    @contextmanager
    def _claimed(self, method: Method, name: str) -> Iterator[bool]:
        """Whether no other process is at the method; it is this one's then, until it ends or dies."""
        path = self.output / "claims" / f"{self.path(method, name).stem}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        claimed = True
        if self.processes.leads:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                claimed = False
        try:
            yield claimed
        finally:
            lock.release()

    def check(self, names: Sequence[str], wanted: Sequence[Method]) -> None:
        """Raise CatsError for tasks without data and rules that do not apply, before minutes of work."""
        tasks.check(names, self.data_dir)
        if self.thresholds is not None:
            self.thresholds.check(self.loaded.model)
        for method in wanted:
            if method.rule != criteria.DENSE:
                if self.thresholds is not None and method.rule != self.thresholds.rule:
                    raise CatsError(
                        f"The thresholds are for the rule {self.thresholds.rule}, not {method.rule}: "
                        "leave one of the two out."
                    )
                criteria.rule(method.rule).check(self.loaded.model)
                method.rule_sparsity(self.shape)

    def path(self, method: Method, name: str) -> Path:
        """The result file: what tells two evaluations apart is in the hash that ends its name."""
        identity = json.dumps(self._identity(method, name), sort_keys=True)
        known = hashlib.sha256(identity.encode()).hexdigest()
        slug = str(method).replace(" ", "-")
        return self.output / f"{name.replace(':', '-').replace('/', '-')}--{slug}--{known[:10]}.json"

    def _identity(self, method: Method, name: str) -> dict:
        dense = method.rule == criteria.DENSE
        return {
            "model": [self.loaded.info.get(key) for key in ("id", "revision", "sha256", "dtype", "seed")],
            "rule": method.rule,
            "sparsity": method.sparsity,
            **({"level": method.level} if method.level != "rule" else {}),
            "policy": None if dense else method.policy.describe(),
            "calibration": None if dense else self._calibration(),
            "documents": self.documents,
            "seed": self.seed if self.documents else None,
            "chat": self.chat,
            "text_tokens": tasks.read_tokens(name, self.text_tokens),
        }

    def _calibration(self) -> dict:
        return self.calibration.describe() if self.thresholds is None else self.thresholds.provenance()

    @contextmanager
    def _applied(self, method: Method) -> Iterator[MaskedHFLM]:
        """The model under a method, and the language model as lm-eval sees it; dense again afterwards."""
        model = self.loaded.model
        fit = self._fit(method.rule)
        sparsity = method.rule_sparsity(self.shape)
        if fit is not None:
            fit.apply(model, sparsity)
        steer = None if fit is None else fit.steer(sparsity)
        options = {} if fit is None else {"continuing": fit.continuing(sparsity)}
        try:
            with Masking(model, method.policy, steer=steer) as masking:
                yield MaskedHFLM(
                    model, self.loaded.tokenizer, masking=masking, tokens=self.batch_tokens, **options
                )
        finally:
            if fit is not None:
                fit.undo(model)

    def _fit(self, rule: str) -> criteria.Fit | None:
        if rule == criteria.DENSE:
            return None
        if self.thresholds is not None:
            self._fits.setdefault(rule, criteria.from_thresholds(self.thresholds))
        if rule not in self._fits:
            if self._batches is None:
                device = self.loaded.model.device.type
                self._batches = self.calibration.batches(self.loaded.tokenizer, device, self._sample)
            source = {"model": self.loaded.info, **self._batches.info}
            self._fits[rule] = criteria.rule(rule).calibrate(self.loaded.model, self._batches, source=source)
        return self._fits[rule]

    def _sample(self, documents: int, length: int) -> Path:
        folder = paths.CACHE / "sampled"
        return self.processes.leading(lambda: sampled(self.loaded, documents, length, folder)[0])

    def _task(self, name: str, lm: MaskedHFLM) -> Task:
        if name not in self._tasks:
            self._tasks[name] = tasks.load(
                name,
                data_dir=self.data_dir,
                documents=self.documents,
                seed=self.seed,
                chat_template=lm.apply_chat_template if self.chat else None,
                text_tokens=self.text_tokens,
            )
        return self._tasks[name]

    def _evaluate(self, method: Method, name: str, lm: MaskedHFLM) -> Result:
        task = self._task(name, lm)
        fit = self._fit(method.rule)
        if lm.masking.steer is not None:  # each task starts from the calibrated thresholds
            fit.apply(self.loaded.model, method.rule_sparsity(self.shape))
        lm.masking.reset()
        lm.processed = 0
        lm.label = name
        task.prepare(lm, self.processes)
        started = time.perf_counter()
        answers = task.score(lm, self.processes)
        seconds = time.perf_counter() - started
        tokens = sum(self.processes.gather(lm.processed))
        realised = lm.masking.realised(self.processes.gather)
        parts = self.processes.gather({} if fit is None else fit.counted())
        counted = {key: sum(part[key] for part in parts) for key in parts[0]}
        return Result(
            task=task.name,
            documents=task.documents,
            data=task.data,
            method=MethodNote(
                **self._identity(method, name),
                shots=task.shots,
                processes=self.processes.size,
                calibrated=None if fit is None else fit.describe(),
            ),
            model=self.loaded.info,
            metrics=summarise(answers.scores),
            scores=answers.scores,
            sparsity=self._sparsity(method, fit, realised, counted),
            speed=Speed(tokens=tokens, seconds=round(seconds, 3), tokens_per_s=round(tokens / seconds, 1)),
            texts=answers.texts,
            asked=answers.questions,
            origin=origin.ended(self._origin, time.perf_counter() - self._begun),
        )

    def _sparsity(self, method: Method, fit, realised: dict, counted: dict) -> Sparsity:
        """Targets, and what was realised: over all phases, weighted by tokens, and by phase."""

        def mean(what: str) -> float | None:
            parts = [(part["tokens"], part[what]) for part in realised.values()]
            if any(value is None for _, value in parts):
                return None
            return sum(count * value for count, value in parts) / max(1, sum(count for count, _ in parts))

        sparsity, shape = method.rule_sparsity(self.shape), self.shape
        skipped = mean("skipped_weights")
        return Sparsity(
            gate_target=0.0 if fit is None else fit.gate_sparsity(sparsity),
            model_target=0.0 if fit is None else fit.model_sparsity(shape, sparsity),
            bytes_per_token=shape.bytes_per_token() if fit is None else fit.bytes_per_token(shape, sparsity),
            gate_realised=mean("gate_sparsity"),
            model_realised=skipped / shape.block_weights,
            bytes_realised=shape.bytes_per_token() - 2 * skipped,
            realised=realised,
            **counted,
        )

    def _late(self, deadline: float | None) -> bool:
        return deadline is not None and self.processes.agree(time.monotonic() > deadline)
