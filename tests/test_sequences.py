"""Rows of tokens for training, packs of them, and the order in which an epoch goes through them."""

import json
import random
from itertools import islice
from pathlib import Path

import pytest

import data
from data import Example, ImageConfig, InputError, Tokenizer

WORKED = Example("w", "What?", "56", response="<think>\n7</think> <answer>56</answer>")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """An excerpt of the published tokenizer, with its ids."""
    return Tokenizer.from_pretrained(Path(__file__).parent / "golden" / "data_tokenizer")


def test_the_forced_exit_has_the_ids_of_training(tokenizer, tmp_path):
    """A thought that is ended by force reads like the ones that were learnt."""
    tagged = (
        "<|begin_of_thought|>\n\n7 x 8.\n\n<|end_of_thought|>\n\n"
        "<|begin_of_solution|>\n\n56\n\n<|end_of_solution|>"
    )
    turns = [{"from": "user", "value": "Why?"}, {"from": "assistant", "value": tagged}]
    (tmp_path / "d.jsonl").write_text(json.dumps({"conversations": turns}))
    (example,) = data.read_examples(tmp_path / "d.jsonl")
    ids = tokenizer.encode("7 x 8 = 56.\n</think> <answer>56</answer>")
    tail = tokenizer.encode("</think>")
    assert any(ids[i : i + 3] == tail for i in range(len(ids)))
    assert ".\n</think> <answer>" in example.response


def test_encode_example(tokenizer):
    ids, mask = data.encode_example(WORKED, tokenizer, style="direct", max_length=4096)
    prompt = data.make_prompt("What?", [], tokenizer, ImageConfig()).ids
    response = [*tokenizer.encode(WORKED.response), tokenizer.im_end]
    assert ids == [*prompt, *response, *tokenizer.encode("\n")]
    assert mask == [False] * len(prompt) + [True] * len(response) + [False]

    short, short_mask = data.encode_example(
        WORKED, tokenizer, style="direct", max_length=4096, answer_only=True
    )
    scored = [i for i, wanted in zip(short, short_mask) if wanted]
    assert tokenizer.decode(scored) == "<answer>56</answer>"
    train, _ = data.encode_example(WORKED, tokenizer, style="train", max_length=999)
    assert "Write your final answer" in tokenizer.decode(train)


def test_cut_example_has_no_false_ending(tokenizer):
    whole, mask = data.encode_example(WORKED, tokenizer, style="direct", max_length=4096)
    for length in (len(whole) - 2, len(whole) - 5, 3):
        cut = data.encode_example(WORKED, tokenizer, style="direct", max_length=length)
        assert cut == (whole[:length], mask[:length])
    assert not any(cut[1])


@pytest.mark.parametrize(
    "example, message",
    [
        (Example("w", "Q", "A"), "w: field 'response' is missing"),
        (Example("w", "Q", "A", images=["a.png"], response="R"), "w: SFT is on text"),
    ],
)
def test_examples_that_sft_cannot_use(tokenizer, example, message):
    with pytest.raises(InputError, match=message):
        data.encode_example(example, tokenizer, style="direct", max_length=9)


def rows_of(*lengths: int) -> list[data.Row]:
    return [data.make_row(range(100 * n, 101 * n), [True] * n) for n in lengths]


def test_make_pack():
    rows = [
        data.make_row([5, 6, 7], [True, False, True]),
        data.make_row([8], [True]),
        data.make_row([9, 4], [False, True]),
    ]
    pack = data.make_pack(rows)
    assert pack.input_ids.tolist() == [[5, 6, 7, 8, 9, 4]] and pack.input_ids.dtype.itemsize == 8
    # A first token is never scored: nothing stands before it.
    assert pack.targets.tolist() == [2, 5]
    assert pack.position_ids.tolist() == [[[0, 1, 2, 0, 0, 1]]] * 3
    assert pack.cu_seqlens.tolist() == [0, 3, 4, 6]


def row(ids: list[int]) -> data.Row:
    return data.make_row(ids, [True] * len(ids))


def test_plan_packs_by_hand():
    def plan(lengths):  # rows that begin differently
        return data.plan_packs([row([i] * n) for i, n in enumerate(lengths)], 10)

    # 4 goes to the row before it, 3 to the first pack that has room, 2 has none.
    assert plan([6, 5, 4, 3, 2]) == [[0, 3], [1, 2], [4]]
    assert plan([]) == []
    assert plan([10, 10]) == [[0], [1]]
    assert plan([3, 25, 3]) == [[0, 2], [1]]  # too long for a pack: one of its own


def test_plan_packs_loses_nothing_and_fills_well():
    chance = random.Random(0)
    for _ in range(30):
        longest = chance.choice([10, 100])
        lengths = [chance.randrange(1, longest) for _ in range(chance.randrange(1, 200))]
        lengths.sort(reverse=True)
        rows = [row([i] * length) for i, length in enumerate(lengths)]
        packs = data.plan_packs(rows, 100)
        assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
        assert max(sum(lengths[i] for i in pack) for pack in packs) <= 100
        assert len(packs) <= 11 / 9 * -(-sum(lengths) // 100) + 1
        assert packs == data.plan_packs(rows, 100)


def planned(groups: list[list[list[int]]], pack_tokens: int) -> list[list[int]]:
    rows = [row(ids) for group in groups for ids in group]
    return data.plan_packs(rows, pack_tokens)


def test_packs_count_what_is_shared_once():
    a = [[1, 1, 1, 1, i] for i in range(4)]  # 8 tokens where all are together
    b = [[2, 2, 2, i] for i in range(2)]  # 5
    assert planned([a, b], 13) == [[0, 1, 2, 3, 4, 5]]
    assert planned([a, b], 12) == [[0, 1, 2, 3, 4], [5]]
    assert planned([a, b], 8) == [[0, 1, 2, 3], [4, 5]]
    assert planned([a, b], 7) == [[0, 1, 2], [3], [4, 5]]
    assert planned([a, b], 1) == [[0], [1], [2], [3], [4], [5]]  # too long: alone
    # A gap in an earlier pack is filled, by a row in full.
    assert planned([[[1, 1, 1]], [[2] * 6], [[3, 3, 3]]], 6) == [[0, 2], [1]]
    assert planned([], 8) == []


def test_rows_in_full_are_bounded():
    """20 answers of a token to a question of 9: 29 tokens, but 200 for attention."""
    group = [[1] * 9 + [2 + i] for i in range(20)]
    packs = planned([group], 29)
    assert [i for pack in packs for i in pack] == list(range(20))
    assert max(map(len, packs)) * 10 <= data.sequences.MOST_SHARING * 29 and len(packs) == 2


def test_epoch_order():
    orders = {(s, e): data.epoch_order(50, s, e) for s in range(3) for e in range(3)}
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 9
    assert data.epoch_order(50, 1, 2) == orders[1, 2] and data.epoch_order(0, 0, 0) == []
    # Resuming relies on it: the same in every version of Python.
    assert data.epoch_order(6, 0, 0) == [2, 3, 4, 1, 5, 0]


def test_batches_go_through_every_epoch_and_can_begin_anywhere():
    steps = list(islice(data.batches(5, 2, seed=3), 9))
    assert [epoch for epoch, _ in steps] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [len(chosen) for _, chosen in steps] == [2, 2, 1] * 3
    for epoch in range(3):
        order = [i for e, chosen in steps if e == epoch for i in chosen]
        assert order == data.epoch_order(5, 3, epoch)
    for first in range(9):
        rest = islice(data.batches(5, 2, seed=3, first_step=first), 9 - first)
        assert list(rest) == steps[first:]


def test_num_steps():
    assert data.num_steps(5, 2, epochs=3, max_steps=None) == 9
    assert data.num_steps(5, 2, epochs=3, max_steps=4) == 4
    assert data.num_steps(4, 4, epochs=1, max_steps=100) == 1
