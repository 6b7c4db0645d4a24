"""What the commands of `cats` do with their parsed arguments; `cats_cli` says what these are."""

import importlib
import sys
import time
from argparse import Namespace
from pathlib import Path

import torch
from transformers import PretrainedConfig

from cats import corpora, paths
from cats.calibration.calibrate import calibrate as calibrate_cats
from cats.calibration.centred import calibrate_centred
from cats.core import thresholds_file
from cats.core.accounting import account
from cats.core.centres import Setting
from cats.core.sparsify import restore, sparsify
from cats.core.structure import find_gated_mlps
from cats.core.thresholds import Thresholds, sparsities
from cats.errors import CatsError
from cats.evaluation import intervals
from cats.evaluation.sweep import sweep
from cats.models import load as model_loading
from cats.models import memory
from cats.models.geometries import GEOMETRIES
from cats.records.text_table import text_table


def calibrate(given: Namespace) -> None:
    """Stream a corpus through a model and write its thresholds file."""
    output = Path(given.output)
    _check_output(output)
    _check_length(given)  # an unknown name, and a wrong corpus, are said before the weights are read
    corpus = corpora.load(given.corpus, split=given.split)
    loaded = _load(given, tokens=min(given.tokens, given.batch_size * given.sequence_length))
    batches = corpora.batches(
        corpus,
        loaded.tokenizer,
        tokens=given.tokens,
        sequence_length=given.sequence_length,
        batch_size=given.batch_size,
        bos=given.bos,
        seed=given.seed,
    )
    print(corpus)
    checkpoint = output.with_suffix(".checkpoint")
    measure_rule = calibrate_centred if given.rule == "centred" else calibrate_cats
    thresholds = measure_rule(
        restore(loaded.model), batches, source={"model": loaded.info, **batches.info}, checkpoint=checkpoint
    )
    thresholds.save(output)
    checkpoint.unlink(missing_ok=True)
    print(f"Wrote {output}: {thresholds.layers} layers, {thresholds.tokens:,} tokens.")


def inspect(given: Namespace) -> None:
    """Print a thresholds file, or what CATS saves on a model, at some sparsities."""
    if paths.named(given.target).suffix == ".json":
        _inspect_thresholds(Thresholds.load(Path(given.target)), given.sparsity)
    else:
        _inspect_model(given.target, given.sparsity)


def perplexity(given: Namespace) -> None:
    """Print perplexity of the dense and the sparse model on the same documents, paired."""
    sparsities(given.sparsity, len(given.sparsity))
    thresholds = _thresholds(given)
    _check_length(given)
    corpus = corpora.load(given.corpus, split=given.split, documents=given.documents, seed=given.seed)
    print(corpus)
    loaded = _load(given, tokens=given.sequence_length)
    scored = sweep(
        loaded.model,
        loaded.tokenizer,
        thresholds,
        corpus.documents,
        given.sparsity,
        max_length=given.sequence_length,
        bos=given.bos,
    ).results
    count = int(scored.documents[0])
    print(f"{count} document{'s' * (count > 1)}, {scored.tokens[0]:,} tokens scored")
    rows = [
        (
            "0 (dense)" if number == 0 else f"{row.gate_sparsity:g}",
            "-" if number == 0 else f"{row.realised_sparsity:.3f}",
            f"{row.nll_nats:.4f}",
            f"{row.perplexity:.3f}",
            intervals.as_text(row.delta_nll, row.delta_low, row.delta_high),
        )
        for number, row in enumerate(scored.itertuples())
    ]
    print(text_table(("gate sparsity", "realised", "NLL, nats", "perplexity", "NLL - dense [95 %]"), rows))


def generate(given: Namespace) -> None:
    """Continue a prompt greedily; the text on stdout, the speed on stderr."""
    sparsities(given.sparsity, 1)
    thresholds = _thresholds(given) if given.sparsity else None
    loaded = _load(given, tokens=1)
    if thresholds:
        sparsify(loaded.model, thresholds, given.sparsity)
    else:
        restore(loaded.model)  # one that was saved sparse
    inputs = loaded.tokenizer(given.prompt, return_tensors="pt").to(loaded.model.device)
    if inputs.input_ids.shape[1] == 0:
        raise CatsError("The prompt is empty: give some text to continue.")
    limit = _positions(loaded.model.config)
    read = inputs.input_ids.shape[1]
    if limit and read + given.new_tokens > limit:
        raise CatsError(
            f"The {read:,} tokens of the prompt and {given.new_tokens:,} new ones are more "
            f"than the {limit:,} that {given.model} can read: shorten one of them."
        )
    started = time.perf_counter()
    with torch.inference_mode():
        ids = loaded.model.generate(**inputs, max_new_tokens=given.new_tokens, do_sample=False)[0]
    seconds = time.perf_counter() - started
    new = len(ids) - inputs.input_ids.shape[1]
    print(loaded.tokenizer.decode(ids, skip_special_tokens=True))
    print(
        f"{new} token{'s' * (new != 1)} in {seconds:.1f} s, {new / seconds:.1f} a second, prompt included",
        file=sys.stderr,
    )


def evaluate(given: Namespace) -> None:
    """Score a model under rules and sparsities on tasks, or run a plan; prints paired differences."""
    from cats.evaluation import command

    command.main(given)


def finetune(given: Namespace) -> None:
    """Fine-tune a model under several methods, or run a plan; prints the curves' end values."""
    from cats.finetuning import command  # peft and accelerate: only this command needs the extra "train"

    command.main(given)


def lm_eval(given: Namespace) -> None:
    """lm-eval's own command line, in a process where the quantization method "cats" is registered."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *(part for part in given.arguments if part != "--")]
    cli_evaluate()


def measure(given: Namespace) -> None:
    """Run a program of `cats.benchmarking`: it prints its table and writes its record."""
    if getattr(given, "output", None):
        paths.check_writable(Path(given.output))
    for name in [*getattr(given, "models", ()), *filter(None, [getattr(given, "model", None)])]:
        model_loading.config(name)  # the last one wrong is said before the first is measured
    importlib.import_module(f"cats.benchmarking.{given.program}").measure(given)


def reproduce(given: Namespace) -> None:
    """Run chapters; prints each one's time and peak memory."""
    from cats.book import reproduce as runner

    started = time.perf_counter()
    runs = runner.reproduce(
        given.chapters,
        profile=given.profile,
        parameters=runner.parse_parameters(given.parameters),
        output=Path(given.output).absolute() if given.output else None,
        in_place=given.in_place,
        force=given.force,
        jobs=given.jobs,
    )
    executed = [run for run in runs if run.seconds is not None]
    if executed:
        total = time.perf_counter() - started
        print(f"{'all':<28} {total:6.1f} s  {max(run.peak_gb for run in executed):5.2f} GB at most")


def _check_output(output: Path) -> None:
    """CatsError, before the pass, where a thresholds file cannot be written or would replace another file."""
    if output.suffix != ".json":
        raise CatsError(f"The thresholds file {output} must end in .json.")
    if not paths.named(output).absolute().parent.is_dir():
        raise CatsError(f"The folder {output.parent} does not exist: make it first.")
    if len(output.name) > 200:
        raise CatsError(f"The name {output.name} is too long for a file: choose a shorter one.")
    paths.check_writable(output.parent)
    thresholds_file.check_output(output)


def _positions(config: PretrainedConfig) -> int | None:
    """How many tokens a model can read; None where its configuration does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _check_length(given: Namespace) -> None:
    limit = _positions(model_loading.config(given.model))
    if given.sequence_length < 2 or (limit and given.sequence_length > limit):
        raise CatsError(
            f"--sequence-length {given.sequence_length} is outside 2 … {limit}, what {given.model} can read."
        )


def _load(given: Namespace, *, tokens: int) -> model_loading.LoadedModel:
    """The model; what no memory holds, with `tokens` in one call, is said before its weights are read."""
    if given.model.removeprefix(model_loading.RANDOM) in GEOMETRIES:
        raise CatsError(f"{given.model} has no tokenizer, so it reads no text: name another model.")
    if given.dtype in model_loading.DTYPES:  # any other is for `load` to say
        memory.check(given.model, model_loading.config(given.model), given.dtype, given.device, tokens=tokens)
    loaded = model_loading.load(given.model, device=given.device, dtype=given.dtype, seed=given.seed)
    find_gated_mlps(loaded.model)
    return loaded


def _thresholds(given: Namespace) -> Thresholds:
    if given.thresholds:
        thresholds = Thresholds.load(Path(given.thresholds))
        if given.rule not in (None, thresholds.rule):
            raise CatsError(
                f"The thresholds {given.thresholds} are for the rule {thresholds.rule}, not {given.rule}: "
                "leave --rule out, or name another file."
            )
        return thresholds
    suffix = "-centred" if given.rule == "centred" else ""
    shipped = paths.THRESHOLDS / f"{given.model}{suffix}.json"
    if not shipped.is_file():
        model_loading.config(given.model)  # an unknown name is the first thing to say
        raise CatsError(
            f"No thresholds are shipped for {given.model}: make a file with `cats calibrate` and name it "
            "with --thresholds (a model that was saved sparse has its own, and runs by them in Transformers)."
        )
    return Thresholds.load(shipped)


def _inspect_thresholds(thresholds: Thresholds, at: list[float]) -> None:
    corpus = thresholds.corpus
    print(
        f"model       {thresholds.model.get('id', '?')} "
        f"({thresholds.layers} layers, {thresholds.activation} gate)"
    )
    print(
        f"criterion   {thresholds.criterion}, "
        f"sparsity exact to {100 * thresholds.grid_error:.3f} percentage points"
    )
    print(f"corpus      {corpus.get('name', '?')} ({corpus.get('split', '?')}), {thresholds.tokens:,} tokens")
    policy = "; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in thresholds.policy.items())
    print(f"policy      {policy}")
    columns = [thresholds.settings(s) for s in at]
    if thresholds.per == "neuron":
        print("thresholds are one per neuron: the table shows each layer's median")
    if thresholds.rule == "centred":
        print("c marks the layers with centres; in the others they do not pay at that sparsity")
    rows = [
        (str(layer), *(_shown(column[layer]) for column in columns)) for layer in range(thresholds.layers)
    ]
    print(text_table(("layer", *(f"t at s = {s:g}" for s in at)), rows))


def _shown(setting: Setting) -> str:
    """A layer's threshold, or the median of its neurons' ones, and whether they are around centres."""
    return f"{float(setting.threshold.median()):.4f}" + (" c" if setting.centre is not None else "")


def _inspect_model(name: str, at: list[float]) -> None:
    sparsities(at, len(at))
    shape = account(model_loading.config(name))
    print(
        f"{name}: {shape.layers} layers, hidden size {shape.hidden_size}, "
        f"intermediate size {shape.intermediate_size}"
    )
    rows = [
        (
            f"{s:g}",
            f"{100 * shape.model_sparsity(s):.1f} %",
            f"{shape.bytes_per_token(s) / 1e9:.3f}",
            f"{shape.mlp_speedup_bound(s):.2f}",
            f"{shape.speedup_bound(s):.2f}",
        )
        for s in [0.0, *at]
    ]
    header = ("gate sparsity", "model sparsity", "GB a token, 16-bit", "MLP bound", "decode bound")
    print(text_table(header, rows))
