"""From hidden states straight to the log-probs of given tokens, without ever holding [N, V] for all N tokens.

With 8,192 tokens and V = 152,064, one float32 logits tensor is 5 GB and training needs several. Here the tokens are
taken a chunk at a time and the chunk's logits are recomputed in the backward pass, so the peak is one chunk's logits.
N tokens, C hidden width, V vocabulary rows.
"""
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**25  # logits in one chunk: 128 MiB in float32


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


def token_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0,
                    masked_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `token_log_probs_reference`, chunk by chunk, the chunks' logits recomputed in the backward pass."""
    rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
    if hidden.shape[0] <= rows:
        return token_log_probs_reference(hidden, weight, targets, temperature=temperature, masked_ids=masked_ids)
    parts = [checkpoint(token_log_probs_reference, h, weight, t, temperature=temperature, masked_ids=masked_ids,
                        use_reentrant=False, preserve_rng_state=False)
             for h, t in zip(hidden.split(rows), targets.split(rows))]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
