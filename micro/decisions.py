"""Which decisions of a chain of thought carry over, and what does the one that fails look at?

    python micro/decisions.py --model runs/reproduce/sft/model [--out decisions.json]

A right chain is put in the model's mouth, and each token that decides something is asked for at its
place (teacher forcing), so that one mistake does not hide the next:

    go on       is it another step, or `</think>`?         #1+4=7;[#]
    number      which step?                                #1+4=7;#[2]
    operation   which operation has that number?           #1+4=7;#2[-][2]
    result      what does it make of the state?            #1+4=7;#2-2=[5]

Then two interventions on what the number of the next step follows. They are on text.

    swapped     The same chain in other symbols: those of the signs, of the states, or of the
                prompt are the other domain's. Which of them does it depend on?
    displaced   The last step is replaced by another of the question: does the number that follows
                go on from the one before it, or does it say how many steps there are? And with the
                positions of all steps moved on, or back, by the length of one: does it say how many
                there are, or how far the chain has come?
"""

import argparse
import random
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from data import Prompt, Tokenizer
from hub.options import MICRO_BASE, run_command
from micro.why import DEPTHS, ask
from micro.world import SIGNS, STATES, TEST_BUCKETS, Question, draw_question
from model import Qwen2_5_VL
from training.journal import write_json

SETTINGS = [f"{domain} {modality}" for domain in "AL" for modality in ("text", "image")]
DECISIONS = ("go on", "number", "operation", "result")
COUNT = 200  # chains of each kind
STEP = 7  # tokens of a step, #1+4=7; (every character is one)
OTHER = {"A": "L", "L": "A"}
SWAPS = ("nothing", "signs", "states", "prompt")

Shares = dict[str, dict[str, float]]


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

    The positions of the last `moved` of them are by `by` further on than they should be.
    """
    images = {}
    if prompt.grids:
        images = {"pixel_values": prompt.pixel_values(), "image_grid_thw": prompt.grids}
    whole = prompt.ids + ids
    if by:
        positions = torch.arange(len(whole)).repeat(3, 1, 1)  # as of text
        positions[..., len(whole) - moved :] += by
        images["position_ids"] = positions
    hidden = model(torch.tensor([whole]), **images)
    return model.logits(hidden[0, len(prompt.ids) - 1 :]).argmax(-1).tolist()


def judge_steps(chosen: list[int], ids: list[int], start: int, depth: int) -> dict[str, list[bool]]:
    """Returns for each decision of a chain, of which the steps begin at `start`: was it right?"""
    right = [one == other for one, other in zip(chosen, ids)]
    places = [start + STEP * i for i in range(depth)]
    return {
        "go on": [right[place] for place in [*places, start + STEP * depth]],
        "number": [right[place + 1] for place in places],
        "operation": [right[place + 2] and right[place + 3] for place in places],
        "result": [right[place + 5] for place in places],
    }


class Judge:
    """A model, and what it decides on chains of its own test questions."""

    def __init__(self, folder: str, seed: int, count: int):
        self.model = Qwen2_5_VL.from_pretrained(folder)
        self.tokenizer = Tokenizer.from_pretrained(folder)
        self.seed, self.count = seed, count

    def questions(self, name: str, domain: str, depths: tuple[int, ...] = DEPTHS):
        """Yields (random numbers, question), of all depths equally often."""
        rng = random.Random(f"{self.seed}/{name}")
        for i in range(self.count):
            yield rng, draw_question(rng, domain, depths[i % len(depths)], TEST_BUCKETS)

    def decisions(self) -> Shares:
        """Returns the share of right decisions, by kind and setting."""
        shares: Shares = {name: {} for name in DECISIONS}
        for setting in SETTINGS:
            domain, modality = setting.split()
            found = defaultdict(list)
            for rng, question in self.questions(setting, domain):
                prompt = ask(question, modality, self.tokenizer, rng)
                ids = self.tokenizer.encode(question.chain())
                start = len(self.tokenizer.encode(head(question)))
                chosen = choose(self.model, prompt, ids)
                for name, right in judge_steps(chosen, ids, start, question.depth).items():
                    found[name] += right
            for name, right in found.items():
                shares[name][setting] = sum(right) / len(right)
        return shares

    def swapped(self) -> Shares:
        """Returns the share of right numbers when a part of the chain is in other symbols."""
        shares: Shares = {swap: {} for swap in SWAPS}
        for domain, swap in [(domain, swap) for domain in "AL" for swap in SWAPS]:
            found = []
            for rng, question in self.questions(f"{domain} swapped", domain):
                other = replace(question, domain=OTHER[domain])
                prompt = ask(other if swap == "prompt" else question, "text", self.tokenizer, rng)
                chain = (other if swap == "states" else question).chain()
                chain = with_signs_of(OTHER[domain] if swap == "signs" else domain, chain)
                ids = self.tokenizer.encode(chain)
                start = len(self.tokenizer.encode(head(question)))
                chosen = choose(self.model, prompt, ids)
                found += judge_steps(chosen, ids, start, question.depth)["number"]
            shares[swap][f"{domain} text"] = sum(found) / len(found)
        return shares

    def displaced(self) -> Shares:
        """Returns what the next number follows.

        replaced: the last step is another; is the number one more than that of the last step, or
        one more than there are steps? moved: all steps stand a step further on, or back; is it what
        their count says, or what is right at the place where it stands?
        """
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
                # Any step but this one, and the one before it, whose successor is this one.
                others = [i for i in range(1, question.depth) if i not in (done - 1, done)]
                last = rng.choice(others)
                steps[-1] = question.step(last, question.after(done - 1))
                number = self.next_number(prompt, question, steps)
                hits["replaced: by number"] += number == last + 1
                hits["replaced: by count"] += number == done + 1
        names = found["A text"]
        return {name: {key: found[key][name] / self.count for key in found} for name in names}

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


def judge_model(folder: str, seed: int = 0, count: int = COUNT) -> dict[str, Shares]:
    """Returns the shares of a model: of right decisions, and of what the next number follows."""
    judge = Judge(folder, seed, count)
    return {
        "decisions": judge.decisions(),
        "swapped": judge.swapped(),
        "displaced": judge.displaced(),
    }


def main(argv: list[str]) -> None:
    """Judges each model, prints the table, and writes it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=[str(MICRO_BASE)], help="model folders")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=COUNT, help="chains of each kind")
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = {folder: judge_model(folder, args.seed, args.count) for folder in args.model}
    for folder, parts in results.items():
        print(f"{folder}: %")
        for part, rows in parts.items():
            for name, columns in rows.items():
                cells = "  ".join(f"{key} {100 * value:5.1f}" for key, value in columns.items())
                print(f"  {part}: {name:<22}{cells}")
    if args.out:
        write_json(args.out, results)


if __name__ == "__main__":
    run_command(main)
