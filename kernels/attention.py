"""Softmax attention for the decoder (causal, grouped-query), the ViT (windows) and decoding.

Shapes: B rows, T queries, S keys, H query heads, K key/value heads (H % K == 0; query head h reads
key/value head h // (H / K)), D head dim. Every path computes softmax(q k^T / sqrt(D) + mask) v
with one of three masks:

* causal:      query t sees key s when s <= t + (S - T): aligned at the bottom right, so that the
               last query sees every key;
* key_lengths: row b has key_lengths[b] real keys (a KV cache whose rows are filled to different
               lengths);
* cu_seqlens:  row 0 packs several segments end to end, with borders [0, n1, n1 + n2, ..., T]; they
               do not see one another.

A query that sees no key at all gets zeros by the definition and from the Triton kernels (SDPA would
give NaN: pytorch#103749); in decoding every query sees itself at least.

First the definition, which takes every combination of masks. Then the same, faster, for what our
models ask: whole rows, packs, and one query per row. Last `attention`, which chooses.
"""

from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention_triton import WIDEST, attention_triton
from kernels.decode_triton import attention_decode_triton
from kernels.triton_or_none import use_triton, wanted_kernels

# --- The definition -----------------------------------------------------------------------------


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    cu_seqlens: Tensor | None = None,
    key_lengths: Tensor | None = None,
) -> Tensor:
    """Returns attention [B, T, H, D] with the scores written out.

    q [B, T, H, D], k and v [B, S, K, D]. The softmax is in float32 (float64 stays).
    """
    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    # The H / K query heads of a group are an axis of their own: no copy of their keys is made.
    q = q.reshape(B, T, K, H // K, D)
    scores = torch.einsum("btkgd,bskd->bkgts", q, k)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * D**-0.5
    mask = visible(
        T, S, causal=causal, cu_seqlens=cu_seqlens, key_lengths=key_lengths, device=q.device
    )
    mask = mask[:, None, None]  # [B or 1, 1, 1, T, S]
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    # Where a query sees nothing, the softmax of -inf alone is NaN.
    weights = weights.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    out = torch.einsum("bkgts,bskd->btkgd", weights.to(v.dtype), v)
    return out.reshape(B, T, H, D)


def visible(
    T: int,
    S: int,
    *,
    causal: bool,
    cu_seqlens: Tensor | None,
    key_lengths: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Returns which keys each query sees: bool [B or 1, T, S]."""
    query = torch.arange(T, device=device)[:, None]
    key = torch.arange(S, device=device)
    mask = torch.ones(1, T, S, dtype=torch.bool, device=device)
    # The keys that a row has are those before `end`: [B, 1, 1], or one number for all rows.
    end = S if key_lengths is None else key_lengths[:, None, None]
    mask = mask & (key < end)
    if causal:
        mask = mask & (key <= query + end - T)
    if cu_seqlens is not None:
        # A token's segment is the number of borders at or before it.
        segment = torch.bucketize(key, cu_seqlens[1:].to(device), right=True)
        mask = mask & (segment[:, None] == segment)
    return mask


# --- The same, faster ---------------------------------------------------------------------------


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Returns attention over whole rows (T = S) by torch's fused kernels, which need no mask."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
    return out.transpose(1, 2)


def attention_packed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, causal: bool
) -> Tensor:
    """Returns attention within each segment of a pack [1, T, H, D], with no [T, T] mask.

    Neighbours of one length lie in memory like the rows of a batch and are computed as one: most
    windows of a ViT have one length, so they are a handful of calls. Python needs the lengths: on
    a GPU, where they are asked for in every layer, the Triton kernels do this job.
    """
    lengths = [length for length in cu_seqlens.diff().tolist() if length > 0]
    runs = [(length, len(list(equal))) for length, equal in groupby(lengths)]
    # One split for all runs: the backward pass puts their gradients together with one `cat`.
    sizes = [length * count for length, count in runs]
    parts = zip(q[0].split(sizes), k[0].split(sizes), v[0].split(sizes))
    outs = []
    for (length, count), part in zip(runs, parts):
        rows = [x.unflatten(0, (count, length)) for x in part]
        outs.append(attention(*rows, causal=causal).flatten(0, 1))
    return torch.cat(outs)[None]


def attention_decode(q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor) -> Tensor:
    """Returns attention for one query per row (T = 1), by two batched products over B * K matrices.

    Keys and values that lie [B, K, S, D] in memory, as in a KV cache, are read where they are.
    """
    B, _, H, D = q.shape
    S, K = k.shape[1:3]
    keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (k, v))  # [B*K, S, D]
    # -inf behind a row's last key. The first product adds it to the scores on its way.
    bias = torch.zeros(B, S, dtype=q.dtype, device=q.device)
    behind = torch.arange(S, device=q.device) >= key_lengths[:, None]
    bias = bias.masked_fill(behind, float("-inf")).repeat_interleave(K, 0)[:, None]  # [B*K, 1, S]
    # A group's queries are the rows of one matrix.
    q = q.reshape(B * K, H // K, D)
    scores = torch.baddbmm(bias, q, keys.transpose(1, 2), alpha=D**-0.5)  # [B*K, H/K, S]
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
    return torch.bmm(weights.to(v.dtype), values).view(B, 1, H, D)


# --- Who computes -------------------------------------------------------------------------------


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    cu_seqlens: Tensor | None = None,
    key_lengths: Tensor | None = None,
) -> Tensor:
    """Returns softmax attention [B, T, H, D] of q [B, T, H, D] over k and v [B, S, K, D].

    The masks are explained at the top of this file. cu_seqlens and key_lengths are integers on
    q's device. On a GPU the Triton kernels compute where SDPA would need a mask, which its fast
    back ends refuse; else, and on a CPU, torch does. KERNELS (triton_or_none.py) overrules this.
    """
    packed = cu_seqlens is not None
    ragged = key_lengths is not None
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    decoding = ragged and not packed and q.shape[1] == 1 and not differentiable
    whole_rows = not ragged and q.shape[1] == k.shape[1]

    # No tokens at all, and combinations of masks that none of our models asks for, are left to the
    # definition.
    if wanted_kernels() == "reference" or q.numel() == 0 or not (decoding or whole_rows):
        return attention_reference(
            q, k, v, causal=causal, cu_seqlens=cu_seqlens, key_lengths=key_lengths
        )
    triton = q.shape[3] <= WIDEST and use_triton(q, instead_of_torch=packed or decoding)
    if decoding and triton:
        return attention_decode_triton(q, k, v, key_lengths)
    if decoding:
        return attention_decode(q, k, v, key_lengths)
    if triton:
        return attention_triton(q, k, v, causal=causal, cu_seqlens=cu_seqlens)
    if packed:
        return attention_packed(q, k, v, cu_seqlens, causal=causal)
    return attention_sdpa(q, k, v, causal=causal)
