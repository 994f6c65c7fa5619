"""micro/decisions.py: chains in other symbols, what is judged, and what the base decides."""

import random

from data import Tokenizer
from hub.options import MICRO_BASE
from micro.decisions import STEP, Judge, choose, head, judge_model, judge_steps, with_signs_of
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
    everything = judge_steps(ids, ids, start, FIVE.depth)
    assert {name: sum(right) for name, right in everything.items()} == {
        "go on": 6, "number": 5, "operation": 5, "result": 5
    }  # fmt: skip
    # A token of the third step that is wrong is a wrong decision of its kind, and of no other.
    for place, name in enumerate(("go on", "number", "operation", "operation", None, "result")):
        chosen = list(ids)
        chosen[start + 2 * STEP + place] = -1
        found = judge_steps(chosen, ids, start, FIVE.depth)
        wrong = {key: i for key, right in found.items() for i, one in enumerate(right) if not one}
        assert wrong == ({name: 2} if name else {})
    # So is an end that does not come.
    chosen = list(ids)
    chosen[start + 5 * STEP] = -1
    assert judge_steps(chosen, ids, start, FIVE.depth)["go on"] == [True] * 5 + [False]


def test_positions_are_moved_behind_a_place_only():
    judge = Judge(str(MICRO_BASE), 0, 1)
    prompt = ask(FIVE, "text", judge.tokenizer, random.Random(0))
    ids = judge.tokenizer.encode(FIVE.chain())
    plain = choose(judge.model, prompt, ids)
    assert len(plain) == len(ids) + 1
    assert choose(judge.model, prompt, ids, 20, 0) == plain
    moved = choose(judge.model, prompt, ids, 20, STEP)
    assert moved[: len(ids) - 20] == plain[: len(ids) - 20]
    assert moved != plain


def test_the_base_knows_each_step_but_not_which_comes_next():
    found = judge_model(str(MICRO_BASE), count=8)
    for setting in ("A text", "A image", "L text", "L image"):
        assert found["decisions"]["operation"][setting] > 0.95
        assert found["decisions"]["result"][setting] > 0.95
        assert found["decisions"]["number"][setting] < 0.6
    assert set(found["swapped"]) == {"nothing", "signs", "states", "prompt"}
    for shares in found["displaced"].values():
        assert set(shares) == {"A text", "L text"}
