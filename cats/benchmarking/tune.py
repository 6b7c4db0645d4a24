"""Sweep launch settings of the batch kernels: `cats measure tune`.

Prints microseconds a call for each setting of `gate_up` and of `down` alone, then of the best pairs.
Winners go into cats_kernels/tuning.py by hand: nothing is tuned while a model runs.
"""

import itertools
from argparse import Namespace

import torch
from cats_kernels import batch, tuning
from tqdm import tqdm

from cats.benchmarking import timing, workload

# programs a multiprocessor, warps, gate rows x columns x stages, up rows x columns x stages
GATE_UP = [
    (2, 4, 64, 128, 4, 32, 256, 4),
    (2, 4, 64, 128, 4, 64, 128, 4),
    (2, 4, 64, 128, 5, 64, 128, 5),
    (2, 4, 64, 128, 6, 64, 128, 6),
    (2, 4, 64, 256, 3, 64, 256, 3),
    (2, 4, 64, 64, 8, 64, 64, 8),
    (2, 8, 64, 128, 6, 64, 128, 6),
    (2, 8, 64, 256, 3, 64, 256, 3),
    (1, 8, 128, 128, 6, 64, 128, 8),
    (1, 8, 128, 128, 6, 128, 128, 6),
    (1, 4, 128, 128, 6, 64, 128, 8),
    (3, 4, 32, 256, 4, 32, 256, 4),
    (3, 4, 32, 128, 6, 32, 128, 6),
    (4, 4, 32, 128, 5, 32, 128, 5),
    (4, 4, 32, 256, 3, 16, 256, 5),
    (4, 2, 32, 128, 6, 16, 256, 6),
]
GATE_UP_NAMES = (
    "programs", "warps", "gate_rows", "gate_cols", "gate_stages", "up_rows", "up_cols", "up_stages"
)  # fmt: skip
# programs a multiprocessor, warps, columns, take, stages
DOWN = [
    (2, 4, 128, 32, 10),
    (4, 4, 128, 32, 6),
    (2, 4, 256, 16, 12),
    (2, 4, 256, 16, 14),
    (3, 4, 256, 16, 8),
    (4, 4, 256, 16, 6),
    (2, 4, 256, 32, 6),
    (2, 4, 512, 16, 6),
    (2, 8, 512, 16, 6),
    (1, 8, 512, 16, 12),
    (1, 8, 512, 32, 6),
    (2, 4, 128, 16, 20),
    (4, 4, 128, 16, 12),
    (4, 2, 256, 16, 6),
]
DOWN_NAMES = ("down_programs", "down_warps", "cols", "take", "down_stages")


def measure(options: Namespace) -> None:
    """Print the settings from fast to slow, for every batch size and sparsity."""
    device = workload.device_or_quick(options.quick)
    d, m = workload.shape(options.shape)
    bandwidth = timing.read_bandwidth() if device.type == "cuda" else float("nan")
    print(f"{options.shape} on {device}, {options.dtype}; read bandwidth {bandwidth:.0f} GB/s")
    gate_up, down = (GATE_UP[:1], DOWN[:1]) if options.quick else (GATE_UP, DOWN)
    for batch_size, sparsity in itertools.product(options.batch_sizes, options.sparsity):
        size = getattr(torch, options.dtype).itemsize
        layers = workload.random_layers(
            m, d, 2 if options.quick else workload.layer_count(m, d, size), batch_size=batch_size,
            correlation=options.correlation, dtype=getattr(torch, options.dtype), device=device,
        )  # fmt: skip
        workload.set_sparsity(layers, sparsity)
        density = sum(layer.density for layer in layers) / len(layers)
        bound = sum(layer.bytes_read() for layer in layers) / len(layers) / bandwidth / 1e3
        print(f"\nB={batch_size} s={sparsity} union {density:.3f}: byte bound {bound:.1f} us")
        best_gate_up = sweep(gate_up, GATE_UP_NAMES, time_gate_up, layers, device, options)
        best_down = sweep(down, DOWN_NAMES, time_down, layers, device, options)
        for first, second in itertools.product(best_gate_up[:2], best_down[:2]):
            us = time_op(layers, first | second, device, options)
            print(f"  op {us:7.2f} us, {bound / us:5.1%} of the bound: {short(first)} + {short(second)}")


def sweep(table, names, timer, layers, device, options) -> list[dict]:
    """Settings from fast to slow; those that are wrong or do not fit are named and left out."""
    found = []
    for values in tqdm(table, disable=None, leave=False):
        config = launch_settings(dict(zip(names, values, strict=True)), device, layers[0])
        try:
            workload.require_correct(
                str(values), lambda layer, c=config: op(layer, c), layers, tolerance=1e-5
            )
            found.append((timer(layers, config, device, options), values))
        except Exception as error:  # out of shared memory or registers, by kinds of Triton's own
            print(f"  {short(dict(zip(names, values, strict=True)))}: {' '.join(str(error).split())[:110]}")
    found.sort()
    for us, values in found:
        print(f"  {timer.__name__[5:]} {us:7.2f} us  {short(dict(zip(names, values, strict=True)))}")
    return [dict(zip(names, values, strict=True)) for _, values in found]


def launch_settings(chosen: dict, device, layer) -> dict:
    """All launch settings with the chosen values, programs counted for the device."""
    config = tuning.batch_config(device, layer.x.element_size())
    scale = tuning.multiprocessors(device)
    return (
        config | chosen | {key: chosen[key] * scale for key in ("programs", "down_programs") if key in chosen}
    )


def op(layer, config):
    return batch.launch(*layer.arguments(), None, torch.float32, config)


def arrivals(layer, config):
    return torch.zeros(-(-layer.x.shape[1] // config["cols"]), dtype=torch.int32, device=layer.x.device)


def time_gate_up(layers, config, device, options) -> float:
    counters = arrivals(layers[0], config)

    def step(i):
        x, w_gate, w_up, _, threshold, activation = layers[i % len(layers)].arguments()
        batch.launch_gate_up(x, w_gate, w_up, threshold, activation, None, counters, config)

    return workload.timed(step, device, "graph", len(layers), options.quick).median


def time_down(layers, config, device, options) -> float:
    """Includes a memset of the arrival counters, which `gate_up` does in the whole op."""
    inputs = []
    for layer in layers:
        x, w_gate, w_up, _, threshold, activation = layer.arguments()
        inputs.append(
            batch.launch_gate_up(
                x, w_gate, w_up, threshold, activation, None, arrivals(layer, config), config
            )[:2]
        )

    def step(i):
        needed, h = inputs[i % len(layers)]
        layer = layers[i % len(layers)]
        batch.launch_down(h, needed, layer.w_down_t, arrivals(layer, config), layer.x.dtype, config)

    return workload.timed(step, device, "graph", len(layers), options.quick).median


def time_op(layers, chosen, device, options) -> float:
    config = launch_settings(chosen, device, layers[0])

    def step(i):
        layer = layers[i % len(layers)]
        batch.launch(*layer.arguments(), None, layer.x.dtype, config)

    return workload.timed(step, device, "graph", len(layers), options.quick).median


def short(config: dict) -> str:
    return " ".join(f"{key}={value}" for key, value in config.items())
