"""The computations that take a reasoning model's time: attention, log-probs over a large vocabulary, linear maps with few
rows, and drawing the next token.

attention.py and logprob.py hold the plain PyTorch reference first, then the fast paths, then one dispatcher of the file's
purpose; linear.py's reference is torch's own F.linear.
"""
from kernels.attention import attention
from kernels.linear import fast_linears
from kernels.logprob import token_log_probs
from kernels.sampling import draw, is_greedy, sampling_log_probs

__all__ = ["attention", "draw", "fast_linears", "is_greedy", "sampling_log_probs", "token_log_probs"]
