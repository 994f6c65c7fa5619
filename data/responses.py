"""What GRPO learns from: sampled responses as rows, and packs of them.

N tokens are scored in a pack: those that the policy has chosen.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from data.completions import Completion
from data.prompts import Prompt
from data.sequences import IDLE_ROW, Pack, Row, common_prefix, make_pack, make_row


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
        pack=make_pack([r.row for r in members], share_prefixes=True),
        advantages=torch.cat(advantages),
        sampler_log_probs=torch.cat([r.sampler_log_probs for r in members]),
    )


# Attention is computed on the rows in full. Their tokens are bounded, too: by so many times the
# pack's. Else short answers to a long question would take memory that no plan foresees.
MOST_SHARING = 4


@dataclass
class Draft:
    """A pack that is being filled."""

    members: list[int] = field(default_factory=list)  # the rows' numbers
    tokens: int = 0  # shared ones counted once
    tokens_in_full: int = 0


def plan_shared_packs(rows: list[Row], pack_tokens: int) -> list[list[int]]:
    """Deals rows out to packs of at most pack_tokens tokens, shared beginnings counted once.

    Returns the rows' numbers, pack by pack. A row goes to the pack of the row before it, with which
    it mostly shares a prompt, or else to the first pack that has room for all of it. One that is
    longer than a pack gets one of its own.
    """
    drafts: list[Draft] = []
    last = None  # where the row before went
    for i, row in enumerate(rows):
        length = len(row.ids)

        def fits(draft: Draft, added: int, length: int = length) -> bool:
            in_full = draft.tokens_in_full + length
            return draft.tokens + added <= pack_tokens and in_full <= MOST_SHARING * pack_tokens

        added = length - (common_prefix(rows[i - 1], row) if i else 0)
        if last is None or not fits(last, added):
            added = length
            last = next((draft for draft in drafts if fits(draft, length)), None)
            if last is None:
                last = Draft()
                drafts.append(last)
        last.members.append(i)
        last.tokens += added
        last.tokens_in_full += length
    return [draft.members for draft in drafts]


def make_response_packs(responses: list[Response], pack_tokens: int) -> list[ResponsePack]:
    """Returns the responses as packs of at most pack_tokens tokens. Neighbours that answer the same
    question share its tokens."""
    plan = plan_shared_packs([response.row for response in responses], pack_tokens)
    return [make_response_pack([responses[i] for i in chosen]) for chosen in plan]


def split_evenly(responses: list[Response], count: int) -> list[list[Response]]:
    """Returns the responses in `count` shares of equal length, give or take one."""
    count = min(count, len(responses))
    bounds = [len(responses) * i // count for i in range(count + 1)]
    return [responses[start:end] for start, end in zip(bounds, bounds[1:])]
