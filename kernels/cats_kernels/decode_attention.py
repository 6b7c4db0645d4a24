"""Attention of one new token in one launch: rotate, append to the cache, attend to what it holds, combine.

It is no part of CATS. A decoding step of a 7B model spends 60 % of its bytes in the MLP and the rest in small
launches around attention; dense and sparse models both get this kernel, so that what is compared is the MLP.
"""

import torch
import triton
import triton.language as tl

SPLIT_ROWS = 16  # fewest cached positions worth a program of their own (the smallest side of tl.dot)
PROGRAMS = 128  # programs aimed at, one a multiprocessor of an A100 or H100


@triton.jit
def _rotate(base, offset, cos1, sin1, cos2, sin2, mask, H: tl.constexpr):
    """Rotary embedding of rows at base + offset; returns their two halves in float32."""
    first = tl.load(base + offset, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(base + offset + H, mask=mask, other=0.0).to(tl.float32)
    return first * cos1 - second * sin1, second * cos2 + first * sin2


@triton.jit
def _decode_attention(
    qkv, cos, sin, keys, values, position, mask, partial, stats, arrivals, out, scale,
    length, cos_stride, mask_stride,
    G: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, H: tl.constexpr,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Grid (B * G, SPLITS): program (b, g, j) serves the R query heads of KV head g over part j of the cache.

    The program whose part holds `position` uses the new key and value from registers and writes them to the
    cache; nobody reads that row. The last program of a (b, g) to arrive adds up the parts in order, so the
    result does not depend on who was last, and sets the arrival counter back to zero.
    """
    D: tl.constexpr = 2 * H
    group = tl.program_id(0)
    part = tl.program_id(1)
    b = group // G
    g = group % G
    heads = tl.arange(0, RP)
    mine = (heads < R)[:, None]
    half = tl.arange(0, H)
    whole = tl.arange(0, D)
    cos1 = tl.load(cos + b * cos_stride + half).to(tl.float32)
    sin1 = tl.load(sin + b * cos_stride + half).to(tl.float32)
    cos2 = tl.load(cos + b * cos_stride + H + half).to(tl.float32)
    sin2 = tl.load(sin + b * cos_stride + H + half).to(tl.float32)
    row = qkv + b * (R + 2) * G * D
    offset_q = (g * R + heads)[:, None] * D + half[None, :]
    q1, q2 = _rotate(row, offset_q, cos1[None, :], sin1[None, :], cos2[None, :], sin2[None, :], mine, H)
    kind = keys.dtype.element_ty
    q1 = q1.to(kind)
    q2 = q2.to(kind)
    k1, k2 = _rotate(row, R * G * D + g * D + half, cos1, sin1, cos2, sin2, half < H, H)
    k1 = k1.to(kind)
    k2 = k2.to(kind)
    v = tl.load(row + (R + 1) * G * D + g * D + whole)

    now = tl.load(position).to(tl.int32)
    each = tl.cdiv(tl.cdiv(now + 1, SPLITS), BLOCK) * BLOCK
    start = part * each
    stop = tl.minimum(start + each, now + 1)
    keys += group.to(tl.int64) * length * D
    values += group.to(tl.int64) * length * D
    if (start <= now) & (now < stop):
        tl.store(keys + now * D + half, k1)
        tl.store(keys + now * D + H + half, k2)
        tl.store(values + now * D + whole, v)

    top = tl.full([RP], float("-inf"), tl.float32)
    total = tl.zeros([RP], tl.float32)
    acc = tl.zeros([RP, D], tl.float32)
    for block in range(start, stop, BLOCK):
        rows = block + tl.arange(0, BLOCK)
        cached = (rows < now)[:, None]
        new = (rows == now)[:, None]
        at = rows[:, None] * D
        kb1 = tl.where(new, k1[None, :], tl.load(keys + at + half[None, :], mask=cached, other=0.0))
        kb2 = tl.where(new, k2[None, :], tl.load(keys + at + H + half[None, :], mask=cached, other=0.0))
        vb = tl.where(new, v[None, :], tl.load(values + at + whole[None, :], mask=cached, other=0.0))
        scores = tl.dot(q1, tl.trans(kb1), input_precision="ieee")
        scores = tl.dot(q2, tl.trans(kb2), scores, input_precision="ieee") * scale
        seen = rows <= now
        if MASKED:
            seen = seen & (tl.load(mask + b * mask_stride + rows, mask=rows < length, other=0) != 0)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        peak = tl.maximum(top, tl.max(scores, axis=1))
        safe = tl.where(peak == float("-inf"), 0.0, peak)  # a part that is masked whole has no peak
        weights = tl.exp(scores - safe[:, None])
        shrink = tl.exp(top - safe)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(kind), vb, acc * shrink[:, None], input_precision="ieee")
        top = peak

    out += group * R * D
    if SPLITS == 1:
        y = acc / total[:, None]
        tl.store(out + heads[:, None] * D + whole[None, :], y.to(out.dtype.element_ty), mask=mine)
    else:
        place = (group * SPLITS + part) * R
        tl.store(partial + (place + heads)[:, None] * D + whole[None, :], acc, mask=mine)
        tl.store(stats + 2 * (place + heads), top, mask=heads < R)
        tl.store(stats + 2 * (place + heads) + 1, total, mask=heads < R)
        tl.debug_barrier()  # all threads have stored before one of them says so
        before = tl.atomic_add(arrivals + group, 1, sem="acq_rel", scope="gpu")
        if before == SPLITS - 1:
            tl.store(arrivals + group, 0)
            parts = group * SPLITS + tl.arange(0, SPLITS)
            for r in tl.static_range(R):
                at = parts * R + r
                tops = tl.load(stats + 2 * at, cache_modifier=".cg")
                totals = tl.load(stats + 2 * at + 1, cache_modifier=".cg")
                weights = tl.exp(tops - tl.max(tops, axis=0))
                sums = tl.load(partial + at[:, None] * D + whole[None, :], cache_modifier=".cg")
                y = tl.sum(sums * weights[:, None], axis=0) / tl.sum(totals * weights, axis=0)
                tl.store(out + r * D + whole, y.to(out.dtype.element_ty))


def arrival_counters(batch: int, kv_heads: int, device) -> torch.Tensor:
    """Zeroed counters [B * G] int32; one set for each stream of calls, left at zero by every call."""
    return torch.zeros(batch * kv_heads, dtype=torch.int32, device=device)


def supports(head_dim: int, device_type: str) -> bool:
    """Whether the kernel serves heads of this size there; other cases take the model's own attention."""
    return device_type == "cuda" and head_dim in (32, 64, 128, 256)


@torch.library.custom_op("cats::decode_attention", mutates_args=("keys", "values", "arrivals"))
def decode_attention(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: torch.Tensor,
    mask: torch.Tensor | None,
    arrivals: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """y [B, Hq * D] of one token a row: rotary embedding, cache append, attention over 0 … position.

    qkv [B, (Hq + 2 Hkv) * D], before rotation; cos and sin [1 or B, D]; keys and values [B, Hkv, S, D],
    contiguous, written at row `position` (int tensor of one element, on the device); mask [1 or B, S] bool,
    True where a position may be seen; arrivals from `arrival_counters`; scale multiplies the scores.
    """
    batch, kv_heads, length, dim = keys.shape
    ratio = (qkv.shape[1] // dim - 2 * kv_heads) // kv_heads
    groups = batch * kv_heads
    splits = 1
    while splits * groups < PROGRAMS and splits * SPLIT_ROWS < length:
        splits *= 2
    out = torch.empty(batch, kv_heads * ratio * dim, dtype=qkv.dtype, device=qkv.device)
    partial = torch.empty(groups * splits * ratio, dim, dtype=torch.float32, device=qkv.device)
    stats = torch.empty(groups * splits * ratio, 2, dtype=torch.float32, device=qkv.device)
    _decode_attention[(groups, splits)](
        qkv, cos, sin, keys, values, position, keys if mask is None else mask.view(torch.uint8),
        partial, stats, arrivals, out, scale, length, dim if cos.shape[0] == batch and batch > 1 else 0,
        0 if mask is None or mask.shape[0] == 1 else mask.stride(0),
        G=kv_heads, R=ratio, RP=max(16, triton.next_power_of_2(ratio)), H=dim // 2,
        BLOCK=SPLIT_ROWS if length <= 1024 else 4 * SPLIT_ROWS, SPLITS=splits, MASKED=mask is not None,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


@decode_attention.register_fake
def _(qkv, cos, sin, keys, values, position, mask, arrivals, scale):
    width = qkv.shape[1] - 2 * keys.shape[1] * keys.shape[3]
    return qkv.new_empty(qkv.shape[0], width)


def reference(qkv, cos, sin, keys, values, position, mask, scale):
    """The same in plain PyTorch, float32; the cache is updated in place."""
    batch, kv_heads, length, dim = keys.shape
    q, k, v = qkv.view(batch, -1, dim).float().split(
        [qkv.shape[1] // dim - 2 * kv_heads, kv_heads, kv_heads], dim=1
    )  # fmt: skip

    def rotate(z):
        swapped = torch.cat((-z[..., dim // 2 :], z[..., : dim // 2]), dim=-1)
        return (z * cos.float()[:, None] + swapped * sin.float()[:, None]).to(qkv.dtype)

    now = int(position)
    keys[:, :, now] = rotate(k)
    values[:, :, now] = v.to(values.dtype)
    q = rotate(q).float().view(batch, kv_heads, -1, dim)
    scores = q @ keys.float().transpose(2, 3) * scale
    seen = torch.arange(length, device=qkv.device)[None] <= now
    seen = seen if mask is None else seen & mask
    scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
    return (scores.softmax(-1) @ values.float()).reshape(batch, -1).to(qkv.dtype)
