"""Why what is learned on text shows on images: two experiments on trained micro models.

    python micro/why.py --run runs/reproduce [--out runs/why.json]          # of `make reproduce`

1. Two sources that disagree. The prompt (words or an image) asks one question, and the thought that
   is put in the model's mouth restates another: one operand altered, or all drawn anew. Whose
   operations do its steps take, of those in which the two differ? Were it the prompt's, each step
   would look its operation up in words or pixels, and text-only training never taught it pixels.
2. Images that are harder to read. With more noise fewer restatements are right. If reading and
   reasoning are two separate skills, joined by the restatement alone, then the accuracy on images
   is the share that was read times the accuracy on text, plus chance for the rest.

Test questions of domain A, k = 3 to 6, drawn afresh.
"""

import argparse
import json
import random
import re
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from data import ImageConfig, Prompt, Tokenizer, make_prompt
from hub.options import MICRO_BASE
from micro.world import (
    MAX_OPERAND,
    TEST_BUCKETS,
    Question,
    Walk,
    draw_image,
    draw_question,
    image_prompt,
    text_prompt,
)
from model import Qwen2_5_VL
from rewards import extract_answer
from sample import Sampler, SamplingParams

DEPTHS = (3, 4, 5, 6)
COUNT = 400  # questions, of all depths together
# The share of an image's pixels that are noise. Training images have the first.
NOISE = (0.02, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4)
MODALITIES = ("text", "image")


def draw_questions(rng: random.Random, count: int) -> list[Question]:
    """Returns test questions of domain A, all depths equally often."""
    return [draw_question(rng, "A", DEPTHS[i % len(DEPTHS)], TEST_BUCKETS) for i in range(count)]


def ask(
    question: Question | Walk, modality: str, tokenizer: Tokenizer, rng: random.Random, **noise
) -> Prompt:
    """Returns the prompt that asks a question in words or as an image."""
    if modality == "text":
        return make_prompt(text_prompt(question, rng), [], tokenizer, ImageConfig())
    text = image_prompt(rng)
    image, _ = draw_image(question, rng, **noise)
    return make_prompt(text, [image], tokenizer, ImageConfig())


def read_on(model: Qwen2_5_VL, prompt: Prompt, ids: list[int], **options) -> Tensor:
    """Returns the hidden states [T, C] of a prompt with these tokens behind it."""
    images = {}
    if prompt.grids:
        images = {"pixel_values": prompt.pixel_values(), "image_grid_thw": prompt.grids}
    return model(torch.tensor([prompt.ids + ids]), **images, **options)[0]


def respond(sampler: Sampler, prompts: list[Prompt]) -> list[str]:
    """Returns the greedy response to each prompt."""
    groups = sampler.generate(prompts, SamplingParams(max_new_tokens=160, temperature=0.0))
    return [group[0].text for group in groups]


def respond_after(sampler: Sampler, prompts: list[Prompt], told: list[Question]) -> list[str]:
    """Returns greedy responses whose thoughts begin with the restatement of a given question."""
    begun = [f"<think>{question.restated};" for question in told]
    longer = []
    for prompt, text in zip(prompts, begun):
        ids = prompt.ids + sampler.tokenizer.encode(text)
        longer.append(replace(prompt, ids=ids))
    return [text + rest for text, rest in zip(begun, respond(sampler, longer))]


def sources(response: str, told: Question, asked: Question) -> dict[str, list[tuple[bool, bool]]]:
    """Says from which question a response took its start state, its operations and its answer.

    Returns for each of these pairs: is it that of the question that was told, is it that of the one
    that was asked? Only what differs between the two counts.
    """
    done = response.partition(";")[2]
    answer = extract_answer(response)
    found = {"operations": [], "start": [], "answer": []}
    for label, operation in re.findall(r"#(\d)([-+]\d)=", done):
        place = slice(2 * int(label) - 1, 2 * int(label) + 1)
        one, other = told.form[place], asked.form[place]
        if one != other:
            found["operations"].append((operation == one, operation == other))
    if told.start != asked.start:
        found["start"].append((done[:1] == told.form[0], done[:1] == asked.form[0]))
    if told.answer != asked.answer:
        found["answer"].append((answer == told.answer, answer == asked.answer))
    return found


def alter(question: Question, rng: random.Random) -> Question:
    """Returns the question with one operand changed, so that the answer changes."""
    operations = list(question.operations)
    i = rng.randrange(len(operations))
    sign, n = operations[i]
    operations[i] = (sign, rng.choice([m for m in range(1, MAX_OPERAND + 1) if m != n]))
    return Question(question.domain, question.start, tuple(operations))


def draw_other(question: Question, rng: random.Random) -> Question:
    """Returns another question of the same depth."""
    return draw_question(rng, question.domain, question.depth, TEST_BUCKETS)


def share(flags: list[bool]) -> float:
    """Returns the share of true ones; 0 of none."""
    return sum(flags) / max(1, len(flags))


def two_sources(sampler: Sampler, seed: int) -> dict[str, dict[str, float]]:
    """Returns the figures of the first experiment, by modality.

    They are the share of right answers behind the true restatement, and where thought and prompt
    disagree, from which of the two operations, start state and answer are.
    """
    results = {}
    for modality in MODALITIES:
        rng = random.Random(f"why {seed}")
        questions = draw_questions(rng, COUNT)
        prompts = [ask(question, modality, sampler.tokenizer, rng) for question in questions]
        texts = respond_after(sampler, prompts, questions)
        right = [extract_answer(text) == q.answer for text, q in zip(texts, questions)]
        row = {"right": share(right)}
        results[modality] = row
        for name, change in (("one operand altered", alter), ("another question", draw_other)):
            told = [change(question, rng) for question in questions]
            texts = respond_after(sampler, prompts, told)
            found = [sources(*triple) for triple in zip(texts, told, questions)]
            for what in found[0]:
                pairs = [pair for one in found for pair in one[what]]
                # An altered operand leaves the start as it is: there is nothing to compare.
                if pairs:
                    row[f"{name}: {what} of the thought"] = share([one for one, _ in pairs])
                    row[f"{name}: {what} of the prompt"] = share([other for _, other in pairs])
    return results


def reading(sampler: Sampler, seed: int) -> list[dict[str, float]]:
    """Returns the figures of the second experiment, for each share of noise.

    They are the shares of right restatements and of right answers, and the latter where the
    restatement is right and where it is wrong.
    """
    results = []
    for noise in NOISE:
        rng = random.Random(f"why {seed}")
        questions = draw_questions(rng, COUNT)
        prompts = [
            ask(question, "image", sampler.tokenizer, rng, specks=noise) for question in questions
        ]
        texts = respond(sampler, prompts)
        read = [text.startswith(f"<think>{q.restated};") for q, text in zip(questions, texts)]
        right = [extract_answer(text) == q.answer for q, text in zip(questions, texts)]
        results.append(
            {
                "noise": noise,
                "read": share(read),
                "right": share(right),
                "right where read": share([a for a, r in zip(right, read) if r]),
                "right where misread": share([a for a, r in zip(right, read) if not r]),
            }
        )
    return results


def in_percent(row: dict[str, float]) -> str:
    return "; ".join(f"{name} {100 * value:.1f}" for name, value in row.items())


def main() -> None:
    """Runs both experiments on the base and the two stages; prints in % and writes shares."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--base", type=Path, default=MICRO_BASE, help="model folder that the run started from"
    )
    parser.add_argument(
        "--run", type=Path, default=Path("runs/reproduce"), help="run folder of reproduce.py"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the questions")
    parser.add_argument("--out", type=Path, default=Path("runs/why.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    folders = {
        "base": args.base,
        "SFT": args.run / "sft/model",
        "SFT + GRPO": args.run / "grpo/model",
    }
    for name, folder in folders.items():
        sampler = Sampler(Qwen2_5_VL.from_pretrained(folder), Tokenizer.from_pretrained(folder))
        by_modality = two_sources(sampler, args.seed)
        by_noise = reading(sampler, args.seed)
        results[name] = {**by_modality, "noise": by_noise}
        print(name)
        for modality, row in by_modality.items():
            print(f"  {modality}; {in_percent(row)}", flush=True)
        for row in by_noise:
            print(f"  {in_percent(row)}", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
