"""Timing by CUDA-graph replay and by eager launch, this device's read bandwidth, what chapters measure."""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import torch
import triton
import triton.language as tl
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from cats import paths
from cats.errors import CatsError

SHIPPED, MEASURED = "h100", "measured"  # how the names of records begin


@dataclass(frozen=True)
class Timing:
    """Latency of a call in µs: median, 5th and 95th percentile over `runs` measurements of `calls` calls."""

    median: float
    p5: float
    p95: float
    runs: int
    calls: int


def require_gpu() -> torch.device:
    """The current CUDA device; CatsError where there is none."""
    if not torch.cuda.is_available():
        raise CatsError(
            "No CUDA device is visible: run this on a GPU machine, or read the recorded results instead."
        )
    return torch.device("cuda", torch.cuda.current_device())


def summarise(samples: list[float], calls: int) -> Timing:
    """Timing of `samples`, each the duration in µs of `calls` calls."""
    each = sorted(sample / calls for sample in samples)
    last = len(each) - 1
    p5, p95 = each[round(0.05 * last)], each[round(0.95 * last)]
    return Timing(statistics.median(each), p5, p95, len(each), calls)


def capture(step: Callable[[int], object], calls: int, warmup: int = 3) -> torch.cuda.CUDAGraph:
    """A CUDA graph of step(0) ... step(calls - 1); `warmup` calls run first: nothing is compiled inside."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(warmup):
            step(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            step(i)
    return graph


def time_graph(step: Callable[[int], object], *, calls: int = 32, runs: int = 30) -> Timing:
    """µs a call when `calls` calls are one CUDA graph: the GPU's time, gaps between kernels included.

    `step(i)` runs the i-th call and must take its weights from a set larger than the L2 cache, in rotation.
    """
    graph = capture(step, calls)
    for _ in range(3):
        graph.replay()
    return summarise([_between_events(graph.replay) for _ in range(runs)], calls)


def time_eager(step: Callable[[int], object], *, calls: int = 32, runs: int = 15) -> Timing:
    """µs a call when every kernel is launched from Python: the larger of host and GPU time, host's clock.

    Without a GPU: the time of the CPU.
    """
    for i in range(3):
        step(i)
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    samples = []
    for _ in range(runs):
        wait()
        start = time.perf_counter()
        for i in range(calls):
            step(i)
        wait()
        samples.append((time.perf_counter() - start) * 1e6)
    return summarise(samples, calls)


def read_bandwidth(gib: float = 2.0, runs: int = 10) -> float:
    """GB/s of a kernel that only reads `gib` GiB once: the ceiling of every memory-bound kernel here.

    A copy is no such ceiling: `Tensor.copy_` moves a fifth less on an H100, counting bytes read and written.
    """
    device = require_gpu()
    per_program = 1024 * 16
    programs = int(gib * 2**30) // (4 * per_program)
    data = torch.randint(0, 2**30, (programs * per_program,), dtype=torch.int32, device=device)
    found = torch.zeros(1, dtype=torch.int32, device=device)

    def read(_: int) -> None:
        _read[(programs,)](data, found, BLOCK=1024, TILES=16, num_warps=4)

    timing = time_graph(read, calls=2, runs=runs)
    return data.numel() * 4 / timing.p5 / 1e3


def timeline(step: Callable[[], object], *, steps: int = 20, warmup: int = 2) -> list[dict]:
    """The kernels of one step in order: {"kernel": name, "us": its time, "gap_us": idle time before it}.

    Medians over `steps` profiled steps. A kernel that starts while another runs (programmatic dependent
    launch) is charged with what it adds after that one's end, so times and gaps sum to the step. Without a
    GPU: the operators of the CPU. Raises CatsError where steps differ in their kernels.
    """
    on_gpu = torch.cuda.is_available()
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    for _ in range(warmup):
        step()
    wait()
    with profile(activities=[activity]) as profiler:
        for _ in range(steps):
            step()
        wait()
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events = [
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events()
        if event.device_type == wanted and event.cpu_parent is None
    ]
    return _one_step(sorted(events), steps)


def _one_step(events: list[tuple[float, float, str]], steps: int) -> list[dict]:
    """`timeline` of events (start, end, name) in µs, sorted, of equal steps."""
    count = len(events) // steps
    names = [name for _, _, name in events]
    if not count or names != names[:count] * steps:
        raise CatsError(
            f"{len(events)} kernels of {steps} steps do not repeat: "
            "profile a step that does the same each time."
        )
    end, times, gaps = events[0][0], [], []
    for first, last, _ in events:
        gaps.append(max(0.0, first - end))
        times.append(max(0.0, last - max(first, end)))
        end = max(end, last)
    return [
        {
            "kernel": names[i],
            "us": statistics.median(times[i::count]),
            "gap_us": statistics.median(gaps[i::count]),
        }
        for i in range(count)
    ]


def _between_events(work: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e3


@triton.jit
def _read(data_ptr, found_ptr, BLOCK: tl.constexpr, TILES: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * (BLOCK * TILES)
    total = tl.zeros([BLOCK], dtype=tl.int32)
    for i in tl.static_range(TILES):
        total += tl.load(data_ptr + first + i * BLOCK + tl.arange(0, BLOCK), eviction_policy="evict_first")
    # The sum must look used, or the compiler drops the loads; this value all but never occurs.
    if tl.sum(total, axis=0) == 1234567891:
        tl.store(found_ptr, 1)


def prefix(source: str, runs: Iterable[tuple], *, folder: Path | None = None) -> str:
    """How the names of a chapter's records begin; with source "measure" they are measured here first.

    `runs`: (program, slug, option, ...) of `cats measure`, the slug without its beginning; each writes its
    record to data/records, or to `folder`. Raises CatsError for another source, without a clone, and with the
    program's own words where one fails, as without a GPU.
    """
    if source == "recorded":
        return SHIPPED
    if source != "measure":
        raise CatsError(f'source is {source!r}: take "recorded", or "measure" on a machine with a GPU.')
    for program, slug, *options in runs:
        _run(program, f"{MEASURED}-{slug}" if slug else MEASURED, options, folder)
    return MEASURED


def _run(program: str, slug: str, options: list, folder: Path | None) -> None:
    """One program in a process of its own: its table is printed as it comes, compilers' notes are not."""
    command = [sys.executable, "-m", "cats_cli", "measure", program, *map(str, options), "--slug", slug]
    command += ["--output", str(folder or paths.in_clone(paths.RECORDS))]
    with TemporaryFile("w+", errors="replace") as errors:
        with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=errors) as process:
            for line in process.stdout:
                print(line, end="", flush=True)
        if process.returncode:
            errors.seek(0)
            lines = [line.strip() for line in errors if line.strip()]
            reason = lines[-1].removeprefix("cats: ") if lines else f"status {process.returncode}, no word"
            raise CatsError(f"cats measure {program}: {reason}")


def speedup(ratio: float, byte_ratio: float, baseline: str) -> float | None:
    """`ratio` over the dense `baseline`; None, and a sentence, where it is above what the bytes allow.

    `byte_ratio`: bytes that dense reads over bytes that sparse reads. Above it (by more than 1 %, the spread
    of a timing) the ratio says that the baseline is weak, not that the sparse code is fast.
    """
    if ratio <= 1.01 * byte_ratio:
        return ratio
    print(
        f"No speed-up is reported: {ratio:.2f} x is above the byte ratio {byte_ratio:.2f}, "
        f"so the dense baseline {baseline} is weak.",
        flush=True,
    )
    return None
