"""Attention of one query per row over a KV cache, in Triton: what a decoding step asks.

A decoding step reads every key and value once and computes next to nothing: bandwidth is all. Two
things keep the whole device reading:

* the query heads of a group are the rows of one tile, so that their keys are read once;
* where there are fewer rows than processors, a row's keys are split over several programs
  (Flash-Decoding, Dao et al. 2023). Each has a softmax over its own part. With lse_i the log of
  the sum of exp(score) over part i, the whole is sum_i softmax(lse)_i out_i.
"""

from functools import lru_cache

import torch
from torch import Tensor

from kernels.attention_triton import _attend, _load_rows, _store_rows, head_constants
from kernels.triton_or_none import tl, triton


@triton.jit
def _decode_kernel(
    q, k, v, part, lse, key_lengths, row_stride, token_stride, head_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    SPLITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One split of one row's keys, for one group: part [B, H, SPLITS, D] and lse [B, H, SPLITS]."""
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    # 1. Our split of the keys: whole tiles, but for the end of the last one.
    length = tl.load(key_lengths + row).to(tl.int32)
    keys = tl.cdiv(tl.cdiv(length, SPLITS), BN) * BN
    begin = tl.minimum(split * keys, length)
    end = tl.minimum(begin + keys, length)
    whole = begin + (end - begin) // BN * BN
    # 2. The group's queries, and pointers to the keys and values that they share.
    member = tl.arange(0, BM)
    head = row * HEADS + kv_head * GROUP
    q_tile = _load_rows(q + head * D, member, D, GROUP, False, D, WIDTH)
    k += row * row_stride + kv_head * head_stride
    v += row * row_stride + kv_head * head_stride
    # 3. The online softmax over the split.
    peak = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, WIDTH], tl.float32)
    acc, peak, total = _attend(
        acc, peak, total, q_tile, k, v, token_stride, member, begin, whole, end,
        "none", D, WIDTH, BN,
    )  # fmt: skip
    acc, peak, total = _attend(
        acc, peak, total, q_tile, k, v, token_stride, member, whole, end, end,
        "end", D, WIDTH, BN,
    )  # fmt: skip
    # 4. The results. A split without keys: zeros, and so low an lse that the others have all the
    #    weight. (Were it -inf, a row without any key would be NaN instead of zeros.)
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    tile = acc / total[:, None]
    _store_rows(part + (head * SPLITS + split) * D, member, SPLITS * D, GROUP, tile, D, WIDTH)
    natural = (peak + tl.log2(total)) * 0.6931471805599453  # ln 2
    place = (head + member) * SPLITS + split
    tl.store(lse + place, tl.where(empty, -1e30, natural), mask=member < GROUP)


@triton.jit
def _combine_kernel(
    part, lse, out,
    D: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr, SPLIT_TILE: tl.constexpr,
):  # fmt: skip
    """One head of one row: the splits' outputs, weighted by softmax(lse)."""
    head = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLIT_TILE)
    inside = split < SPLITS
    weight = tl.load(lse + head * SPLITS + split, mask=inside, other=float("-inf"))
    weight = tl.exp(weight - tl.max(weight, 0))
    weight /= tl.sum(weight, 0)
    column = tl.arange(0, WIDTH)
    place = part + (head * SPLITS + split[:, None]) * D + column[None, :]
    tile = tl.load(place, mask=inside[:, None] & (column < D)[None, :], other=0.0)
    whole = tl.sum(weight[:, None] * tile, 0).to(out.dtype.element_ty)
    tl.store(out + head * D + column, whole, mask=column < D)


def splits_for(programs: int, S: int, processors: int) -> int:
    """Returns into how many parts the keys are split: for about two programs per processor, but
    not into more than 64 parts, nor into parts of fewer than 256 keys."""
    wanted = -(-2 * processors // programs)
    return max(1, min(wanted, -(-S // 256), 64))


@lru_cache
def processors(device: torch.device) -> int:
    """Returns the number of streaming multiprocessors. The interpreter, which has none, gets four,
    so that splitting is tested."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def decode_blocks(dtype: torch.dtype) -> dict:
    """Returns keys per tile, warps and stages: the next two tiles are already on their way."""
    if dtype == torch.float32:
        return {"BN": 16, "num_warps": 4, "num_stages": 1}
    return {"BN": 64, "num_warps": 4, "num_stages": 3}


def attention_decode_triton(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor, *, splits: int | None = None
) -> Tensor:
    """Returns attention [B, 1, H, D] for one query per row. It has no gradient.

    Keys and values are read where they lie in a cache; what lies behind a row's length never is.
    """
    B, _, H, D = q.shape
    S, K = k.shape[1:3]
    q = q.contiguous()
    if k.stride() != v.stride() or k.stride(3) != 1:  # not two slices of one cache
        k, v = k.contiguous(), v.contiguous()
    splits = splits or splits_for(B * K, S, processors(q.device))
    out = torch.empty_like(q)
    parts = out if splits == 1 else q.new_empty((B, H, splits, D), dtype=torch.float32)
    lse = torch.empty((B, H, splits), dtype=torch.float32, device=q.device)
    constants = {**head_constants(q, k), "SPLITS": splits, **decode_blocks(q.dtype)}
    BM = max(16, triton.next_power_of_2(H // K))
    with torch.cuda.device_of(q):  # Triton launches on the current device
        _decode_kernel[(B, K, splits)](
            q, k, v, parts, lse, key_lengths.contiguous(), *k.stride()[:3], BM=BM, **constants
        )
        if splits > 1:
            sizes = {"SPLITS": splits, "SPLIT_TILE": triton.next_power_of_2(splits)}
            _combine_kernel[(B * H,)](parts, lse, out, D=D, WIDTH=constants["WIDTH"], **sizes)
    return out
