"""From hidden states straight to the log-probs of given tokens, without ever holding [N, V].

N tokens, C hidden width, V vocabulary rows. With 8,192 tokens and V = 152,064, one float32 tensor
of logits is 5 GB, and training needs several. Two ways around it, one result:

* `token_log_probs_torch`: chunks of tokens, whose logits are computed again in the backward pass.
  Any device, any dtype.
* `token_log_probs_triton` (logprob_triton.py): chunks of ids, read by Triton kernels. On a GPU.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.linear import logits_float32
from kernels.logprob_triton import token_log_probs_triton
from kernels.triton_or_none import use_triton, wanted_kernels

# Logits in one chunk of the PyTorch path: 128 MiB in float32, 220 tokens of the 7B.
CHUNK_ELEMENTS = 2**25

# --- The definition -----------------------------------------------------------------------------


def token_log_probs_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    masked_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the log-probs of the targets, and the entropy of each distribution, both in nats.

    The distribution is softmax(hidden @ weight.T / temperature). hidden [N, C], weight [V, C],
    targets [N] -> log_probs [N], entropy [N], in float32 at least. The entropy is a metric: it has
    no gradient. `masked_ids` are outside the softmax's support: probability 0, here as in the
    sampler (what is sampled is what is scored).
    """
    logits = logits_float32(hidden, weight) / temperature  # [N, V]
    if masked_ids is not None:
        logits = logits.index_fill(-1, masked_ids, float("-inf"))
    log_probs = logits.log_softmax(-1)
    with torch.no_grad():
        # A masked id has p = 0, and 0 * -inf must count as 0. (log Z - sum p * logit would cancel
        # badly in float32.)
        finite = log_probs.masked_fill(log_probs.isneginf(), 0.0)
        entropy = -(log_probs.exp() * finite).sum(-1)
    return log_probs.gather(-1, targets[:, None])[:, 0], entropy


# --- The same with less memory, and who computes ------------------------------------------------


def token_log_probs_torch(
    hidden: Tensor, weight: Tensor, targets: Tensor, **options
) -> tuple[Tensor, Tensor]:
    """Returns what the reference does, with the logits of CHUNK_ELEMENTS / V tokens at a time."""
    rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
    if hidden.shape[0] <= rows:
        return token_log_probs_reference(hidden, weight, targets, **options)
    # `checkpoint` keeps a chunk's inputs alone; its logits come again in the backward pass.
    options |= {"use_reentrant": False, "preserve_rng_state": False}
    log_probs, entropies = [], []
    for some_hidden, some_targets in zip(hidden.split(rows), targets.split(rows)):
        log_prob, entropy = checkpoint(
            token_log_probs_reference, some_hidden, weight, some_targets, **options
        )
        log_probs.append(log_prob)
        entropies.append(entropy)
    return torch.cat(log_probs), torch.cat(entropies)


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    masked_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns (log_probs [N], entropy [N]) of targets [N]: see `token_log_probs_reference`.

    By default a GPU runs the Triton kernels, and a CPU PyTorch; KERNELS overrules it.
    """
    if wanted_kernels() == "reference":
        path = token_log_probs_reference
    elif use_triton(hidden, instead_of_torch=True):
        path = token_log_probs_triton
    else:
        path = token_log_probs_torch
    return path(hidden, weight, targets, temperature=temperature, masked_ids=masked_ids)
