"""Triton where it is installed, and who computes: our Triton kernels, torch, or the definitions.

There is no Triton for macOS. There stand-ins take its place, under which the kernel files still
import. TRITON_INTERPRET=1, set before the first import, runs kernels on CPU tensors, in numpy.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:

    def unchanged(function=None, **options):
        return function or unchanged

    triton = SimpleNamespace(jit=unchanged)
    tl = SimpleNamespace(constexpr=None)
    AVAILABLE = False
else:
    AVAILABLE = True
INTERPRETED = AVAILABLE and os.environ.get("TRITON_INTERPRET") == "1"

standing_in = False  # set by `standing_for_a_gpu`


@contextmanager
def standing_for_a_gpu() -> Iterator[None]:
    """Inside, tensors on the CPU stand for a GPU's: what would run there is chosen, but no kernel
    of ours is launched. It is for the memory plan, whose tensors have shapes and no contents."""
    global standing_in

    def launch_nothing(kernel, grid):
        return lambda *args, **options: None

    standing_in = True
    try:
        if AVAILABLE:
            with patch.object(triton.runtime.jit.KernelInterface, "__getitem__", launch_nothing):
                yield
        else:
            yield
    finally:
        standing_in = False


def on_gpu(x: Tensor) -> bool:
    """Returns whether a tensor is on a GPU, or stands for one that is."""
    return x.is_cuda or standing_in


class WrongKernels(OSError, ValueError):
    """A bad value of the environment variable KERNELS.

    It is an OSError, as what else is wrong with a user's environment: commands print one line.
    """


def wanted_kernels() -> str:
    """Returns the environment variable KERNELS, which says who computes.

    auto (the default): on a GPU our Triton kernels where torch has nothing as fast, else torch.
    triton, sdpa (torch's own), reference (the definitions): that one, for all that it can compute.
    Raises WrongKernels for any other word.
    """
    wanted = os.environ.get("KERNELS") or "auto"  # an empty one counts as not set
    if wanted not in ("auto", "triton", "sdpa", "reference"):
        raise WrongKernels(f"KERNELS must be auto, triton, sdpa or reference, not {wanted}")
    return wanted


@lru_cache
def is_supported(gpu: torch.device) -> bool:
    """Returns whether the tiles fit this GPU: NVIDIA's from Ampere (compute capability 8.0) on."""
    return torch.version.hip is None and torch.cuda.get_device_capability(gpu) >= (8, 0)


def triton_runs_on(x: Tensor) -> bool:
    """Returns whether our kernels can compute with this tensor. They keep their sums in float32."""
    if not AVAILABLE or x.dtype == torch.float64:
        return False
    return INTERPRETED or standing_in or (x.is_cuda and is_supported(x.device))


def use_triton(x: Tensor, *, instead_of_torch: bool) -> bool:
    """Returns whether our kernels shall compute with this tensor.

    `instead_of_torch`: whether "auto" prefers them to torch's own for what is to be computed.
    """
    if not triton_runs_on(x):
        return False
    wanted = wanted_kernels()
    return wanted == "triton" or (wanted == "auto" and on_gpu(x) and instead_of_torch)
