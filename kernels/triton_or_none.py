"""triton and triton.language where they are installed (there is no Triton for macOS), else stand-ins under which the kernel
files still import. TRITON_INTERPRET=1, set before the first import, runs kernels on CPU tensors, in numpy."""
import os
from functools import lru_cache
from types import SimpleNamespace

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    def unchanged(function=None, **options):
        return function or unchanged

    triton, tl = SimpleNamespace(jit=unchanged), SimpleNamespace(constexpr=None)
    AVAILABLE = False
else:
    AVAILABLE = True
INTERPRETED = AVAILABLE and os.environ.get("TRITON_INTERPRET") == "1"


def wanted_kernels() -> str:
    """The environment's KERNELS: auto (a GPU runs ours where they are the faster ones), or one of triton, sdpa (torch's
    own) and reference for everything that it can compute."""
    wanted = os.environ.get("KERNELS", "auto")
    if wanted not in ("auto", "triton", "sdpa", "reference"):
        raise ValueError(f"KERNELS must be auto, triton, sdpa or reference, not {wanted}")
    return wanted


@lru_cache
def is_known(device: torch.device) -> bool:
    """NVIDIA's GPUs from Ampere on: those that the tile sizes fit (`benchmarks/kernel_resources.py --fits`)."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def triton_runs_on(x: Tensor) -> bool:
    """Whether our kernels run on this tensor: on a GPU's unless it is float64, in the interpreter on any."""
    return AVAILABLE and (INTERPRETED or x.is_cuda and x.dtype != torch.float64 and is_known(x.device))
