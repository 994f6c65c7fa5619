"""Attention in Triton: forward, backward and decoding kernels, and the host's side of them."""
import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.triton_or_none import tl, triton

LOG2_E = math.log2(math.e)

# --- Triton -----------------------------------------------------------------------------------------------------------
# One forward and two backward kernels do everything: batches, packed rows and ragged caches are all segments, runs of
# queries and keys of one row. A program takes one tile of queries (or of keys), and walks over its segment's keys.
#
# The loop is FlashAttention-2's (arXiv 2307.08691, section 3.1), its derivation and the backward pass FlashAttention's
# (2205.14135). The tensor cores of an H100 are so fast that what is done to each score beside the products takes as
# long as they do (FlashAttention-3, 2407.08608, section 3.1), so that is as little as can be:
#
# * exp2 is one instruction, exp is two; so log2(e) goes into the scale, and the scale into one multiply-add per score,
#   exp2(score * scale2 - peak). The peak is found among raw scores, which needs scale > 0.
# * Tiles that every query sees whole are walked without any mask, of scores or of memory; the last ones with.
# * A head dim such as 80 is no power of two, which tiles must be: it is cut into 64 + 16 columns, two products that cost
#   80 and not 128.
# * Causal tiles have different numbers of keys. The longest start first, so that no processor ends up alone with one.

NUMBERS = ["segments", "T", "S"]  # differ from call to call: no compilation of its own for the odd and the even

@triton.jit
def _tile(cu_seqlens, segments, key_lengths, T, S, BLOCK: tl.constexpr, OF_KEYS: tl.constexpr, PACKED: tl.constexpr,
          RAGGED: tl.constexpr, LAST_FIRST: tl.constexpr):
    """This program's tile: row; its segment's first token in it; the tile's first in the segment (behind its end: there
    is nothing to do); the segment's numbers of queries and keys.

    In a packed row the tiles of segment i are numbered from cu_seqlens[i] // BLOCK + i on. Those are enough for it, one
    too many at times, and the device need not be asked for the lengths, nor a table made (as FlashAttention's and
    vLLM's kernels for packed rows do)."""
    program = tl.program_id(0)
    if LAST_FIRST:
        program = tl.num_programs(0) - 1 - program
    if PACKED:
        segment = -1
        for i in range(0, segments, 128):
            index = i + tl.arange(0, 128)
            begun = tl.load(cu_seqlens + index, mask=index < segments, other=0) // BLOCK + index <= program
            segment += tl.sum((begun & (index < segments)).to(tl.int32), 0)
        first = tl.load(cu_seqlens + segment)
        length = tl.load(cu_seqlens + segment + 1) - first
        start = (program - first // BLOCK - segment) * BLOCK
        row = 0
        queries = length
        keys = length
    else:
        each = tl.cdiv(S if OF_KEYS else T, BLOCK)
        row = program // each
        start = program % each * BLOCK
        first = 0
        queries = T
        keys = S
        if RAGGED:
            keys = tl.load(key_lengths + row).to(tl.int32)
    return tl.cast(row, tl.int64), tl.cast(first, tl.int64), start, queries, keys


def tiles(B: int, tokens: int, segments: int, block: int) -> int:
    """How many programs `_tile` needs."""
    return tokens // block + segments if segments else B * triton.cdiv(tokens, block)


@triton.jit
def _rows(base, token, stride, keep, ALL: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """Rows of D1 and of D2 more columns (the first part again if D2 is 0); zeros where not keep, unless ALL are kept."""
    offset = token.to(tl.int64)[:, None] * stride  # may be beyond 2^31
    one_columns = tl.arange(0, D1)[None, :]
    if ALL:
        one = tl.load(base + offset + one_columns)
    else:
        one = tl.load(base + offset + one_columns, mask=keep[:, None], other=0.0)
    two = one
    if D2 > 0:
        two_columns = D1 + tl.arange(0, D2)[None, :]
        if ALL:
            two = tl.load(base + offset + two_columns)
        else:
            two = tl.load(base + offset + two_columns, mask=keep[:, None], other=0.0)
    return one, two


@triton.jit
def _store(base, token, stride, keep, one, two, D1: tl.constexpr, D2: tl.constexpr):
    offset = token.to(tl.int64)[:, None] * stride  # may be beyond 2^31
    column = tl.arange(0, D1)
    tl.store(base + offset + column[None, :], one.to(base.dtype.element_ty), mask=keep[:, None])
    if D2 > 0:
        column = D1 + tl.arange(0, D2)
        tl.store(base + offset + column[None, :], two.to(base.dtype.element_ty), mask=keep[:, None])


@triton.jit
def _products(a1, a2, b1, b2, D2: tl.constexpr):
    """a b^T: the inner products of rows. float32 is not rounded to TF32."""
    out = tl.dot(a1, tl.trans(b1), input_precision="ieee")
    if D2 > 0:
        out += tl.dot(a2, tl.trans(b2), input_precision="ieee")
    return out


@triton.jit
def _add_product(out1, out2, p, x1, x2, D2: tl.constexpr):
    """out + p x, in both parts."""
    out1 += tl.dot(p, x1, input_precision="ieee")
    if D2 > 0:
        out2 += tl.dot(p, x2, input_precision="ieee")
    return out1, out2


@triton.jit
def _attend(acc1, acc2, peak, total, q1, q2, k, v, k_stride, v_stride, query, begin, end, keys, shift, scale2,
            CAUSAL: tl.constexpr, MASKED: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BN: tl.constexpr):
    """Online softmax (Milakov and Gimelshein, arXiv 1805.02867) over keys begin .. end: `peak` is the largest score so
    far, `total` the sum of exp2(score - peak), acc the sum of the values so weighted; a new peak shrinks both."""
    for start in range(begin, end, BN):
        key = start + tl.arange(0, BN)
        k1, k2 = _rows(k, key, k_stride, key < keys, not MASKED, D1, D2)
        score = _products(q1, q2, k1, k2, D2)                                                                # [BM, BN]
        if MASKED:
            seen = (key < keys)[None, :]
            if CAUSAL:
                seen = seen & (key[None, :] <= query[:, None] + shift)
            score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1) * scale2)
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet: -inf less -inf would be NaN
        weight = tl.exp2(score * scale2 - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(weight, 1)
        v1, v2 = _rows(v, key, v_stride, key < keys, not MASKED, D1, D2)
        acc1, acc2 = _add_product(acc1 * shrink[:, None], acc2 * shrink[:, None], weight.to(v1.dtype), v1, v2, D2)
        peak = higher
    return acc1, acc2, peak, total


@triton.jit
def _key_range(start, N, shift, CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Of the N keys, those before `whole` lie in tiles that all BM queries from `start` on see, and need no mask; from
    `end` on no query sees any. Query t sees keys up to t + shift."""
    whole, end = N // BN * BN, N
    if CAUSAL:
        whole = tl.maximum(tl.minimum(N, start + shift + 1), 0) // BN * BN
        end = tl.maximum(tl.minimum(N, start + BM + shift), 0)
    return whole, end


@triton.jit(do_not_specialize=NUMBERS)
def _forward_kernel(q, k, v, out, lse, cu_seqlens, segments, key_lengths, scale2, T, S,
                    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, o_row, o_token, o_head,
                    HEADS: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr,
                    RAGGED: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                    FLOAT: tl.constexpr):
    """A tile of BM queries of one head: out, and for the backward pass lse [B, H, T] = log2(sum of exp2(score))."""
    b, first, start, M, N = _tile(cu_seqlens, segments, key_lengths, T, S, BM, False, PACKED, RAGGED, CAUSAL)
    if start < M:
        head = tl.program_id(1).to(tl.int64)
        query = start + tl.arange(0, BM)
        inside = query < M
        q1, q2 = _rows(q + b * q_row + first * q_token + head * q_head, query, q_token, inside, False, D1, D2)
        k += b * k_row + first * k_token + head // GROUP * k_head
        v += b * v_row + first * v_token + head // GROUP * v_head
        peak = tl.full([BM], float("-inf"), FLOAT)
        total = tl.zeros([BM], FLOAT)
        acc1 = tl.zeros([BM, D1], FLOAT)
        acc2 = tl.zeros([BM, D2 if D2 > 0 else D1], FLOAT)
        shift = N - M
        whole, end = _key_range(start, N, shift, CAUSAL, BM, BN)
        acc1, acc2, peak, total = _attend(acc1, acc2, peak, total, q1, q2, k, v, k_token, v_token, query, 0, whole, N,
                                          shift, scale2, CAUSAL, False, D1, D2, BN)
        acc1, acc2, peak, total = _attend(acc1, acc2, peak, total, q1, q2, k, v, k_token, v_token, query, whole, end, N,
                                          shift, scale2, CAUSAL, True, D1, D2, BN)
        blind = total == 0.0  # sees no key: zeros, and a finite lse
        total = tl.where(blind, 1.0, total)
        out += b * o_row + first * o_token + head * o_head
        _store(out, query, o_token, inside, acc1 / total[:, None], acc2 / total[:, None], D1, D2)
        place = (b * HEADS + head) * T + first + query
        tl.store(lse + place, tl.where(blind, 0.0, peak + tl.log2(total)), mask=inside)


@triton.jit
def _walk_keys(dq1, dq2, q1, q2, d1, d2, k, v, k_stride, v_stride, lse, delta, query, begin, end, N, shift, scale2,
               CAUSAL: tl.constexpr, MASKED: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BN: tl.constexpr):
    """The weights p again, from the scores and lse; d_score = p * (d_out v^T - delta); d_q = d_score k."""
    for start in range(begin, end, BN):
        key = start + tl.arange(0, BN)
        k1, k2 = _rows(k, key, k_stride, key < N, not MASKED, D1, D2)
        v1, v2 = _rows(v, key, v_stride, key < N, not MASKED, D1, D2)
        p = tl.exp2(_products(q1, q2, k1, k2, D2) * scale2 - lse[:, None])                                   # [BM, BN]
        if MASKED:
            seen = (key < N)[None, :]
            if CAUSAL:
                seen = seen & (key[None, :] <= query[:, None] + shift)
            p = tl.where(seen, p, 0.0)
        d_score = p * (_products(d1, d2, v1, v2, D2) - delta[:, None])
        dq1, dq2 = _add_product(dq1, dq2, d_score.to(k1.dtype), k1, k2, D2)
    return dq1, dq2


@triton.jit(do_not_specialize=NUMBERS)
def _query_kernel(q, k, v, out, d_out, dq, lse, delta, cu_seqlens, segments, key_lengths, scale, scale2, T, S,
                  q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, o_row, o_token, o_head,
                  HEADS: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr,
                  RAGGED: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                  FLOAT: tl.constexpr):
    """d_q of a tile of queries of one head: the forward pass's walk over the keys, again. And, for the key kernel, delta
    [B, H, T] = rowsum(d_out * out), which the backward pass of the softmax subtracts (FlashAttention, appendix B.2)."""
    b, first, start, M, N = _tile(cu_seqlens, segments, key_lengths, T, S, BM, False, PACKED, RAGGED, CAUSAL)
    if start < M:
        head = tl.program_id(1).to(tl.int64)
        query = start + tl.arange(0, BM)
        inside = query < M
        offset = b * o_row + first * o_token + head * o_head
        place = (b * HEADS + head) * T + first + query
        o1, o2 = _rows(out + offset, query, o_token, inside, False, D1, D2)
        d1, d2 = _rows(d_out + offset, query, o_token, inside, False, D1, D2)
        subtracted = tl.sum(o1.to(FLOAT) * d1.to(FLOAT), 1)
        if D2 > 0:
            subtracted += tl.sum(o2.to(FLOAT) * d2.to(FLOAT), 1)
        tl.store(delta + place, subtracted, mask=inside)
        q1, q2 = _rows(q + b * q_row + first * q_token + head * q_head, query, q_token, inside, False, D1, D2)
        k += b * k_row + first * k_token + head // GROUP * k_head
        v += b * v_row + first * v_token + head // GROUP * v_head
        normaliser = tl.load(lse + place, mask=inside, other=0.0)
        dq1 = tl.zeros([BM, D1], FLOAT)
        dq2 = tl.zeros([BM, D2 if D2 > 0 else D1], FLOAT)
        shift = N - M
        whole, end = _key_range(start, N, shift, CAUSAL, BM, BN)
        dq1, dq2 = _walk_keys(dq1, dq2, q1, q2, d1, d2, k, v, k_token, v_token, normaliser, subtracted, query, 0, whole,
                              N, shift, scale2, CAUSAL, False, D1, D2, BN)
        dq1, dq2 = _walk_keys(dq1, dq2, q1, q2, d1, d2, k, v, k_token, v_token, normaliser, subtracted, query, whole,
                              end, N, shift, scale2, CAUSAL, True, D1, D2, BN)
        _store(dq + offset, query, o_token, inside, dq1 * scale, dq2 * scale, D1, D2)


@triton.jit
def _walk_queries(dk1, dk2, dv1, dv2, k1, k2, v1, v2, q, d_out, q_stride, o_stride, lse, delta, key, begin, end, M,
                  shift, scale2, CAUSAL: tl.constexpr, MASKED: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
                  BM: tl.constexpr):
    """Everything transposed, keys by queries: so p and d_score are left operands of their products, which Hopper's
    tensor cores take from registers. Queries behind the segment's end are zeros, with d_out, lse and delta: they add
    nothing. Keys behind it are rows of dk and dv that are not stored."""
    for start in range(begin, end, BM):
        query = start + tl.arange(0, BM)
        inside = query < M
        q1, q2 = _rows(q, query, q_stride, inside, not MASKED, D1, D2)
        d1, d2 = _rows(d_out, query, o_stride, inside, not MASKED, D1, D2)
        l = tl.load(lse + query, mask=inside, other=0.0)
        d = tl.load(delta + query, mask=inside, other=0.0)
        p = tl.exp2(_products(k1, k2, q1, q2, D2) * scale2 - l[None, :])                                     # [BN, BM]
        if MASKED and CAUSAL:
            p = tl.where(key[:, None] <= query[None, :] + shift, p, 0.0)
        dv1, dv2 = _add_product(dv1, dv2, p.to(d1.dtype), d1, d2, D2)
        d_score = p * (_products(v1, v2, d1, d2, D2) - d[None, :])
        dk1, dk2 = _add_product(dk1, dk2, d_score.to(q1.dtype), q1, q2, D2)
    return dk1, dk2, dv1, dv2


@triton.jit(do_not_specialize=NUMBERS)
def _key_kernel(q, k, v, d_out, dk, dv, lse, delta, cu_seqlens, segments, key_lengths, scale, scale2, T, S,
                q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, o_row, o_token, o_head,
                d_row, d_token, d_head, HEADS: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr,
                PACKED: tl.constexpr, RAGGED: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr,
                BN: tl.constexpr, FLOAT: tl.constexpr):
    """d_k and d_v of a tile of keys. One program sums over all queries of all heads of the group, in a fixed order: no
    atomics, so the same bits every time."""
    b, first, start, M, N = _tile(cu_seqlens, segments, key_lengths, T, S, BN, True, PACKED, RAGGED, False)
    if start < N:
        kv_head = tl.program_id(1).to(tl.int64)
        key = start + tl.arange(0, BN)
        inside = key < N
        k1, k2 = _rows(k + b * k_row + first * k_token + kv_head * k_head, key, k_token, inside, False, D1, D2)
        v1, v2 = _rows(v + b * v_row + first * v_token + kv_head * v_head, key, v_token, inside, False, D1, D2)
        dk1 = tl.zeros([BN, D1], FLOAT)
        dv1 = tl.zeros([BN, D1], FLOAT)
        dk2 = tl.zeros([BN, D2 if D2 > 0 else D1], FLOAT)
        dv2 = tl.zeros([BN, D2 if D2 > 0 else D1], FLOAT)
        shift = N - M
        begin, whole = 0, 0
        if CAUSAL:  # the first query that sees any of these keys; from the tile of `whole` on, they see them all
            begin = tl.maximum(start - shift, 0) // BM * BM
            whole = tl.minimum(tl.maximum(tl.cdiv(start + BN - 1 - shift, BM) * BM, begin), tl.cdiv(M, BM) * BM)
        full = tl.maximum(M // BM * BM, whole)
        for member in range(GROUP):
            head = kv_head * GROUP + member
            q_base = q + b * q_row + first * q_token + head * q_head
            o_base = d_out + b * o_row + first * o_token + head * o_head
            place = (b * HEADS + head) * T + first
            dk1, dk2, dv1, dv2 = _walk_queries(dk1, dk2, dv1, dv2, k1, k2, v1, v2, q_base, o_base, q_token, o_token,
                                               lse + place, delta + place, key, whole, full, M, shift, scale2,
                                               CAUSAL, False, D1, D2, BM)
            for edge in range(0 if CAUSAL else 1, 2):  # where not all is seen, and what does not fill a tile
                dk1, dk2, dv1, dv2 = _walk_queries(dk1, dk2, dv1, dv2, k1, k2, v1, v2, q_base, o_base, q_token, o_token,
                                                   lse + place, delta + place, key, begin if edge == 0 else full,
                                                   whole if edge == 0 else M, M, shift, scale2, CAUSAL, True, D1, D2,
                                                   BM)
        place = b * d_row + first * d_token + kv_head * d_head
        _store(dk + place, key, d_token, inside, dk1 * scale, dk2 * scale, D1, D2)
        _store(dv + place, key, d_token, inside, dv1, dv2, D1, D2)


def columns(D: int) -> tuple[int, int] | None:
    """A head dim as a power of two and a rest that is one (80 = 64 + 16) or 0; None if it cannot be, or is not from 16
    to 128."""
    first = 1 << (D.bit_length() - 1)
    rest = D - first
    return (first, rest) if 16 <= D <= 128 and rest & (rest - 1) == 0 and (rest == 0 or rest >= 16) else None


def blocks(D: int, longest: float, kernel: str, dtype: torch.dtype) -> dict:
    """Tile sizes, warps and pipeline stages of the forward, query and key kernels; one choice for each, no autotuning at
    first use. Windows of a ViT are 64 tokens: longer tiles would be half empty. float32 has no tensor core that does
    not round, and each thread's part of a product is written out: small tiles.

    Chosen by what Triton 3.9 compiles for sm_90 (`benchmarks/kernel_resources.py`): at D = 128 the forward kernel's loop
    has 2,048 cycles of products and issues for 1,084, the query kernel's 1,536 and 672, the key kernel's 1,024 and 552,
    and nothing is spilled. Not yet measured on a GPU.
    """
    if dtype == torch.float32:
        return {"BM": 32, "BN": 16, "num_warps": 4, "num_stages": 1}
    if longest <= 64:
        return {"BM": 32 if kernel == "key" else 64, "BN": 64, "num_warps": 4, "num_stages": 2}
    if kernel == "key":  # few queries at a time where the sums dk and dv take most of the registers
        return {"BM": 32 if D > 80 else 64, "BN": 128, "num_warps": 8, "num_stages": 2}
    return {"BM": 128, "BN": 128 if kernel == "forward" else 64, "num_warps": 8, "num_stages": 2}


class TritonAttention(torch.autograd.Function):
    """The kernels as one differentiable function."""

    @staticmethod
    def forward(ctx, q, k, v, key_lengths, cu_seqlens, causal, scale):
        B, T, H, D = q.shape
        out = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device)
        lse = torch.empty((B, H, T), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        segments = 0 if cu_seqlens is None else len(cu_seqlens) - 1
        # Only the tile size hangs on it, and the device is not asked: segments of a packed row are taken for windows
        # where they are short on average.
        longest = 1.5 * T / segments if segments else T
        sizes = blocks(D, longest, "forward", q.dtype)
        _forward_kernel[(tiles(B, T, segments, sizes["BM"]), H)](
            q, k, v, out, lse, cu_seqlens, segments, key_lengths, scale * LOG2_E, T, k.shape[1], *strides(q, k, v, out),
            **constants(q, k, causal, cu_seqlens, key_lengths), **sizes)
        ctx.save_for_backward(q, k, v, out, lse, key_lengths, cu_seqlens)
        ctx.options = (segments, longest, causal, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        q, k, v, out, lse, key_lengths, cu_seqlens = ctx.saved_tensors
        segments, longest, causal, scale = ctx.options
        (B, T, H, D), (_, S, K, _) = q.shape, k.shape
        d_out, dq, delta = d_out.contiguous(), torch.empty_like(out), torch.empty_like(lse)
        new = torch.empty if key_lengths is None else torch.zeros  # keys behind a row's length: no gradient
        dk, dv = (new(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
        common = (lse, delta, cu_seqlens, segments, key_lengths, scale, scale * LOG2_E, T, S, *strides(q, k, v, out))
        kinds = constants(q, k, causal, cu_seqlens, key_lengths)
        sizes = blocks(D, longest, "query", q.dtype)
        _query_kernel[(tiles(B, T, segments, sizes["BM"]), H)](q, k, v, out, d_out, dq, *common, **kinds, **sizes)
        sizes = blocks(D, longest, "key", q.dtype)
        _key_kernel[(tiles(B, S, segments, sizes["BN"]), K)](q, k, v, d_out, dk, dv, *common, *strides(dk), **kinds,
                                                            **sizes)
        return dq, dk, dv, None, None, None, None


def strides(*tensors: Tensor) -> list[int]:
    """Of rows, tokens and heads; columns must lie side by side."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def shape_constants(q: Tensor, k: Tensor) -> dict:
    """What all kernels are compiled for."""
    H, K, (D1, D2) = q.shape[2], k.shape[2], columns(q.shape[3])
    return {"HEADS": H, "GROUP": H // K, "D1": D1, "D2": D2,
            "FLOAT": tl.float64 if q.dtype == torch.float64 else tl.float32}


def constants(q: Tensor, k: Tensor, causal: bool, cu_seqlens: Tensor | None, key_lengths: Tensor | None) -> dict:
    """And those with many queries."""
    return {**shape_constants(q, k), "CAUSAL": causal, "PACKED": cu_seqlens is not None,
            "RAGGED": key_lengths is not None}


def attention_triton(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None = None,
                     key_lengths: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """As `attention_reference`, for scale > 0, head dims that `columns` can cut, and where `triton_runs_on` the tensors."""
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    key_lengths, cu_seqlens = (None if x is None else x.to(q.device, torch.int32).contiguous()
                               for x in (key_lengths, cu_seqlens))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    with torch.cuda.device_of(q):  # Triton launches on the current device
        return TritonAttention.apply(q, k, v, key_lengths, cu_seqlens, causal, scale)


# --- Decoding: one query per row --------------------------------------------------------------------------------------
# A step of decoding reads every key and value once and computes next to nothing: bandwidth is all. Two things keep the
# whole device reading: the query heads of a group are the rows of one tile, so that their keys are read once; and where
# there are fewer rows than processors, a row's keys are split over several programs (Flash-Decoding, Dao et al. 2023).
# Each has a softmax over its own part; a second kernel weights the parts: with lse_i = log2 sum exp2(score) of part i,
# the whole is sum_i 2^(lse_i - max) out_i / sum_i 2^(lse_i - max).

@triton.jit
def _decode_kernel(q, k, v, part, lse, lengths, scale2, q_row, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
                   HEADS: tl.constexpr, GROUP: tl.constexpr, SPLITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                   D1: tl.constexpr, D2: tl.constexpr, FLOAT: tl.constexpr):
    """One split of the keys of a row for one group: part [B, H, SPLITS, D] and lse [B, H, SPLITS]."""
    b, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    N = tl.load(lengths + b).to(tl.int32)
    each = tl.cdiv(tl.cdiv(N, SPLITS), BN) * BN
    begin = tl.minimum(split * each, N)
    end = tl.minimum(begin + each, N)
    member = tl.arange(0, BM)
    inside = member < GROUP
    head = kv_head * GROUP + member
    q1, q2 = _rows(q + b * q_row, head, q_head, inside, False, D1, D2)
    k += b * k_row + kv_head * k_head
    v += b * v_row + kv_head * v_head
    peak = tl.full([BM], float("-inf"), FLOAT)
    total = tl.zeros([BM], FLOAT)
    acc1 = tl.zeros([BM, D1], FLOAT)
    acc2 = tl.zeros([BM, D2 if D2 > 0 else D1], FLOAT)
    whole = begin + (end - begin) // BN * BN
    acc1, acc2, peak, total = _attend(acc1, acc2, peak, total, q1, q2, k, v, k_token, v_token, member, begin, whole,
                                      end, 0, scale2, False, False, D1, D2, BN)
    acc1, acc2, peak, total = _attend(acc1, acc2, peak, total, q1, q2, k, v, k_token, v_token, member, whole, end, end,
                                      0, scale2, False, True, D1, D2, BN)
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    place = (b * HEADS + head) * SPLITS + split
    _store(part, place, D1 + D2, inside, acc1 / total[:, None], acc2 / total[:, None], D1, D2)
    tl.store(lse + place, tl.where(empty, float("-inf"), peak + tl.log2(total)), mask=inside)


@triton.jit
def _combine_kernel(part, lse, out, SPLITS: tl.constexpr, PADDED: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """The parts of one row and head, weighted. A row without keys gives zeros."""
    place = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, PADDED)
    l = tl.load(lse + place * SPLITS + split, mask=split < SPLITS, other=float("-inf"))
    peak = tl.max(l, 0)
    weight = tl.exp2(l - tl.where(peak == float("-inf"), 0.0, peak))
    total = tl.sum(weight, 0)
    weight = weight / tl.where(total == 0.0, 1.0, total)
    p1, p2 = _rows(part + place * SPLITS * (D1 + D2), split, D1 + D2, split < SPLITS, False, D1, D2)
    column = tl.arange(0, D1)
    tl.store(out + place * (D1 + D2) + column, tl.sum(p1 * weight[:, None], 0).to(out.dtype.element_ty))
    if D2 > 0:
        column = D1 + tl.arange(0, D2)
        tl.store(out + place * (D1 + D2) + column, tl.sum(p2 * weight[:, None], 0).to(out.dtype.element_ty))


def splits_for(programs: int, S: int, processors: int) -> int:
    """Parts of the keys: about two programs per processor, and at least 256 keys in a part."""
    return max(1, min(-(-2 * processors // programs), -(-S // 256), 64))


def decode_blocks(dtype: torch.dtype) -> dict:
    """As `blocks`: tiles of 64 keys, two more of which are on their way."""
    return {"num_warps": 4, **({"BN": 16, "num_stages": 1} if dtype == torch.float32 else {"BN": 64, "num_stages": 3})}


def attention_decode_triton(q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor, *, scale: float | None,
                            splits: int | None = None) -> Tensor:
    """One query per row, as `attention_decode`. Keys behind a row's length are never read."""
    B, _, H, D = q.shape
    S, K, group = k.shape[1], k.shape[2], H // k.shape[2]
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    splits = splits or splits_for(B * K, S, processors(q.device))
    dtype = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty((B, 1, H, D), dtype=q.dtype, device=q.device)
    part = out if splits == 1 else torch.empty((B, H, splits, D), dtype=dtype, device=q.device)
    lse = torch.empty((B, H, splits), dtype=dtype, device=q.device)
    kinds = shape_constants(q, k)
    with torch.cuda.device_of(q):
        _decode_kernel[(B, K, splits)](
            q, k, v, part, lse, key_lengths.contiguous(), (D**-0.5 if scale is None else scale) * LOG2_E, q.stride(0),
            q.stride(2), *strides(k, v), **kinds, SPLITS=splits, BM=max(16, triton.next_power_of_2(group)),
            **decode_blocks(q.dtype))
        if splits > 1:
            _combine_kernel[(B * H,)](part, lse, out, SPLITS=splits, PADDED=triton.next_power_of_2(splits),
                                      D1=kinds["D1"], D2=kinds["D2"], num_warps=1)
    return out


@lru_cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; the interpreter has none, and is given a few so that splitting is tested."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
