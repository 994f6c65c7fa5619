"""What goes into the model: tokenizer, chat template, image preprocessing, the paper's prompts, training sequences.

    python data.py medqa.jsonl                                                   # how a file is read (inspection.py)
    python data.py openthoughts.jsonl --model Qwen2.5-VL-7B-Instruct --prompt-style train --max-length 4096

Shapes: P patches of 14 x 14 pixels, B batch, T tokens. Every complaint about what a user gave us is an `InputError`.
"""
import base64
import io
import math
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import tokenizers
import torch
from PIL import Image, UnidentifiedImageError

from data.datasets import (Example, InputError, convert_examples, read_examples, read_json, repeated_id,
                     report_bad)  # from here on, also for who imports data


class Tokenizer:
    """A model folder's `tokenizer.json`, with the control tokens of Qwen2.5-VL's chat format as attributes (ids)."""

    CONTROL = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")

    def __init__(self, core: tokenizers.Tokenizer, name: str = "tokenizer.json"):
        core.encode_special_tokens = True  # text never turns into control tokens, whatever it says
        core.no_truncation()  # files saved after training carry these two settings
        core.no_padding()
        self.core = core
        for token in self.CONTROL:
            if core.token_to_id(f"<|{token}|>") is None:
                raise InputError(f"{name}: special token <|{token}|> is missing")
            setattr(self, token, core.token_to_id(f"<|{token}|>"))
        self.stop_ids = (self.im_end, self.endoftext)
        self.known_ids = frozenset(core.get_vocab(with_added_tokens=True).values())
        self.vocab_size = max(self.known_ids) + 1

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Tokenizer":
        path = Path(folder) / "tokenizer.json"
        try:
            core = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        except Exception as error:  # the Rust library raises the bare class
            raise InputError(f"{path}: malformed tokenizer ({' '.join(str(error).split())})") from None
        return cls(core, str(path))

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; `<|im_end|>` and its like in the text stay text."""
        try:
            return self.core.encode(text, add_special_tokens=False).ids
        except TypeError:  # a lone surrogate: undecodable bytes on the command line
            raise InputError(f"text is not valid Unicode: {text[:40]!a}") from None

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return self.core.decode(list(ids), skip_special_tokens=skip_special)

    def never_sampled(self, vocab_rows: int) -> torch.Tensor:
        """Ids [N] below vocab_rows that no response may hold: ids without a token, and all vision tokens."""
        vision = {self.vision_start, self.vision_end, self.vision_pad, self.image_pad, self.video_pad}
        banned = [i for i in range(vocab_rows) if i not in self.known_ids or i in vision]
        return torch.tensor(banned, dtype=torch.long)


# Images

PATCH, MERGE, TEMPORAL = 14, 2, 2  # pixels; patches per merged cell's side; frames per patch (a still is repeated)
IMAGE_MEAN, IMAGE_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")  # not EPS: PIL runs a program for it


def smart_resize(height: int, width: int, *, factor: int = 28, min_pixels: int = 3136,
                 max_pixels: int = 12845056) -> tuple[int, int]:
    """(height, width) in multiples of `factor`, about the same shape, with an area from min_pixels to max_pixels.

    The published rule to the letter: halves round to even; with min_pixels == max_pixels the area may exceed both.
    """
    if min(height, width) < 1:
        raise InputError(f"image is zero-sized ({width} x {height})")
    if max(height, width) / min(height, width) > 200:
        raise InputError(f"image's aspect ratio is over 200 ({width} x {height})")
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / beta / factor) * factor)
        new_width = max(factor, math.floor(width / beta / factor) * factor)
    elif new_height * new_width < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * beta / factor) * factor
        new_width = math.ceil(width * beta / factor) * factor
    return new_height, new_width


@dataclass(frozen=True)
class ImageConfig:
    """Bounds on an image's area after resizing, in pixels."""
    min_pixels: int = 3136
    max_pixels: int = 12845056

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "ImageConfig":
        """Of `preprocessor_config.json`: min_pixels, max_pixels or (newer files) size.shortest_edge, .longest_edge."""
        path = Path(folder) / "preprocessor_config.json"
        raw = read_json(path)
        fixed = {"patch_size": PATCH, "temporal_patch_size": TEMPORAL, "merge_size": MERGE, "resample": 3,
                 "image_mean": list(IMAGE_MEAN), "image_std": list(IMAGE_STD)}
        for key, value in fixed.items():
            if raw.get(key, value) != value:
                raise InputError(f"{path}: field '{key}' is {raw[key]!r}, only {value} is supported")
        size = raw.get("size") if isinstance(raw.get("size"), dict) else {}
        low = size.get("shortest_edge") if raw.get("min_pixels") is None else raw["min_pixels"]
        high = size.get("longest_edge") if raw.get("max_pixels") is None else raw["max_pixels"]
        if type(low) is not int or type(high) is not int or not 1 <= low <= high:
            raise InputError(f"{path}: fields 'min_pixels' and 'max_pixels' must be whole numbers, 1 <= min <= max, "
                             f"but are {low!r} and {high!r}")
        return cls(low, high)


def load_image(source: str | Path | bytes | Image.Image, name: str | None = None) -> Image.Image:
    """An RGB image from a path, a data URI, a file's bytes or a PIL image; `name` stands for it in complaints.

    Transparency is laid on white (as qwen_vl_utils does), 16-bit grey is scaled to 8 bits. The EXIF orientation is
    not applied, as in the published processor. Of an animation the first frame is taken.
    """
    is_uri = isinstance(source, str) and source.startswith("data:")
    name = name or ("data URI" if is_uri else str(source) if isinstance(source, str | Path) else "image")
    try:
        if is_uri:
            header, _, body = source.partition(";base64,")
            source = base64.b64decode(body if body else header, validate=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's warnings of large and of odd files: we refuse, or take them
            if not isinstance(source, Image.Image):
                source = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=IMAGE_FORMATS)
            width, height = source.size  # from the header: nothing is decoded yet
            if width * height > 100_000_000:
                raise InputError(f"image is over 100 megapixels ({width} x {height})")
            smart_resize(height, width)  # complains of zero-sized and of too narrow ones
            return _to_rgb(source)
    except InputError as error:
        reason = str(error)
    except UnidentifiedImageError:
        reason = f"not an image of a known format ({', '.join(IMAGE_FORMATS)}), or zero-sized"
    except Image.DecompressionBombError:
        reason = "image is over 100 megapixels"
    except Exception as error:  # on damaged files the decoders raise almost anything
        reason = f"image cannot be read ({getattr(error, 'strerror', None) or ' '.join(str(error).split())})"
    raise InputError(f"{name}: {reason}")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode[0] in "IF":  # 16-bit grey, which PIL also hands out as 32; its own conversion to 8 would clip
        wide = image.convert("I")
        if image.mode == "F" or wide.getextrema()[0] < 0 or wide.getextrema()[1] > 65535:
            raise InputError("image has more than 16 bits per channel")
        image = wide.point(lambda value: value * (1 / 257) + 0.5).convert("L")
        image.info.pop("transparency", None)  # a 16-bit value; such a colour stays opaque
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def preprocess_image(image: Image.Image,
                     config: ImageConfig = ImageConfig()) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Patches float32 [P, 1176] and the grid (1, rows, columns), bit-equal to transformers' Qwen2VLImageProcessor.

    P = rows * columns; the four patches of a merged 2 x 2 cell are neighbours. In a patch: (channel, frame, y, x).
    """
    height, width = smart_resize(image.height, image.width, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
    resized = load_image(image).resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).view(height, width, 3).float() / 255
    pixels = (pixels - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)
    rows, columns = height // PATCH, width // PATCH
    patches = pixels.view(rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH, 3)
    patches = patches.permute(0, 3, 1, 4, 6, 2, 5).unsqueeze(5)  # cell row, cell column, row, column, channel, 1, y, x
    patches = patches.expand(-1, -1, -1, -1, -1, TEMPORAL, -1, -1)
    return patches.reshape(rows * columns, 3 * TEMPORAL * PATCH * PATCH), (1, rows, columns)


# Chat

DEFAULT_SYSTEM = "You are a helpful assistant."


def render_chat(messages: Sequence[dict], tokenizer: Tokenizer, *, image_tokens: Sequence[int] = (),
                add_generation_prompt: bool = False) -> tuple[list[int], list[bool]]:
    """Ids of a conversation in Qwen2.5-VL's published chat template, and the mask of those that the assistant produces.

    messages: {"role": system|user|assistant, "content": text, or a list of {"type": "image"} and {"type": "text",
    "text": ...}}. image_tokens: the number of <|image_pad|> of each image, in order. The mask is true on an assistant's
    text and its <|im_end|>, not on the newline behind it.
    Text between two control tokens is tokenised in one piece, as it is when the rendered string is. An assistant's text
    alone is cut off its "assistant\\n", so that training ids begin with the very ids that a sampler is prompted with
    (the two ways differ only for a text whose leading white space holds a line break).
    """
    if messages and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": DEFAULT_SYSTEM}, *messages]
    ids: list[int] = []
    mask: list[bool] = []

    def add(new: list[int], produced: bool = False):
        ids.extend(new)
        mask.extend([produced] * len(new))

    images = 0
    for message in messages:
        role, content = message["role"], message["content"]
        if role not in ("system", "user", "assistant"):
            raise InputError(f"message: field 'role' must be system, user or assistant, not {role!r}")
        produced = role == "assistant"
        add([tokenizer.im_start])
        text = f"{role}\n"
        if produced:
            add(tokenizer.encode(text))
            text = ""
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                text += part["text"]
            elif part["type"] == "image":
                add(tokenizer.encode(text), produced)
                text = ""
                count = image_tokens[images] if images < len(image_tokens) else 0  # complained of below
                add([tokenizer.vision_start, *[tokenizer.image_pad] * count, tokenizer.vision_end])
                images += 1
            else:
                raise InputError(f"message: a part must be 'text' or 'image', not {part['type']!r}")
        add([*tokenizer.encode(text), tokenizer.im_end], produced)
        add(tokenizer.encode("\n"))
    if images != len(image_tokens):
        raise InputError(f"messages: {len(image_tokens)} images for {images} image parts")
    if add_generation_prompt:
        add([tokenizer.im_start, *tokenizer.encode("assistant\n")])
    return ids, mask


@dataclass
class Prompt:
    """What a response is sampled after."""
    ids: list[int]
    patches: torch.Tensor | None = None  # [P, 1176], the rows of all images one after the other
    grids: list[tuple[int, int, int]] = field(default_factory=list)  # per image


def chat_prompt(messages: Sequence[dict], images: Sequence[Image.Image], tokenizer: Tokenizer,
                image_config: ImageConfig) -> Prompt:
    """A conversation, ready for the assistant to go on; `images` in the order of the messages' image parts."""
    pairs = [preprocess_image(image, image_config) for image in images]
    image_tokens = [rows * columns // MERGE**2 for _, (_, rows, columns) in pairs]
    ids, _ = render_chat(messages, tokenizer, image_tokens=image_tokens, add_generation_prompt=True)
    return Prompt(ids, torch.cat([patches for patches, _ in pairs]) if pairs else None, [grid for _, grid in pairs])


def make_prompt(text: str, images: Sequence[Image.Image], tokenizer: Tokenizer, image_config: ImageConfig, *,
                system: str | None = None) -> Prompt:
    """One user turn, the images before the text, ready for the assistant to go on."""
    messages = [{"role": "system", "content": DEFAULT_SYSTEM if system is None else system},
                {"role": "user", "content": [{"type": "image"}] * len(images) + [{"type": "text", "text": text}]}]
    return chat_prompt(messages, images, tokenizer, image_config)


# The paper's prompts

TRAIN_PROMPT = (
    "You will solve a problem/request. You should provide your thoughts within <think> </think> tags before providing "
    "the answer.\nWrite your final answer within <answer> </answer> tags. Here is the question: ")
MCQ_PROMPT = (
    "You should provide your thoughts within <think> </think> tags, then answer with just one of the options below "
    "within <answer> </answer> tags (For example, if the question is \n'Is the earth flat?\n A: Yes \nB: No', you "
    "should answer with <think>...</think> <answer>B: No </answer>). Here is the question: ")
MATH_PROMPT = (
    "A conversation between User and Assistant. The user asks a question, and you as the assistant solves it. You "
    "should first think about the reasoning process in the mind and then provide the user with the answer. The "
    "reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, "
    "i.e., <think> reasoning process here </think><answer> the final answer as the option letter or the number "
    "depending on the question </answer> (For example, if the question is \n'Is the earth flat?\n A: Yes \nB: No', you "
    "should answer with <think> your reasoning </think> <answer>B: No</answer>. If the question is 'What is 1+1?', you "
    "should answer with <think> your reasoning </think> <answer>2 </answer>).\n\nHere is the question: ")


def _option_lines(example: Example) -> str:
    return "\n".join(f"{letter}: {text}" for letter, text in example.options.items())


def question_text(example: Example) -> str:
    """The question, and its options (if any) as lines "A: text"."""
    return f"{example.question}\n{_option_lines(example)}" if example.options else example.question


def format_prompt(example: Example, style: str) -> str:
    """The user's text in one of the paper's prompts (train, mcq, math), or the bare question (direct).

    The paper ends its math prompt with " Options:\\n\\n{options}", which we leave off where there are none.
    """
    if style == "mcq" and not example.options:
        raise InputError(f"{example.id}: the mcq prompt needs options")
    if style in ("mcq", "math"):
        options = f" Options:\n\n{_option_lines(example)}" if example.options else ""
        return (MCQ_PROMPT if style == "mcq" else MATH_PROMPT) + example.question + options
    if style not in ("train", "direct"):
        raise InputError(f"prompt style must be train, mcq, math or direct, not {style!r}")
    return (TRAIN_PROMPT if style == "train" else "") + question_text(example)


# SFT

def encode_example(example: Example, tokenizer: Tokenizer, *, style: str, max_length: int,
                   answer_only: bool = False) -> tuple[list[int], list[bool]]:
    """(ids, loss mask) of a text example, cut to max_length; the paper's non-CoT ablation trains on the answer only.

    What is cut has no <|im_end|>, so nothing teaches the model to stop there. Where the prompt alone fills max_length,
    the mask is all false: such rows are for the caller to drop.
    """
    if example.images:
        raise InputError(f"{example.id}: SFT is on text, but field 'image' is given")
    response = f"<answer>{example.answer}</answer>" if answer_only else example.response
    if response is None:
        raise InputError(f"{example.id}: field 'response' is missing")
    ids, mask = render_chat([{"role": "user", "content": format_prompt(example, style)},
                             {"role": "assistant", "content": response}], tokenizer)
    return ids[:max_length], mask[:max_length]


Row = tuple[torch.Tensor, torch.Tensor]  # a sequence as it is kept: ids int32 [T] and loss mask bool [T]


def make_row(ids: Sequence[int], mask: Sequence[bool]) -> Row:
    """Five bytes a token; as Python lists they would be 44."""
    return torch.tensor(ids, dtype=torch.int32), torch.tensor(mask, dtype=torch.bool)


def collate(rows: Sequence[Row], pad_id: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids [B, T] and bool loss_mask [B, T], padded on the right (attention is causal: any pad id will do)."""
    length = max(len(ids) for ids, _ in rows)
    input_ids = torch.full((len(rows), length), pad_id)
    loss_mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for b, (ids, mask) in enumerate(rows):
        input_ids[b, :len(ids)], loss_mask[b, :len(mask)] = ids, mask
    return input_ids, loss_mask


def collate_packed(rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """All rows end to end in one, with no padding: input_ids and loss_mask [1, T], position_ids [3, 1, T], cu_seqlens.

    Positions restart at 0 with each sequence, and cu_seqlens [N + 1] holds the borders across which nothing is seen. A
    first token follows nothing, so it carries no loss: its prediction would be the sequence before's.
    """
    lengths = [len(ids) for ids, _ in rows]
    cu_seqlens = torch.tensor([0, *accumulate(lengths)])
    input_ids, loss_mask = (torch.cat(parts)[None] for parts in zip(*rows))
    loss_mask[:, cu_seqlens[:-1]] = False
    position_ids = torch.cat([torch.arange(length) for length in lengths]).expand(3, 1, -1)
    return input_ids.long(), loss_mask, position_ids, cu_seqlens


def pack(rows: Sequence[Row], size: int) -> list[list[Row]]:
    """Deals rows out to packs of up to `size` tokens, by first-fit decreasing: each goes, the longest first, to the
    first pack with room for it. That makes at most 11/9 of the fewest possible packs, and one more (Johnson, 1973)."""
    packs, room = [], []
    for row in sorted(rows, key=lambda row: -len(row[0])):
        length = len(row[0])
        place = next((i for i, left in enumerate(room) if length <= left), len(packs))
        if place == len(packs):
            packs.append([])
            room.append(size)
        packs[place].append(row)
        room[place] -= length
    return packs


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """The order of n examples in an epoch: a function of (seed, epoch) alone, so that a resumed run sees the same."""
    return random.Random(f"{seed}/{epoch}").sample(range(n), n)


if __name__ == "__main__":
    from tools.inspect_data import main  # it stands on the whole of this file
    from training import run_command
    run_command(main)
