"""The computations that take a reasoning model's time.

Attention, log-probs over a large vocabulary, linear maps with few rows, drawing the next token.
attention.py and logprob.py hold the definition in plain PyTorch first, then the same, faster, then
the function that chooses; linear.py's definition is torch's own F.linear.
"""

from kernels.attention import attention
from kernels.linear import fast_linears
from kernels.logprob import token_log_probs
from kernels.sampling import draw, is_greedy, sampling_log_probs

__all__ = [
    "attention",
    "draw",
    "fast_linears",
    "is_greedy",
    "sampling_log_probs",
    "token_log_probs",
]
