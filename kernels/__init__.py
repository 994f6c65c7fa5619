"""The computations that take a reasoning model's time.

Attention, log-probs over a large vocabulary, linear maps with few rows, drawing the next token.
attention.py and logprob.py hold the definition in plain PyTorch first, then the same, faster, then
the function that chooses; the definition of linear.py's products is torch's own.
"""

from kernels.attention import attention
from kernels.linear import BlockedLinear, fast_linears, logits_float32
from kernels.logprob import token_log_probs
from kernels.sampling import draw, is_greedy, sampling_log_probs

__all__ = [
    "BlockedLinear",
    "attention",
    "draw",
    "fast_linears",
    "is_greedy",
    "logits_float32",
    "sampling_log_probs",
    "token_log_probs",
]
