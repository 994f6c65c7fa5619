"""micro/decisions.py: chains in other symbols, what is asked where, and what the base decides."""

import random
import re

import pytest
import torch

from data import Tokenizer
from hub.options import MICRO_BASE
from micro import decisions
from micro.decisions import STEP, Examination, choose, examine, head, right_decisions, with_signs_of
from micro.why import ask
from micro.world import Question

FIVE = Question("A", 3, ((0, 4), (1, 2), (0, 1), (1, 5), (0, 2)))


def test_a_chain_in_the_signs_of_the_other_domain():
    chain = Question("L", 2, ((0, 4), (1, 2))).chain()
    assert chain == "<think>c#1>4#2<2;c;#1>4=g;#2<2=e;</think><answer>e</answer>"
    swapped = "<think>c#1+4#2-2;c;#1+4=g;#2-2=e;</think><answer>e</answer>"
    assert with_signs_of("A", chain) == swapped
    assert with_signs_of("L", swapped) == chain
    assert with_signs_of("A", swapped) == swapped


def test_each_decision_is_judged_at_its_place():
    tokenizer = Tokenizer.from_pretrained(str(MICRO_BASE))
    ids = tokenizer.encode(FIVE.chain())
    start = len(tokenizer.encode(head(FIVE)))

    def wrong_if(place: int) -> dict[str, list[int]]:
        """Returns which decisions, by kind, are wrong if the token at a place is."""
        chosen = list(ids)
        chosen[place] = -1
        found = right_decisions(chosen, ids, start, FIVE.depth)
        assert {name: len(right) for name, right in found.items()} == {
            "go on": 4, "end": 1, "number": 5, "operation": 5, "result": 5, "answer": 1
        }  # fmt: skip
        wrong = {name: [i for i, one in enumerate(r) if not one] for name, r in found.items()}
        return {name: places for name, places in wrong.items() if places}

    third = start + 2 * STEP
    kinds = ("go on", "number", "operation", "operation", None, "result")
    for place, kind in enumerate(kinds):
        # The first step is no question, so the third is the second that goes on.
        number = 1 if kind == "go on" else 2
        assert wrong_if(third + place) == ({kind: [number]} if kind else {})
    assert wrong_if(start) == {}
    assert wrong_if(start + 5 * STEP) == {"end": [0]}
    assert wrong_if(len(ids) - 4) == {"answer": [0]}  # </answer> is behind it, three tokens


def test_positions_are_moved_behind_a_place_only(monkeypatch):
    examination = Examination(str(MICRO_BASE), count=1)
    prompt = ask(FIVE, "text", examination.tokenizer, random.Random(0))
    ids = examination.tokenizer.encode(FIVE.chain())
    plain = choose(examination.model, prompt, ids)
    assert len(plain) == len(ids) + 1
    moved = choose(examination.model, prompt, ids, 20, STEP)
    assert moved[: len(ids) - 20] == plain[: len(ids) - 20]

    def read_on(model, prompt, ids, position_ids):
        length = len(prompt.ids) + len(ids)
        expected = [*range(length - 20), *range(length - 20 + STEP, length + STEP)]
        assert position_ids.shape == (3, 1, length)
        assert position_ids.tolist() == [[expected]] * 3
        return torch.zeros(length, examination.model.config.hidden_size)

    monkeypatch.setattr(decisions, "read_on", read_on)
    choose(examination.model, prompt, ids, 20, STEP)


@pytest.mark.parametrize("follows", ["count", "place", "number"])
def test_what_a_number_follows_is_found(monkeypatch, follows):
    """A model that counts, one that goes by the place, one that goes on from the last number."""
    examination = Examination(str(MICRO_BASE), count=40)
    tokenizer = examination.tokenizer

    def choose(model, prompt, ids, moved=0, by=0):
        steps = re.findall(r"#(\d)[-+<>]\d=.;", tokenizer.decode(ids))
        count = len(steps)
        assert moved == STEP * count + 1
        due = {"count": count, "place": count + by // STEP, "number": int(steps[-1])}[follows] + 1
        return tokenizer.encode(str(due))

    monkeypatch.setattr(decisions, "choose", choose)
    found = {name: row["L text"][0] for name, row in examination.displaced().items()}
    # What is not moved or replaced, count and number or count and place agree on.
    assert found == {
        "moved on: by count": 0 if follows == "place" else 40,
        "moved on: by place": 40 if follows == "place" else 0,
        "moved back: by count": 0 if follows == "place" else 40,
        "moved back: by place": 40 if follows == "place" else 0,
        "replaced: by number": 40 if follows == "number" else 0,
        "replaced: by count": 0 if follows == "number" else 40,
    }


def test_the_base_knows_each_step_but_not_which_comes_next():
    found = examine(str(MICRO_BASE), count=8)
    for setting in ("A text", "A image", "L text", "L image"):
        shares = {name: row[setting] for name, row in found["decisions"].items()}
        assert shares["end"][1] == 8 and shares["number"][1] == 36 == shares["go on"][1] + 8
        assert shares["operation"][0] >= 35 and shares["result"][0] >= 35
        assert shares["number"][0] < 20
    assert set(found["swapped"]) == {"nothing", "signs", "states", "prompt"}
