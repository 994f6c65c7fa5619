"""Training sequences: an example as a row of token ids, and rows packed end to end.

A row of T tokens is `ids` [T] and `scored` [T]: true on the tokens that the loss is about, those of
the response. A pack is several rows in one, [1, T], that do not see one another; what neighbours
begin with in common, a prompt or its first words, it has once. SFT and GRPO train on packs alone:
there is no padding, and `--pack-tokens` alone decides how much memory a forward pass takes.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, count
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.datasets import Example
from data.prompts import format_prompt
from data.tokenizer import Piece, Tokenizer, chat_pieces, join_pieces
from hub.errors import InputError


class Row(NamedTuple):
    """One training sequence, five bytes a token (as Python lists it would be 44)."""

    ids: Tensor  # int32 [T]
    scored: Tensor  # bool [T]: the tokens whose log-probs the loss takes
    example: str = ""  # the id of the example that it was made of


def make_row(ids: Sequence[int], scored: Sequence[bool], example: str = "") -> Row:
    """Returns the row of a sequence's ids and the mask of its scored tokens.

    A first token follows nothing, so nothing predicts it: it is never scored.
    """
    # By way of numpy, which reads a Python list three times as fast as torch.
    ids, scored = np.array(ids, dtype=np.int32), np.array(scored, dtype=np.bool_)
    scored[:1] = False
    return Row(torch.from_numpy(ids), torch.from_numpy(scored), example)


# One token and nothing to score: what a process runs while others have one more pack to run.
IDLE_ROW = make_row([0], [False])


def encode_example(
    example: Example,
    tokenizer: Tokenizer,
    *,
    style: str,
    max_length: int,
    answer_only: bool = False,
) -> tuple[list[int], list[bool]]:
    """Returns (ids, loss mask) of a text example for SFT, cut to max_length tokens.

    What is cut has no <|im_end|>, so nothing teaches the model to stop there. Where the prompt
    alone fills max_length, the mask is all false: such rows are for the caller to drop.
    """
    pieces = example_pieces(example, tokenizer, style=style, answer_only=answer_only)
    ids, mask = join_pieces(pieces, tokenizer.encode)
    return ids[:max_length], mask[:max_length]


def example_pieces(
    example: Example, tokenizer: Tokenizer, *, style: str, answer_only: bool = False
) -> list[Piece]:
    """Returns a text example for SFT as a conversation in pieces: question, response.

    `answer_only` leaves the thoughts out: the paper's ablation without chains of thought.
    """
    if example.images:
        raise InputError(f"{example.id}: SFT is on text, but field 'image' is given")
    response = f"<answer>{example.answer}</answer>" if answer_only else example.response
    if response is None:
        raise InputError(f"{example.id}: field 'response' is missing")
    question = {"role": "user", "content": format_prompt(example, style)}
    answer = {"role": "assistant", "content": response}
    return chat_pieces([question, answer], tokenizer)


@dataclass
class Pack:
    """Rows end to end in one, with no padding. Positions restart at 0 in each.

    Neighbours that begin alike, as the responses to one question do, share their beginning. What a
    token becomes depends on those before it alone, so nothing changes but the work. The pack is
    then a tree of T tokens, and `in_full` says which of them make up the S tokens of the rows in
    full, end to end. Where nothing is shared both are the same, and `in_full` is None.
    """

    input_ids: Tensor  # [1, T]
    targets: Tensor  # [N]: the places of the scored tokens in it
    sources: Tensor  # [N]: the places of the tokens before them, from which they are predicted
    position_ids: Tensor  # [3, 1, T]
    cu_seqlens: Tensor  # int32 [rows + 1]: the borders 0, S1, S1 + S2, ..., S between the rows
    in_full: Tensor | None = None  # [S]: the place in the pack of each token of the rows in full
    first: Tensor | None = None  # [T]: the first place in the rows of each token of the pack

    @property
    def shared(self) -> tuple[Tensor, Tensor] | None:
        """Returns what the model is to know of shared beginnings."""
        return None if self.in_full is None else (self.in_full, self.first)

    def to(self, device: torch.device | str) -> "Pack":
        """Returns the same pack on a device."""
        tensors = vars(self).values()
        return Pack(*(None if tensor is None else tensor.to(device) for tensor in tensors))


def common_prefix(a: Row, b: Row) -> int:
    """Returns the number of tokens with which both rows begin."""
    shorter = min(len(a.ids), len(b.ids))
    [different] = np.nonzero(a.ids[:shorter].numpy() != b.ids[:shorter].numpy())
    return int(different[0]) if len(different) else shorter


def make_pack(rows: Sequence[Row]) -> Pack:
    """Returns the pack of these rows, on the host. Neighbours share their beginning.

    Which tokens are scored is found here, by numpy: a GPU that had to find it would be waited for.
    """
    ids, positions = [], []  # of the tokens in the pack
    places = []  # of each row: where its tokens are in the pack
    count = 0  # tokens in the pack so far
    for i, row in enumerate(rows):
        known = common_prefix(rows[i - 1], row) if i else 0
        added = len(row.ids) - known
        ids.append(row.ids[known:].numpy())
        positions.append(np.arange(known, len(row.ids)))
        own = np.arange(count, count + added)
        places.append(np.concatenate([places[-1][:known], own]) if i else own)
        count += added

    in_full = np.concatenate(places)
    scored = np.flatnonzero(np.concatenate([row.scored.numpy() for row in rows]))
    pack = Pack(
        input_ids=torch.from_numpy(np.concatenate(ids)).long()[None],
        targets=torch.from_numpy(in_full[scored]),
        # The first token of a row is never scored, so the one before is of the same row.
        sources=torch.from_numpy(in_full[scored - 1]),
        position_ids=torch.from_numpy(np.concatenate(positions)).expand(3, 1, -1),
        cu_seqlens=torch.tensor([0, *accumulate(len(row.ids) for row in rows)], dtype=torch.int32),
    )
    if len(in_full) > count:
        _, first = np.unique(in_full, return_index=True)
        pack.in_full, pack.first = torch.from_numpy(in_full), torch.from_numpy(first)
    return pack


# Attention is computed on the rows in full. Their tokens are bounded, too: by so many times the
# pack's. Else short answers to a long question would take memory that no plan foresees.
MOST_SHARING = 4


@dataclass
class Draft:
    """A pack that is being filled."""

    members: list[int] = field(default_factory=list)  # the rows' numbers
    tokens: int = 0
    tokens_in_full: int = 0

    def has_room(self, added: int, length: int, pack_tokens: int) -> bool:
        """Returns whether a row of this length fits, which adds so many tokens to the pack."""
        in_full = self.tokens_in_full + length
        return self.tokens + added <= pack_tokens and in_full <= MOST_SHARING * pack_tokens


def plan_packs(rows: Sequence[Row], pack_tokens: int) -> list[list[int]]:
    """Deals rows out to packs of at most pack_tokens tokens. Returns their numbers, pack by pack.

    A row goes to the pack of the row before it, with which it may share a prompt, or else to the
    first pack that has room for all of it. One that is longer than a pack gets one of its own.
    """
    drafts: list[Draft] = []
    draft = None  # where the row before went
    for i, row in enumerate(rows):
        length = len(row.ids)
        added = length - (common_prefix(rows[i - 1], row) if i else 0)
        if draft is None or not draft.has_room(added, length, pack_tokens):
            added = length
            roomy = (other for other in drafts if other.has_room(length, length, pack_tokens))
            draft = next(roomy, None)
            if draft is None:
                draft = Draft()
                drafts.append(draft)
        draft.members.append(i)
        draft.tokens += added
        draft.tokens_in_full += length
    return [draft.members for draft in drafts]


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """Returns the order of n examples in an epoch.

    It is a function of (seed, epoch) alone, so that a resumed run sees the same.
    """
    return random.Random(f"{seed}/{epoch}").sample(range(n), n)


def num_steps(n: int, size: int, epochs: int, max_steps: int | None) -> int:
    """Returns how many batches of `size` the epochs over n examples make, at most max_steps."""
    steps = epochs * -(-n // size)
    return steps if max_steps is None else min(steps, max_steps)


def batches(
    n: int, size: int, seed: int, *, first_step: int = 0
) -> Iterator[tuple[int, list[int]]]:
    """Yields (epoch, the numbers of a batch's examples) for each step from first_step on, for ever.

    Every epoch goes through all n examples, so its last batch may be smaller.
    """
    steps_per_epoch = -(-n // size)
    first_epoch, skipped = divmod(first_step, steps_per_epoch)
    for epoch in count(first_epoch):
        order = epoch_order(n, seed, epoch)
        start = skipped * size if epoch == first_epoch else 0
        for begin in range(start, n, size):
            yield epoch, order[begin : begin + size]
