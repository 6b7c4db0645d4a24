"""What CATS gains on this CPU: latency of a gated MLP and tokens per second, dense and sparse in turns."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from cats_kernels import cats_mlp, reference
from torch import Tensor
from tqdm.auto import tqdm
from transformers.generation.streamers import BaseStreamer

from cats.benchmarking.timing import Timing, summarise
from cats.core import accounting
from cats.core.sparsify import restore, sparsify
from cats.core.structure import cats_mlps
from cats.core.thresholds import Thresholds
from cats.errors import CatsError
from cats.models.load import DTYPES, LoadedModel

ROTATED_BYTES = 512 * 2**20  # weights that a pass reads: more than the last-level cache of any CPU but a few
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3}  # relative error of a rounded result
NEVER = 1e30  # no activation is that large: only the gate is read


def in_turns(steps: dict[str, Callable[[], object]], seconds: float, calls: int) -> dict[str, list[float]]:
    """µs a call of every step, one sample a round; a round runs each once, so that all see the same machine.

    A step makes `calls` calls. The first round warms up and is not counted; at least three others are.
    """
    samples = {name: [] for name in steps}
    for step in steps.values():
        step()
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(samples[next(iter(steps))]) < 3:
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            samples[name].append((time.perf_counter() - start) * 1e6 / calls)
    return samples


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median of the ratios of samples of the same round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


@torch.inference_mode()
def read_bandwidth(mib: int = 256, runs: int = 10) -> float:
    """GB/s of the fastest way found to only read memory, with the threads that PyTorch has: the ceiling.

    Sums and maxima of one long array, and the sparse MLP with every neuron dropped, whose streams are more.
    """
    d = 4096
    data = torch.zeros(mib * 2**20 // (4 * d), d)
    flat, x, never = data.view(-1), torch.zeros(1, d), torch.tensor(NEVER)
    passes = {"sum": flat.sum, "maximum": flat.amax, "gate": lambda: cats_mlp(x, data, data, data, never)}
    samples = in_turns(passes, 0.0, 1)
    for name, each in in_turns(passes, runs * 0.03, 1).items():
        samples[name] += each
    return data.nbytes / min(min(each) for each in samples.values()) / 1e3


def mlp_latency(
    hidden_size: int,
    intermediate_size: int,
    sparsities: Sequence[float] = (0.0, 0.5, 0.7),
    *,
    dtype: str = "float32",
    batch_size: int = 1,
    compiled: bool = False,
    seconds: float = 8.0,
    seed: int = 0,
) -> list[dict]:
    """Rows of the experiment mlp_latency for layers with random weights: dense, then CATS at each sparsity.

    Every variant is compared with the reference before it is timed. `compiled` adds torch.compile, which
    needs a C++ compiler. A neuron counts as read where one of the tokens keeps it. Raises CatsError
    for a wrong result, a wrong dtype, and where torch.compile finds no compiler.
    """
    if dtype not in DTYPES:
        raise CatsError(f"Unknown dtype {dtype!r}: use one of {', '.join(DTYPES)}.")
    kind, m, d = DTYPES[dtype], intermediate_size, hidden_size
    count = -(-ROTATED_BYTES // (3 * m * d * kind.itemsize))
    generator = torch.Generator().manual_seed(seed)
    layers = [[_normal(generator, m, d).to(kind) for _ in range(3)] for _ in range(count)]
    x = torch.randn(batch_size, d, generator=generator).to(kind)
    z = [F.silu(x.float() @ gate.float().t()) for gate, _, _ in layers]
    downs = [down.t().contiguous() for _, _, down in layers]  # as the dense model stores it

    def dense(i: int) -> Tensor:
        gate, up, _ = layers[i]
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), downs[i])

    variants = {("dense_eager", 0.0): dense}
    if compiled:
        variants["dense_compiled", 0.0] = _compiled(layers, downs, x)
    thresholds = {s: [_quantile(each, s) for each in z] for s in sparsities}
    for s in sparsities:
        variants["cats", s] = lambda i, s=s: cats_mlp(x, *layers[i], thresholds[s][i])
    errors = {}
    with torch.inference_mode():
        for (name, s), call in variants.items():
            errors[name, s] = _require_correct(name, call(0), (x, *layers[0], _quantile(z[0], s)))
        steps = {key: lambda call=call: [call(i) for i in range(count)] for key, call in variants.items()}
        samples = in_turns(steps, seconds, count)
    bandwidth = read_bandwidth()
    best = min((key for key in samples if key[0] != "cats"), key=lambda key: statistics.median(samples[key]))
    samples["dense_best", 0.0], errors["dense_best", 0.0] = samples[best], errors[best]
    result = []
    for (name, s), each in samples.items():
        timing: Timing = summarise(each, 1)
        density = statistics.mean(float((v.abs() >= _quantile(v, s)).any(dim=0).float().mean()) for v in z)
        read = m * d * kind.itemsize * (1 + 2 * (density if name == "cats" else 1.0))
        result.append({
            "hidden_size": d, "intermediate_size": m, "dtype": dtype, "batch": batch_size, "sparsity": s,
            "variant": name, "threads": torch.get_num_threads(), "union_density": density,
            "latency_us": timing.median, "latency_us_p5": timing.p5, "latency_us_p95": timing.p95,
            "runs": timing.runs, "layers": count,
            "gbs": read / timing.median / 1e3, "bandwidth_gbs": bandwidth,
            "bound_share": read / bandwidth / 1e3 / timing.median, "best_dense": best[0],
            "speedup_over_best_dense": ratio(samples[best], each), "relative_error": errors[name, s],
        })  # fmt: skip
    return result


class _Clock(BaseStreamer):
    """Times at which `generate` hands over the prompt and then each token."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def decode_rate(
    loaded: LoadedModel,
    thresholds: Thresholds,
    prompt: Tensor,
    sparsities: Sequence[float] = (0.5, 0.7),
    *,
    new_tokens: int = 64,
    rounds: int = 5,
    progress: bool = True,
) -> list[dict]:
    """Rows of the experiment decode: tokens/s of greedy `model.generate` from one prompt [1, T].

    The rate leaves out the first token, which prefill gives. Rounds take dense and sparse in turns; a
    speed-up is the median over rounds. The model comes back dense.
    """
    model = loaded.model
    bound = accounting.account(model)
    rates = {s: [] for s in (0.0, *(s for s in sparsities if s > 0))}
    turns = [(number, s) for number in range(rounds + 1) for s in rates]  # the first round warms up
    for number, s in tqdm(turns, desc="generate", unit="run", disable=None if progress else True):
        if s == 0:
            restore(model) if number else None
        else:
            sparsify(model, thresholds, s)
            if not number:
                _require_same_logits(model, prompt)
        rate = _generate(model, prompt, new_tokens if number else 4)
        if number:
            rates[s].append(rate)
    restore(model)
    return [
        {
            "geometry": loaded.info["id"], "weights": loaded.info["weights"], "sparsity": s,
            "variant": "cats_generate_eager" if s else "dense_generate_eager",
            "prompt_tokens": prompt.shape[1], "new_tokens": new_tokens,
            "threads": torch.get_num_threads(), "dtype": loaded.info["dtype"], "runs": rounds,
            "tokens_per_s": statistics.median(each), "tokens_per_s_low": min(each),
            "tokens_per_s_high": max(each), "speedup_over_best_dense": ratio(each, rates[0.0]),
            "bound_speedup": bound.speedup_bound(s), "peak_memory_gb": None,
        }
        for s, each in rates.items()
    ]  # fmt: skip


@torch.inference_mode()
def _require_same_logits(model, prompt: Tensor) -> None:
    """CatsError where one token through the kernel and through masked dense products give other logits."""
    sparse = model(input_ids=prompt[:, -1:], use_cache=False).logits.float()
    modules = cats_mlps(model)
    for module in modules:
        module.observer = lambda z, up: None  # an observed module takes the dense path
    masked = model(input_ids=prompt[:, -1:], use_cache=False).logits.float()
    for module in modules:
        module.observer = None
    error = float((sparse - masked).norm() / masked.norm())
    allowed = 1e-2 if model.dtype == torch.float32 else 5e-2  # activations at a threshold may fall either way
    if not error <= allowed:
        raise CatsError(f"Logits of the sparse model are off by {error:.1e}: nothing is reported.")


def _generate(model, prompt: Tensor, new_tokens: int) -> float:
    """Tokens/s of exactly `new_tokens`, greedy, without the first."""
    clock = _Clock()
    model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, eos_token_id=None, pad_token_id=0,
        max_new_tokens=new_tokens, streamer=clock,
    )  # fmt: skip
    return (new_tokens - 1) / (clock.times[-1] - clock.times[1])


def _normal(generator, m: int, d: int) -> Tensor:
    return torch.randn(m, d, generator=generator) / d**0.5


def _quantile(z: Tensor, sparsity: float) -> Tensor:
    """The threshold that drops the share `sparsity` of z, between two magnitudes."""
    ordered = z.abs().flatten().sort().values
    rank = round(sparsity * len(ordered))
    if rank == 0:
        return torch.tensor(0.0)
    return (ordered[rank - 1] + ordered[min(rank, len(ordered) - 1)]) / 2


def _require_correct(name: str, y: Tensor, arguments: Iterable[Tensor]) -> float:
    expected = reference.cats_mlp(*arguments, out_dtype=torch.float64, accumulate=torch.float64)
    error = float((y.double() - expected).norm() / expected.norm())
    if not error <= TOLERANCE[y.dtype]:
        allowed = TOLERANCE[y.dtype]
        raise CatsError(f"{name} is wrong by {error:.1e} (allowed {allowed:.0e}): nothing is reported.")
    return error


def _compiled(layers, downs, x: Tensor) -> Callable[[int], Tensor]:
    """The dense MLP by torch.compile, compiled and checked to run."""

    @torch.compile(fullgraph=True, dynamic=False)
    def mlp(x, gate, up, down):
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    def call(i: int) -> Tensor:
        return mlp(x, *layers[i][:2], downs[i])

    try:
        with torch.inference_mode():
            call(0)
    except RuntimeError as error:
        raise CatsError("torch.compile needs a C++ compiler here: install one or leave it out.") from error
    return call
