"""A step of the compact AdamW in Triton: every number is read once and written once.

What is to be computed is defined in training/compact.py (`adamw_reference`): some 30 operations of
PyTorch, each of which reads and writes all elements, most of them in float32. Bandwidth is all that
such a step costs, so here one kernel does them all in registers. Bytes a parameter:

    read     weight 2, gradient 2, low 1, exp_avg 2, exp_avg_sq 2, random bits 4
    written  weight 2,             low 1, exp_avg 2, exp_avg_sq 2

The arithmetic is the definition's, in float32, with divisions and roots rounded as IEEE 754 says. A
compiler may fuse a product and a sum, which rounds once instead of twice: the last float32 bit may
differ from the definition's, and so now and then the last bit of what is stored. The kernel itself
gives the same bits each time: no element depends on another.
"""

import torch
from torch import Tensor

from kernels.triton_or_none import tl, triton

# Elements of a program. A thread has 8 of them: 16 bytes of each bfloat16 tensor.
TILE = {"BLOCK": 1024, "num_warps": 4}

# --- The kernel ---------------------------------------------------------------------------------


@triton.jit
def _bits(x):
    """A float's bits, as an integer of its size."""
    return x.to(tl.int32 if x.dtype == tl.float32 else tl.int16, bitcast=True)


@triton.jit
def _adamw_kernel(
    weight, grad, low, exp_avg, exp_avg_sq, noise, clip_factor,
    keep, rate1, beta2, rate2, root, eps, step_size, n,
    CLIPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """AdamW's step of BLOCK elements, in place. The scalars are in `adamw_triton`, which makes
    them."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < n
    # 1. What was stored, in float32. The master has the weight's 16 bits and 8 more, a signed
    #    distance from it; below those are 8 zeros.
    high = _bits(tl.load(weight + place, mask=inside, other=0.0)).to(tl.int32)
    lower = tl.load(low + place, mask=inside, other=0).to(tl.int32)
    master = (((high << 8) + lower) << 8).to(tl.float32, bitcast=True)
    gradient = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    if CLIPPED:
        gradient *= tl.load(clip_factor)
    m = tl.load(exp_avg + place, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(exp_avg_sq + place, mask=inside, other=0.0).to(tl.float32)

    # 2. The moments.
    m += rate1 * (gradient - m)
    v = beta2 * v + rate2 * (gradient * gradient)

    # 3. Decay and step.
    denominator = tl.div_rn(tl.sqrt_rn(v), root) + eps
    master = keep * master - step_size * tl.div_rn(m, denominator)

    # 4. Back into few bits. 8 random ones carry into the 24 that are kept of the master, and the
    #    weight is the nearest to those. The next 16 carry into the 16 that are kept of v.
    random = tl.load(noise + place, mask=inside, other=0)
    kept = (_bits(master) + (random & 0xFF)) >> 8
    high = (kept + 0x80) >> 8
    new_weight = high.to(tl.int16).to(tl.bfloat16, bitcast=True)
    tl.store(weight + place, new_weight, mask=inside)
    tl.store(low + place, (kept - (high << 8)).to(tl.int8), mask=inside)
    tl.store(exp_avg + place, m.to(tl.bfloat16), mask=inside)
    new_v = (_bits(v) + ((random >> 8) & 0xFFFF)) >> 16
    new_v = new_v.to(tl.int16).to(tl.bfloat16, bitcast=True)
    tl.store(exp_avg_sq + place, new_v, mask=inside)


# --- The host's side ----------------------------------------------------------------------------


def adamw_triton(
    weight: Tensor,
    grad: Tensor,
    low: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    noise: Tensor,
    clip_factor: Tensor | None,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Does what `adamw_reference` in training/compact.py does. All tensors are on one device, and
    what is [n] there is contiguous."""
    beta1, beta2 = betas
    n = weight.numel()
    scalars = {
        "keep": 1 - lr * weight_decay,
        "rate1": 1 - beta1,
        "beta2": beta2,
        "rate2": 1 - beta2,
        # The moments began at 0: the divisions make up for that.
        "root": (1 - beta2**step) ** 0.5,
        "eps": eps,
        "step_size": lr / (1 - beta1**step),
    }
    grid = (max(1, triton.cdiv(n, TILE["BLOCK"])),)  # an empty one cannot be launched
    with torch.cuda.device_of(weight):  # Triton launches on the current device
        _adamw_kernel[grid](
            weight, grad, low, exp_avg, exp_avg_sq, noise, clip_factor, **scalars, n=n,
            CLIPPED=clip_factor is not None, **TILE,
        )  # fmt: skip
    # Autograd does not see what a kernel of ours writes, and has to know of changed weights.
    torch.autograd.graph.increment_version(weight)
