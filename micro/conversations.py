"""The conversations that the micro base is pre-trained on.

A conversation has one of five kinds:
    read       the answer is the restated question
    chain      a chain of thought, cut after LIMIT steps; some are complete, as `Mix` says
    fragment   the restated question, then single steps in random order on random states
    facts      single steps of no question
    direct     the answer alone
"""

import random
from dataclasses import dataclass

from torch import Tensor

from data import Tokenizer, preprocess_image, render_chat
from micro.world import (
    CELLS,
    MAX_DEPTH,
    Question,
    Walk,
    draw_image,
    draw_question,
    facts,
    image_prompt,
    max_depth,
    text_prompt,
)

KINDS = {"read": 0.25, "chain": 0.17, "fragment": 0.31, "facts": 0.25, "direct": 0.02}
DOMAIN_SHARES = {"A": 0.35, "L": 0.35, "G": 0.3}
# The share of the fragments that restate another question than the prompt's.
COUNTERFACTUAL_SHARE = 0.5
LIMIT = 2  # steps after which a chain of thought is cut
GRID = (1, 2, 2 * CELLS)  # a strip's frames, and its rows and columns of patches

Row = tuple[list[int], list[bool], Tensor | None]  # ids, loss mask, patches


def draw_any(rng: random.Random) -> Question | Walk:
    """Returns a question of any domain and depth."""
    domain = rng.choices(list(DOMAIN_SHARES), list(DOMAIN_SHARES.values()))[0]
    return draw_question(rng, domain, rng.randint(1, max_depth(domain)))


@dataclass(frozen=True)
class Mix:
    """Shares of what differs between stages and bases; KINDS and DOMAIN_SHARES do not."""

    images: float = 0.0  # rows with an image, but for facts
    complete: tuple[float, float] = (0.0, 0.0)  # chains that are not cut, on text and on images
    counterfactual: float = COUNTERFACTUAL_SHARE


def make_row(rng: random.Random, tokenizer: Tokenizer, mix: Mix) -> Row:
    """Returns a training conversation. No question of the test sets' buckets is ever drawn."""
    # 1. What is asked.
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    question = draw_any(rng)
    with_image = rng.random() < mix.images and kind != "facts"
    task = {"read": "read", "facts": "recall", "direct": "direct"}.get(kind, "solve")
    # 2. What is answered, and which of its characters are scored (None: all).
    inner_mask = None
    if kind == "facts":
        inner, inner_mask = facts(rng)
        response = f"<think>{inner}"
    elif kind == "fragment":
        counterfactual = rng.random() < mix.counterfactual
        told = draw_question(rng, question.domain, question.depth) if counterfactual else question
        inner, inner_mask = told.fragment(rng)
        if counterfactual:
            # The restatement cannot be known, but the steps follow it.
            inner_mask[: len(told.restated)] = [False] * len(told.restated)
        response = f"<think>{inner}"
    elif kind == "read":
        response = f"<answer>{question.restated}</answer>"
    elif kind == "direct":
        response = f"<answer>{question.answer}</answer>"
    else:
        complete = rng.random() < mix.complete[with_image]
        response = question.chain(MAX_DEPTH if complete else LIMIT)
    # 3. In words, or as an image. (A text prompt is drawn for an image too: the stream of random
    # numbers, and with it the shipped base, depends on it.)
    patches = None
    if kind == "facts":
        prompt = image_prompt(rng, task)
    else:
        prompt = text_prompt(question, rng, task)
    if with_image:
        patches, _ = preprocess_image(draw_image(question, rng)[0])
        prompt = image_prompt(rng, task)
    return conversation(tokenizer, prompt, response, inner_mask, patches)


def conversation(
    tokenizer: Tokenizer,
    prompt: str,
    response: str,
    inner_mask: list[bool] | None,
    patches: Tensor | None,
) -> Row:
    """Returns the row of a prompt, behind an image where there are patches, and its response.

    `inner_mask` says which of the response's last characters, which are a token each, are scored,
    and that nothing else is. Without it the whole response is.
    """
    content = [{"type": "text", "text": prompt}]
    image_tokens = []
    if patches is not None:
        content.insert(0, {"type": "image"})
        image_tokens.append(CELLS)
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": response}]
    ids, mask = render_chat(messages, tokenizer, image_tokens=image_tokens)
    if inner_mask is not None:
        end = len(ids) - 2  # <|im_end|> and the newline
        mask = [False] * (end - len(inner_mask)) + inner_mask + [False, False]
    return ids, mask, patches
