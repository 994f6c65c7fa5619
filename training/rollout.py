"""Sampling while training: on several processes each rank samples its share of the prompts."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from data.completions import Completion, SamplingParams, random_streams
from data.prompts import Prompt
from data.tokenizer import Tokenizer
from hub.errors import InputError
from model import Qwen2_5_VL
from sample import Sampler
from training.parallel import exchange, gather, rank, world_size


def rollout(
    model: Qwen2_5_VL,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    *,
    dtype: torch.dtype,
    max_batch: int,
    judge: Callable[[int, Completion], float],
) -> tuple[list[list[Completion]], Tensor]:
    """Returns params.n completions of each of B prompts, and their rewards [B, n].

    `judge(i, completion)` rewards a completion of prompt i. It is asked on the rank that sampled
    it, and its verdict travels along, so that ranks never disagree on one. Random numbers belong to
    the prompts: the completions do not depend on the number of ranks (but for rounding).
    """
    # 1. The weights as they are now, in the forward pass's dtype. Sampler, cache and CUDA graphs go
    #    when the rollout is over, and leave their memory to the update.
    sampler = Sampler(gather(model, dtype), tokenizer, max_batch=max_batch)

    # 2. This rank's share. There is no collective in here: nobody waits for anybody's tokens.
    streams = random_streams(prompts)
    mine = range(rank(), len(prompts), world_size())
    groups = sampler.generate(
        [prompts[i] for i in mine], params, streams=[streams[i] for i in mine]
    )
    # The copy's memory goes back to the GPU: the update asks for other sizes.
    del sampler
    if model.head_weight.is_cuda:
        torch.cuda.empty_cache()
    judged = {}
    for i, group in zip(mine, groups):
        judged[i] = (group, [judge(i, completion) for completion in group])

    # 3. All ranks learn of everything.
    judged = exchange(judged)
    everything = [judged[i] for i in range(len(prompts))]
    rewards = torch.tensor([rewards for _, rewards in everything], dtype=torch.float32)
    if not rewards.isfinite().all():
        i, sample = (~rewards.isfinite()).nonzero()[0].tolist()
        raise InputError(
            f"the reward of response {sample + 1} to question {i + 1} of the batch is "
            f"{rewards[i, sample].item()}: rewards must be finite"
        )
    return [group for group, _ in everything], rewards
