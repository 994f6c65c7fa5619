"""What benchmarks/check_weights.py gives to a model: a text, two questions, a picture, a lesson."""

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from data import Example, ImageConfig, Prompt, Tokenizer, chat_prompt, encode_example

# The beginning of Pride and Prejudice, which language models have read, a line to be tokenised, and
# the same passage once more: a model that looks back rightly can copy it.
PASSAGE = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, "
    "must be in want of a wife. However little known the feelings or views of such a man may be on "
    "his first entering a neighbourhood, this truth is so well fixed in the minds of the "
    "surrounding families, that he is considered the rightful property of some one or other of "
    "their daughters."
)
LINE = "1 2 3 4 5 6 7 8 9 10; 一二三四五六七八九十; def add(a, b): return a + b"
TEXT = f"{PASSAGE}\n{LINE}\n{PASSAGE}"
SYSTEM = "You are a helpful assistant."
ASKED = "What is 17 + 25? Answer with the number."
ASKED_OF_PICTURE = "Which shapes are in this picture, and which colours do they have?"
LESSON = Example(
    id="lesson",
    question="A train goes 60 km in one hour. How far does it go in 3 hours?",
    answer="180",
    response="<think>In each hour it goes 60 km, so in 3 hours it goes 3 * 60 = 180 km.</think>\n"
    "<answer>180</answer>",
)


def draw_picture() -> Image.Image:
    """Returns a red disc and a blue square on a grey that grows lighter to the right.

    Both sides are no multiples of 28, so that the picture must be resized.
    """
    width, height = 250, 190
    pixels = bytearray()
    for y in range(height):
        for x in range(width):
            if (x - 70) ** 2 + (y - 95) ** 2 < 45**2:
                pixels += bytes((220, 30, 30))
            elif 145 <= x < 225 and 55 <= y < 135:
                pixels += bytes((30, 60, 220))
            else:
                pixels += bytes([155 + 100 * x // width] * 3)
    return Image.frombytes("RGB", (width, height), bytes(pixels))


@dataclass
class Inputs:
    """What both programs get."""

    text: list[int]
    question: Prompt
    picture: Prompt | None  # None for a text-only model
    lesson: tuple[list[int], list[bool]]  # ids, and which of them are scored
    image_pad: int  # the id of an image token

    def tensors(self) -> dict[str, Tensor]:
        """Returns them as the peer reads them (transformers_forward.py)."""
        ids, scored = self.lesson
        out = {
            "text.ids": torch.tensor(self.text),
            "lesson.ids": torch.tensor(ids),
            "lesson.scored": torch.tensor(scored),
        }
        if self.picture is not None:
            out["picture.ids"] = torch.tensor(self.picture.ids)
            out["picture.grid"] = torch.tensor(self.picture.grids)
            out["picture.patches"] = self.picture.pixel_values()
        return out

    def template_ids(self) -> list[int]:
        """Returns the ids of the conversation that a folder's template is asked to render: with
        one image token, which the processor then makes as many as the picture needs."""
        if self.picture is None:
            return self.question.ids
        ids, image = self.picture.ids, self.image_pad
        return [token for token, last in zip(ids, [None, *ids]) if not token == last == image]


def conversation(text: str, picture: bool) -> list[dict]:
    """Returns a question to the model, with or without an image before it."""
    content = [{"type": "image"}, {"type": "text", "text": text}] if picture else text
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]


def make_inputs(tokenizer: Tokenizer, images: ImageConfig | None) -> Inputs:
    """Returns the inputs in a folder's tokens; `images` is None for a text-only model."""
    picture = None
    if images is not None:
        asked = conversation(ASKED_OF_PICTURE, picture=True)
        picture = chat_prompt(asked, [draw_picture()], tokenizer, images)
    question = chat_prompt(conversation(ASKED, picture=False), [], tokenizer, ImageConfig())
    lesson = encode_example(LESSON, tokenizer, style="train", max_length=4096)
    return Inputs(tokenizer.encode(TEXT), question, picture, lesson, tokenizer.image_pad)
