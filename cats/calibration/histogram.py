"""Histograms over the leading bits of magnitudes: quantiles of a stream in fixed memory (sec. 4.1)."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from cats.core.quantiles import interpolate
from cats.core.thresholds import GRID

_CHUNK = 1 << 20  # values binned at a time on a CPU: the integers of one chunk stay in its caches
_CHUNK_GPU = 1 << 24
# Distances from a fold, 2^-26 to 2^-4, that have bins of their own.
_NEAREST, _FARTHEST = -26, -4


@dataclass(frozen=True)
class Binning:
    """Bins of |v|: one below 2^lowest, 2^mantissa_bits for each octave up to 2^highest, one for the rest.

    The leading bits of an fp32 number number its bin. So each value that bf16 (7 bits of mantissa) or fp16
    (10) can hold is the left edge of a bin of its own where `mantissa_bits` is no less: ties are never split.
    `fold`: a magnitude just below which values crowd, as they do where an activation has its minimum: their
    density grows there as 1 / sqrt(fold - |v|). Bins get finer with that distance, down to single numbers;
    2^fold_bits of them for each halving of it.
    """

    mantissa_bits: int
    lowest: int
    highest: int
    fold: float | None = None
    fold_bits: int = 9

    @property
    def bins(self) -> int:
        return self._coarse + self._fine

    @property
    def _coarse(self) -> int:
        return ((self.highest - self.lowest) << self.mantissa_bits) + 2

    @property
    def _fine(self) -> int:
        return 0 if self.fold is None else (_FARTHEST - _NEAREST) << self.fold_bits

    def number(self, values: Tensor) -> Tensor:
        """The bin of each value, int32 in the shape of `values`; infinities and NaN are in the last."""
        bits = torch.bitwise_and(values.float().view(torch.int32), 0x7FFFFFFF)  # without the sign
        bits.clamp_(max=0x7F800000)  # NaN as infinity: its bits are any above
        if self.fold is not None:
            # a sum of two step functions that never fall: its steps are the steps of both
            distance = torch.sub(self.fold, bits.view(torch.float32)).view(torch.int32)  # < 0 above the fold
            distance.bitwise_right_shift_(23 - self.fold_bits).sub_(_NEAREST + 127 << self.fold_bits)
            distance.clamp_(0, self._fine)
        bins = bits.bitwise_right_shift_(23 - self.mantissa_bits)
        bins.sub_((self.lowest + 127 << self.mantissa_bits) - 1).clamp_(0, self._coarse - 1)
        return bins if self.fold is None else bins.add_(self._fine).sub_(distance)

    @lru_cache  # noqa: B019, there are as many as kinds of activation
    def edges(self) -> Tensor:
        """Left edge of each bin, fp64 [bins]; a value on an edge belongs to the bin that starts there."""
        steps = torch.arange(self._coarse - 1, dtype=torch.int32) + (self.lowest + 127 << self.mantissa_bits)
        candidates = (steps << (23 - self.mantissa_bits)).view(torch.float32)
        if self.fold is not None:
            steps = torch.arange(self._fine + 1, dtype=torch.int32) + (_NEAREST + 127 << self.fold_bits)
            folded = self.fold - (steps << (23 - self.fold_bits)).view(torch.float32)
            above, below = (
                torch.nextafter(folded, torch.tensor(1.0)),
                torch.nextafter(folded, torch.tensor(0.0)),
            )
            candidates = torch.cat([candidates, folded, above, below])
        starts = candidates.sort().values
        bins = self.number(starts).long()
        first = torch.cat([torch.ones(1, dtype=torch.bool), bins.diff() > 0])
        edges = torch.full((self.bins,), torch.inf, dtype=torch.float64)
        edges[bins[first]] = starts[first].double()
        edges[0] = 0
        # a bin that no number falls in, where two steps coincide, is empty between the edges beside it
        return edges.flip(0).cummin(0).values.flip(0)


def count(counts: Tensor, values: Tensor, binning: Binning) -> None:
    """Add the magnitudes of `values` to `counts` in place, on their device and without synchronising with it.

    counts: int64 or int32; [bins] counts all values [...] together, [m, bins] each column of values [N, m].
    """
    rows = counts.shape[0] if counts.ndim == 2 else 1
    if rows > 1:
        offsets = torch.arange(0, rows * binning.bins, binning.bins, dtype=torch.int64, device=values.device)
    chunk = _CHUNK if values.device.type == "cpu" else _CHUNK_GPU
    flat = counts.view(-1)
    for part in values.reshape(-1, rows).split(max(1, chunk // rows)):
        bins = binning.number(part)
        bins = (bins + offsets if rows > 1 else bins).view(-1)
        if bins.device.type == "cpu" and len(bins) * 4 > len(
            flat
        ):  # or it would allocate more than it counts
            flat += torch.bincount(bins, minlength=len(flat))
        else:
            flat.index_add_(0, bins, torch.ones(1, dtype=counts.dtype, device=bins.device).expand(len(bins)))


def quantiles(counts: Tensor, grid: Tensor, binning: Binning) -> Tensor:
    """Thresholds [R, G] (fp64) below which the share `grid` [G] of the magnitudes lies, for counts [R, bins].

    The share below t is the nearest to `grid` that a bin's edge can give, or nearer: where magnitudes are
    discrete, t lies in the middle of a gap between two; where they are dense, it is interpolated in a bin. At
    0, t is 0; above 0, at least 2^lowest, so that zeros count as dropped; at 1, every magnitude is below t.
    """
    return _quantiles(_below(counts), grid, binning)


def shares_below(
    counts: Tensor, thresholds: Tensor, binning: Binning, slack: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds [R, S] (fp64) of the share of magnitudes below thresholds [R, S].

    For counts [R, bins]. `slack`: relative error that the comparison may make. Equal bounds where a threshold
    lies in a gap.
    """
    return _shares(_below(counts), thresholds, binning, slack)


def refined(
    counts: Tensor, grid: Tensor, binning: Binning, probes: Tensor, *, tolerance: float, limit: int
) -> Tensor:
    """`grid` with as many of the `probes` (sparsities) as it takes to interpolate between its points.

    That is until the share below an interpolated threshold is within `tolerance` of the share below the one
    that `quantiles` would give there, for every row of counts [R, bins], or until there are `limit` points.
    """
    below = _below(counts)
    aims = _quantiles(below, probes, binning)
    goals = torch.stack(_shares(below, aims, binning, 0.0)).mean(0)
    reached, before = torch.empty_like(goals), torch.full_like(goals, torch.nan)
    while True:
        t = interpolate(grid, _quantiles(below, grid, binning), probes[None])
        moved = (t != before).any(0)  # few after the first round: those next to the points that it added
        reached[:, moved] = torch.stack(_shares(below, t[:, moved], binning, 0.0)).mean(0)
        before = t
        worst = (reached - goals).abs().max(1)
        # where quantiles turn steep, at a fold, the share reached is that of the turn: stay before it
        turns = reached.gather(1, worst.indices[:, None])[:, 0].to(probes.dtype)
        kinks = probes[(torch.searchsorted(probes, turns, right=True) - 1).clamp(min=0)]
        chosen = torch.where(torch.isin(kinks, grid), probes[worst.indices], kinks)
        order = worst.values.argsort(descending=True)[: max(0, limit - len(grid))]
        added = chosen[order][worst.values[order] > tolerance]
        wider = torch.cat([grid, added]).unique()
        if len(wider) == len(grid):
            return grid
        grid = wider


def rounded(
    counts: Tensor, grid: Tensor, values: Tensor, binning: Binning, probes: Tensor, tolerance: float
) -> Tensor:
    """Quantiles `values` [R, G] at `grid` in as few decimal digits as move no share by `tolerance`, fp32.

    That is neither at a point of the grid nor at the `probes` between it and its neighbours.
    """
    below = _below(counts)
    every = torch.cat([grid, probes])
    place = torch.searchsorted(grid, every).expand(len(values), -1)  # the point at or after each

    def shares(row: Tensor) -> Tensor:
        return torch.stack(_shares(below, interpolate(grid, row, every[None]), binning, 0.0))

    goals = shares(values)
    result = values.float().double()
    for digits in range(9, 3, -1):
        text = [[float(f"{value:.{digits}g}") for value in row] for row in values.tolist()]
        shorter = torch.tensor(text, dtype=torch.float32).double()
        moved = (shares(shorter) - goals).abs().amax(0)
        before = torch.zeros_like(values).scatter_reduce_(1, place, moved, "amax")
        after = torch.cat([before[:, 1:], torch.zeros_like(before[:, :1])], 1)
        result = torch.where(torch.maximum(before, after) < tolerance, shorter, result)
    return result.float().cummax(1).values


def _below(counts: Tensor) -> Tensor:
    """How many magnitudes are below each edge but the first, fp64 [R, bins - 1]."""
    return counts.cpu().cumsum(-1)[..., :-1].double()


def _quantiles(below: Tensor, grid: Tensor, binning: Binning) -> Tensor:
    edges = binning.edges()[1:]
    target = grid.double() * below[:, -1:]
    high = torch.searchsorted(below, target).clamp(max=len(edges) - 1)
    low = (high - 1).clamp(min=0)
    low_count, high_count = below.gather(1, low), below.gather(1, high)
    nearest = torch.where(target - low_count < high_count - target, low_count, high_count)
    start = torch.searchsorted(below, nearest)
    stop = torch.searchsorted(below, nearest, right=True) - 1
    at_end = (start == 0) | (nearest == below[:, -1:])
    values = torch.where(at_end, edges[start], (edges[start] + edges[stop]) / 2)
    before, after = (low - 1).clamp(min=0), (high + 1).clamp(max=len(edges) - 1)
    dense = (below.gather(1, before) < low_count) & (low_count < high_count)
    dense &= high_count < below.gather(1, after)
    share = (target - low_count) / (high_count - low_count).clamp(min=1)
    values = torch.where(dense, edges[low] + share * (edges[high] - edges[low]), values)
    values[:, grid <= 0] = 0
    return values.cummax(1).values


def _shares(below: Tensor, thresholds: Tensor, binning: Binning, slack: float) -> tuple[Tensor, Tensor]:
    edges = binning.edges()[1:]
    total = below[:, -1:]
    t = thresholds.double()
    first = torch.searchsorted(edges, t * (1 - slack), right=True) - 1
    last = torch.searchsorted(edges, t * (1 + slack)).clamp(max=len(edges) - 1)  # above the last is nothing
    lower = torch.where(first < 0, 0, below.gather(1, first.clamp(min=0)))
    return lower / total, below.gather(1, last) / total


# bf16 has 7 bits of mantissa: each of its numbers has a bin of its own. 8,194 bins, near TEAL's 10,000.
_BINNING = Binning(mantissa_bits=7, lowest=-40, highest=24)


class Quantiles:
    """Quantiles of magnitudes by key, from a stream: `see` counts, `at` gives a threshold."""

    def __init__(self):
        self._counts: dict[Any, Tensor] = {}
        self._values: dict[Any, Tensor] = {}

    def see(self, key: Any, values: Tensor) -> None:
        if key not in self._counts:
            self._counts[key] = torch.zeros(_BINNING.bins, dtype=torch.int64, device=values.device)
        count(self._counts[key], values, _BINNING)

    def at(self, key: Any, share: float) -> float:
        """The magnitude below which `share` of what was seen lies."""
        if key not in self._values:
            self._values[key] = quantiles(self._counts.pop(key)[None].cpu(), GRID, _BINNING)[0]
        at = torch.tensor([share], dtype=torch.float64)
        return float(interpolate(GRID, self._values[key], at)[0].float())
