"""Histograms over the leading bits of floating-point magnitudes: quantiles of a stream in fixed memory (sec. 4.1)."""

from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 1 << 20  # values binned at a time on a CPU: the integers of one chunk stay in its caches
_CHUNK_GPU = 1 << 24
_FINE = 3  # bits of an fp32 mantissa that the finer bins do not tell apart


@dataclass(frozen=True)
class Binning:
    """Bins of |v|: one below 2^lowest, 2^mantissa_bits for each octave up to 2^highest, one for the rest.

    The leading bits of an fp32 number number its bin. So each value that bf16 (7 bits of mantissa) or fp16
    (10) can hold is the left edge of a bin of its own where `mantissa_bits` is no less: ties are never split.
    `fold`: a magnitude just below which values crowd, as they do where an activation has its minimum; bins
    there are finer, 2^-20 wide relative to it.
    """

    mantissa_bits: int
    lowest: int
    highest: int
    fold: float | None = None

    @property
    def bins(self) -> int:
        return self._coarse + self._fine

    @property
    def _coarse(self) -> int:
        return ((self.highest - self.lowest) << self.mantissa_bits) + 2

    @property
    def _fine(self) -> int:
        return 0 if self.fold is None else (_bits(self.fold * (1 + 2**-18)) - self._window >> _FINE) + 1

    @property
    def _window(self) -> int:
        """Bits of the number at which the finer bins start, 3 % below the fold, on the edge of a coarse bin."""
        shift = 23 - self.mantissa_bits
        return _bits(self.fold * (1 - 2**-5)) >> shift << shift

    def number(self, values: Tensor) -> Tensor:
        """The bin of each value, int32 in the shape of `values`; infinities and NaN are in the last."""
        bits = torch.bitwise_and(values.float().view(torch.int32), 0x7FFFFFFF)  # without the sign
        bins = torch.bitwise_right_shift(bits, 23 - self.mantissa_bits)
        bins.sub_(((self.lowest + 127) << self.mantissa_bits) - 1).clamp_(0, self._coarse - 1)
        if self.fold is not None:
            bins.add_(bits.sub_(self._window).bitwise_right_shift_(_FINE).clamp_(0, self._fine))
        return bins

    def edges(self) -> Tensor:
        """Left edge of each bin, fp64 [bins]; a value on an edge belongs to the bin that starts there."""
        shift, first = 23 - self.mantissa_bits, (self.lowest + 127) << self.mantissa_bits
        bits = torch.arange(first, first + self._coarse - 1, dtype=torch.int32) << shift
        if self.fold is not None:
            bits = torch.cat([bits, self._window + (torch.arange(self._fine + 1, dtype=torch.int32) << _FINE)])
        starts = bits.unique().view(torch.float32)
        edges = torch.full((self.bins,), torch.inf, dtype=torch.float64)
        edges[self.number(starts).long()] = starts.double()
        edges[0] = 0
        # a number that no value has, where a coarse and a fine bin start together, belongs to the next bin
        return edges.flip(0).cummin(0).values.flip(0)


def count(counts: Tensor, values: Tensor, binning: Binning) -> None:
    """Add the magnitudes of `values` to `counts` in place, on their device and without synchronising with it.

    counts: int64 or int32, [bins] for all values [...] together, or [m, bins] for each column of values [N, m].
    """
    rows = counts.shape[0] if counts.ndim == 2 else 1
    if rows > 1:
        offsets = torch.arange(0, rows * binning.bins, binning.bins, dtype=torch.int64, device=values.device)
    chunk = _CHUNK if values.device.type == "cpu" else _CHUNK_GPU
    flat = counts.view(-1)
    for part in values.reshape(-1, rows).split(max(1, chunk // rows)):
        bins = binning.number(part)
        bins = (bins + offsets if rows > 1 else bins).view(-1)
        if bins.device.type == "cpu" and len(bins) * 4 > len(flat):  # or it would allocate more than it counts
            flat += torch.bincount(bins, minlength=len(flat))
        else:
            flat.index_add_(0, bins, torch.ones(1, dtype=counts.dtype, device=bins.device).expand(len(bins)))


def quantiles(counts: Tensor, grid: Tensor, binning: Binning) -> Tensor:
    """Thresholds [R, G] (fp64) below which the share `grid` [G] of the magnitudes lies, for counts [R, bins].

    The share below t is the nearest to `grid` that a bin's edge can give, or nearer: where magnitudes are discrete, t
    lies in the middle of a gap between two; where they are dense, it is interpolated in a bin. At 0, t is 0; above 0,
    at least 2^lowest, so that zeros count as dropped; at 1, every magnitude is below t.
    """
    edges = binning.edges()[1:]
    below = counts.cpu().cumsum(-1)[..., :-1].double()  # [R, K], how many are below each edge
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
    dense = (below.gather(1, before) < low_count) & (low_count < high_count) & (high_count < below.gather(1, after))
    share = (target - low_count) / (high_count - low_count).clamp(min=1)
    values = torch.where(dense, edges[low] + share * (edges[high] - edges[low]), values)
    values[:, grid <= 0] = 0
    return values.cummax(1).values


def shares_below(counts: Tensor, thresholds: Tensor, binning: Binning, slack: float = 0.0) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds [R, S] (fp64) of the share of magnitudes below thresholds [R, S], for counts [R, bins].

    `slack`: relative error that the comparison may make. Equal bounds where a threshold lies in a gap.
    """
    edges = binning.edges()[1:]
    below = counts.cpu().cumsum(-1)[..., :-1].double()
    below = torch.cat([below, below[:, -1:]], 1)  # above the last edge there is nothing
    t = thresholds.double()
    first = torch.searchsorted(edges, t * (1 - slack), right=True) - 1
    last = torch.searchsorted(edges, t * (1 + slack))
    lower = torch.where(first < 0, 0, below.gather(1, first.clamp(min=0)))
    return lower / below[:, -1:], below.gather(1, last) / below[:, -1:]


def _bits(value: float) -> int:
    return int(torch.tensor(value, dtype=torch.float32).view(torch.int32))
