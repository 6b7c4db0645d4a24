"""Rows of the experiment mlp_latency: variants of one shape checked, then timed, against the best dense."""

import torch
from cats_kernels import cats_mlp, decode, tuning
from tqdm import tqdm

from cats.benchmarking import dense, naive, published, workload
from cats.benchmarking.timing import speedup

# A 16-bit gate puts neurons at the threshold on its other side: up to 7e-2 of the norm of y.
TOLERANCE_16_BIT_GATE = 0.1


def sparse_variants(batch_size: int) -> dict:
    """Name → (function of a layer's arguments, launch kinds, tolerance) for a batch of that size."""
    variants = {
        "cats": (cats_mlp, ("graph", "eager"), None),
        "cats_mask_dense": (naive.mask_then_dense, ("graph", "eager"), TOLERANCE_16_BIT_GATE),
        "cats_gather": (naive.gather_then_multiply, ("eager",), TOLERANCE_16_BIT_GATE),
    }
    if batch_size == 1:
        variants["cats_separate"] = (naive.separate_launches, ("graph", "eager"), TOLERANCE_16_BIT_GATE)
        variants["cats_atomic"] = (_atomic, ("graph",), None)
    return variants


def _atomic(x, w_gate, w_up, w_down_t, threshold, activation):
    """The shipped kernel with atomic sums: what bit-equal results cost."""
    config = tuning.decode_config(*w_gate.shape, x.element_size()) | {"atomic": True}
    return decode.launch(x, w_gate, w_up, w_down_t, threshold, activation, None, x.dtype, config)


class Bench:
    """Measurements of one set of layers; `rows` collects the rows, `best` is the fastest dense in µs."""

    def __init__(self, layers, options, device, bandwidth: float | None, labels: dict):
        self.layers, self.options, self.device, self.bandwidth = layers, options, device, bandwidth
        self.labels = labels
        self.rows: list[dict] = []
        self.best: float | None = None
        self.recipe: str | None = None  # of the fastest dense

    def dense(self, names) -> None:
        """Time the dense variants `names`, and set `best`."""
        found = []
        for name in tqdm(names, desc="dense", disable=None, leave=False):
            variant = dense.build(name, self.layers)
            tolerance = workload.TOLERANCE[self.layers[0].x.dtype]
            error = workload.require_correct(
                name, variant.compute, self.layers, masked=False, tolerance=tolerance
            )
            for launch in variant.launches:
                row = self.time(name, variant.step, launch, 0.0, error, compile_s=variant.compile_s)
                found.append(row)
            del variant
        fastest = min(found, key=lambda row: row["latency_us"])
        self.best, self.recipe = fastest["latency_us"], fastest["variant"]
        self.rows.append({**fastest, "variant": "dense_best", "recipe": fastest["variant"]})
        for row in self.rows:
            row["speedup_over_best_dense"] = self.best / row["latency_us"]

    def sparse(self, sparsity: float, names=None) -> None:
        """Time the CATS variants at the thresholds that the layers have now."""
        wanted = sparse_variants(len(self.layers[0].x))
        shape = *self.layers[0].w_gate.shape, len(self.layers[0].x)
        wanted |= published.variants(*shape, tolerance=TOLERANCE_16_BIT_GATE)
        for name in names or wanted:
            function, launches, tolerance = wanted[name]
            error = workload.require_correct(
                name,
                lambda layer, f=function: f(*layer.arguments()),
                self.layers,
                tolerance=tolerance or workload.TOLERANCE[self.layers[0].x.dtype],
            )

            @torch.no_grad()
            def step(i, f=function):
                return f(*self.layers[i % len(self.layers)].arguments())

            for launch in launches:
                self.time(name, step, launch, sparsity, error)

    def time(self, name, step, launch, sparsity, error, compile_s=0.0) -> dict:
        """The row of `step(i)`, which runs layer i, with the bytes of `layers`; it is printed and kept."""
        timing = workload.timed(step, self.device, launch, len(self.layers), self.options.quick)
        layers = self.layers
        masked = not name.startswith("dense")
        m, d = layers[0].w_gate.shape
        size = layers[0].x.element_size()
        read = sum(layer.bytes_read() for layer in layers) / len(layers) if masked else 3 * m * d * size
        bound = read / self.bandwidth / 1e3 if self.bandwidth else None
        gain = self.best / timing.median if self.best else None
        if gain and masked and self.bandwidth:
            gain = speedup(gain, 3 * m * d * size / read, self.recipe)
        row = {
            "hidden_size": d, "intermediate_size": m, "dtype": self.options.dtype, "batch": len(layers[0].x),
            "sparsity": sparsity, "variant": name, "launch": launch, **self.labels,
            "realised_sparsity": mean(layer.sparsity for layer in layers) if masked else 0.0,
            "union_density": mean(layer.density for layer in layers) if masked else 1.0,
            "latency_us": timing.median, "latency_us_p5": timing.p5, "latency_us_p95": timing.p95,
            "runs": timing.runs, "layers": len(layers), "compile_s": round(compile_s, 2),
            "bytes_mb": read / 1e6, "gbs": read / timing.median / 1e3, "bandwidth_gbs": self.bandwidth,
            "bound_us": bound, "bound_share": bound / timing.median if bound else None,
            "speedup_over_best_dense": gain,
            "relative_error": error,
        }  # fmt: skip
        self.rows.append(row)
        print(line(row), flush=True)
        return row


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


HEADER = (
    f"{'shape':>12} {'B':>2} {'s':>4} {'union':>6} {'variant':<25} {'launch':<6} "
    f"{'us':>9} {'p5':>9} {'p95':>9} {'GB/s':>6} {'bound':>6} {'x dense':>8}"
)


def line(row: dict) -> str:
    share = f"{row['bound_share']:6.1%}" if row["bound_share"] else f"{'':>6}"
    speedup = f"{row['speedup_over_best_dense']:8.2f}" if row["speedup_over_best_dense"] else ""
    return (
        f"{row['hidden_size']:>6}x{row['intermediate_size']:<5} {row['batch']:>2} {row['sparsity']:4.2f} "
        f"{row['union_density']:6.3f} {row['variant']:<25} {row['launch']:<6} {row['latency_us']:9.2f} "
        f"{row['latency_us_p5']:9.2f} {row['latency_us_p95']:9.2f} {row['gbs']:6.0f} {share} {speedup}"
    )
