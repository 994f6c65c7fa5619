"""The two computations that dominate a reasoning model's time: attention, and log-probs over a large vocabulary.

Each file holds the plain PyTorch reference first, then the fast paths, then one dispatcher of the same name.
"""
from kernels.attention import attention
from kernels.logprob import token_log_probs

__all__ = ["attention", "token_log_probs"]
