"""The questions that micro/claims.py needs beside the shipped ones; its runs write them.

None of the test questions is ever in a training file: which question may occur where is decided by
its canonical form (world.bucket), as in the shipped data.
"""

import json
import random
from pathlib import Path

from hub.options import MICRO_DATA
from micro.experiments import Dataset, Place, Run
from micro.failures import parse_form
from micro.med import write_lessons
from micro.reproduce import LIMIT
from micro.world import (
    RL_BUCKETS,
    RL_COUNT,
    RL_DEPTHS,
    SFT_BUCKETS,
    SFT_COUNT,
    TASKS,
    draw_question,
    record,
    text_prompt,
)

DOTS = 6  # more of them behind a chain for each step that it is deeper


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def shipped(name: str) -> Dataset:
    """Returns a file of micro/data."""
    return Dataset(name)


def asked_directly(name: str) -> Dataset:
    """Returns a shipped file with the prompt `Answer:`, which asks for no thoughts.

    The base knows this prompt: 2% of its pre-training were answers behind it.
    """

    def write(place: Place) -> list[dict]:
        records = read_jsonl(MICRO_DATA / f"{name}.jsonl")
        for one in records:
            one["question"] = one["question"].replace(TASKS["solve"], TASKS["direct"], 1)
            if "image" in one:
                one["image"] = str(MICRO_DATA / one["image"])
        return records

    return Dataset(f"{name}_direct", write)


def questions_of(domain: str) -> Dataset:
    """Returns questions for RL of domain A, L or G; those of A and G are shipped."""
    if domain != "L":
        return shipped({"A": "rl", "G": "med"}[domain])

    def write(place: Place) -> list[dict]:
        rng = random.Random("rl of L 0")
        records = []
        for i in range(RL_COUNT):
            q = draw_question(rng, "L", RL_DEPTHS[i % len(RL_DEPTHS)], RL_BUCKETS)
            records.append(record("rl_L", i, q, text_prompt(q, rng), q.answer))
        return records

    return Dataset("rl_L", write)


def chains_for_rl() -> Dataset:
    """Returns the questions of rl.jsonl with worked chains: what RL learns from, for SFT."""

    def write(place: Place) -> list[dict]:
        records = read_jsonl(MICRO_DATA / "rl.jsonl")
        return [
            one | {"response": parse_form(one["form"], one["domain"]).chain()} for one in records
        ]

    return Dataset("rl_worked", write)


def deep_strips() -> Dataset:
    """Returns those images of A that are to be read out which show more than two steps."""

    def write(place: Place) -> list[dict]:
        records = read_jsonl(MICRO_DATA / "test_transcription.jsonl")
        return [
            one | {"image": str(MICRO_DATA / one["image"])}
            for one in records
            if one["domain"] == "A" and one["depth"] > LIMIT
        ]

    return Dataset("test_transcription_deep", write)


def hesitating(response: str, dots: int) -> str:
    """Returns a worked response that hesitates behind its last step before it ends its thoughts.

    >>> hesitating("<think>3#1+4;3;#1+4=7;</think><answer>7</answer>", 3)
    '<think>3#1+4;3;#1+4=7;...</think><answer>7</answer>'
    """
    thought, end, answer = response.partition("</think>")
    return thought + "." * dots + end + answer


def hesitating_chains() -> Dataset:
    """Returns worked chains of A, of all depths, that hesitate: the deeper, the longer.

    So do the traces that the paper trains on: they come back to what they have found, on hard
    questions for long, and those that are too long are cut (here by --max-length) and do not show
    how to end.
    """

    def write(place: Place) -> list[dict]:
        rng = random.Random("hesitating 0")
        records = []
        for i in range(SFT_COUNT):
            q = draw_question(rng, "A", RL_DEPTHS[i % len(RL_DEPTHS)], SFT_BUCKETS)
            dots = DOTS * (q.depth - RL_DEPTHS[0]) + rng.randrange(DOTS)
            prompt = text_prompt(q, rng)
            response = hesitating(q.chain(), dots)
            records.append(record("hesitating", i, q, prompt, q.answer, response=response))
        return records

    return Dataset("sft_hesitating", write)


def pausing(response: str, dots: int) -> str:
    """Returns a worked response with so many dots behind the start and each step.

    >>> pausing("<think>3#1+4;3;#1+4=7;</think><answer>7</answer>", 2)
    '<think>3#1+4;3;..#1+4=7;..</think><answer>7</answer>'
    """
    thought, end, answer = response.partition("</think>")
    restated, steps = thought.split(";", 1)
    return f"{restated};{steps.replace(';', ';' + '.' * dots)}{end}{answer}"


def pausing_chains(dots: int) -> Dataset:
    """Returns the shipped chains with pauses: a form of step that no base has seen."""

    def write(place: Place) -> list[dict]:
        records = read_jsonl(MICRO_DATA / "sft.jsonl")
        return [one | {"response": pausing(one["response"], dots)} for one in records]

    return Dataset(f"sft_pausing_{dots}", write)


def lessons(seed: int) -> Dataset:
    """Returns the worked questions of G from which micro/med.py's teacher learns."""

    def write(place: Place) -> list[dict]:
        path = place.out / "data" / f"lessons_{seed}.txt"
        write_lessons(path, seed)
        records = read_jsonl(path)
        path.unlink()
        return records

    return Dataset(f"lessons_{seed}", write)


def mix(special: list[dict], general: list[dict], share: tuple[int, int]) -> list[dict]:
    """Returns all special records and as many general ones as make up the share (1, 8) of 1/8.

    Records keep the fields of the plain schema only: the two kinds may have others.
    """
    part, whole = share
    count = len(special) * part // (whole - part)
    fields = ("question", "answer", "response", "domain")
    mixed = []
    for kind, records in (("special", special), ("general", general[:count])):
        for i, one in enumerate(records):
            plain = {name: one[name] for name in fields if name in one}
            mixed.append({"id": f"{kind}-{i}"} | plain)
    return mixed


def mixed_chains(distilled: Run, share: tuple[int, int]) -> Dataset:
    """Returns a teacher's right answers on G, with worked chains of A among them."""
    part, whole = share

    def write(place: Place) -> list[dict]:
        special = read_jsonl(distilled.folder(place) / "distilled.jsonl")
        return mix(special, read_jsonl(MICRO_DATA / "sft.jsonl"), share)

    return Dataset(f"med_sft_{distilled.seed}_{part}of{whole}", write, (distilled,))


def mixed_questions(share: tuple[int, int]) -> Dataset:
    """Returns the questions of med.jsonl, with questions of rl.jsonl among them."""
    part, whole = share

    def write(place: Place) -> list[dict]:
        return mix(read_jsonl(MICRO_DATA / "med.jsonl"), read_jsonl(MICRO_DATA / "rl.jsonl"), share)

    return Dataset(f"med_rl_{part}of{whole}", write)
