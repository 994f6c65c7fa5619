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
from hub.errors import InputError  # noqa: E402
from hub.options import option, parse_options, pick_device, run_command  # noqa: E402
from kernels import attention  # noqa: E402
from kernels.attention import visible  # noqa: E402
from kernels.attention_triton import attention_decode_triton, attention_triton  # noqa: E402
from training.journal import git_commit  # noqa: E402



@dataclass
class AttentionOptions:
    """The Triton kernels against SDPA's back ends: milliseconds, and the share of what the device can do. Needs a GPU;
    on a CPU two small shapes through torch's paths, to see that the command runs."""
    only: str | None = option(None, "shapes whose name has this in it")
    device: str = option("auto", "auto, cpu or cuda")
    dtype: str = option("bfloat16", "of q, k and v", choices=("float32", "float16", "bfloat16"))
    json: bool = option(False, "the last line is one JSON object with everything")


@dataclass
class AttentionShape:
    """B rows of T queries and S keys, or one row of segments of `segment` tokens; H heads on K, of width D."""
    name: str
    B: int
    T: int
    S: int
    H: int
    K: int
    D: int
    causal: bool
    segment: int | None = None

    def flops(self) -> float:
        """Of the forward pass: two products; the backward pass has five."""
        T, S, rows = (self.segment, self.segment, self.T / self.segment) if self.segment else (self.T, self.S, self.B)
        pairs = T * S - T * (T - 1) / 2 if self.causal else T * S
        return 4 * rows * self.H * self.D * pairs


GPU_SHAPES = [
    *(AttentionShape(f"7B causal {T}", 16384 // T, T, T, 28, 4, 128, True) for T in (4096, 8192, 16384)),
    AttentionShape("7B packed, 512 each", 1, 16384, 16384, 28, 4, 128, True, segment=512),
    *(AttentionShape(f"ViT windows {T}", 1, T, T, 16, 16, 80, False, segment=64) for T in (1024, 4096, 16384)),
    *(AttentionShape(f"ViT full {T}", 1, T, T, 16, 16, 80, False) for T in (1024, 4096, 16384)),
    *(AttentionShape(f"7B decode {B} x {S}", B, 1, S, 28, 4, 128, True)
      for B, S in ((1, 4096), (16, 4096), (128, 2048)))]
CPU_SHAPES = [AttentionShape("causal 64", 1, 64, 64, 4, 2, 32, True),
              AttentionShape("windows 256", 1, 256, 256, 2, 2, 16, False, segment=64)]


def competitors(shape: AttentionShape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Callable]:
    """Functions of (q, k, v) by name. SDPA gets segments, here all of one length, as a batch, which is its best case,
    and also with a mask; keys and values of a group are not copied."""
    B, T, S, H, K, n = shape.B, shape.T, shape.S, shape.H, shape.K, shape.segment
    lengths = torch.full((B,), S, device=q.device)
    cu_seqlens = torch.arange(0, T + 1, n, device=q.device) if n else None

    def sdpa(q, k, v, mask=None):
        if n and mask is None:
            q, k, v = (x.view(T // n, n, *x.shape[2:]) for x in (q, k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        causal = shape.causal and T > 1 and mask is None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=H != K)

    def backend(kind):
        def run(q, k, v):
            with sdpa_kernel([kind]):
                return sdpa(q, k, v)
        return run

    borders = None
    if n and H == K:  # SDPA's fast back ends take a mask, or groups, not both
        borders = visible(T, S, causal=shape.causal, key_lengths=None, cu_seqlens=cu_seqlens, device=q.device)

    if q.device.type == "cuda" and T == 1:
        found = {"triton": lambda q, k, v: attention_decode_triton(q, k, v, lengths, scale=None)}
    elif q.device.type == "cuda":
        found = {"triton": lambda q, k, v: attention_triton(q, k, v, causal=shape.causal, cu_seqlens=cu_seqlens)}
    else:
        found = {"ours": lambda q, k, v: attention(q, k, v, causal=shape.causal, cu_seqlens=cu_seqlens)}
    if q.device.type == "cuda":
        found |= {"flash": backend(SDPBackend.FLASH_ATTENTION), "cudnn": backend(SDPBackend.CUDNN_ATTENTION)}
    if borders is not None:
        found["masked sdpa"] = lambda q, k, v: sdpa(q, k, v, borders)
    return found | {"sdpa": sdpa}


def time_attention(shape: AttentionShape, device: torch.device, dtype: torch.dtype, ceilings: dict) -> dict:
    """By competitor: ms of forward, and but for decoding of forward + backward; TFLOP/s or GB/s, and its share; peak
    memory beyond inputs and gradients."""
    B, T, S, H, K, D = shape.B, shape.T, shape.S, shape.H, shape.K, shape.D
    decode, result = T == 1, {}
    q, k, v = (torch.randn(size, device=device).to(dtype) for size in ((B, T, H, D), (B, S, K, D), (B, S, K, D)))
    if decode:  # as a KV cache lies
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    upstream = torch.randn_like(q)
    caches = cycle([(k, v)])
    if decode and device.type == "cuda":  # several, by turns: more than the L2 cache holds, as between two steps
        caches = cycle([(k.clone(), v.clone()) for _ in range(-(-2**28 // (k.nbytes + v.nbytes)))])
    for name, function in competitors(shape, q, k, v).items():
        leaves = [x.detach().requires_grad_(not decode) for x in (q, k, v)]

        def backward(out):
            return torch.autograd.grad(out, leaves, upstream.view(out.shape))

        try:
            forward = milliseconds(lambda: function(q, *next(caches)) if decode else function(*leaves), device)
            both = None if decode else milliseconds(lambda: backward(function(*leaves)), device)
        except RuntimeError as error:  # a back end that does not take this shape
            print(f"{shape.name:<22}{name:<14}{str(error).splitlines()[0][:70]}")
            continue
        if decode:
            rate, ceiling = (k.nbytes + v.nbytes) / forward / 1e6, ceilings["copy"] / 1e9
        else:
            rate, ceiling = shape.flops() / forward / 1e9, ceilings["matmul"] / 1e12
        extra = peak_bytes(lambda: function(*leaves) if decode else backward(function(*leaves)), device,
                           less=0 if decode else q.nbytes + k.nbytes + v.nbytes)
        result[name] = {"forward_ms": forward, "forward_backward_ms": both, "rate": rate, "share": rate / ceiling,
                        "extra_bytes": extra}
        print(f"{shape.name:<22}{name:<14}{forward:>9.3f} ms{rate:>9.1f} {'GB/s' if decode else 'TFLOP/s'} "
              f"({100 * rate / ceiling:.0f}%)" + ("" if decode else f"   forward + backward {both:.3f} ms")
              + (f"   {extra / 1e9:.3f} GB" if device.type == "cuda" else ""), flush=True)
    return result


def attention_bench(o: AttentionOptions) -> dict:
    """Prints and returns all shapes."""
    device, dtype = pick_device(o.device), getattr(torch, o.dtype)
    ceilings = {"copy": copy_bandwidth(device), "matmul": matmul_flops(device, dtype)}
    print(f"ceilings: copy {ceilings['copy'] / 1e9:,.0f} GB/s, product {ceilings['matmul'] / 1e12:,.1f} TFLOP/s")
    shapes = [s for s in (GPU_SHAPES if device.type == "cuda" else CPU_SHAPES) if (o.only or "") in s.name]
    if not shapes:
        raise InputError(f"--only {o.only}: no such shape")
    result = {"ceilings": ceilings, "shapes": {s.name: time_attention(s, device, dtype, ceilings) for s in shapes}}
    return result | {"date": str(date.today()), "commit": git_commit(), "torch": torch.__version__, "dtype": o.dtype,
                     "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.platform()}


def main(argv: list[str]) -> None:
    options = parse_options(AttentionOptions, argv)
    result = attention_bench(options)
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    run_command(main)
