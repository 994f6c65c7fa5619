"""From logits to the distribution that is sampled from, and to one id drawn from it. B rows, V vocabulary rows."""
import torch
import torch.nn.functional as F
from torch import Tensor

GREEDY_BELOW = 1e-5  # the hub's generation_config says "temperature": 1e-06 and means greedy
BLOCK = 256  # ids


def is_greedy(temperature: float) -> bool:
    return temperature <= GREEDY_BELOW


def sampling_log_probs(logits: Tensor, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0,
                       masked_ids: Tensor) -> Tensor:
    """Log-probs [B, V], float32, of the distribution that is sampled from. `masked_ids` have probability 0, as in
    `token_log_probs`; of what is left top_k keeps the k likeliest ids (0: all) and top_p the fewest that hold so much of
    the probability. Greedy decoding reports the untempered distribution."""
    logits = logits.float().index_fill(-1, masked_ids, float("-inf"))
    if not is_greedy(temperature):
        if temperature != 1.0:
            logits = logits / temperature
        if top_k:
            kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < kth, float("-inf"))
        if top_p < 1.0:
            probs, order = logits.softmax(-1).sort(-1, descending=True)
            outside = probs.cumsum(-1) - probs >= top_p  # the token that crosses top_p is still inside
            outside[:, 0] = False  # also at top_p 0
            logits = logits.masked_fill(outside.scatter(-1, order, outside), float("-inf"))
    return logits.log_softmax(-1)


def draw(log_probs: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-transform sampling: log_probs [B, V] and one uniform number per row -> ids [B]. Ids of probability 0 never
    come.

    Sums are in float64, and in two levels: first the block of BLOCK ids is found, then the id in it. So the long sum
    over a real vocabulary has 600 terms, not 152,000.
    """
    probs = log_probs.exp()
    blocks = F.pad(probs, (0, -probs.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))                # [B, V/BLOCK, BLOCK]
    mass = blocks.sum(-1, dtype=torch.float64).cumsum(-1)                                                # [B, V/BLOCK]
    target = uniforms.double()[:, None] * mass[:, -1:]
    block = torch.searchsorted(mass, target, right=True)                                                       # [B, 1]
    before = F.pad(mass, (1, 0)).gather(-1, block)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0].double().cumsum(-1)            # [B, BLOCK]
    target = torch.minimum(target - before, inside[:, -1:] * (1 - 1e-15))  # rounding must not lead past the block
    return (block * BLOCK + torch.searchsorted(inside, target, right=True))[:, 0]
