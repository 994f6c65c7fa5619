"""What stands between the large products of a transformer layer: RMSNorm, RoPE and SwiGLU.

First the definitions, then who computes: on a GPU Triton kernels (layers_triton.py), which read and
write each element once; elsewhere the definitions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.layers_triton import apply_rope_triton, rms_norm_triton, swiglu_triton
from kernels.triton_or_none import use_triton

# --- The definitions ------------------------------------------------------------------------------


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Returns x / rms(x) * weight [..., C] (arXiv 1910.07467), with rms over the last dimension.

    Normalised in float32, and cast *before* the weight is applied: Qwen2's bits depend on it.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def apply_rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x[i], x[i + D/2]) of each head (RoFormer, arXiv 2104.09864).

    x [..., tokens, heads, D]; cos and sin [..., tokens, D], in whose dtype is computed. The paper
    pairs neighbours; this is the half-split layout of the published weights.
    """
    wide = x.to(cos.dtype)
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (wide * cos.unsqueeze(-2) + turned * sin.unsqueeze(-2)).to(x.dtype)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """Returns silu(gate) * up (arXiv 2002.05202)."""
    return F.silu(gate) * up


# --- Who computes ---------------------------------------------------------------------------------


def fused(x: Tensor) -> bool:
    """Returns whether the Triton kernels compute. They cannot launch an empty grid."""
    return x.numel() > 0 and use_triton(x, instead_of_torch=True)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Returns x / rms(x) * weight [..., C]: `rms_norm_reference`."""
    return rms_norm_triton(x, weight, eps) if fused(x) else rms_norm_reference(x, weight, eps)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Returns x [..., tokens, heads, D], turned by its positions: `apply_rope_reference`."""
    return apply_rope_triton(x, cos, sin) if fused(x) else apply_rope_reference(x, cos, sin)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Returns silu(gate) * up: `swiglu_reference`."""
    return swiglu_triton(gate, up) if fused(gate) else swiglu_reference(gate, up)
