"""What the runs of a comparison share: a pristine model, rows by seed, and rules calibrated once."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cats import corpora, criteria
from cats.corpora import sampled
from cats.errors import CatsError
from cats.evaluation.distributed import Processes
from cats.finetuning import data
from cats.finetuning.checkpoints import read_note, write_note
from cats.finetuning.plan import CALIBRATION, Comparison
from cats.finetuning.recipe import Recipe
from cats.models import load as models

_NOTE = "data.json"


class Inputs:
    """The model and the texts of a comparison, read when the first run needs them, in its folder."""

    def __init__(self, each: Comparison, folder: Path, processes: Processes):
        self.each, self.folder, self.processes = each, folder, processes
        self._loaded: models.LoadedModel | None = None
        self._about: dict = {}
        self._texts: dict[int, data.TrainingText] = {}
        self._fits: dict[str, criteria.Fit] = {}
        self._batches: dict[int, corpora.Batches] = {}

    def loaded(self, recipe: Recipe) -> models.LoadedModel:
        """The model; raises CatsError for one that reads no text."""
        if self._loaded is None:
            self._loaded = models.load(self.each.model, dtype=recipe.dtype)
            if self._loaded.tokenizer is None:
                raise CatsError(
                    f"{self.each.model} has no tokenizer, so it reads no text: name another model."
                )
        return self._loaded

    def about(self, recipe: Recipe) -> dict:
        """What a record says about model and data, as it was noted, or by the text of `recipe`."""
        if not self._about and self._loaded is None:
            self._about = self.processes.gather(read_note(self.folder / _NOTE))[0]
        if not self._about:
            self._about = {"model": self.loaded(recipe).info, "data": self.text(recipe).info}
            if self.processes.leads:
                write_note(self.folder / _NOTE, self._about)
        return self._about

    def text(self, recipe: Recipe) -> data.TrainingText:
        """The rows of a seed; text sampled from the model is written first."""
        if recipe.seed not in self._texts:
            name, about = self.each.train, {}
            if name.startswith(sampled.SAMPLED):
                name, about = self._sampled(recipe)
            self._texts[recipe.seed] = data.load(
                name,
                self.each.heldout,
                self.loaded(recipe).tokenizer,
                rows=max(1, recipe.steps * recipe.batch),
                sequence_length=recipe.sequence_length,
                seed=recipe.seed,
                heldout_rows=self.each.heldout_rows,
                heldout_split=self.each.heldout_split,
                documents=self.each.documents,
                data_dir=self.each.data_dir,
            )
            self._texts[recipe.seed].info["train"] |= about
        return self._texts[recipe.seed]

    def fit(self, recipe: Recipe) -> criteria.Fit | None:
        """The recipe's rule calibrated on the pristine model; None for the dense model."""
        if not recipe.sparse:
            return None
        if recipe.rule not in self._fits:
            self._fits[recipe.rule] = self._calibrated(recipe)
        return self._fits[recipe.rule]

    def batches(self, recipe: Recipe, tokens: int) -> corpora.Batches | None:
        """So many tokens of the text to calibrate on; None for no tokens."""
        if tokens and tokens not in self._batches:
            given = CALIBRATION | self.each.calibration
            corpus = _corpus(given["corpus"], given["split"], self.each.data_dir)
            self._batches[tokens] = corpora.batches(
                corpus,
                self.loaded(recipe).tokenizer,
                tokens=tokens,
                sequence_length=given["sequence_length"],
            )
        return self._batches.get(tokens)

    def _calibrated(self, recipe: Recipe) -> criteria.Fit:
        if recipe.rule == "cats" and self.each.thresholds:
            return criteria.ThresholdFit("cats", self.each.load_thresholds())
        loaded = self.loaded(recipe)
        text = self.batches(recipe, (CALIBRATION | self.each.calibration)["tokens"])
        with _on(loaded, self.each.device):
            source = {"model": loaded.info, **text.info}
            return criteria.rule(recipe.rule).calibrate(loaded.model, text, source=source)

    def _sampled(self, recipe: Recipe) -> tuple[str, dict]:
        count, loaded = sampled.number(self.each.train), self.loaded(recipe)

        def write() -> tuple[Path, dict]:
            with _on(loaded, self.each.device):
                return sampled.sampled(loaded, count, recipe.sequence_length, self.folder.parent)

        path, about = self.processes.leading(write)
        return str(path), about


@contextmanager
def _on(loaded: models.LoadedModel, device: str) -> Iterator[None]:
    """A pristine model on the device for a while, and back in memory."""
    loaded.model.to(device)
    try:
        yield
    finally:
        loaded.model.to("cpu")


def _corpus(name: str, split: str, data_dir: str | None) -> corpora.Corpus:
    """Text to calibrate on: a corpus, or the instructions of a task with their responses."""
    if not data.is_instructions(name):
        return corpora.load(name, split=split)
    found, about = data.examples(name, split, data_dir)
    return corpora.Corpus(name, split, [each.prompt + each.response for each in found], about)
