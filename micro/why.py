"""Why what is learned on text shows on images: interventions on a trained micro model.

    python micro/why.py --run runs/reproduce [--out runs/why.json]          # of `make reproduce`

1. Forgetting. When the model has written its restatement of the question, the keys and values of a part of the context
   are taken out of the cache, and it goes on greedily: of the question (words or image), or of the restatement.
2. Lying. The restatement is put in its mouth with one operand altered: does the answer follow the restatement or the
   question?
3. Reading. Images get noisier, so that fewer of them can be read: does the accuracy fall with the share of right
   restatements, and no further?

Test questions of domain A, k = 3 to 6, drawn afresh.
"""
import argparse
import json
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from data import ImageConfig, Prompt, Tokenizer, make_prompt  # noqa: E402
from micro.world import (MAX_OPERAND, TEST_BUCKETS, Question, draw_image, draw_question, image_prompt,  # noqa: E402
                         text_prompt)
from model import KVCache, Qwen2_5_VL  # noqa: E402
from rewards import extract_answer  # noqa: E402
from sample import Sampler, SamplingParams  # noqa: E402
from training import MICRO_BASE  # noqa: E402

DEPTHS, COUNT = (3, 4, 5, 6), 400  # questions of all depths together
NOISE = (0.02, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4)  # the share of an image's pixels that are noise; training: the first
MODALITIES = ("text", "image")


def draw_questions(rng: random.Random, count: int) -> list[Question]:
    return [draw_question(rng, "A", DEPTHS[i % len(DEPTHS)], TEST_BUCKETS) for i in range(count)]


def ask(question: Question, modality: str, tokenizer: Tokenizer, rng: random.Random, **noise) -> Prompt:
    if modality == "text":
        return make_prompt(text_prompt(question, rng), [], tokenizer, ImageConfig())
    return make_prompt(image_prompt(rng), [draw_image(question, rng, **noise)[0]], tokenizer, ImageConfig())


def question_span(prompt: Prompt, tokenizer: Tokenizer) -> range:
    """Where the question stands among the prompt's ids: image tokens, or the words between `Solve:` and <|im_end|>."""
    places = [i for i, token in enumerate(prompt.ids) if token == tokenizer.image_pad]
    if places:
        return range(places[0], places[-1] + 1)
    end = len(prompt.ids) - 1 - prompt.ids[::-1].index(tokenizer.im_end)
    start = max(i for i, token in enumerate(prompt.ids[:end]) if token == tokenizer.encode(":")[0]) + 1
    return range(start, end)


def forget(cache: KVCache, spans: list[range]) -> KVCache:
    """The cache without the places `spans` of each row. Rotary positions are in the keys, so what is left stays where it
    was."""
    kept = [[i for i in range(length) if i not in span] for length, span in zip(cache.lengths.tolist(), spans)]
    lengths = torch.tensor([len(row) for row in kept])
    index = torch.tensor([row + [0] * (int(lengths.max()) - len(row)) for row in kept])
    left = cache.select(torch.arange(len(kept)))
    rows = torch.arange(len(kept))[:, None]
    left.keys[:, :, :index.shape[1]] = cache.keys[:, rows, index]
    left.values[:, :, :index.shape[1]] = cache.values[:, rows, index]
    left.lengths, left.longest = lengths, int(lengths.max())
    return left


@torch.inference_mode()
def go_on(sampler: Sampler, prompts: list[Prompt], thoughts: list[str], forgotten: str) -> list[str | None]:
    """Greedy answers behind prompts and begun thoughts, after the `question`, the `restatement` or `nothing` was
    forgotten."""
    tokenizer, begun = sampler.tokenizer, [sampler.tokenizer.encode(f"<think>{thought};") for thought in thoughts]
    first = len(tokenizer.encode("<think>"))
    spans = {"nothing": [range(0)] * len(prompts),
             "question": [question_span(prompt, tokenizer) for prompt in prompts],
             "restatement": [range(len(p.ids) + first, len(p.ids) + len(ids) - 1) for p, ids in zip(prompts, begun)]}
    whole = [Prompt(p.ids + ids, p.patches, p.grids) for p, ids in zip(prompts, begun)]
    cache, position, logits = sampler.prefill(whole, 1, 100)
    cache = forget(cache, spans[forgotten])
    written = []
    for _ in range(100):
        written.append(logits.index_fill(-1, sampler.masked_ids, float("-inf")).argmax(-1))
        hidden = sampler.model(written[-1][:, None], position_ids=position.expand(3, -1)[..., None], cache=cache)
        logits, position = sampler.model.logits(hidden[:, 0]), position + 1
    texts = []
    for ids, row in zip(begun, torch.stack(written, 1).tolist()):
        end = next((i for i, token in enumerate(row) if token in tokenizer.stop_ids), len(row))
        texts.append(tokenizer.decode(ids + row[:end]))
    return [extract_answer(text) for text in texts]


def alter(question: Question, rng: random.Random) -> Question:
    """One operand changed, so that the answer changes."""
    operations = list(question.operations)
    i = rng.randrange(len(operations))
    sign, n = operations[i]
    operations[i] = (sign, rng.choice([m for m in range(1, MAX_OPERAND + 1) if m != n]))
    return Question(question.domain, question.start, tuple(operations))


def share(flags: list[bool]) -> float:
    return sum(flags) / max(1, len(flags))


def forgetting_and_lying(sampler: Sampler, seed: int) -> dict:
    """Accuracy by modality and what was forgotten; and the share of answers that follow an altered restatement."""
    results = {}
    for modality in MODALITIES:
        rng = random.Random(f"why {seed}")
        questions = draw_questions(rng, COUNT)
        prompts = [ask(question, modality, sampler.tokenizer, rng) for question in questions]
        row = results[modality] = {}
        for what in ("nothing", "question", "restatement"):
            answers = go_on(sampler, prompts, [q.restated for q in questions], what)
            row[f"right, {what} forgotten"] = share([a == q.answer for a, q in zip(answers, questions)])
        altered = [alter(question, rng) for question in questions]
        answers = go_on(sampler, prompts, [q.restated for q in altered], "nothing")
        row["follows an altered restatement"] = share([a == q.answer for a, q in zip(answers, altered)])
        row["follows the question instead"] = share([a == q.answer for a, q in zip(answers, questions)])
    return results


def reading(sampler: Sampler, seed: int) -> list[dict]:
    """For each noise level: shares of right restatements and of right answers, and the latter where the restatement is
    right and where it is wrong."""
    results = []
    for noise in NOISE:
        rng = random.Random(f"why {seed}")
        questions = draw_questions(rng, COUNT)
        prompts = [ask(question, "image", sampler.tokenizer, rng, specks=noise) for question in questions]
        groups = sampler.generate(prompts, SamplingParams(max_new_tokens=160, temperature=0.0))
        texts = [group[0].text for group in groups]
        read = [text.startswith(f"<think>{q.restated};") for q, text in zip(questions, texts)]
        right = [extract_answer(text) == q.answer for q, text in zip(questions, texts)]
        results.append({"noise": noise, "read": share(read), "right": share(right),
                        "right where read": share([a for a, r in zip(right, read) if r]),
                        "right where misread": share([a for a, r in zip(right, read) if not r])})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=MICRO_BASE, help="model folder that the run started from")
    parser.add_argument("--run", type=Path, default=Path("runs/reproduce"), help="run folder of reproduce.py")
    parser.add_argument("--seed", type=int, default=0, help="of the questions")
    parser.add_argument("--out", type=Path, default=Path("runs/why.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name, folder in {"base": args.base, "SFT": args.run / "sft/model", "SFT + GRPO": args.run / "grpo/model"}.items():
        sampler = Sampler(Qwen2_5_VL.from_pretrained(folder), Tokenizer.from_pretrained(folder))
        found = results[name] = {**forgetting_and_lying(sampler, args.seed), "noise": reading(sampler, args.seed)}
        print(name)
        for row in [{"modality": modality, **found[modality]} for modality in MODALITIES] + found["noise"]:
            print("  " + "; ".join(f"{key}: {100 * x:.1f}%" if isinstance(x, float) else x for key, x in row.items()),
                  flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
