"""The paper's prompts, and a question with its images as the model gets it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data.datasets import Example, load_examples
from data.images import ImageConfig, ImageSource, image_grid, load_image, preprocess_image
from data.tokenizer import DEFAULT_SYSTEM, Piece, Tokenizer, chat_pieces, encode_chats, render_chat
from hub.config import MERGE, Grid
from hub.errors import InputError

# Appendix A of the paper, to the letter (tests/test_data.py has hashes of its text).
TRAIN_PROMPT = (
    "You will solve a problem/request. You should provide your thoughts within <think> </think> "
    "tags before providing the answer.\nWrite your final answer within <answer> </answer> tags. "
    "Here is the question: "
)
MCQ_PROMPT = (
    "You should provide your thoughts within <think> </think> tags, then answer with just one of "
    "the options below within <answer> </answer> tags (For example, if the question is \n'Is the "
    "earth flat?\n A: Yes \nB: No', you should answer with <think>...</think> <answer>B: No "
    "</answer>). Here is the question: "
)
MATH_PROMPT = (
    "A conversation between User and Assistant. The user asks a question, and you as the assistant "
    "solves it. You should first think about the reasoning process in the mind and then provide "
    "the user with the answer. The reasoning process and answer are enclosed within <think> "
    "</think> and <answer> </answer> tags, respectively, i.e., <think> reasoning process here "
    "</think><answer> the final answer as the option letter or the number depending on the "
    "question </answer> (For example, if the question is \n'Is the earth flat?\n A: Yes \nB: No', "
    "you should answer with <think> your reasoning </think> <answer>B: No</answer>. If the "
    "question is 'What is 1+1?', you should answer with <think> your reasoning </think> <answer>2 "
    "</answer>).\n\nHere is the question: "
)
PROMPTS = {"direct": "", "train": TRAIN_PROMPT, "mcq": MCQ_PROMPT, "math": MATH_PROMPT}
STYLES = tuple(PROMPTS)  # the choices of --prompt-style


def question_text(example: Example, before_options: str = "\n") -> str:
    """Returns the question, and behind it its options, if it has any, as lines "A: text"."""
    if not example.options:
        return example.question
    lines = [f"{letter}: {text}" for letter, text in example.options.items()]
    return example.question + before_options + "\n".join(lines)


def format_prompt(example: Example, style: str) -> str:
    """Returns the user's text: the bare question (direct), or one of the paper's prompts.

    The paper ends its math prompt with " Options:\\n\\n{options}", which we leave off where there
    are none. Raises InputError for the mcq prompt of a question without options.
    """
    if style == "mcq" and not example.options:
        raise InputError(f"{example.id}: the mcq prompt needs options")
    before_options = " Options:\n\n" if style in ("mcq", "math") else "\n"
    return PROMPTS[style] + question_text(example, before_options)


@dataclass
class Prompt:
    """What a response is sampled after: token ids, and the images of its <|image_pad|> tokens.

    Images are kept as they came (a path, a file's bytes, ...) and preprocessed when the prompt is
    run: patches take 24 bytes a pixel, and a benchmark's would not fit into memory together.
    """

    ids: list[int]
    images: list[ImageSource] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)  # of each image: (1, rows, columns) of patches
    image_config: ImageConfig = ImageConfig()

    def pixel_values(self) -> Tensor | None:
        """Returns the patches of all images, float32 [P, 1176]; None if there are none."""
        if not self.images:
            return None
        return torch.cat([preprocess_image(image, self.image_config)[0] for image in self.images])


class Question(NamedTuple):
    """A question, and what the model gets of it."""

    example: Example
    prompt: Prompt


def chat_prompt(
    messages: Sequence[dict],
    images: Sequence[ImageSource],
    tokenizer: Tokenizer,
    image_config: ImageConfig,
) -> Prompt:
    """Returns a conversation, ready for the assistant to go on.

    `images` are in the order of the messages' image parts. Each is decoded once here, so that a
    damaged file raises its InputError before anything is sampled.
    """
    grids = [image_grid(load_image(image), image_config) for image in images]
    image_tokens = [rows * columns // MERGE**2 for _, rows, columns in grids]
    ids, _ = render_chat(messages, tokenizer, image_tokens=image_tokens, add_generation_prompt=True)
    return Prompt(ids, list(images), grids, image_config)


def make_prompt(
    text: str,
    images: Sequence[ImageSource],
    tokenizer: Tokenizer,
    image_config: ImageConfig,
    *,
    system: str | None = None,
) -> Prompt:
    """Returns one user turn, the images before the text, ready for the assistant to go on."""
    return chat_prompt(question_turns(text, len(images), system), images, tokenizer, image_config)


def question_turns(text: str, num_images: int = 0, system: str | None = None) -> list[dict]:
    """Returns the messages of one user turn, the images before the text."""
    content = [{"type": "image"}] * num_images + [{"type": "text", "text": text}]
    return [
        {"role": "system", "content": DEFAULT_SYSTEM if system is None else system},
        {"role": "user", "content": content},
    ]


def load_text_questions(
    path: str | Path, tokenizer: Tokenizer, *, style: str, limit: int, skip_bad: bool = False
) -> list[Question]:
    """Returns a file's questions for training, which is on text only.

    Those whose prompt has over `limit` tokens are dropped and counted.
    """

    def convert(example: Example) -> tuple[Example, list[Piece]]:
        if example.images:
            raise InputError(f"question {example.id} has an image: training is on text only")
        turns = question_turns(format_prompt(example, style))
        pieces = chat_pieces(turns, tokenizer, add_generation_prompt=True)
        return replace(example, response=None, meta={}), pieces

    def tokenise(block: list[tuple[Example, list[Piece]]]) -> list[Question | None]:
        questions = []
        encoded = encode_chats([pieces for _, pieces in block], tokenizer)
        for (example, _), (ids, _) in zip(block, encoded):
            questions.append(Question(example, Prompt(ids)) if len(ids) <= limit else None)
        return questions

    too_long = f"the prompt is over {limit} tokens"
    return load_examples(path, convert, tokenise, skip_bad=skip_bad, too_long=too_long).items
