"""Token log-probs on a GPU: cuBLAS multiplies, and Triton kernels read each logit once.

The vocabulary goes by in chunks of ids, of which [N, ids] logits are in memory and no more:

    forward    for each chunk: logits = hidden weight^T; the online softmax goes on over them
               (Milakov and Gimelshein, arXiv 1805.02867; over a vocabulary: "Cut Your Losses",
               2411.09009, whose gradient filtering is left out, since it is not exact)
    backward   for each chunk: the logits again; their gradients; from those a term of hidden's
               gradient, and the chunk's rows of weight's gradient

So it is right for any upstream gradient per token. Kernels that make the gradients in the forward
pass were not (Liger#968, #1298). The sizes for 8,192 tokens and Qwen2.5-7B's head in bfloat16
(C = 3,584, V = 152,064: 75 chunks of 2,048 ids):

    logits of a chunk                     [8192, 2048]   float32      64 MiB
    their gradients                       [8192, 2048]   bfloat16     32 MiB
    hidden's gradient, summed up          [8192, 3584]   float32     112 MiB
    for comparison, what is never made:
    all logits                            [8192, 152064] float32   4,752 MiB
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.triton_or_none import tl, triton

CHUNK_ELEMENTS = 2**24  # logits in one chunk
LEAST_WIDTH = 1024  # ids in one chunk: hidden's gradient is read and written once per chunk
# The logit of an id outside the softmax's support. It is finite, because -inf less -inf, where a
# tile holds no other ids, would be NaN. exp of its distance from any true logit is 0.
LOWEST = -1e30
TILE = {"BN": 16, "BV": 256, "num_warps": 8}  # tokens x ids

# --- The kernels --------------------------------------------------------------------------------
# `logits` [N, V] are those of one chunk: V ids from id `first` on; `masked` [V] is 1 for the ids of
# the chunk outside the softmax's support. Everything but the logits' gradient is float32.


@triton.jit
def _exp(x):
    """exp(x) as two instructions. tl.exp takes five, to get results below 2^-126 right."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _load_logits(logits, masked, token, column, scale, N, V, LOWEST: tl.constexpr):
    """A tile of logits at the temperature, LOWEST where they do not count; and where they do."""
    counts = tl.load(masked + column, mask=column < V, other=1) == 0
    place = logits + token[:, None] * V + column[None, :]
    tile = tl.load(place, mask=(token < N)[:, None] & (column < V)[None, :], other=0.0)
    return tl.where(counts[None, :], tile * scale, LOWEST), counts


@triton.jit
def _statistics_kernel(
    logits, masked, targets, statistics, target_logits, scale, first, N, V,
    LOWEST: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Goes on with the online softmax of BN tokens over one more chunk of logits l.

    statistics [3, N] are peak, the largest l so far; total, the sum of exp(l - peak); and spread,
    the sum of exp(l - peak) (l - peak). The entropy will be log total - spread / total: no term of
    spread is positive, and log total is not negative, so nothing cancels."""
    token = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = token < N
    # 1. The target's logit, if the target is in this chunk.
    target = tl.load(targets + token, mask=inside, other=-1) - first
    here = (target >= 0) & (target < V) & inside
    target_logit = tl.load(logits + token * V + target, mask=here, other=0.0) * scale
    outside_support = tl.load(masked + target, mask=here, other=0) != 0
    target_logit = tl.where(outside_support, float("-inf"), target_logit)
    tl.store(target_logits + token, target_logit, mask=here)
    # 2. The sums so far.
    peak = tl.load(statistics + token, mask=inside, other=0.0)
    total = tl.load(statistics + N + token, mask=inside, other=0.0)
    spread = tl.load(statistics + 2 * N + token, mask=inside, other=0.0)
    for start in range(0, V, BV):
        column = start + tl.arange(0, BV)
        tile, _ = _load_logits(logits, masked, token, column, scale, N, V, LOWEST)
        # 3. With a new peak, what was summed so far shrinks by exp(shift), and each l - peak by
        #    shift.
        higher = tl.maximum(peak, tl.max(tile, 1))
        shift = peak - higher
        shrink = _exp(shift)
        spread = shrink * (spread + total * shift)
        total = shrink * total
        peak = higher
        # 4. What this tile adds.
        below = tile - peak[:, None]
        weights = _exp(below)
        spread += tl.sum(weights * below, 1)
        total += tl.sum(weights, 1)
    tl.store(statistics + token, peak, mask=inside)
    tl.store(statistics + N + token, total, mask=inside)
    tl.store(statistics + 2 * N + token, spread, mask=inside)


@triton.jit
def _gradient_kernel(
    logits, masked, targets, lse, upstream, gradients, scale, first, N, V,
    LOWEST: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of logits, upstream * (one_hot - p) / temperature, into [N, V]."""
    token = tl.program_id(0) * BN + tl.arange(0, BN)
    column = tl.program_id(1) * BV + tl.arange(0, BV)
    inside = token < N
    tile, counts = _load_logits(logits, masked, token, column, scale, N, V, LOWEST)
    p = _exp(tile - tl.load(lse + token, mask=inside, other=0.0)[:, None])
    target = tl.load(targets + token, mask=inside, other=-1) - first
    one_hot = (column[None, :] == target[:, None]).to(tl.float32)
    factor = tl.load(upstream + token, mask=inside, other=0.0) * scale
    gradient = tl.where(counts[None, :], (one_hot - p) * factor[:, None], 0.0)
    place = gradients + token[:, None] * V + column[None, :]
    mask = inside[:, None] & (column < V)[None, :]
    tl.store(place, gradient.to(gradients.dtype.element_ty), mask=mask)


# --- The host's side ----------------------------------------------------------------------------


def chunk_width(N: int, C: int) -> int:
    """Returns how many ids a chunk has: [N, ids] and the rows [ids, C] of the weight shall have
    about CHUNK_ELEMENTS elements at most."""
    return max(LEAST_WIDTH, CHUNK_ELEMENTS // max(N, C) // 256 * 256)


def chunks(weight: Tensor, width: int):
    """Yields (first id, the weight's rows) of each chunk of ids."""
    for first in range(0, len(weight), width):
        yield first, weight[first : first + width]


def add_product(out: Tensor, a: Tensor, b: Tensor, *, beta: float) -> None:
    """out = beta * out + a @ b, where out may be float32 and the factors not: its sums are not
    rounded to 16 bits in between (Liger#1391 shows what that costs)."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif out.is_cuda:
        torch.addmm(out, a, b, beta=beta, out_dtype=out.dtype, out=out)
    else:  # in the interpreter
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, out=out)


def chunk_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Returns hidden @ weight.T [N, ids of the chunk] in float32."""
    logits = torch.empty((len(hidden), len(weight)), dtype=torch.float32, device=hidden.device)
    add_product(logits, hidden, weight.T, beta=0)
    return logits


class TritonLogProbs(torch.autograd.Function):
    """The kernels as one differentiable function. `masked` [V] is 1 for the ids outside the
    support."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, masked, temperature):
        """Returns log-probs and entropies [N] of hidden states [N, C] and the head [V, C]."""
        N, C = hidden.shape
        scale = 1.0 / temperature
        statistics = torch.zeros((3, N), dtype=torch.float32, device=hidden.device)
        statistics[0] = LOWEST
        # A target that is in no chunk, which is a bug of the caller's, leaves NaN here.
        target_logits = torch.full_like(statistics[0], float("nan"))
        grid = (triton.cdiv(N, TILE["BN"]),)
        for first, rows in chunks(weight, chunk_width(N, C)):
            logits = chunk_logits(hidden, rows)
            _statistics_kernel[grid](
                logits, masked[first:], targets, statistics, target_logits, scale, first, N,
                len(rows), LOWEST=LOWEST, **TILE,
            )  # fmt: skip
            del logits  # before the next chunk's are made
        peak, total, spread = statistics
        # In this order: the two logits may be large, and then their difference is exact.
        log_probs = (target_logits - peak) - total.log()
        entropy = total.log() - spread / total
        ctx.save_for_backward(hidden, weight, targets, masked, peak + total.log())
        ctx.scale = scale
        ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):
        """A chunk's rows of weight's gradient are finished at once, by one product over all tokens.
        Hidden's gradient is summed over the chunks, in float32. No atomics: every sum has one
        order."""
        hidden, weight, targets, masked, lse = ctx.saved_tensors
        scale, upstream = ctx.scale, upstream.contiguous()
        N, C = hidden.shape
        d_hidden, d_weight = None, None
        if ctx.needs_input_grad[0]:
            d_hidden = torch.zeros((N, C), dtype=torch.float32, device=hidden.device)
        if ctx.needs_input_grad[1]:
            d_weight = torch.empty_like(weight)
        for first, rows in chunks(weight, chunk_width(N, C)):
            # 1. The logits once more, and their gradients.
            logits = chunk_logits(hidden, rows)
            d_logits = torch.empty((N, len(rows)), dtype=weight.dtype, device=hidden.device)
            grid = (triton.cdiv(N, TILE["BN"]), triton.cdiv(len(rows), TILE["BV"]))
            _gradient_kernel[grid](
                logits, masked[first:], targets, lse, upstream, d_logits, scale, first, N,
                len(rows), LOWEST=LOWEST, **TILE,
            )  # fmt: skip
            del logits  # before the next chunk's are made
            # 2. From those the gradients of both factors.
            if d_hidden is not None:
                add_product(d_hidden, d_logits, rows, beta=1)
            if d_weight is not None:
                add_product(d_weight[first : first + len(rows)], d_logits.T, hidden, beta=0)
            del d_logits
        if d_hidden is not None:
            d_hidden = d_hidden.to(hidden.dtype)
        return d_hidden, d_weight, None, None, None


def token_log_probs_triton(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    masked_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns what `token_log_probs_reference` does, of no tokens too. A target that does not exist
    gives NaN."""
    if len(hidden) == 0:  # an empty grid cannot be launched; the gradients are zeros
        nothing = (hidden @ weight.T).sum(-1).float()
        return nothing, nothing.detach()
    masked = torch.zeros(len(weight), dtype=torch.uint8, device=weight.device)
    if masked_ids is not None:
        masked.index_fill_(0, masked_ids, 1)
    with torch.cuda.device_of(hidden):  # Triton launches on the current device
        return TritonLogProbs.apply(hidden, weight, targets.contiguous(), masked, temperature)
