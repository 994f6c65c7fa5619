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
from hub.device import DEVICE_HELP, pick_device
from hub.options import option, parse_options, run_command  # noqa: E402
from kernels.logprob import token_log_probs_reference, token_log_probs_torch  # noqa: E402
from kernels.logprob_triton import token_log_probs_triton  # noqa: E402
from training.journal import git_commit  # noqa: E402


@dataclass
class LogprobOptions:
    """Log-probs straight from hidden states, forward and backward: time, rate, and memory beyond
    inputs and gradients. On a CPU a small shape through the PyTorch paths, to see that the command
    runs."""

    tokens: int | None = option(None, "tokens; default 8192, on a CPU 256", low=1)
    shape: str = option("7b", "head of this model; on a CPU a small one", choices=SHAPES)
    peer: str | None = option(None, "Python of an environment with liger-kernel")
    device: str = option("auto", DEVICE_HELP)
    dtype: str = option(
        "bfloat16", "of hidden states and head", choices=("float32", "float16", "bfloat16")
    )
    json: bool = option(False, "the last line is one JSON object with everything")


def contenders(on_gpu: bool) -> dict[str, Callable]:
    """Returns functions of (hidden, weight, targets) by name. They give the log-probs, or the sum
    of them where they can only that."""
    found = {
        "reference": lambda *x: token_log_probs_reference(*x)[0],
        "torch, chunked": lambda *x: token_log_probs_torch(*x)[0],
    }
    if hasattr(F, "linear_cross_entropy"):  # torch >= 2.13
        options = torch.nn.LinearCrossEntropyOptions()
        found["linear_cross_entropy"] = lambda *x: (
            -F.linear_cross_entropy(*x, reduction="sum", options=options)
        )
    if on_gpu:
        found["triton"] = lambda *x: token_log_probs_triton(*x)[0]
    return found


def time_function(
    function: Callable, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> dict:
    """Returns milliseconds of a forward pass that only scores, and of one with its backward pass;
    and the peak of memory."""
    device = hidden.device
    upstream = torch.linspace(-1, 1, len(hidden), device=device)

    def step():
        out = function(hidden, weight, targets)
        gradient = upstream.to(out.dtype) if out.dim() else None
        return torch.autograd.grad(out, (hidden, weight), gradient)

    with torch.no_grad():
        forward = milliseconds(lambda: function(hidden, weight, targets), device)
    return {
        "forward_ms": forward,
        "forward_backward_ms": milliseconds(step, device),
        "extra_bytes": peak_bytes(step, device, less=hidden.nbytes + weight.nbytes),
    }


def time_all(options: LogprobOptions, device: torch.device, N: int, C: int, V: int) -> dict:
    """Returns the figures by contender, the peer's included."""
    dtype, on_gpu = getattr(torch, options.dtype), device.type == "cuda"
    hidden = torch.randn(N, C, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(V, C, device=device) * C**-0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (N,), device=device)
    result = {}
    for name, function in contenders(on_gpu).items():
        try:
            result[name] = time_function(function, hidden, weight, targets)
        except torch.cuda.OutOfMemoryError:
            print(f"{name:<22}does not fit")
    if options.peer:
        del hidden, weight
        torch.cuda.empty_cache()
        job = {"tokens": N, "width": C, "vocabulary": V, "dtype": options.dtype}
        for figures in ask_peer(options.peer, "liger_cross_entropy.py", job):
            result[figures.pop("name")] = figures
    return result


def main(argv: list[str]) -> None:
    """Times each way, forward and backward, and prints a line for each."""
    options = parse_options(LogprobOptions, argv)
    device = pick_device(options.device)
    on_gpu = device.type == "cuda"
    N = options.tokens or (8192 if on_gpu else 256)
    C, V = 64, 4000
    if on_gpu:
        C, V = SHAPES[options.shape]["hidden_size"], SHAPES[options.shape]["vocab_size"]
    ceiling = matmul_flops(device, getattr(torch, options.dtype))
    print(
        f"{N} tokens, head {V} x {C}, {options.dtype}; "
        f"ceiling: product {ceiling / 1e12:,.1f} TFLOP/s"
    )
    ways = time_all(options, device, N, C, V)
    for name, figures in ways.items():
        # The three products that are needed count, not those that are done again.
        figures["rate"] = 6e3 * N * V * C / figures["forward_backward_ms"]
        figures["share"] = figures["rate"] / ceiling
        line = f"{name:<22}forward {figures['forward_ms']:>9.3f} ms"
        line += f"   forward + backward {figures['forward_backward_ms']:>9.3f} ms"
        line += f"{figures['rate'] / 1e12:>8.1f} TFLOP/s ({100 * figures['share']:.0f}%)"
        if on_gpu:
            line += f"   {figures['extra_bytes'] / 1e9:.3f} GB beyond inputs and gradients"
        print(line, flush=True)
    result = {
        "ways": ways,
        "tokens": N,
        "width": C,
        "vocabulary": V,
        "dtype": options.dtype,
        "ceiling": ceiling,
        "date": str(date.today()),
        "commit": git_commit(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.platform(),
    }
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    run_command(main)
