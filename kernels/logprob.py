"""From hidden states straight to the log-probs of given tokens, without ever holding [N, V].

N tokens, C hidden width, V vocabulary rows. With 8,192 tokens and V = 152,064, one float32 tensor
of logits is 5 GB, and training needs several. Two ways around it, one result:

* `token_log_probs_torch`: chunks of tokens; of several, each is computed again in the backward
  pass. Any device, any dtype.
* `token_log_probs_triton` (logprob_triton.py): chunks of ids, read by Triton kernels. On a GPU.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.linear import logits_float32
from kernels.logprob_triton import token_log_probs_triton
from kernels.triton_or_none import use_triton, wanted_kernels

# Logits in one chunk of the PyTorch path: 128 MiB in float32, 220 tokens of the 7B.
CHUNK_ELEMENTS = 2**25
# So few are left to the definition: those of a pack of the micro model.
SMALL_ELEMENTS = 2**22

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
        finite = log_probs if masked_ids is None else log_probs.index_fill(-1, masked_ids, 0.0)
        entropy = -(log_probs.exp() * finite).sum(-1)
    return log_probs.gather(-1, targets[:, None])[:, 0], entropy


# --- The same with less memory, and who computes ------------------------------------------------


class ChunkedLogProbs(torch.autograd.Function):
    """`token_log_probs_reference` in chunks of so many rows, with its gradient written out.

    With z the logits over the temperature, and p = softmax(z), of a target t

        log p_t = z_t - log sum exp z,    d log p_t / d z = onehot(t) - p,

    so the backward pass needs the logits alone. A single chunk keeps them (as p); of several each
    is computed again.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, masked_ids, rows):
        """Returns log-probs and entropies [N] of hidden states [N, C] and the head [V, C]."""
        ctx.temperature, ctx.masked_ids, ctx.rows, ctx.kept = temperature, masked_ids, rows, None
        log_probs, entropies, log_sums = [], [], []
        for some_hidden, some_targets in zip(hidden.split(rows), targets.split(rows)):
            z = scaled_logits(some_hidden, weight, temperature, masked_ids)  # [rows, V]
            peak = z.amax(-1, keepdim=True)
            z -= peak
            weights = z.exp()
            total = weights.sum(-1)
            log_probs.append(z.gather(-1, some_targets[:, None])[:, 0] - total.log())
            log_sums.append(total.log() + peak[:, 0])
            # The entropy is log Z - sum p z. Behind a peak of 0 both terms are positive, and
            # nothing cancels. A masked id has p = 0, and 0 * -inf must count as 0.
            if masked_ids is not None:
                z.index_fill_(-1, masked_ids, 0.0)
            entropies.append(total.log() - torch.linalg.vecdot(weights, z) / total)
            if len(hidden) <= rows:
                ctx.kept = weights.div_(total[:, None])
        ctx.save_for_backward(hidden, weight, targets, torch.cat(log_sums))
        entropy = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(log_probs), entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, _):
        """Returns the gradients of hidden states and head, for that of the log-probs [N]."""
        hidden, weight, targets, log_sums = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), ctx.rows):
            chunk = slice(start, start + ctx.rows)
            if ctx.kept is not None:
                p, ctx.kept = ctx.kept, None
            else:
                p = scaled_logits(hidden[chunk], weight, ctx.temperature, ctx.masked_ids)
                p = p.sub_(log_sums[chunk, None]).exp_()
            # The gradient of the logits takes the place of p.
            scale = (upstream[chunk] / ctx.temperature)[:, None].to(p.dtype)
            d_logits = p.mul_(-scale).scatter_add_(-1, targets[chunk, None], scale)
            d_logits = d_logits.to(weight.dtype)
            torch.mm(d_logits, weight, out=d_hidden[chunk])
            if d_weight is not None:
                d_weight.addmm_(d_logits.T, hidden[chunk])
        return d_hidden, d_weight, None, None, None, None


def scaled_logits(
    hidden: Tensor, weight: Tensor, temperature: float, masked_ids: Tensor | None
) -> Tensor:
    """Returns a new tensor of logits over the temperature, -inf where they are masked."""
    logits = logits_float32(hidden, weight)
    if temperature != 1.0:
        logits /= temperature
    return logits if masked_ids is None else logits.index_fill_(-1, masked_ids, float("-inf"))


def token_log_probs_torch(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    masked_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns what the reference does, with the logits of CHUNK_ELEMENTS / V tokens at a time."""
    if len(hidden) * len(weight) <= SMALL_ELEMENTS:
        return token_log_probs_reference(
            hidden, weight, targets, temperature=temperature, masked_ids=masked_ids
        )
    rows = max(1, CHUNK_ELEMENTS // len(weight))
    return ChunkedLogProbs.apply(hidden, weight, targets, temperature, masked_ids, rows)


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
