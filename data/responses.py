"""What GRPO learns from: sampled responses as rows, and packs of them.

N tokens are scored in a pack: those that the policy has chosen.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from data.completions import Completion
from data.prompts import Prompt
from data.sequences import IDLE_ROW, Pack, Row, make_pack, make_row, plan_packs


@dataclass
class Response:
    """A sampled response, ready to be learnt from."""

    row: Row  # prompt and response ids; scored where the policy chose the token
    sampler_log_probs: Tensor  # [N]: of the scored tokens, under the distribution they came from
    advantage: float


@dataclass
class ResponsePack:
    """Responses of one forward pass; each [N] belongs to the pack's scored tokens, in order."""

    pack: Pack
    advantages: Tensor  # [N]: each response's, on all its tokens
    sampler_log_probs: Tensor  # [N]
    old_log_probs: Tensor | None = None  # [N]: of the policy before this rollout's first step
    ref_log_probs: Tensor | None = None  # [N]: of the model that training started from

    def to(self, device: torch.device) -> "ResponsePack":
        """Returns the same pack on a device, before it has been scored."""
        return ResponsePack(
            self.pack.to(device), self.advantages.to(device), self.sampler_log_probs.to(device)
        )


def make_response(prompt: Prompt, completion: Completion, advantage: float) -> Response:
    """Returns prompt and response as one row. The ids are those sampled, never re-tokenised text.

    Ids that a think budget forced (none in our recipes) are no actions of the policy: they are not
    scored.
    """
    scored = [False] * len(prompt.ids) + [not forced for forced in completion.forced]
    log_probs = torch.tensor(completion.log_probs)
    return Response(
        row=make_row(prompt.ids + completion.ids, scored),
        sampler_log_probs=log_probs[~torch.tensor(completion.forced, dtype=torch.bool)],
        advantage=advantage,
    )


# What a process runs while others have one more pack to run.
IDLE_RESPONSE = Response(IDLE_ROW, torch.zeros(0), 0.0)


def make_response_pack(members: list[Response]) -> ResponsePack:
    """Returns the responses as one pack, on the host."""
    advantages = [torch.full_like(r.sampler_log_probs, r.advantage) for r in members]
    return ResponsePack(
        pack=make_pack([r.row for r in members]),
        advantages=torch.cat(advantages),
        sampler_log_probs=torch.cat([r.sampler_log_probs for r in members]),
    )


def make_response_packs(responses: list[Response], pack_tokens: int) -> list[ResponsePack]:
    """Returns the responses as packs of at most pack_tokens tokens.

    Those to one question stand side by side, so a pack has its prompt once.
    """
    plan = plan_packs([response.row for response in responses], pack_tokens)
    return [make_response_pack([responses[i] for i in chosen]) for chosen in plan]


def split_evenly(responses: list[Response], count: int) -> list[list[Response]]:
    """Returns the responses in `count` shares of equal length, give or take one."""
    count = min(count, len(responses))
    bounds = [len(responses) * i // count for i in range(count + 1)]
    return [responses[start:end] for start, end in zip(bounds, bounds[1:])]
