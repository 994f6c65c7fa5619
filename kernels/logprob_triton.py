"""Token log-probs in Triton: the kernels, and the host's side of them."""
import os
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.triton_or_none import tl, triton



GRADIENT_ELEMENTS = {"triton": 2**24, "cublas": 2**25}  # gradients of logits in one chunk: 32 and 64 MiB in bfloat16
CUBLAS_ELEMENTS = 2**23  # logits in one chunk of the "cublas" way: 32 MiB in float32
LEAST_WIDTH = 1024  # ids of a chunk: hidden's gradient is read and written once per chunk
NEVER = -1e30  # the logit of an id outside the softmax's support; -inf less -inf would be NaN

# --- Triton: the kernels ----------------------------------------------------------------------------------------------
# BN tokens x BV ids is a tile; BK columns of C are multiplied at a time. FLOAT is what sums are kept in: float32
# (float64 for float64 inputs). Tokens and ids past the end wrap around to the first and are thrown away, so that the
# inner loop has no mask. It must be `%`, not a minimum: from a remainder by a multiple of 16 the compiler still sees
# that 16 neighbours lie side by side, and only then copies them asynchronously, 16 bytes at a time, while it computes.

@triton.jit
def _place(num_tokens, num_ids, GROUP: tl.constexpr):
    """This program's tile: its number along the tokens and along the ids. Programs that run at the same time should
    read the same tokens and ids, so that they come from the L2 cache: the tiles are gone through in bands of GROUP
    token tiles (Triton's matmul tutorial)."""
    program = tl.program_id(0)
    return tl.swizzle2d(program // num_ids, program % num_ids, num_tokens, num_ids, GROUP)


@triton.jit
def _add_product(total, a, b, size, a_step, b_step, EVEN: tl.constexpr, BK: tl.constexpr, FLOAT: tl.constexpr):
    """total + a b for pointers a [BM, BK] and b [BK, BN] that walk `size` elements along the shared axis. float32 is
    not rounded to TF32."""
    k = tl.arange(0, BK)
    for start in range(0, size, BK):
        if EVEN:
            left, right = tl.load(a), tl.load(b)
        else:
            left = tl.load(a, mask=(start + k < size)[None, :], other=0.0)
            right = tl.load(b, mask=(start + k < size)[:, None], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee", out_dtype=FLOAT)
        a += BK * a_step
        b += BK * b_step
    return total


@triton.jit
def _exp(x):
    """exp(x) as two instructions; tl.exp takes five, to get results below 2^-126 right, which here may be 0."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _logits(hidden, weight, token, column, masked, scale, N, V, C, hidden_row, weight_row, MASK: tl.constexpr,
            PRODUCT: tl.constexpr, EVEN: tl.constexpr, NEVER: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr,
            BK: tl.constexpr, FLOAT: tl.constexpr):
    """A tile of logits [BN, BV] at the temperature, NEVER where they do not count; and where they do, [BV].

    Without PRODUCT, `hidden` is the product already, [N, V]."""
    token = (token % N).to(tl.int64)
    there = column % V
    counts = column < V
    if MASK:  # before the product: behind it, Triton 3.6 makes each step of the tensor cores wait (ptxas C7515)
        counts = counts & (tl.load(masked + there) == 0)
    if PRODUCT:
        k = tl.arange(0, BK)
        logits = _add_product(tl.zeros([BN, BV], FLOAT), hidden + token[:, None] * hidden_row + k[None, :],
                              weight + there.to(tl.int64)[None, :] * weight_row + k[:, None], C, 1, 1, EVEN, BK, FLOAT)
    else:
        logits = tl.load(hidden + token[:, None] * hidden_row + there[None, :])
    return tl.where(counts[None, :], logits * scale, NEVER), counts


@triton.jit
def _statistics_kernel(hidden, weight, targets, masked, parts, target_logits, scale, N, V, C, hidden_row, weight_row,
                       first, TILES, MASK: tl.constexpr, PRODUCT: tl.constexpr, EVEN: tl.constexpr, NEVER: tl.constexpr,
                       FLOAT: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr):
    """Of BN tokens and TILES tiles of ids: peak, the largest logit l; total, sum exp(l - peak); and spread,
    sum exp(l - peak) (l - peak). parts [3, splits, N] takes them, target_logits [N] the targets' logits.

    The entropy is log total - spread / total. Every term of spread is <= 0 and log total >= 0, so nothing cancels.
    """
    tiles = tl.cdiv(V, BV)
    splits = tl.cdiv(tiles, TILES)
    block, split = _place(tl.cdiv(N, BN), splits, GROUP)
    token = block * BN + tl.arange(0, BN)
    target = tl.load(targets + token, mask=token < N, other=-1).to(tl.int32) - first
    peak = tl.full([BN], NEVER, FLOAT)
    total = tl.zeros([BN], FLOAT)
    spread = tl.zeros([BN], FLOAT)
    for tile in range(split * TILES, tl.minimum(split * TILES + TILES, tiles)):
        column = tile * BV + tl.arange(0, BV)
        logits, _ = _logits(hidden, weight, token, column, masked, scale, N, V, C, hidden_row, weight_row, MASK,
                            PRODUCT, EVEN, NEVER, BN, BV, BK, FLOAT)
        here = (target >= tile * BV) & (target < tl.minimum(tile * BV + BV, V))
        if tl.sum(here.to(tl.int32), 0) > 0:  # few tiles hold a target
            found = tl.sum(tl.where(column[None, :] == target[:, None], logits, 0.0), 1)
            tl.store(target_logits + token, found, mask=here & (token < N))
        higher = tl.maximum(peak, tl.max(logits, 1))
        below = logits - higher[:, None]
        weights = _exp(below)
        shift = peak - higher  # a new peak: what was summed so far shrinks by exp(shift), and each l - peak by shift
        shrink = _exp(shift)
        spread = shrink * (spread + total * shift) + tl.sum(weights * below, 1)
        total = shrink * total + tl.sum(weights, 1)
        peak = higher
    parts += split * N + token
    tl.store(parts, peak, mask=token < N)
    tl.store(parts + splits * N, total, mask=token < N)
    tl.store(parts + 2 * splits * N, spread, mask=token < N)


@triton.jit
def _gradient_kernel(hidden, weight, targets, masked, lse, upstream, out, scale, N, V, C, hidden_row, weight_row,
                     out_row, first, MASK: tl.constexpr, PRODUCT: tl.constexpr, EVEN: tl.constexpr, NEVER: tl.constexpr,
                     FLOAT: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr):
    """The gradient of a tile of raw logits, upstream * (one_hot - p) / temperature, into out [N, V]: the only thing of
    this size that is ever written, for one chunk of ids at a time."""
    block, tile = _place(tl.cdiv(N, BN), tl.cdiv(V, BV), GROUP)
    token = block * BN + tl.arange(0, BN)
    column = tile * BV + tl.arange(0, BV)
    logits, counts = _logits(hidden, weight, token, column, masked, scale, N, V, C, hidden_row, weight_row, MASK,
                             PRODUCT, EVEN, NEVER, BN, BV, BK, FLOAT)
    inside = token < N
    target = tl.load(targets + token, mask=inside, other=-1).to(tl.int32) - first
    p = _exp(logits - tl.load(lse + token, mask=inside, other=0.0)[:, None])
    one_hot = (column[None, :] == target[:, None]).to(FLOAT)
    gradient = (one_hot - p) * (tl.load(upstream + token, mask=inside, other=0.0) * scale)[:, None]
    gradient = tl.where(counts[None, :], gradient, 0.0)
    tl.store(out + token.to(tl.int64)[:, None] * out_row + column[None, :], gradient.to(out.dtype.element_ty),
             mask=inside[:, None] & (column < V)[None, :])


@triton.jit
def _matmul_kernel(a, b, out, rest, M, N, K, a_row, a_column, b_row, out_row, EVEN: tl.constexpr, ADD: tl.constexpr,
                   REST: tl.constexpr, FLOAT: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                   BK: tl.constexpr):
    """out [M, N] = a [M, K] @ b [K, N], or with ADD out += a @ b. With REST, a sum over many calls is kept as two
    numbers of out's type: its rounded value in `out`, and in `rest` what rounding took away. So a bfloat16 sum has 16
    bits, half of them in the gradient itself, and not the 8 that cost accuracy chunk by chunk (Liger#1391)."""
    row_block, column_block = _place(tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    row = row_block * BM + tl.arange(0, BM)
    column = column_block * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    a += (row % M).to(tl.int64)[:, None] * a_row + k[None, :] * a_column
    b += k[:, None] * b_row + (column % N)[None, :]
    place = row.to(tl.int64)[:, None] * out_row + column[None, :]
    inside = (row < M)[:, None] & (column < N)[None, :]
    total = tl.zeros([BM, BN], FLOAT)
    if ADD:  # before the product: after it, `out` and `rest` beside `total` would be more than the registers hold
        total += tl.load(out + place, mask=inside, other=0.0).to(FLOAT)
        if REST:
            total += tl.load(rest + place, mask=inside, other=0.0).to(FLOAT)
    total = _add_product(total, a, b, K, a_column, b_row, EVEN, BK, FLOAT)
    rounded = total.to(out.dtype.element_ty)
    tl.store(out + place, rounded, mask=inside)
    if REST:
        tl.store(rest + place, (total - rounded.to(FLOAT)).to(rest.dtype.element_ty), mask=inside)


# --- Triton: the host's side ------------------------------------------------------------------------------------------

H100_SHARED = 232_448  # bytes of shared memory that a program may have


def tile_sizes(dtype: torch.dtype, N: int, shared: int = H100_SHARED) -> dict:
    """Of a tile product (`python benchmarks/kernel_resources.py` shows what they take).

    16-bit: 128 x 256 fills the registers of 8 warps, and as many stages of copies as shared memory holds hide its
    latency. Up to 64 tokens time goes into reading the weight, and half a tile loses nothing. float32 has no tensor
    core that does not round: small tiles.
    """
    if dtype.itemsize != 2:
        return {"BN": 64, "BV": 64, "BK": 32, "num_warps": 8, "num_stages": 3, "GROUP": 16}
    BN, BV, BK = 64 if N <= 64 else 128, 256, 64
    if 3 * (BN + BV) * BK * 2 > shared:  # not a data-centre GPU
        BV = 128
    return {"BN": BN, "BV": BV, "BK": BK, "num_warps": 8, "num_stages": min(4, shared // ((BN + BV) * BK * 2)),
            "GROUP": 16}


READ_SIZES = {"BN": 16, "BV": 256, "BK": 16, "num_warps": 8, "num_stages": 2, "GROUP": 1}  # where logits are only read


def float_of(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in."""
    return torch.promote_types(dtype, torch.float32)


def triton_float(dtype: torch.dtype):
    return tl.float64 if dtype == torch.float64 else tl.float32


@lru_cache
def processors_and_shared(device: torch.device) -> tuple[int, int]:
    """Streaming multiprocessors, and the shared memory that a program may have; in the interpreter, which has neither,
    a few so that splitting is tested."""
    if device.type != "cuda":
        return 4, H100_SHARED
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


def tiles_per_program(blocks: int, tiles: int, processors: int) -> int:
    """How many of the vocabulary's tiles a program goes through, where there are `blocks` blocks of tokens: such that
    all processors work to the end, and then as many as can be. 64 blocks, 594 tiles, 132 processors: 18, in 16 full
    rounds."""
    def rounds(length: int) -> int:
        return triton.cdiv(blocks * triton.cdiv(tiles, length), processors) * length
    return min(range(min(tiles, 64), 0, -1), key=rounds)


def chunk_width(V: int, elements: int, *rows: int) -> int:
    """Ids of a chunk such that tensors [n, ids] for each n of `rows` have about so many elements at most."""
    return min([V, *(max(LEAST_WIDTH, elements // n // 256 * 256) for n in rows)])


def chunks(weight: Tensor, width: int, dtype: torch.dtype):
    """(first id, a chunk of the weight in the products' dtype): under autocast no copy of all of it is made."""
    for first in range(0, len(weight), width):
        yield first, weight[first:first + width].to(dtype)


def matmul(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """torch's a @ b into or on top of `out`, which may be float32 where the factors are not."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=int(add), out=out)
    elif out.is_cuda:  # float32 sums of 16-bit factors, never rounded in between
        torch.addmm(out, a, b, beta=int(add), out_dtype=out.dtype, out=out)
    else:
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=int(add), out=out)


def matmul_triton(a: Tensor, b: Tensor, out: Tensor, rest: Tensor | None = None, *, add: bool = False) -> None:
    """a @ b into or on top of `out` (and `rest`: see the kernel)."""
    (M, K), N = a.shape, b.shape[1]
    sizes = tile_sizes(a.dtype, M, processors_and_shared(a.device)[1])
    BM, BN = sizes.pop("BN"), sizes.pop("BV")
    _matmul_kernel[(triton.cdiv(M, BM) * triton.cdiv(N, BN),)](
        a, b, out, out if rest is None else rest, M, N, K, *a.stride(), b.stride(0), out.stride(0),
        EVEN=K % sizes["BK"] == 0, ADD=add, REST=rest is not None, FLOAT=triton_float(a.dtype), BM=BM, BN=BN, **sizes)


def tiles_of(hidden: Tensor, weight: Tensor, masked: Tensor | None, products: str) -> tuple[tuple, dict]:
    """What a kernel reads its tiles from, the two factors or with "cublas" their product; and its options for that."""
    shared = processors_and_shared(hidden.device)[1]
    sizes = tile_sizes(hidden.dtype, len(hidden), shared) if products == "triton" else READ_SIZES
    options = {"MASK": masked is not None, "PRODUCT": products == "triton", "NEVER": NEVER,
               "EVEN": hidden.shape[1] % sizes["BK"] == 0, "FLOAT": triton_float(hidden.dtype), **sizes}
    if products == "cublas":
        logits = torch.empty((len(hidden), len(weight)), dtype=float_of(hidden.dtype), device=hidden.device)
        matmul(hidden, weight.T, logits)
        hidden = weight = logits
    return (hidden, weight), options


def statistics(hidden: Tensor, weight: Tensor, first: int, targets: Tensor, masked: Tensor | None, scale: float,
               target_logits: Tensor, products: str) -> Tensor:
    """parts [3, splits, N] of a chunk of ids that begins with id `first`; target_logits where the targets are in it."""
    (N, C), V = hidden.shape, len(weight)
    (left, right), options = tiles_of(hidden, weight, masked, products)
    blocks, tiles = triton.cdiv(N, options["BN"]), triton.cdiv(V, options["BV"])
    length = tiles_per_program(blocks, tiles, processors_and_shared(hidden.device)[0])
    parts = target_logits.new_empty((3, triton.cdiv(tiles, length), N))
    _statistics_kernel[(blocks * parts.shape[1],)](
        left, right, targets, targets if masked is None else masked[first:], parts, target_logits, scale, N, V, C,
        left.stride(0), right.stride(0), first, length, **options)
    return parts


def logit_gradients(hidden: Tensor, weight: Tensor, first: int, targets: Tensor, masked: Tensor | None, scale: float,
                    lse: Tensor, upstream: Tensor, out: Tensor, products: str) -> None:
    """Gradient of a chunk's raw logits into out [N, ids of the chunk]."""
    (N, C), V = hidden.shape, len(weight)
    (left, right), options = tiles_of(hidden, weight, masked, products)
    _gradient_kernel[(triton.cdiv(N, options["BN"]) * triton.cdiv(V, options["BV"]),)](
        left, right, targets, targets if masked is None else masked[first:], lse, upstream, out, scale, N, V, C,
        left.stride(0), right.stride(0), out.stride(0), first, **options)


def combine(parts: Tensor, target_logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The splits' parts [3, splits, N] together, by the same rule as in the kernel: log_probs, entropy and lse, [N]."""
    peaks, totals, spreads = parts
    peak = peaks.amax(0)
    shift = peaks - peak
    shrink = shift.exp()
    total, spread = (shrink * totals).sum(0), (shrink * (spreads + totals * shift)).sum(0)
    log_probs = ((target_logits - peak) - total.log()).masked_fill(target_logits == NEVER, float("-inf"))
    return log_probs, total.log() - spread / total, peak + total.log()


class TritonLogProbs(torch.autograd.Function):
    """The kernels as one differentiable function. `masked` [V] marks the ids outside the support; dtype is that of the
    products."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, masked, temperature, dtype, products):
        ctx.options = scale, dtype, products = 1.0 / temperature, dtype, products
        (N, C), V, h = hidden.shape, len(weight), hidden.to(dtype)
        width = V if weight.dtype == dtype else chunk_width(V, GRADIENT_ELEMENTS["triton"], C)
        if products == "cublas":
            width = chunk_width(V, CUBLAS_ELEMENTS, N, C)
        # A target that no tile contains, which is a bug of the caller's, leaves NaN here.
        target_logits = torch.full((N,), float("nan"), dtype=float_of(dtype), device=hidden.device)
        parts = torch.cat([statistics(h, w, first, targets, masked, scale, target_logits, products)
                           for first, w in chunks(weight, width, dtype)], 1)
        log_probs, entropy, lse = combine(parts, target_logits)
        ctx.save_for_backward(hidden, weight, targets, masked, lse)
        ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):
        """A chunk of ids at a time: its rows of weight's gradient are finished at once, by one product over all tokens,
        and need no float32 copy. Hidden's gradient is summed over the chunks. No atomics: every sum has one order."""
        hidden, weight, targets, masked, lse = ctx.saved_tensors
        scale, dtype, products = ctx.options
        (N, C), V, h, upstream = hidden.shape, len(weight), hidden.to(dtype), upstream.contiguous()
        d_hidden = HiddenGradient(hidden, dtype, products) if ctx.needs_input_grad[0] else None
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        product = matmul_triton if products == "triton" else matmul
        width = chunk_width(V, GRADIENT_ELEMENTS[products], N, *([] if weight.dtype == dtype else [C]))
        buffer = torch.empty((N, width), dtype=dtype, device=hidden.device)
        for first, w in chunks(weight, width, dtype):
            d_logits = buffer[:, :len(w)]
            step = len(w) if products == "triton" else chunk_width(V, CUBLAS_ELEMENTS, N)
            for begin in range(0, len(w), step):
                logit_gradients(h, w[begin:begin + step], first + begin, targets, masked, scale, lse, upstream,
                                d_logits[:, begin:begin + step], products)
            if d_hidden is not None:
                d_hidden.add(d_logits, w)
            if d_weight is not None:
                product(d_logits.T, h, d_weight[first:first + len(w)])
        return (None if d_hidden is None else d_hidden.result(), d_weight, *[None] * 5)


class HiddenGradient:
    """The sum of d_logits @ weight over chunks of ids. It is not rounded to hidden's dtype in between: "triton" keeps a
    16-bit sum as two numbers, "cublas" a float32 tensor."""

    def __init__(self, hidden: Tensor, dtype: torch.dtype, products: str):
        self.dtype, self.products, self.begun = hidden.dtype, products, False
        wide = hidden.dtype == float_of(hidden.dtype)
        self.sum = torch.empty_like(hidden, dtype=None if products == "triton" else float_of(hidden.dtype))
        self.rest = torch.empty_like(hidden) if products == "triton" and not wide else None

    def add(self, d_logits: Tensor, weight: Tensor) -> None:
        if self.products == "triton":
            matmul_triton(d_logits, weight, self.sum, self.rest, add=self.begun)
        else:
            matmul(d_logits, weight, self.sum, add=self.begun)
        self.begun = True

    def result(self) -> Tensor:
        return self.sum.to(self.dtype)


def token_log_probs_triton(hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0,
                           masked_ids: Tensor | None = None, products: str | None = None) -> tuple[Tensor, Tensor]:
    """As `token_log_probs_reference`; products: "triton", "cublas" (top of the file) or what LOGPROB_PRODUCTS says."""
    products = products or os.environ.get("LOGPROB_PRODUCTS", "cublas")
    if products not in ("triton", "cublas"):
        raise ValueError(f"LOGPROB_PRODUCTS must be triton or cublas, not {products}")
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    masked = None
    if masked_ids is not None:
        masked = torch.zeros(len(weight), dtype=torch.uint8, device=weight.device).index_fill_(0, masked_ids, 1)
    hidden, weight = (x if x.stride(1) == 1 else x.contiguous() for x in (hidden, weight))
    targets = targets.contiguous()
    with torch.cuda.device_of(hidden):  # Triton launches on the current device
        return TritonLogProbs.apply(hidden, weight, targets, masked, temperature, dtype, products)
