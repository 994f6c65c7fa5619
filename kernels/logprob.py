"""From hidden states straight to the log-probs of given tokens, without ever holding [N, V] for all N tokens.

N tokens, C hidden width, V vocabulary rows. With 8,192 tokens and V = 152,064, one float32 logits tensor is 5 GB and
training needs several. Three ways around it, one result:

* `token_log_probs_torch`: chunks of tokens, whose logits are recomputed in the backward pass. Any device, any dtype.
* `token_log_probs_triton`, products by "triton": no logits in memory. A program holds one tile of them in registers,
  takes what the softmax needs and goes on to the next (online softmax: Milakov and Gimelshein, arXiv 1805.02867; over
  a vocabulary: "Cut Your Losses", arXiv 2411.09009, whose gradient filtering is left out, since it is not exact). The
  backward pass recomputes them, as FlashAttention does (arXiv 2205.14135), and writes the gradients of a chunk of them
  for two plain products. So it is right for any upstream gradient per token; kernels that make the gradients in the
  forward pass were not (Liger#968, #1298).
* the same, products by "cublas": cuBLAS writes a chunk of logits, and the same kernels read their tiles from there.

Where the time should go, for 8,192 tokens and Qwen2.5-7B's head (C = 3,584) in bfloat16 on an H100. This is arithmetic
from assumed speeds, NOT MEASURED YET; `python bench.py logprob` measures. Forward and backward are four products of
2 N V C = 8.9 TFLOP (the logits twice, the gradients of hidden and of weight): 36 in all.

* "triton": at the 500 to 550 TFLOP/s of a Triton matmul without TMA, 65 to 71 ms; and 18 GB to sum hidden's gradient
  over chunks, 5 ms at 3.35 TB/s. Beyond inputs and gradients 0.09 GB: chunks of 2,048 ids' gradients of logits, 34 MB,
  and the second half of hidden's gradient, 59 MB.
* "cublas": at 650 to 700 TFLOP/s, 51 to 55 ms; and 23 GB of logits and their gradients, written and read, and 9 GB to
  sum hidden's gradient, 10 ms. Beyond inputs and gradients 0.22 GB: larger chunks (101 MB) and hidden's gradient in
  float32 (117 MB), since cuBLAS cannot sum in two halves.

So "cublas" should be the faster by a tenth, and is the default; LOGPROB_PRODUCTS=triton stays below 0.1 GB. (Liger's
kernel makes do with three products, 40 ms, but sums weight's gradient over 32 chunks of tokens: 70 GB of traffic in
bfloat16, 140 in float32.)
"""
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.logprob_triton import token_log_probs_triton
from kernels.triton_or_none import triton_runs_on, wanted_kernels



CHUNK_ELEMENTS = 2**25  # logits in one chunk of the PyTorch path: 128 MiB in float32


def token_log_probs_reference(hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0,
                              masked_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """log softmax(hidden @ weight.T / temperature) at the targets, and the entropy of each distribution, in nats.

    hidden [N, C], weight [V, C], targets [N] -> log_probs [N], entropy [N], float32 at least. The entropy is a metric:
    it has no gradient. `masked_ids` are outside the softmax's support: probability 0, here as in the sampler (what is
    sampled is what is scored).
    """
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32)) / temperature          # [N, V]
    if masked_ids is not None:
        logits = logits.index_fill(-1, masked_ids, float("-inf"))
    log_probs = logits.log_softmax(-1)
    with torch.no_grad():
        # A masked id has p = 0, and 0 * -inf must count as 0. (log Z - sum p * logit would cancel badly in float32.)
        entropy = -(log_probs.exp() * log_probs.masked_fill(log_probs.isneginf(), 0.0)).sum(-1)
    return log_probs.gather(-1, targets[:, None])[:, 0], entropy


# --- PyTorch, and the dispatcher --------------------------------------------------------------------------------------

def token_log_probs_torch(hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0,
                          masked_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `token_log_probs_reference`, chunk by chunk, the chunks' logits recomputed in the backward pass."""
    rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
    if hidden.shape[0] <= rows:
        return token_log_probs_reference(hidden, weight, targets, temperature=temperature, masked_ids=masked_ids)
    parts = [checkpoint(token_log_probs_reference, h, weight, t, temperature=temperature, masked_ids=masked_ids,
                        use_reentrant=False, preserve_rng_state=False)
             for h, t in zip(hidden.split(rows), targets.split(rows))]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def pick_path(hidden: Tensor):
    """What KERNELS says; by default a GPU runs our kernels, and a CPU PyTorch."""
    wanted = wanted_kernels()
    if wanted == "reference":
        return token_log_probs_reference
    if triton_runs_on(hidden) and len(hidden) > 0 and (wanted == "triton" or wanted == "auto" and hidden.is_cuda):
        return token_log_probs_triton
    return token_log_probs_torch


def token_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0,
                    masked_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Dispatcher; see `token_log_probs_reference` for what is computed."""
    return pick_path(hidden)(hidden, weight, targets, temperature=temperature, masked_ids=masked_ids)
