"""Softmax attention for the decoder (causal, grouped-query), the ViT (packed windows) and decoding (ragged keys).

Shapes: B batch, T queries, S keys, H query heads, K key/value heads (H % K == 0; head h reads kv head h // (H / K)),
D head dim. Every path computes softmax(scale * q k^T + mask) v with one of three masks:

* causal:      query t sees key s when s <= t + (S - T): bottom-right aligned, so the last query sees every key;
* key_lengths: row b has key_lengths[b] real keys (a KV cache whose rows are filled to different lengths);
* cu_seqlens:  row 0 packs several segments end to end, with borders [0, n1, n1+n2, ..., T] and no key_lengths; they do
               not see one another.

A query that sees no key at all gets zeros (SDPA would give NaN: pytorch#103749).
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention_triton import attention_decode_triton, attention_triton, columns
from kernels.triton_or_none import triton_runs_on, wanted_kernels


def attention_reference(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None = None,
                        key_lengths: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """The definition, with the scores written out: q [B, T, H, D], k and v [B, S, K, D] -> [B, T, H, D].

    The softmax is in float32 (float64 stays). A group's H/K query heads are rows of one product: no copy of k or v.
    """
    B, T, H, D = q.shape
    S, K = k.shape[1], k.shape[2]
    group = H // K
    q = q.view(B, T, K, group, D).permute(0, 2, 3, 1, 4)
    scores = q.reshape(B, K, group * T, D) @ k.permute(0, 2, 3, 1)                             # [B, K, group*T, S]
    scores = scores.view(B, K, group, T, S).to(torch.promote_types(q.dtype, torch.float32))
    scores = scores * (D**-0.5 if scale is None else scale)
    mask = visible(T, S, causal=causal, key_lengths=key_lengths, cu_seqlens=cu_seqlens, device=q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
    weights = scores.softmax(dim=-1)
    if mask is not None and (key_lengths is not None or (causal and T > S)):  # only these can leave a query with no key
        weights = weights.masked_fill(~mask.any(-1)[:, None, None, :, None], 0.0)
    out = weights.to(v.dtype).view(B, K, group * T, S) @ v.transpose(1, 2)                       # [B, K, group*T, D]
    return out.view(B, K, group, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H, D)


def visible(T: int, S: int, *, causal: bool, key_lengths: Tensor | None, cu_seqlens: Tensor | None,
            device: torch.device) -> Tensor | None:
    """Which keys each query sees: bool [B or 1, T, S], or None when it sees all of them."""
    if not causal and key_lengths is None and cu_seqlens is None:
        return None
    t, s = torch.arange(T, device=device)[:, None], torch.arange(S, device=device)[None, :]
    mask = torch.ones(1, T, S, dtype=torch.bool, device=device)
    if key_lengths is not None:
        ends = key_lengths[:, None, None]
        mask = (s < ends) & (s <= t + ends - T) if causal else (s < ends).expand(-1, T, -1)
    elif causal:
        mask = mask & (s <= t + S - T)
    if cu_seqlens is not None:
        segment = torch.bucketize(torch.arange(S, device=device), cu_seqlens[1:].to(device), right=True)
        mask = mask & (segment[:, None] == segment[None, :])
    return mask


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None = None) -> Tensor:
    """torch's fused attention, for the mask-free cases: full, and causal with as many queries as keys."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def attention_packed(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, causal: bool,
                     scale: float | None) -> Tensor:
    """Packed rows [1, T, H, D]: all segments of one length go through one batched call.

    A ViT has many windows of few distinct lengths (full ones, and those cut by the image's border), so this is a
    handful of calls and no [T, T] mask.
    """
    starts, lengths = cu_seqlens[:-1], cu_seqlens.diff()
    out = torch.empty_like(q)
    for length in lengths.unique().tolist():
        if length == 0:
            continue
        index = starts[lengths == length][:, None] + torch.arange(length, device=starts.device)           # [n, length]
        index = index.to(q.device)
        out[0, index] = attention(q[0, index], k[0, index], v[0, index], causal=causal, scale=scale)
    return out


def attention_decode(q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor, *, scale: float | None) -> Tensor:
    """One query per row (T = 1): two batched products over [B * K] matrices, the first of which adds the mask.

    Keys and values that lie [B, K, S, D] in memory, as in a KV cache, are read where they are.
    """
    B, _, H, D = q.shape
    S, K = k.shape[1], k.shape[2]
    keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (k, v))                                     # [B*K, S, D]
    bias = torch.zeros(B, 1, S, dtype=q.dtype, device=q.device)
    bias.masked_fill_(torch.arange(S, device=q.device) >= key_lengths[:, None, None], float("-inf"))
    bias = bias[:, None].expand(B, K, 1, S).reshape(B * K, 1, S)
    scores = torch.baddbmm(bias, q.reshape(B * K, H // K, D), keys.transpose(1, 2),
                           alpha=D**-0.5 if scale is None else scale)                              # [B*K, group, S]
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(v.dtype)
    return torch.bmm(weights, values).view(B, 1, H, D)


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None = None,
              key_lengths: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """Dispatcher. q [B, T, H, D], k and v [B, S, K, D] -> [B, T, H, D]; see the top of the file for the masks.

    On a CPU torch's own paths. On a GPU the Triton kernels where SDPA would need a mask, which its fast back ends
    refuse; whether they are the faster ones without a mask too is for `bench.py attention` to say.
    """
    q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast RoPE leaves these two in float32
    wanted, masks = wanted_kernels(), dict(key_lengths=key_lengths, cu_seqlens=cu_seqlens)
    one_query = key_lengths is not None and q.shape[1] == 1
    positive = scale is None or scale > 0  # else our peak is wrong, and SDPA's causal scores become 0 * -inf
    no_mask = key_lengths is None and cu_seqlens is None and (not causal or q.shape[1] == k.shape[1] and positive)
    if wanted == "reference":
        return attention_reference(q, k, v, causal=causal, scale=scale, **masks)
    possible = triton_runs_on(q) and positive and columns(q.shape[3]) is not None
    if possible and (wanted == "triton" or wanted == "auto" and q.is_cuda and not no_mask):
        if one_query and not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))):
            return attention_decode_triton(q, k, v, key_lengths, scale=scale)
        return attention_triton(q, k, v, causal=causal, scale=scale, **masks)
    if cu_seqlens is not None:
        return attention_packed(q, k, v, cu_seqlens, causal=causal, scale=scale)
    if one_query:
        return attention_decode(q, k, v, key_lengths, scale=scale)
    if no_mask:
        return attention_sdpa(q, k, v, causal=causal, scale=scale)
    return attention_reference(q, k, v, causal=causal, scale=scale, key_lengths=key_lengths)
