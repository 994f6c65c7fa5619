"""The peer of benchmarks/logprob.py: Liger's fused linear cross-entropy.

Runs in an environment with a GPU, torch and liger-kernel. Reads one JSON object (tokens, width,
vocabulary, dtype) on stdin, and prints one per way of summing weight's gradient: milliseconds, and
the peak of memory beyond inputs and gradients.
"""

import json
import sys
import time
from importlib.metadata import version

import torch
from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss


def milliseconds(run) -> float:
    """Returns the median time of the runs of half a second, after three to warm up."""
    for _ in range(3):
        run()
    times = []
    while sum(times) < 0.5 or len(times) < 5:
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 1e3 * sorted(times)[len(times) // 2]


def main() -> None:
    """Reads a job from standard input, does it, and prints the figures as JSON."""
    job = json.load(sys.stdin)
    dtype, N, C, V = getattr(torch, job["dtype"]), job["tokens"], job["width"], job["vocabulary"]
    hidden = torch.randn(N, C, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(V, C, device="cuda") * C**-0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (N,), device="cuda")
    for name, options in (("liger", {}), ("liger, float32 sums", {"accum_dtype": torch.float32})):
        loss = LigerFusedLinearCrossEntropyLoss(reduction="sum", **options)

        def step():
            return torch.autograd.grad(loss(weight, hidden, targets), (hidden, weight))

        with torch.no_grad():
            forward = milliseconds(lambda: loss(weight, hidden, targets))
        both = milliseconds(step)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        extra = torch.cuda.max_memory_allocated() - before - hidden.nbytes - weight.nbytes
        figures = {
            "name": name,
            "forward_ms": forward,
            "forward_backward_ms": both,
            "extra_bytes": extra,
            "liger": version("liger-kernel"),
            "torch": torch.__version__,
        }
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
