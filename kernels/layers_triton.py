"""RMSNorm, RoPE and SwiGLU in Triton: what layers.py defines, each in one kernel.

There is next to nothing to compute in them, so what counts is how often memory is read and written.
Written in PyTorch, RMSNorm alone is eight kernels that hand [tokens, C] to one another; and where
there are few tokens, as in decoding, the launch of each takes longer than its work.

Everything is computed in float32 and rounded where the definitions round. So in 16 bits the forward
pass has the same bits, but for the few that the last bits of a float32 decide: a row is summed in
another order, and exp and rsqrt are the GPU's own. The backward passes compute again what is cheap,
and keep only what went in.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.triton_or_none import tl, triton

# A product that is rounded and then added shall not become one multiply-add, rounded once.
EXACT = {"enable_fp_fusion": False}

# --- RMSNorm --------------------------------------------------------------------------------------

WEIGHT_SUMS = 512  # the weight's gradient is summed up by at most so many programs


@triton.jit
def _rms_norm_kernel(x, weight, out, scales, eps, C: tl.constexpr, WIDTH: tl.constexpr):
    """One row [C]: out, and for the backward pass its scale, 1 / rms(x)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < C
    values = tl.load(x + row * C + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / C + eps)
    tl.store(scales + row, scale)
    # Rounded before the weight is applied, as in the definition.
    normalised = (values * scale).to(x.dtype.element_ty).to(tl.float32)
    weights = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * C + column, (normalised * weights).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_backward_kernel(
    x, weight, scales, d_out, dx, weight_sums, rows, rows_each,
    C: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """dx of rows_each rows, and the sum of what they add to the weight's gradient, [C].

    With n = x * scale and g = d_out * weight: dx = scale * (g - n * mean(g * n))."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < C
    weights = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    weight_sum = tl.zeros([WIDTH], tl.float32)
    begin = program * rows_each
    for row in range(begin, tl.minimum(begin + rows_each, rows)):
        values = tl.load(x + row * C + column, mask=inside, other=0.0).to(tl.float32)
        upstream = tl.load(d_out + row * C + column, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scales + row)
        normalised = values * scale
        weight_sum += upstream * normalised.to(x.dtype.element_ty).to(tl.float32)
        gradient = upstream * weights
        mean = tl.sum(gradient * normalised, 0) / C
        dx_row = scale * (gradient - normalised * mean)
        tl.store(dx + row * C + column, dx_row.to(dx.dtype.element_ty), mask=inside)
    tl.store(weight_sums + program * C + column, weight_sum, mask=inside)


class TritonRMSNorm(torch.autograd.Function):
    """The kernels as one differentiable function of x [N, C] and weight [C]."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        """Returns [N, C]."""
        N, C = x.shape
        out = torch.empty_like(x, dtype=torch.promote_types(x.dtype, weight.dtype))
        scales = torch.empty(N, dtype=torch.float32, device=x.device)
        width = triton.next_power_of_2(C)
        _rms_norm_kernel[(N,)](
            x, weight, out, scales, eps, C=C, WIDTH=width, num_warps=warps(width), **EXACT
        )
        ctx.save_for_backward(x, weight, scales)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        """Returns the gradients of x and weight. The sums have one order: no atomics."""
        x, weight, scales = ctx.saved_tensors
        N, C = x.shape
        rows_each = triton.cdiv(N, WEIGHT_SUMS)
        programs = triton.cdiv(N, rows_each)
        dx = torch.empty_like(x)
        weight_sums = torch.empty((programs, C), dtype=torch.float32, device=x.device)
        width = triton.next_power_of_2(C)
        _rms_norm_backward_kernel[(programs,)](
            x, weight, scales, d_out.contiguous(), dx, weight_sums, N, rows_each,
            C=C, WIDTH=width, num_warps=warps(width), **EXACT,
        )  # fmt: skip
        return dx, weight_sums.sum(0).to(weight.dtype), None


def warps(width: int) -> int:
    """Returns how many warps share a row: each thread has some 16 of its elements."""
    return min(16, max(1, width // 512))


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Returns what `rms_norm_reference` does."""
    with torch.cuda.device_of(x):  # Triton launches on the current device
        out = TritonRMSNorm.apply(x.reshape(-1, x.shape[-1]).contiguous(), weight, eps)
    return out.view(x.shape)


# --- RoPE -----------------------------------------------------------------------------------------


@triton.jit
def _rope_kernel(
    x, cos, sin, out, token_stride, head_stride,
    HEADS: tl.constexpr, D: tl.constexpr, BACKWARD: tl.constexpr,
    HEAD_TILE: tl.constexpr, HALF_TILE: tl.constexpr,
):  # fmt: skip
    """All heads of one token. The gradient of a rotation is turned back by it."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEAD_TILE)[:, None]
    pair = tl.arange(0, HALF_TILE)[None, :]
    HALF: tl.constexpr = D // 2
    inside = (head < HEADS) & (pair < HALF)
    # 1. The pairs, and what each is turned by.
    source = x + token * token_stride + head * head_stride + pair
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    angle = token * D + pair
    cos_first = tl.load(cos + angle, mask=pair < HALF, other=0.0).to(tl.float32)
    cos_second = tl.load(cos + angle + HALF, mask=pair < HALF, other=0.0).to(tl.float32)
    sin_first = tl.load(sin + angle, mask=pair < HALF, other=0.0).to(tl.float32)
    sin_second = tl.load(sin + angle + HALF, mask=pair < HALF, other=0.0).to(tl.float32)
    # 2. The four products, rounded to the dtype that the definition computes in.
    dtype = cos.dtype.element_ty
    kept_first = (first * cos_first).to(dtype).to(tl.float32)
    kept_second = (second * cos_second).to(dtype).to(tl.float32)
    if BACKWARD:
        turned_first = (second * sin_second).to(dtype).to(tl.float32)
        turned_second = -(first * sin_first).to(dtype).to(tl.float32)
    else:
        turned_first = -(second * sin_first).to(dtype).to(tl.float32)
        turned_second = (first * sin_second).to(dtype).to(tl.float32)
    # 3. Their sums.
    target = out + (token * HEADS + head) * D + pair
    to = out.dtype.element_ty
    tl.store(target, (kept_first + turned_first).to(dtype).to(to), mask=inside)
    tl.store(target + HALF, (kept_second + turned_second).to(dtype).to(to), mask=inside)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, *, backward: bool) -> Tensor:
    """Launches the kernel for x [tokens, H, D], whose heads may lie apart; cos and sin [tokens, D]
    may not."""
    tokens, heads, D = x.shape
    if x.stride(-1) != 1:
        x = x.contiguous()
    out = torch.empty((tokens, heads, D), dtype=x.dtype, device=x.device)
    _rope_kernel[(tokens,)](
        x, cos, sin, out, x.stride(0), x.stride(1), HEADS=heads, D=D, BACKWARD=backward,
        HEAD_TILE=triton.next_power_of_2(heads), HALF_TILE=triton.next_power_of_2(D // 2), **EXACT,
    )  # fmt: skip
    return out


class TritonRope(torch.autograd.Function):
    """The kernel as a differentiable function of x [tokens, H, D]."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        """Returns [tokens, H, D]."""
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        """Returns the gradient of x."""
        return _turn(d_out, *ctx.saved_tensors, backward=True), None, None


def apply_rope_triton(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Returns what `apply_rope_reference` does."""
    *rows, heads, D = x.shape
    # Rows may share their angles, but the kernel reads a token's own.
    cos, sin = (t.expand(*rows, D).reshape(-1, D).contiguous() for t in (cos, sin))
    with torch.cuda.device_of(x):  # Triton launches on the current device
        return TritonRope.apply(x.reshape(-1, heads, D), cos, sin).view(x.shape)


# --- SwiGLU ---------------------------------------------------------------------------------------

ELEMENTS = 1024  # of a program


@triton.jit
def _swiglu_kernel(gate, up, out, count, ELEMENTS: tl.constexpr):
    """out = silu(gate) * up. The first factor is rounded, as the definition rounds it."""
    place = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = place < count
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    silu = (g / (1.0 + tl.exp(-g))).to(gate.dtype.element_ty).to(tl.float32)
    tl.store(out + place, (silu * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward_kernel(gate, up, d_out, d_gate, d_up, count, ELEMENTS: tl.constexpr):
    """With s = sigmoid(gate): d silu / d gate = s * (1 + gate * (1 - s))."""
    place = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = place < count
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    upstream = tl.load(d_out + place, mask=inside, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-g))
    slope = s * (1.0 + g * (1.0 - s))
    tl.store(d_gate + place, (upstream * u * slope).to(d_gate.dtype.element_ty), mask=inside)
    tl.store(d_up + place, (upstream * g * s).to(d_up.dtype.element_ty), mask=inside)


class TritonSwiGLU(torch.autograd.Function):
    """The kernels as one differentiable function of gate and up, of one shape and dtype."""

    @staticmethod
    def forward(ctx, gate, up):
        """Returns silu(gate) * up."""
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        grid = (triton.cdiv(gate.numel(), ELEMENTS),)
        _swiglu_kernel[grid](gate, up, out, gate.numel(), ELEMENTS=ELEMENTS, **EXACT)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        """Returns the gradients of both."""
        gate, up = ctx.saved_tensors
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        grid = (triton.cdiv(gate.numel(), ELEMENTS),)
        _swiglu_backward_kernel[grid](
            gate, up, d_out.contiguous(), d_gate, d_up, gate.numel(), ELEMENTS=ELEMENTS, **EXACT
        )
        return d_gate, d_up


def swiglu_triton(gate: Tensor, up: Tensor) -> Tensor:
    """Returns what `swiglu_reference` does."""
    with torch.cuda.device_of(gate):  # Triton launches on the current device
        return TritonSwiGLU.apply(gate.contiguous(), up.contiguous())
