"""From logits to the distribution that is sampled from, and from it to one id.

B rows, V vocabulary rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

GREEDY_BELOW = 1e-5  # the hub's generation_config says "temperature": 1e-06 and means greedy
BLOCK = 256  # ids


def is_greedy(temperature: float) -> bool:
    """Returns whether the temperature asks for the likeliest id instead of a random one."""
    return temperature <= GREEDY_BELOW


def sampling_step(
    logits: Tensor,
    uniforms: Tensor,
    masked_ids: Tensor,
    *,
    temperature: float,
    top_p: float,
    top_k: int,
) -> tuple[Tensor, Tensor]:
    """Takes a token for each row: logits [B, V] -> ids [B], and the log-probs [B, V] behind them.

    Masked ids get probability 0; temperature, top-k and top-p make the distribution. Of it the
    likeliest id is taken (greedy), or the one at which the cumulated probability passes the row's
    uniform number in [0, 1).
    """
    log_probs = sampling_log_probs(
        logits, temperature=temperature, top_p=top_p, top_k=top_k, masked_ids=masked_ids
    )
    if is_greedy(temperature):
        return log_probs.argmax(-1), log_probs
    return draw(log_probs, uniforms), log_probs


def sampling_log_probs(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    masked_ids: Tensor,
) -> Tensor:
    """Returns the log-probs [B, V], float32, of the distribution that is sampled from.

    `masked_ids` have probability 0, as in `token_log_probs`. Of what is left, top_k keeps the k
    likeliest ids (0: all of them), and top_p the fewest that together hold so much of the
    probability. Greedy decoding reports the untempered distribution.
    """
    logits = logits.float().index_fill(-1, masked_ids, float("-inf"))
    if not is_greedy(temperature):
        if temperature != 1.0:
            logits = logits / temperature
        if top_k:
            kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < kth, float("-inf"))
        if top_p < 1.0:
            probs, order = logits.softmax(-1).sort(-1, descending=True)
            # The id that crosses top_p is still inside: what counts is the sum before it.
            outside = probs.cumsum(-1) - probs >= top_p
            outside[:, 0] = False  # the likeliest id is always inside, also at top_p = 0
            logits = logits.masked_fill(outside.scatter(-1, order, outside), float("-inf"))
    return logits.log_softmax(-1)


def widest_float(device: torch.device) -> torch.dtype:
    """Returns the dtype in which probabilities are summed: float64, but Apple's GPUs have none."""
    return torch.float32 if device.type == "mps" else torch.float64


def draw(log_probs: Tensor, uniforms: Tensor) -> Tensor:
    """Returns one id per row [B], by inverse-transform sampling: the id at which the cumulative
    sum of the probabilities exceeds the row's number.

    log_probs [B, V], and uniforms [B] from 0 to 1. Ids of probability 0 never come. Sums are in
    float64 (`widest_float`), and in two levels: first the block of BLOCK ids is found, then the id
    in it. So the long sum over a real vocabulary has 600 terms, not 152,000.
    """
    dtype = widest_float(log_probs.device)
    # Rounding must not lead past the end of a sum: targets stay just below it.
    below = 1 - 4 * torch.finfo(dtype).eps
    probs = log_probs.exp()
    # 1. The block: the first one at whose end the cumulative sum exceeds the target.
    blocks = F.pad(probs, (0, -probs.shape[-1] % BLOCK))
    blocks = blocks.unflatten(-1, (-1, BLOCK))  # [B, V/BLOCK, BLOCK]
    mass = blocks.sum(-1, dtype=dtype).cumsum(-1)  # [B, V/BLOCK]
    target = uniforms.to(dtype)[:, None].clamp(max=below) * mass[:, -1:]
    block = torch.searchsorted(mass, target, right=True)  # [B, 1]
    # 2. The id in the block, in the same way, by what is left of the target.
    before = F.pad(mass, (1, 0)).gather(-1, block)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0]
    inside = inside.to(dtype).cumsum(-1)  # [B, BLOCK]
    target = torch.minimum(target - before, inside[:, -1:] * below)
    return (block * BLOCK + torch.searchsorted(inside, target, right=True))[:, 0]
