r"""Attention in Triton: what attention.py defines, by tiles, with no [T, T] scores in memory.

The algorithm is FlashAttention's (arXiv 2205.14135; the loops are FlashAttention-2's, 2307.08691).
`attention_by_tiles` below is that algorithm in plain PyTorch, a screen long: read it first.

1. A pack is cut into tiles. Here segments of 5 and 3 tokens, cu_seqlens = [0, 5, 8], BLOCK = 4:

       token     0  1  2  3 |  4 ||  5  6  7
       tile      0  0  0  0 |  1 ||  2  2  2         a tile never crosses a border

   One program computes one tile, and must find it from its own number. The tiles of segment i are
   numbered from cu_seqlens[i] // BLOCK + i on: from 0 // 4 + 0 = 0, and from 5 // 4 + 1 = 2. So
   neither a table of tiles is made, nor is the device asked for the lengths.
   These numbers suffice: n tokens from token c on have ceil(n / BLOCK) tiles, and up to the next
   segment's first number there are (c + n) // BLOCK + 1 - c // BLOCK, which is never fewer.
   It may be one more, as here: tile 3 would begin behind its segment's end. It does nothing.

2. Within a causal segment, here of 10 tokens, most tiles of scores need no mask:

                      keys 0-3   4-7   8-9
       queries 0-3        \                          #  whole: every query sees every key
               4-7        #       \                  \  border: some queries see some keys
               8-9        r       r     \            r  rest: whole, but no full tile of queries

   The forward and the query kernel walk along a row, whole tiles and then the border. The key
   kernel walks down a column: border, whole, rest. Without `causal` there is no border: all
   tiles are whole, but for the last, which may not be full.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.triton_or_none import tl, triton

WIDEST = 128  # head dim: a tile of wider rows would not fit into registers


def attention_by_tiles(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, block: int = 4) -> Tensor:
    """Returns attention of one head over one segment, q, k and v [T, D], as the kernels compute it.

    Nothing larger than a tile of scores [block, block] exists. The softmax is "online" (Milakov and
    Gimelshein, arXiv 1805.02867): it is right after each tile for the keys seen so far.
    """
    T, D = q.shape
    out = torch.empty_like(q)
    for start in range(0, T, block):  # each turn of this loop is a program of the forward kernel
        queries = q[start : start + block]
        peak = torch.full((len(queries), 1), float("-inf"))  # the largest score so far
        total = torch.zeros(len(queries), 1)  # the sum of exp(score - peak)
        weighted = torch.zeros_like(queries)  # the sum of exp(score - peak) * value
        # No query of this tile sees a key behind the tile's last query.
        end = start + len(queries) if causal else T
        for first in range(0, end, block):
            keys, values = k[first : first + block], v[first : first + block]
            scores = queries @ keys.T * D**-0.5
            if causal:
                query = torch.arange(start, start + len(queries))[:, None]
                key = torch.arange(first, first + len(keys))
                scores = scores.masked_fill(key > query, float("-inf"))
            # A new peak: what was summed below the old one shrinks by exp(old - new).
            higher = torch.maximum(peak, scores.amax(1, keepdim=True))
            shrink = (peak - higher).exp()
            weights = (scores - higher).exp()
            total = total * shrink + weights.sum(1, keepdim=True)
            weighted = weighted * shrink + weights @ values
            peak = higher
        out[start : start + block] = weighted / total
    return out


# --- What the kernels share ---------------------------------------------------------------------
# All tensors are packs without gaps: q, out and their gradients [tokens, HEADS, D], k, v and
# theirs [tokens, HEADS // GROUP, D]. Sums are in float32, and float32 products are not rounded to
# TF32. exp2 is one instruction where exp is two, so scores are in units of log2(e) / sqrt(D).

COUNTS = ["segments", "tokens"]  # they differ from call to call: no compilation for odd and even


@triton.jit
def _exponent(score, D: tl.constexpr):
    """The scores so that exp2 of them is exp(score / sqrt(D))."""
    return score * (1.4426950408889634 * D**-0.5)


@triton.jit
def _find_tile(cu_seqlens, segments, BLOCK: tl.constexpr):
    """This program's segment, its first token and its length, and where in it the tile starts."""
    # The last segment whose first tile has our number or a smaller one, by bisection.
    program = tl.program_id(0)
    low, high = 0, segments - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(cu_seqlens + middle) // BLOCK + middle <= program:
            low = middle
        else:
            high = middle - 1
    first = tl.load(cu_seqlens + low)
    length = tl.load(cu_seqlens + low + 1) - first
    start = (program - first // BLOCK - low) * BLOCK
    return first.to(tl.int64), length, start


def number_of_tiles(tokens: int, segments: int, block: int) -> int:
    """Returns how many programs `_find_tile` needs: as if behind the last segment came another."""
    return tokens // block + segments


@triton.jit
def _load_rows(base, row, stride, rows, FULL: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """A tile of rows, D columns wide and zeros up to WIDTH. Rows from `rows` on are zeros; FULL
    promises that there are none."""
    column = tl.arange(0, WIDTH)[None, :]
    pointers = base + row.to(tl.int64)[:, None] * stride + column  # may be beyond 2^31
    if FULL and D == WIDTH:
        tile = tl.load(pointers)
    elif FULL:
        tile = tl.load(pointers, mask=column < D, other=0.0)
    elif D == WIDTH:
        tile = tl.load(pointers, mask=row[:, None] < rows, other=0.0)
    else:
        tile = tl.load(pointers, mask=(row[:, None] < rows) & (column < D), other=0.0)
    return tile


@triton.jit
def _store_rows(base, row, stride, rows, tile, D: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)[None, :]
    pointers = base + row.to(tl.int64)[:, None] * stride + column
    mask = (row[:, None] < rows) & (column < D)
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=mask)


# --- Forward ------------------------------------------------------------------------------------


@triton.jit
def _attend(
    acc, peak, total, q_tile, k, v, stride, query, begin, end, length,
    MASK: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The online softmax over keys begin .. end, as the inner loop of `attention_by_tiles`.

    MASK: "none" if the tiles are whole and full; "causal"; "end" if the last one is not full.
    Every tile holds a key that is seen, at least after the first one: so no peak stays at -inf."""
    for start in range(begin, end, BN):
        key = start + tl.arange(0, BN)
        k_tile = _load_rows(k, key, stride, length, MASK == "none", D, WIDTH)
        score = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")  # [BM, BN]
        if MASK == "causal":
            score = tl.where(key[None, :] <= query[:, None], score, float("-inf"))
        if MASK == "end":
            score = tl.where(key[None, :] < length, score, float("-inf"))
        # The peak is in units of exp2's argument: one multiply-add per score.
        higher = tl.maximum(peak, _exponent(tl.max(score, 1), D))
        weight = tl.exp2(_exponent(score, D) - higher[:, None])
        shrink = tl.exp2(peak - higher)
        total = total * shrink + tl.sum(weight, 1)
        # The weights go back to 16 bits, as the tensor cores take them.
        v_tile = _load_rows(v, key, stride, length, MASK == "none", D, WIDTH)
        acc = acc * shrink[:, None]
        acc += tl.dot(weight.to(v_tile.dtype), v_tile, input_precision="ieee")
        peak = higher
    return acc, peak, total


@triton.jit
def _key_range(start, length, CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """For queries start .. start + BM: keys before `whole` lie in whole tiles; keys from `end` on
    are seen by no query."""
    if CAUSAL:
        whole = start // BN * BN
        end = tl.minimum(start + BM, length)
    else:
        whole = length // BN * BN
        end = length
    return whole, end


@triton.jit(do_not_specialize=COUNTS)
def _forward_kernel(
    q, k, v, out, lse, cu_seqlens, segments, tokens,
    HEADS: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One tile of BM queries of one head: out, and for the backward pass lse [HEADS, tokens],
    log2 of the sum of exp2(score)."""
    first, length, start = _find_tile(cu_seqlens, segments, BM)
    if start < length:
        # 1. The tile of queries; pointers to the segment's first token in our heads.
        head = tl.program_id(1).to(tl.int64)
        query = start + tl.arange(0, BM)
        place = (first * HEADS + head) * D
        q_tile = _load_rows(q + place, query, HEADS * D, length, False, D, WIDTH)
        key_stride = HEADS // GROUP * D
        k += first * key_stride + head // GROUP * D
        v += first * key_stride + head // GROUP * D
        # 2. The keys: whole tiles first, then those at the border.
        peak = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, WIDTH], tl.float32)
        whole, end = _key_range(start, length, CAUSAL, BM, BN)
        acc, peak, total = _attend(
            acc, peak, total, q_tile, k, v, key_stride, query, 0, whole, length,
            "none", D, WIDTH, BN,
        )  # fmt: skip
        acc, peak, total = _attend(
            acc, peak, total, q_tile, k, v, key_stride, query, whole, end, length,
            "causal" if CAUSAL else "end", D, WIDTH, BN,
        )  # fmt: skip
        # 3. The results.
        _store_rows(out + place, query, HEADS * D, length, acc / total[:, None], D, WIDTH)
        lse += head * tokens + first
        tl.store(lse + query, peak + tl.log2(total), mask=query < length)


# --- Backward -----------------------------------------------------------------------------------
# The weights p are computed again: p = exp2(score - lse). With delta = rowsum(d_out * out), which
# the backward pass of the softmax subtracts (FlashAttention, appendix B.2):
#     d_v = p^T d_out    d_score = p * (d_out v^T - delta)    d_q = d_score k    d_k = d_score^T q


@triton.jit
def _walk_keys(
    dq, q_tile, d_out_tile, k, v, stride, lse, delta, query, begin, end, length,
    MASK: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Adds to d_q [BM, WIDTH] what comes from keys begin .. end. MASK as in `_attend`."""
    for start in range(begin, end, BN):
        key = start + tl.arange(0, BN)
        k_tile = _load_rows(k, key, stride, length, MASK == "none", D, WIDTH)
        v_tile = _load_rows(v, key, stride, length, MASK == "none", D, WIDTH)
        # The weights of the forward pass, without a second softmax: lse normalises them.
        score = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")  # [BM, BN]
        p = tl.exp2(_exponent(score, D) - lse[:, None])
        if MASK == "causal":
            p = tl.where(key[None, :] <= query[:, None], p, 0.0)
        if MASK == "end":
            p = tl.where(key[None, :] < length, p, 0.0)
        d_p = tl.dot(d_out_tile, tl.trans(v_tile), input_precision="ieee")
        d_score = p * (d_p - delta[:, None])
        dq += tl.dot(d_score.to(k_tile.dtype), k_tile, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=COUNTS)
def _query_kernel(
    q, k, v, out, d_out, dq, lse, delta, cu_seqlens, segments, tokens,
    HEADS: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """d_q of one tile of queries of one head, by the forward kernel's walk; and, for the key
    kernel, delta [HEADS, tokens]."""
    first, length, start = _find_tile(cu_seqlens, segments, BM)
    if start < length:
        # 1. The tile of queries, what was made of it, and its gradient.
        head = tl.program_id(1).to(tl.int64)
        query = start + tl.arange(0, BM)
        place = (first * HEADS + head) * D
        q_tile = _load_rows(q + place, query, HEADS * D, length, False, D, WIDTH)
        out_tile = _load_rows(out + place, query, HEADS * D, length, False, D, WIDTH)
        d_out_tile = _load_rows(d_out + place, query, HEADS * D, length, False, D, WIDTH)
        subtracted = tl.sum(out_tile.to(tl.float32) * d_out_tile.to(tl.float32), 1)
        place_of_sums = head * tokens + first + query
        tl.store(delta + place_of_sums, subtracted, mask=query < length)
        normaliser = tl.load(lse + place_of_sums, mask=query < length, other=0.0)
        # 2. The keys: whole tiles first, then those at the border.
        key_stride = HEADS // GROUP * D
        k += first * key_stride + head // GROUP * D
        v += first * key_stride + head // GROUP * D
        dq_tile = tl.zeros([BM, WIDTH], tl.float32)
        whole, end = _key_range(start, length, CAUSAL, BM, BN)
        dq_tile = _walk_keys(
            dq_tile, q_tile, d_out_tile, k, v, key_stride, normaliser, subtracted, query,
            0, whole, length, "none", D, WIDTH, BN,
        )  # fmt: skip
        dq_tile = _walk_keys(
            dq_tile, q_tile, d_out_tile, k, v, key_stride, normaliser, subtracted, query,
            whole, end, length, "causal" if CAUSAL else "end", D, WIDTH, BN,
        )  # fmt: skip
        # 3. The scores were scaled by 1 / sqrt(D), and so is their gradient.
        _store_rows(dq + place, query, HEADS * D, length, dq_tile * D**-0.5, D, WIDTH)


@triton.jit
def _walk_queries(
    dk, dv, k_tile, v_tile, q, d_out, stride, lse, delta, key, begin, end, length,
    MASK: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Adds to d_k and d_v [BN, WIDTH] what comes from queries begin .. end. MASK as in `_attend`.

    Everything is transposed, keys by queries: so p and d_score are the left operands of their
    products, which Hopper's tensor cores take from registers. Queries behind the segment's end
    are zeros, and so is their d_out: they add nothing."""
    for start in range(begin, end, BM):
        query = start + tl.arange(0, BM)
        q_tile = _load_rows(q, query, stride, length, MASK == "none", D, WIDTH)
        d_out_tile = _load_rows(d_out, query, stride, length, MASK == "none", D, WIDTH)
        normaliser = tl.load(lse + query, mask=query < length, other=0.0)
        subtracted = tl.load(delta + query, mask=query < length, other=0.0)
        score = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")  # [BN, BM]
        p = tl.exp2(_exponent(score, D) - normaliser[None, :])
        if MASK == "causal":
            p = tl.where(key[:, None] <= query[None, :], p, 0.0)
        # The products' left operands go back to 16 bits; the sums stay in float32.
        dv += tl.dot(p.to(d_out_tile.dtype), d_out_tile, input_precision="ieee")
        d_p = tl.dot(v_tile, tl.trans(d_out_tile), input_precision="ieee")
        d_score = p * (d_p - subtracted[None, :])
        dk += tl.dot(d_score.to(q_tile.dtype), q_tile, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=COUNTS)
def _key_kernel(
    q, k, v, d_out, dk, dv, lse, delta, cu_seqlens, segments, tokens,
    HEADS: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """What one query head adds to d_k and d_v of one tile of BN keys: dk and dv [tokens, HEADS, D].
    The host sums over the heads of a group. (A program for all of them would save that, but there
    would be too few programs: the 3B has two groups.) No atomics: the same bits every time."""
    first, length, start = _find_tile(cu_seqlens, segments, BN)
    if start < length:
        # 1. The tile of keys and values.
        head = tl.program_id(1).to(tl.int64)
        key = start + tl.arange(0, BN)
        key_stride = HEADS // GROUP * D
        key_place = first * key_stride + head // GROUP * D
        k_tile = _load_rows(k + key_place, key, key_stride, length, False, D, WIDTH)
        v_tile = _load_rows(v + key_place, key, key_stride, length, False, D, WIDTH)
        dk_tile = tl.zeros([BN, WIDTH], tl.float32)
        dv_tile = tl.zeros([BN, WIDTH], tl.float32)
        # 2. Down the column of tiles. In a causal segment queries from `border` on see some of
        #    our keys, and from `whole` on all of them; from `rest` on there is no full tile left.
        border, whole = 0, 0
        if CAUSAL:
            border = start // BM * BM
            whole = tl.cdiv(start + BN, BM) * BM
        rest = tl.maximum(length // BM * BM, whole)
        place = (first * HEADS + head) * D
        lse += head * tokens + first
        delta += head * tokens + first
        if CAUSAL:
            dk_tile, dv_tile = _walk_queries(
                dk_tile, dv_tile, k_tile, v_tile, q + place, d_out + place, HEADS * D, lse, delta,
                key, border, tl.minimum(whole, length), length, "causal", D, WIDTH, BM,
            )  # fmt: skip
        dk_tile, dv_tile = _walk_queries(
            dk_tile, dv_tile, k_tile, v_tile, q + place, d_out + place, HEADS * D, lse, delta,
            key, whole, rest, length, "none", D, WIDTH, BM,
        )  # fmt: skip
        dk_tile, dv_tile = _walk_queries(
            dk_tile, dv_tile, k_tile, v_tile, q + place, d_out + place, HEADS * D, lse, delta,
            key, rest, length, length, "end", D, WIDTH, BM,
        )  # fmt: skip
        # 3. The results.
        _store_rows(dk + place, key, HEADS * D, length, dk_tile * D**-0.5, D, WIDTH)
        _store_rows(dv + place, key, HEADS * D, length, dv_tile, D, WIDTH)


# --- The host's side ----------------------------------------------------------------------------


# BM queries, BN keys and pipeline stages of a tile in 16 bits, with 4 warps: of 243 choices that
# were tried on an H200 the fastest, or nearly (docs/log.md). Windows are a ViT's, of 64 patches.
TILES = {"forward": (64, 64, 3), "query": (64, 64, 2), "key": (32, 64, 2)}
TILES_FOR_WINDOWS = {"forward": (64, 32, 2), "query": (64, 32, 1), "key": (32, 64, 1)}
# No tensor core takes float32 unrounded: small tiles, which fit into shared memory.
TILE_IN_FLOAT32 = (32, 16, 1)


def blocks(short: bool, kernel: str, dtype: torch.dtype) -> dict:
    """Returns the tile of a kernel (forward, query or key). `short`: segments of 64 tokens or fewer
    on average, which would leave longer tiles half empty. No autotuning at first use."""
    sizes = (TILES_FOR_WINDOWS if short else TILES)[kernel]
    BM, BN, stages = TILE_IN_FLOAT32 if dtype == torch.float32 else sizes
    return {"BM": BM, "BN": BN, "num_warps": 4, "num_stages": stages}


def head_constants(q: Tensor, k: Tensor) -> dict:
    """Returns what every kernel is compiled for, of q [..., H, D] and k [..., K, D]."""
    H, D = q.shape[-2:]
    return {
        "HEADS": H,
        "GROUP": H // k.shape[-2],
        "D": D,
        "WIDTH": max(16, triton.next_power_of_2(D)),  # tiles are powers of two: 80 becomes 128
    }


class TritonAttention(torch.autograd.Function):
    """The kernels as one differentiable function of a pack: q [T, H, D], k and v [T, K, D]."""

    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, causal):
        """Returns attention [T, H, D]."""
        T, H, _ = q.shape
        out = torch.empty_like(q)
        lse = torch.empty((H, T), dtype=torch.float32, device=q.device)
        segments = len(cu_seqlens) - 1
        constants = {"CAUSAL": causal, **head_constants(q, k)}
        # By their average: the lengths themselves are on the device.
        short = T <= 64 * segments
        sizes = blocks(short, "forward", q.dtype)
        grid = (number_of_tiles(T, segments, sizes["BM"]), H)
        _forward_kernel[grid](q, k, v, out, lse, cu_seqlens, segments, T, **constants, **sizes)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens)
        ctx.options = (segments, short, constants)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        """Returns the gradients of q, k and v, for that of the output [T, H, D]."""
        q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
        segments, short, constants = ctx.options
        (T, H, _), K = q.shape, k.shape[1]
        d_out = d_out.contiguous()
        dq, delta = torch.empty_like(q), torch.empty_like(lse)
        common = (lse, delta, cu_seqlens, segments, T)
        # The query kernel goes first: it writes the delta that the key kernel reads.
        sizes = blocks(short, "query", q.dtype)
        grid = (number_of_tiles(T, segments, sizes["BM"]), H)
        _query_kernel[grid](q, k, v, out, d_out, dq, *common, **constants, **sizes)
        sizes = blocks(short, "key", q.dtype)
        grid = (number_of_tiles(T, segments, sizes["BN"]), H)
        # Where a group's heads are summed, their terms are not rounded before.
        dtype = k.dtype if H == K else torch.float32
        dk, dv = (torch.empty(q.shape, dtype=dtype, device=q.device) for _ in range(2))
        _key_kernel[grid](q, k, v, d_out, dk, dv, *common, **constants, **sizes)
        if H != K:
            dk, dv = (x.unflatten(1, (K, H // K)).sum(2).to(k.dtype) for x in (dk, dv))
        return dq, dk, dv, None, None


def attention_triton(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Returns attention over whole rows [B, T, H, D] or, with cu_seqlens, within a pack's segments.

    D is at most WIDEST. A batch is a pack, too: of B segments of T tokens.
    """
    B, T = q.shape[:2]
    if cu_seqlens is None:
        cu_seqlens = torch.arange(0, (B + 1) * T, T, device=q.device)
    cu_seqlens = cu_seqlens.to(q.device, torch.int32)
    rows = [x.flatten(0, 1).contiguous() for x in (q, k, v)]
    with torch.cuda.device_of(q):  # Triton launches on the current device
        out = TritonAttention.apply(*rows, cu_seqlens, causal)
    return out.view(q.shape)
