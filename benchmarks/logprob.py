"""Log-probs straight from hidden states, beside Liger's fused loss; needs a GPU.

    python benchmarks/logprob.py --peer PEER/bin/python

Set up the peer with `python -m venv PEER && PEER/bin/pip install torch transformers liger-kernel`.
"""
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import SHAPES, ask_peer, matmul_flops, milliseconds, peak_bytes  # noqa: E402
from hub.options import option, parse_options, pick_device, run_command  # noqa: E402
from kernels import logprob  # noqa: E402
from kernels.logprob_triton import token_log_probs_triton  # noqa: E402
from training.journal import git_commit  # noqa: E402



@dataclass
class LogprobOptions:
    """Log-probs straight from hidden states, forward and backward: time, rate, and memory beyond inputs and gradients.
    On a CPU a small shape through the PyTorch paths, to see that the command runs."""
    tokens: int | None = option(None, "tokens; default 8192, on a CPU 256", low=1)
    shape: str = option("7b", "head of this model; on a CPU a small one", choices=SHAPES)
    peer: str | None = option(None, "Python of an environment with liger-kernel")
    device: str = option("auto", "auto, cpu or cuda")
    dtype: str = option("bfloat16", "of hidden states and head", choices=("float32", "float16", "bfloat16"))
    json: bool = option(False, "the last line is one JSON object with everything")


def logprob_contenders(on_gpu: bool) -> dict[str, Callable]:
    """Functions of (hidden, weight, targets) by name: log-probs, or the sum of them for those that can only that."""
    found = {"reference": lambda *x: logprob.token_log_probs_reference(*x)[0],
             "torch, chunked": lambda *x: logprob.token_log_probs_torch(*x)[0]}
    if hasattr(F, "linear_cross_entropy"):  # torch >= 2.13
        options = torch.nn.LinearCrossEntropyOptions()
        found["linear_cross_entropy"] = lambda *x: -F.linear_cross_entropy(*x, reduction="sum", options=options)
    if on_gpu:
        found |= {products: lambda *x, products=products: token_log_probs_triton(*x, products=products)[0]
                  for products in ("triton", "cublas")}
    return found


def time_logprob(function: Callable, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> dict:
    """Milliseconds of a forward pass that only scores, and of one with its backward pass; and the peak of memory."""
    device = hidden.device
    upstream = torch.linspace(-1, 1, len(hidden), device=device)

    def step():
        out = function(hidden, weight, targets)
        return torch.autograd.grad(out, (hidden, weight), upstream.to(out.dtype) if out.dim() else None)

    with torch.no_grad():
        forward = milliseconds(lambda: function(hidden, weight, targets), device)
    result = {"forward_ms": forward, "forward_backward_ms": milliseconds(step, device)}
    return result | {"extra_bytes": peak_bytes(step, device, less=hidden.nbytes + weight.nbytes)}


def logprob_bench(o: LogprobOptions) -> dict:
    """Prints and returns all contenders. The rate counts the three products that are needed, not those done again."""
    device, dtype = pick_device(o.device), getattr(torch, o.dtype)
    on_gpu = device.type == "cuda"
    N = o.tokens or (8192 if on_gpu else 256)
    C, V = (SHAPES[o.shape]["hidden_size"], SHAPES[o.shape]["vocab_size"]) if on_gpu else (64, 4000)
    hidden = torch.randn(N, C, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(V, C, device=device) * C**-0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (N,), device=device)
    ceiling, result = matmul_flops(device, dtype), {}
    print(f"{N} tokens, head {V} x {C}, {o.dtype}; ceiling: product {ceiling / 1e12:,.1f} TFLOP/s")
    for name, function in logprob_contenders(on_gpu).items():
        try:
            result[name] = time_logprob(function, hidden, weight, targets)
        except torch.cuda.OutOfMemoryError:
            print(f"{name:<22}does not fit")
    if o.peer:
        del hidden, weight
        torch.cuda.empty_cache()
        job = {"tokens": N, "width": C, "vocabulary": V, "dtype": o.dtype}
        result |= {r.pop("name"): r for r in ask_peer(o.peer, "liger_cross_entropy.py", job)}
    for name, r in result.items():
        r["rate"] = 6e3 * N * V * C / r["forward_backward_ms"]
        r["share"] = r["rate"] / ceiling
        memory = f"   {r['extra_bytes'] / 1e9:.3f} GB beyond inputs and gradients" if on_gpu else ""
        print(f"{name:<22}forward {r['forward_ms']:>9.3f} ms   forward + backward {r['forward_backward_ms']:>9.3f} ms"
              f"{r['rate'] / 1e12:>8.1f} TFLOP/s ({100 * r['share']:.0f}%){memory}", flush=True)
    about = {"tokens": N, "width": C, "vocabulary": V, "dtype": o.dtype, "ceiling": ceiling}
    return {"ways": result, **about, "date": str(date.today()), "commit": git_commit(), "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if on_gpu else platform.platform()}


def main(argv: list[str]) -> None:
    options = parse_options(LogprobOptions, argv)
    result = logprob_bench(options)
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    run_command(main)
