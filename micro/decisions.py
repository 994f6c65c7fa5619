"""Which decisions of a chain of thought carry over, and what does the one that fails look at?

    python micro/decisions.py --model runs/reproduce/sft/model [--out decisions.json]

A right chain is put in the model's mouth, and each token that decides something is asked for at its
place (teacher forcing), so that one mistake does not hide the next:

    go on       behind a step: is there another one?       #1+4=7;[#]
    end         behind the last step: is it the last?      #2-2=5;[</think>]
    number      which step is it?                          #1+4=7;#[2]
    operation   which operation has that number?           #1+4=7;#2[-][2]
    result      what does it make of the state?            #1+4=7;#2-2=[5]
    answer      which state was the last?                  </think><answer>[5]

Then two interventions on what the number of the next step follows. They are on text.

    swapped     The same chain in other symbols: its signs, its states, or the words of the prompt
                before it are the other domain's. Which of them does the number depend on?
    displaced   replaced: the last step is another one of the question. Is the number that follows
                one more than the number of that step, or one more than there are steps? moved: the
                positions of all steps are further on, or back, by the length of one. Is the number
                one more than there are steps, or the one that is due at that place?

All steps are of one length, so while nothing is moved, place and count say the same: no training
could tell them apart. Moved on, the steps leave a hole behind the restatement; moved back, the
first of them shares its positions with the restatement's end, and what is due at the place is also
the number of the last step, once more. No model has seen either.
"""

import argparse
import random
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from data import Prompt, Tokenizer
from hub.options import MICRO_BASE, run_command
from micro.why import DEPTHS, ask, read_on
from micro.world import SIGNS, STATES, TEST_BUCKETS, Question, draw_question
from model import Qwen2_5_VL
from training.journal import write_json

SETTINGS = [f"{domain} {modality}" for domain in "AL" for modality in ("text", "image")]
DECISIONS = ("go on", "end", "number", "operation", "result", "answer")
COUNT = 200  # chains of each kind
STEP = 7  # tokens of a step, #1+4=7; (every character is one)
OTHER = {"A": "L", "L": "A"}
SWAPS = ("nothing", "signs", "states", "prompt")

Counts = dict[str, dict[str, list[int]]]  # name -> setting -> [how many, of how many]


def head(question: Question) -> str:
    """Returns the chain of thought up to its first step."""
    return f"<think>{question.restated};{STATES[question.domain][question.start]};"


def with_signs_of(domain: str, chain: str) -> str:
    """Returns a chain with the signs of a domain, whichever it has."""
    thought, end, rest = chain.removeprefix("<think>").partition("</think>")
    for sign, others in zip(SIGNS[domain], zip(*SIGNS.values())):
        for other in others:
            thought = thought.replace(other, sign)
    return f"<think>{thought}{end}{rest}"


@torch.no_grad()
def choose(
    model: Qwen2_5_VL, prompt: Prompt, ids: list[int], moved: int = 0, by: int = 0
) -> list[int]:
    """Returns the most likely token at the place of each of `ids`, and behind the last.

    The positions of the last `moved` of them are by `by` further on than they should be (on text).
    """
    options = {}
    if by:
        length = len(prompt.ids) + len(ids)
        positions = torch.arange(length).repeat(3, 1, 1)  # [3, B, T], as of text
        positions[..., length - moved :] += by
        options["position_ids"] = positions
    hidden = read_on(model, prompt, ids, **options)
    return model.logits(hidden[len(prompt.ids) - 1 :]).argmax(-1).tolist()


def right_decisions(
    chosen: list[int], ids: list[int], start: int, depth: int
) -> dict[str, list[bool]]:
    """Returns for each decision of a chain, whose steps begin at `start`: was it right?"""
    right = [one == other for one, other in zip(chosen, ids)]
    places = [start + STEP * i for i in range(depth)]
    end = start + STEP * depth  # where </think><answer> begins, which are six tokens
    return {
        "go on": [right[place] for place in places[1:]],  # every chain has a first step
        "end": [right[end]],
        "number": [right[place + 1] for place in places],
        "operation": [right[place + 2] and right[place + 3] for place in places],
        "result": [right[place + 5] for place in places],
        "answer": [right[end + 6]],
    }


class Examination:
    """A model, and what it decides on chains of test questions."""

    def __init__(self, folder: str, seed: int = 0, count: int = COUNT):
        self.model = Qwen2_5_VL.from_pretrained(folder)
        self.tokenizer = Tokenizer.from_pretrained(folder)
        self.seed, self.count = seed, count

    def questions(
        self, name: str, domain: str, depths: tuple[int, ...] = DEPTHS
    ) -> Iterator[tuple[random.Random, Question]]:
        """Yields questions of all depths equally often, and the random numbers for the rest."""
        rng = random.Random(f"{self.seed}/{name}")
        for i in range(self.count):
            yield rng, draw_question(rng, domain, depths[i % len(depths)], TEST_BUCKETS)

    def decide(self, prompt: Prompt, chain: str, question: Question) -> dict[str, list[bool]]:
        """Returns which decisions are right along a chain, in whichever symbols it is."""
        ids = self.tokenizer.encode(chain)
        start = len(self.tokenizer.encode(head(question)))
        return right_decisions(choose(self.model, prompt, ids), ids, start, question.depth)

    def decisions(self) -> Counts:
        """Returns how many decisions are right, by kind and setting."""
        counts: Counts = {name: {} for name in DECISIONS}
        for setting in SETTINGS:
            domain, modality = setting.split()
            found = defaultdict(list)
            for rng, question in self.questions(setting, domain):
                prompt = ask(question, modality, self.tokenizer, rng)
                for name, right in self.decide(prompt, question.chain(), question).items():
                    found[name] += right
            for name, right in found.items():
                counts[name][setting] = [sum(right), len(right)]
        return counts

    def swapped(self) -> Counts:
        """Returns how many numbers are right when a part of the chain is in other symbols."""
        counts: Counts = {swap: {} for swap in SWAPS}
        for domain, swap in [(domain, swap) for domain in "AL" for swap in SWAPS]:
            found = []
            for rng, question in self.questions(f"{domain} swapped", domain):
                other = replace(question, domain=OTHER[domain])
                prompt = ask(other if swap == "prompt" else question, "text", self.tokenizer, rng)
                chain = (other if swap == "states" else question).chain()
                chain = with_signs_of(OTHER[domain] if swap == "signs" else domain, chain)
                found += self.decide(prompt, chain, question)["number"]
            counts[swap][f"{domain} text"] = [sum(found), len(found)]
        return counts

    def displaced(self) -> Counts:
        """Returns how often the next number is what count, place, or the last number say."""
        found = defaultdict(lambda: defaultdict(int))
        for domain in "AL":
            hits = found[f"{domain} text"]
            for rng, question in self.questions(f"{domain} displaced", domain, (5, 6)):
                prompt = ask(question, "text", self.tokenizer, rng)
                done = rng.randint(2, question.depth - 2)
                steps = [question.step(i, question.after(i - 1)) for i in range(1, done + 1)]
                for name, by in (("on", 1), ("back", -1)):
                    number = self.next_number(prompt, question, steps, by * STEP)
                    hits[f"moved {name}: by count"] += number == done + 1
                    hits[f"moved {name}: by place"] += number == done + 1 + by
                # Another step than the last, and one whose successor is not due anyway.
                others = [i for i in range(1, question.depth) if i not in (done - 1, done)]
                last = rng.choice(others)
                steps[-1] = question.step(last, question.after(done - 1))
                number = self.next_number(prompt, question, steps)
                hits["replaced: by number"] += number == last + 1
                hits["replaced: by count"] += number == done + 1
        names = found["A text"]
        return {name: {key: [found[key][name], self.count] for key in found} for name in names}

    def next_number(
        self, prompt: Prompt, question: Question, steps: list[str], by: int = 0
    ) -> int | None:
        """Returns the number that the model gives to the step behind these; None: no number.

        The positions of all steps are by `by` further on than they should be.
        """
        ids = self.tokenizer.encode("".join([head(question), *steps, "#"]))
        moved = len(ids) - len(self.tokenizer.encode(head(question)))
        digit = self.tokenizer.decode(choose(self.model, prompt, ids, moved, by)[-1:])
        return int(digit) if digit.isdigit() else None


def examine(folder: str, seed: int = 0, count: int = COUNT) -> dict[str, Counts]:
    """Returns the counts of a model: of right decisions, and of what the next number follows."""
    examination = Examination(folder, seed, count)
    return {
        "decisions": examination.decisions(),
        "swapped": examination.swapped(),
        "displaced": examination.displaced(),
    }


def main(argv: list[str]) -> None:
    """Examines each model, prints the table, and writes it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=[str(MICRO_BASE)], help="model folders")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=COUNT, help="chains of each kind")
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = {folder: examine(folder, args.seed, args.count) for folder in args.model}
    for folder, parts in results.items():
        print(f"{folder}: %")
        for part, rows in parts.items():
            for name, columns in rows.items():
                shares = {key: 100 * hits / asked for key, (hits, asked) in columns.items()}
                cells = "  ".join(f"{key} {share:5.1f}" for key, share in shares.items())
                print(f"  {part}: {name:<22}{cells}")
    if args.out:
        write_json(args.out, results)


if __name__ == "__main__":
    run_command(main)
