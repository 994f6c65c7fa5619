"""Training sequences: rows of ids with their loss masks, padded or packed, and the order of an epoch."""
import random
from collections.abc import Sequence
from itertools import accumulate

import torch

from data.datasets import Example
from data.prompts import format_prompt
from data.tokenizer import Tokenizer, render_chat
from hub.errors import InputError



def encode_example(example: Example, tokenizer: Tokenizer, *, style: str, max_length: int,
                   answer_only: bool = False) -> tuple[list[int], list[bool]]:
    """(ids, loss mask) of a text example, cut to max_length; the paper's non-CoT ablation trains on the answer only.

    What is cut has no <|im_end|>, so nothing teaches the model to stop there. Where the prompt alone fills max_length,
    the mask is all false: such rows are for the caller to drop.
    """
    if example.images:
        raise InputError(f"{example.id}: SFT is on text, but field 'image' is given")
    response = f"<answer>{example.answer}</answer>" if answer_only else example.response
    if response is None:
        raise InputError(f"{example.id}: field 'response' is missing")
    ids, mask = render_chat([{"role": "user", "content": format_prompt(example, style)},
                             {"role": "assistant", "content": response}], tokenizer)
    return ids[:max_length], mask[:max_length]


Row = tuple[torch.Tensor, torch.Tensor]  # a sequence as it is kept: ids int32 [T] and loss mask bool [T]


def make_row(ids: Sequence[int], mask: Sequence[bool]) -> Row:
    """Five bytes a token; as Python lists they would be 44."""
    return torch.tensor(ids, dtype=torch.int32), torch.tensor(mask, dtype=torch.bool)


def collate(rows: Sequence[Row], pad_id: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids [B, T] and bool loss_mask [B, T], padded on the right (attention is causal: any pad id will do)."""
    length = max(len(ids) for ids, _ in rows)
    input_ids = torch.full((len(rows), length), pad_id)
    loss_mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for b, (ids, mask) in enumerate(rows):
        input_ids[b, :len(ids)], loss_mask[b, :len(mask)] = ids, mask
    return input_ids, loss_mask


def collate_packed(rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """All rows end to end in one, with no padding: input_ids and loss_mask [1, T], position_ids [3, 1, T], cu_seqlens.

    Positions restart at 0 with each sequence, and cu_seqlens [N + 1] holds the borders across which nothing is seen. A
    first token follows nothing, so it carries no loss: its prediction would be the sequence before's.
    """
    lengths = [len(ids) for ids, _ in rows]
    cu_seqlens = torch.tensor([0, *accumulate(lengths)])
    input_ids, loss_mask = (torch.cat(parts)[None] for parts in zip(*rows))
    loss_mask[:, cu_seqlens[:-1]] = False
    position_ids = torch.cat([torch.arange(length) for length in lengths]).expand(3, 1, -1)
    return input_ids.long(), loss_mask, position_ids, cu_seqlens


def pack(rows: Sequence[Row], size: int) -> list[list[Row]]:
    """Deals rows out to packs of up to `size` tokens, by first-fit decreasing: each goes, the longest first, to the
    first pack with room for it. That makes at most 11/9 of the fewest possible packs, and one more (Johnson, 1973)."""
    packs, room = [], []
    for row in sorted(rows, key=lambda row: -len(row[0])):
        length = len(row[0])
        place = next((i for i, left in enumerate(room) if length <= left), len(packs))
        if place == len(packs):
            packs.append([])
            room.append(size)
        packs[place].append(row)
        room[place] -= length
    return packs


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """The order of n examples in an epoch: a function of (seed, epoch) alone, so that a resumed run sees the same."""
    return random.Random(f"{seed}/{epoch}").sample(range(n), n)
