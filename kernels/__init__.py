"""The computations that take a reasoning model's time.

Attention, log-probs over a large vocabulary, what stands between a layer's products, linear maps
with few rows, drawing the next token. attention.py, logprob.py and layers.py hold the definition in
plain PyTorch first, then the same, faster, then the function that chooses; the definition of
linear.py's products is torch's own.
"""

from kernels.attention import attention
from kernels.layers import apply_rope, rms_norm, swiglu
from kernels.linear import BlockedLinear, fast_linears, logits_float32
from kernels.logprob import token_log_probs
from kernels.sampling import draw, sampling_log_probs, sampling_step, widest_float

__all__ = [
    "BlockedLinear",
    "apply_rope",
    "attention",
    "draw",
    "fast_linears",
    "logits_float32",
    "rms_norm",
    "sampling_log_probs",
    "sampling_step",
    "swiglu",
    "token_log_probs",
    "widest_float",
]
