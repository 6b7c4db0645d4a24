"""Two streaming passes over text give what the rule `centred` needs, for every sparsity."""

import os
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from cats.calibration.calibrate import EXCESS, GRID_LIMIT, PROBES, grid_error_of, plain_notes, provenance
from cats.calibration.checkpoint import Checkpoint
from cats.calibration.histogram import Binning, count, quantiles, refined, rounded
from cats.calibration.stream import check_decoder, checked, watch
from cats.core.activation import ACTIVATIONS, CatsMLP, cats, unrounded
from cats.core.centres import COMPARED_AT, Centres
from cats.core.structure import GatedMLP, find_gated_mlps
from cats.core.thresholds import GRID, Thresholds, fingerprint
from cats.errors import CatsError

MEDIANS, INPUTS = 512, 128  # tokens in the samples, at least, where the text has so many
FIRST = 30_000  # tokens that the first pass reads, about, where the text has more
_BINNING = Binning(mantissa_bits=10, lowest=-40, highest=24)
_LEAST = 2.0**-14  # of a weight over its layer's mean: what 16 bits hold without loss
_FLOOR = 1e-3  # of the mean square of an output


def calibrate_centred(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    *,
    source: dict | None = None,
    checkpoint: str | os.PathLike | None = None,
    progress: bool = True,
) -> Thresholds:
    """Thresholds of the rule `centred` for every sparsity, from one and a half passes of `batches` or fewer.

    Arguments as `cats.calibrate`. The first pass, of every so many batches of a text of more than 30,000
    tokens, samples x W_gate, for each neuron's median, and sums up (x W_up)^2. The second, of all, counts
    scores with centres and without. At the end a sample of 128 to 255 tokens
    says at which sparsities a layer is nearer to the dense one with centres. Memory: a sample of 512 to 1,023
    tokens a layer, and 1 MB. Raises CatsError as `cats.calibrate`, and for a model that is sparse already.

    >>> thresholds = calibrate_centred(model, batches)
    >>> thresholds.save("centred.json")
    >>> _ = sparsify(model, Thresholds.load("centred.json"), 0.5)
    """
    check_decoder(model)
    mlps = find_gated_mlps(model)
    source = plain_notes(source or {}, "source")
    if len({mlp.activation for mlp in mlps}) > 1:
        raise CatsError("The layers differ in activation: thresholds need one activation for all.")
    if any(isinstance(mlp.module, CatsMLP) for mlp in mlps):
        raise CatsError(
            "This model is sparse already: cats.restore it, the rule centred measures dense ones."
        )
    layers = [_Layer(mlp) for mlp in mlps]
    passes = _Passes(batches)
    signs = fingerprint(mlps)
    saved = None
    if checkpoint is not None:
        tensors = [tensor for layer in layers for tensor in layer.tensors()]
        saved = Checkpoint(checkpoint, tensors, ["centred", signs, str(next(model.parameters()).dtype)])

    def see(key: tuple[_Layer, str], x: Tensor, output: Tensor) -> None:
        layer, part = key
        output = output.narrow(-1, layer.mlp.first_output(part), layer.mlp.intermediate_size)
        if passes.number == 1:
            layer.measure(part, x, output)
        elif part == "gate":
            layer.score(output)

    modules = [((layer, part), layer.mlp.projection(part)) for layer in layers for part in ("gate", "up")]
    tokens = watch(model, modules, passes, see, at="both", saved=saved, progress=progress) - passes.first
    for layer in layers:
        layer.check(passes.first, tokens)
    scores = torch.cat([torch.stack([layer.scores[n].cpu() for layer in layers]) for n in (0, 1)])
    limit = GRID_LIMIT // len(scores)
    grid = refined(scores, GRID, _BINNING, PROBES, tolerance=EXCESS, limit=limit)
    values = quantiles(scores, grid, _BINNING)
    values = rounded(scores, grid, values, _BINNING, PROBES, EXCESS / 4)
    errors = [
        grid_error_of(counts[None], grid, row, _BINNING, True)
        for counts, row in zip(scores, values, strict=True)
    ]
    thresholds = Thresholds(
        **provenance(source, model, mlps, signs, 0),
        criterion="quantile of |act(x W_gate) - c| times a weight per neuron, c around its median",
        tokens=tokens,
        grid=grid,
        values=values[: len(layers)],
        grid_error=float(f"{max(errors):.3g}"),
        centres=Centres(
            gates=[layer.gates.cpu() for layer in layers],
            weights=[layer.weights.cpu() for layer in layers],
            values=values[len(layers) :],
            hidden_sizes=[mlp.hidden_size for mlp in mlps],
            errors=torch.ones(len(layers), len(COMPARED_AT)),
        ),
    )
    for n, layer in enumerate(layers):
        thresholds.centres.errors[n] = errors_with_centres(layer.mlp, layer.inputs.rows, thresholds)
    return thresholds


@torch.no_grad()
def errors_with_centres(mlp: GatedMLP, x: Tensor, thresholds: Thresholds) -> Tensor:
    """Error of an MLP's output on x [N, d] with centres, over that without, at COMPARED_AT; fp32 [S].

    Squared, of each token relative to its size. 1 where A takes as much as all neurons that are left.
    """
    x = x.to(mlp.gate.weight)
    gate, up = (
        mlp.projection(part)(x).narrow(-1, mlp.first_output(part), mlp.intermediate_size)
        for part in ("gate", "up")
    )
    act = ACTIVATIONS[mlp.activation]
    z = act(gate)
    exact = unrounded(act, gate, z)
    dense = mlp.down(z * up).float()
    root = root_size(dense)
    ratios = torch.ones(len(COMPARED_AT))
    for place, sparsity in enumerate(COMPARED_AT.tolist()):
        if sparsity + thresholds.centres.overhead(mlp.layer) >= 1:
            break
        sums = []
        for centred in (False, True):
            setting = thresholds.setting(mlp.layer, sparsity, centred)
            threshold, centre = (part if part is None else part.to(x.device) for part in setting)
            output = mlp.down(cats(z, threshold, exact, centre) * up).float()
            sums.append(float(((output - dense) * root).pow(2).sum()))
        if sums[0] > 0:
            ratios[place] = float(f"{sums[1] / sums[0]:.4g}")
    return ratios


def root_size(y: Tensor) -> Tensor:
    """[N, 1]: one over the norm of each output y [N, d], fp32, by which tokens of any size weigh alike."""
    size = y.pow(2).sum(1, keepdim=True)
    return (size + _FLOOR * size.mean()).rsqrt()


class _Passes:
    """Batches of a first pass, every so many, and of a second, all of them; `number` says which, 1 or 2.

    `first`: tokens of the first pass. Raises CatsError for batches of another form.
    """

    def __init__(self, batches: Iterable[dict[str, Tensor]]):
        self._batches = list(checked(batches))
        sizes = [_tokens(batch) for batch in self._batches]
        self._stride = max(1, round(sum(sizes) / FIRST))
        self.first = sum(sizes[:: self._stride])
        self.info = {"tokens": self.first + sum(sizes)}
        self.number = 1

    def __iter__(self):
        self.number = 1
        yield from self._batches[:: self._stride]
        self.number = 2
        yield from self._batches


def _tokens(batch: dict[str, Tensor]) -> int:
    mask = batch.get("attention_mask")
    return int(batch["input_ids"].numel() if mask is None else mask.sum())


class _Layer:
    """What is counted of one layer: samples and sums in the first pass, scores in the second."""

    def __init__(self, mlp: GatedMLP):
        self.mlp = mlp
        device, dtype, m = mlp.gate.weight.device, mlp.gate.weight.dtype, mlp.intermediate_size
        self.gate_sample = Sample(MEDIANS, m, dtype)
        self.inputs = Sample(INPUTS, mlp.hidden_size, dtype)
        self.squares = torch.zeros(m, dtype=torch.float64, device=device)
        self.scores = torch.zeros(2, _BINNING.bins, dtype=torch.int64, device=device)
        self.gates: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """All that a checkpoint keeps."""
        samples = (self.gate_sample, self.inputs)
        return [self.squares, self.scores, *(t for s in samples for t in (s.buffer, s.state))]

    def measure(self, part: str, x: Tensor, output: Tensor) -> None:
        if part == "up":
            self.squares += output.float().pow(2).sum(0)
        else:
            self.gate_sample.see(output)
            self.inputs.see(x)

    def score(self, gate: Tensor) -> None:
        if self.gates is None:
            self.settle()
        z = ACTIVATIONS[self.mlp.activation](gate.float())
        count(self.scores[0], z * self.weights, _BINNING)
        count(self.scores[1], z.sub_(self.centre).mul_(self.weights), _BINNING)

    def settle(self) -> None:
        """Medians and weights, of the precision that a thresholds file keeps."""
        device = self.squares.device
        rms = (self.squares / self.gate_sample.seen).sqrt()
        mean = rms.mean()
        weights = rms / mean if mean > 0 else torch.ones_like(rms)
        self.weights = weights.clamp(min=_LEAST).half().float()
        self.gates = self.gate_sample.rows.float().median(0).values.half().float().to(device)
        self.centre = ACTIVATIONS[self.mlp.activation](self.gates)

    def check(self, first: int, tokens: int) -> None:
        """Raise CatsError where tokens went past the layer, or where its activations are not finite."""
        if self.gates is None:
            self.settle()
        if self.gate_sample.seen < first or int(self.scores[0].sum()) < tokens * self.mlp.intermediate_size:
            raise CatsError(
                f"{self.mlp.name} was not called on every token, so it has no thresholds: load the model "
                "without what skips or replaces it."
            )
        finite = bool(self.gates.isfinite().all() and self.weights.isfinite().all())
        if not finite or int(self.scores[:, -1].sum()):
            raise CatsError(
                f"Layer {self.mlp.layer} has activations that are infinite, NaN or too large: run the model "
                "in float32 or bfloat16, or check its weights."
            )


class Sample:
    """Rows [least … 2 least, n] of a stream, evenly spaced, fewer where it is shorter."""

    def __init__(self, least: int, width: int, dtype: torch.dtype):
        self.least = least
        self.buffer = torch.zeros(2 * least, width, dtype=dtype)
        self.state = torch.tensor([0, 0, 1])  # rows in the buffer, rows seen, one row in so many is taken

    @property
    def rows(self) -> Tensor:
        return self.buffer[: int(self.state[0])]

    @property
    def seen(self) -> int:
        return int(self.state[1])

    def see(self, x: Tensor) -> None:
        """Take what is due of the rows x [N, n] that come next in the stream."""
        filled, seen, stride = self.state.tolist()
        taken = x[-seen % stride :: stride]
        while len(taken):
            part, taken = taken[: 2 * self.least - filled], taken[2 * self.least - filled :]
            self.buffer[filled : filled + len(part)] = part
            filled += len(part)
            if filled == 2 * self.least:  # every second row stays, and of those to come as well
                self.buffer[: self.least] = self.buffer[::2].clone()
                filled, stride, taken = self.least, 2 * stride, taken[::2]
        self.state.copy_(torch.tensor([filled, seen + len(x), stride]))
