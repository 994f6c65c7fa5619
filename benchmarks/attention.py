"""The Triton attention kernels against SDPA's back ends; needs a GPU.

python benchmarks/attention.py
"""

import json
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from itertools import cycle
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import copy_bandwidth, matmul_flops, milliseconds, peak_bytes  # noqa: E402
from hub.device import DEVICE_HELP, pick_device
from hub.errors import InputError  # noqa: E402
from hub.options import option, parse_options, run_command  # noqa: E402
from kernels import attention  # noqa: E402
from kernels.attention import visible  # noqa: E402
from kernels.attention_triton import attention_triton  # noqa: E402
from kernels.decode_triton import attention_decode_triton  # noqa: E402
from training.journal import git_commit  # noqa: E402


@dataclass
class AttentionOptions:
    """The Triton kernels against SDPA's back ends: milliseconds, and the share of what the device
    can do. Needs a GPU; on a CPU two small shapes through torch's paths, to see that the command
    runs."""

    only: str | None = option(None, "shapes whose name has this in it")
    device: str = option("auto", DEVICE_HELP)
    dtype: str = option("bfloat16", "of q, k and v", choices=("float32", "float16", "bfloat16"))
    json: bool = option(False, "the last line is one JSON object with everything")


@dataclass
class AttentionShape:
    """B rows of T tokens, or one row of segments of `segment` tokens, or one query per row on a
    cache of S keys; H heads on K, of width D."""

    name: str
    B: int
    T: int
    S: int
    H: int
    K: int
    D: int
    causal: bool
    segment: int | None = None

    @property
    def decoding(self) -> bool:
        return self.T == 1

    def flops(self) -> float:
        """Returns the operations of the forward pass's two products; the backward pass has five."""
        rows, T = self.B, self.T
        if self.segment:
            rows, T = self.T / self.segment, self.segment
        pairs = T * (T + 1) / 2 if self.causal else T * T
        return 4 * rows * self.H * self.D * pairs


GPU_SHAPES = [
    *(
        AttentionShape(f"7B causal {T}", 16384 // T, T, T, 28, 4, 128, True)
        for T in (4096, 8192, 16384)
    ),
    AttentionShape("7B packed, 512 each", 1, 16384, 16384, 28, 4, 128, True, segment=512),
    *(
        AttentionShape(f"ViT windows {T}", 1, T, T, 16, 16, 80, False, segment=64)
        for T in (1024, 4096, 16384)
    ),
    *(AttentionShape(f"ViT full {T}", 1, T, T, 16, 16, 80, False) for T in (1024, 4096, 16384)),
    *(
        AttentionShape(f"7B decode {B} x {S}", B, 1, S, 28, 4, 128, True)
        for B, S in ((1, 4096), (16, 4096), (128, 2048))
    ),
]
CPU_SHAPES = [
    AttentionShape("causal 64", 1, 64, 64, 4, 2, 32, True),
    AttentionShape("windows 256", 1, 256, 256, 2, 2, 16, False, segment=64),
]


def ours(shape: AttentionShape, device: torch.device) -> dict[str, Callable]:
    """Returns our path for the shape, as a function of (q, k, v), by its name."""
    cu_seqlens = None
    if shape.segment:
        cu_seqlens = torch.arange(0, shape.T + 1, shape.segment, device=device, dtype=torch.int32)
    masks = {"causal": shape.causal, "cu_seqlens": cu_seqlens}
    if device.type != "cuda":
        return {"ours": lambda q, k, v: attention(q, k, v, **masks)}
    if shape.decoding:
        lengths = torch.full((shape.B,), shape.S, device=device)
        return {"triton": lambda q, k, v: attention_decode_triton(q, k, v, lengths)}
    return {"triton": lambda q, k, v: attention_triton(q, k, v, **masks)}


def torchs(shape: AttentionShape, device: torch.device) -> dict[str, Callable]:
    """Returns torch's paths for the shape, as functions of (q, k, v), by their names.

    Segments, here all of one length, are a batch, which is SDPA's best case; and once a mask. Keys
    and values of a group are not copied.
    """

    def sdpa(q, k, v, mask=None):
        if shape.segment and mask is None:
            q, k, v = (x.view(-1, shape.segment, *x.shape[2:]) for x in (q, k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        causal = shape.causal and not shape.decoding and mask is None
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=shape.H != shape.K
        )

    def backend(kind):
        def run(q, k, v):
            with sdpa_kernel([kind]):
                return sdpa(q, k, v)

        return run

    found = {}
    if device.type == "cuda":
        found["flash"] = backend(SDPBackend.FLASH_ATTENTION)
        found["cudnn"] = backend(SDPBackend.CUDNN_ATTENTION)
    if shape.segment and shape.H == shape.K:  # SDPA's fast back ends take a mask, or groups
        borders = torch.arange(0, shape.T + 1, shape.segment, device=device)
        masks = {"causal": shape.causal, "cu_seqlens": borders, "key_lengths": None}
        mask = visible(shape.T, shape.S, **masks, device=device)
        found["masked sdpa"] = lambda q, k, v: sdpa(q, k, v, mask)
    return found | {"sdpa": sdpa}


def time_training(function, shape, q, k, v, ceilings) -> dict:
    """Returns ms of forward and of forward + backward, TFLOP/s and their share, and peak memory
    beyond inputs and gradients."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    upstream = torch.randn_like(q)

    def step():
        out = function(*leaves)
        return torch.autograd.grad(out, leaves, upstream.view(out.shape))

    forward = milliseconds(lambda: function(*leaves), q.device)
    both = milliseconds(step, q.device)
    rate = shape.flops() / forward / 1e9
    return {
        "forward_ms": forward,
        "forward_backward_ms": both,
        "rate": rate,
        "share": rate / (ceilings["matmul"] / 1e12),
        "extra_bytes": peak_bytes(step, q.device, less=q.nbytes + k.nbytes + v.nbytes),
    }


def time_decoding(function, q, k, v, ceilings) -> dict:
    """Returns ms, GB/s of keys and values and their share, and peak memory beyond the inputs."""
    caches = [(k, v)]
    if q.device.type == "cuda":  # several, by turns: more than the L2 cache holds
        caches = [(k.clone(), v.clone()) for _ in range(-(-(2**28) // (k.nbytes + v.nbytes)))]
    turns = cycle(caches)
    forward = milliseconds(lambda: function(q, *next(turns)), q.device)
    rate = (k.nbytes + v.nbytes) / forward / 1e6
    return {
        "forward_ms": forward,
        "forward_backward_ms": None,
        "rate": rate,
        "share": rate / (ceilings["copy"] / 1e9),
        "extra_bytes": peak_bytes(lambda: function(q, k, v), q.device, less=0),
    }


def time_shape(
    shape: AttentionShape, device: torch.device, dtype: torch.dtype, ceilings: dict
) -> dict:
    """Prints and returns the figures by competitor."""
    q = torch.randn(shape.B, shape.T, shape.H, shape.D, device=device).to(dtype)
    # Keys and values lie as in a KV cache, heads first, or as a projection leaves them.
    sizes = (shape.B, shape.K, shape.S, shape.D)
    k, v = (torch.randn(sizes, device=device).to(dtype).transpose(1, 2) for _ in range(2))
    if not shape.decoding:
        k, v = k.contiguous(), v.contiguous()
    result = {}
    for name, function in (ours(shape, device) | torchs(shape, device)).items():
        try:
            if shape.decoding:
                result[name] = time_decoding(function, q, k, v, ceilings)
            else:
                result[name] = time_training(function, shape, q, k, v, ceilings)
        except RuntimeError as error:  # a back end that does not take this shape
            print(f"{shape.name:<22}{name:<14}{str(error).splitlines()[0][:70]}")
            continue
        print_line(shape, name, result[name])
    return result


def print_line(shape: AttentionShape, name: str, figures: dict) -> None:
    """Prints one competitor's figures."""
    unit = "GB/s" if shape.decoding else "TFLOP/s"
    line = f"{shape.name:<22}{name:<14}{figures['forward_ms']:>9.3f} ms"
    line += f"{figures['rate']:>9.1f} {unit} ({100 * figures['share']:.0f}%)"
    if not shape.decoding:
        line += f"   forward + backward {figures['forward_backward_ms']:.3f} ms"
    if figures["extra_bytes"] is not None:
        line += f"   {figures['extra_bytes'] / 1e9:.3f} GB"
    print(line, flush=True)


def main(argv: list[str]) -> None:
    """Times the shapes, and prints a line for each."""
    options = parse_options(AttentionOptions, argv)
    device, dtype = pick_device(options.device), getattr(torch, options.dtype)
    on_gpu = device.type == "cuda"
    known = GPU_SHAPES if on_gpu else CPU_SHAPES
    shapes = [shape for shape in known if (options.only or "") in shape.name]
    if not shapes:
        raise InputError(f"--only {options.only}: no such shape")
    ceilings = {"copy": copy_bandwidth(device), "matmul": matmul_flops(device, dtype)}
    copies, products = ceilings["copy"] / 1e9, ceilings["matmul"] / 1e12
    print(f"ceilings: copy {copies:,.0f} GB/s, product {products:,.1f} TFLOP/s")
    result = {
        "ceilings": ceilings,
        "shapes": {shape.name: time_shape(shape, device, dtype, ceilings) for shape in shapes},
        "date": str(date.today()),
        "commit": git_commit(),
        "torch": torch.__version__,
        "dtype": options.dtype,
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.platform(),
    }
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    run_command(main)
