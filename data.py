"""What goes into the model: tokenizer, chat template, image preprocessing, the paper's prompts, dataset readers, SFT batches.

Shapes: P patches of 14 x 14 pixels, B batch, T tokens. Every complaint about a user's file is an `InputError`.
"""
import base64
import io
import json
import math
import random
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
import torch
from PIL import Image, UnidentifiedImageError


class InputError(ValueError):
    """Something that the user gave us is wrong. The message is one line that names the file, the line and the field."""


def read_json(path: str | Path) -> object:
    """The value in a JSON file; InputError where it cannot be read or is malformed."""
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: malformed JSON ({error})") from None


# --- Tokenizer ----------------------------------------------------------------------------------------------------------------

class Tokenizer:
    """A hub folder's `tokenizer.json`, with the control tokens of Qwen2.5-VL's chat format as attributes (ids)."""

    CONTROL = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")

    def __init__(self, core: tokenizers.Tokenizer, name: str = "tokenizer.json"):
        core.encode_special_tokens = True  # text never turns into control tokens, whatever it says
        core.no_truncation()  # some published files carry these settings
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
            return cls(tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8")), str(path))
        except InputError:
            raise
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        except Exception as error:  # the Rust library raises the bare class
            raise InputError(f"{path}: malformed tokenizer ({' '.join(str(error).split())})") from None

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; `<|im_end|>` and its like in the text stay text."""
        try:
            return self.core.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):  # a lone surrogate, from JSON's \ud800 or undecodable arguments
            raise InputError(f"text is not valid Unicode: {text[:40]!a}") from None

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return self.core.decode(list(ids), skip_special_tokens=skip_special)

    def never_sampled(self, vocab_rows: int) -> torch.Tensor:
        """Ids [N] below vocab_rows that no response may hold: padding rows, and all vision tokens."""
        vision = {self.vision_start, self.vision_end, self.vision_pad, self.image_pad, self.video_pad}
        return torch.tensor([i for i in range(vocab_rows) if i not in self.known_ids or i in vision], dtype=torch.long)


# --- Images -------------------------------------------------------------------------------------------------------------------

PATCH, MERGE, TEMPORAL = 14, 2, 2  # pixels, patches per merged cell's side, frames per patch (a still image is repeated)
IMAGE_MEAN, IMAGE_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MAX_ASPECT_RATIO = 200
MAX_IMAGE_PIXELS = 100_000_000
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")  # not EPS: PIL runs a program for it


def smart_resize(height: int, width: int, *, factor: int = 28, min_pixels: int = 3136,
                 max_pixels: int = 12845056) -> tuple[int, int]:
    """(height, width) in multiples of `factor`, near the input's shape, with an area from min_pixels to max_pixels.

    The published rule to the letter: halves round to even, and with min_pixels == max_pixels the result may exceed both.
    """
    if min(height, width) < 1:
        raise InputError(f"image is zero-sized ({width} x {height})")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise InputError(f"image's aspect ratio is over {MAX_ASPECT_RATIO} ({width} x {height})")
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
        """From `preprocessor_config.json`: min_pixels and max_pixels, or (newer files) size.shortest_edge and longest_edge."""
        path = Path(folder) / "preprocessor_config.json"
        raw = read_json(path)
        if not isinstance(raw, dict):
            raise InputError(f"{path}: not an object")
        ours = {"patch_size": PATCH, "temporal_patch_size": TEMPORAL, "merge_size": MERGE, "resample": 3,
                "image_mean": list(IMAGE_MEAN), "image_std": list(IMAGE_STD)}
        for key, value in ours.items():
            if raw.get(key, value) != value:
                raise InputError(f"{path}: field '{key}' is {raw[key]}, only {value} is supported")
        size = raw.get("size") if isinstance(raw.get("size"), dict) else {}
        bounds = []
        for key, inner in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            value = raw[key] if raw.get(key) is not None else size.get(inner)
            if type(value) is not int or value < 1:
                raise InputError(f"{path}: field '{key}' (or size.{inner}) must be a positive integer, not {value!r}")
            bounds.append(value)
        if bounds[0] > bounds[1]:
            raise InputError(f"{path}: field 'min_pixels' ({bounds[0]}) is over 'max_pixels' ({bounds[1]})")
        return cls(*bounds)


def load_image(source: str | Path | bytes | Image.Image, name: str | None = None) -> Image.Image:
    """An RGB image from a path, a data URI, a file's bytes or a PIL image; `name` stands for it in complaints.

    Transparency is laid on white (as qwen_vl_utils does), 16-bit grey is scaled to 8 bits. The EXIF orientation is not
    applied, as in the published processor. Of an animation, the first frame.
    """
    is_uri = isinstance(source, str) and source.startswith("data:")
    if name is None:
        name = str(source) if isinstance(source, str | Path) and not is_uri else "data URI" if is_uri else "image"
    try:
        if is_uri:
            header, _, body = source.partition(",")
            if not header.endswith(";base64"):
                raise InputError(f"{name}: a data URI must be base64")
            source = base64.b64decode(body, validate=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit, below
            if not isinstance(source, Image.Image):
                source = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=IMAGE_FORMATS)
        width, height = source.size
        if width * height > MAX_IMAGE_PIXELS:  # from the header, before anything is decoded
            raise InputError(f"{name}: image is over 100 megapixels ({width} x {height})")
        smart_resize(height, width)  # zero-sized, too narrow
        return _to_rgb(source)
    except InputError as error:
        raise InputError(str(error) if str(error).startswith(name) else f"{name}: {error}") from None
    except Image.DecompressionBombError:
        raise InputError(f"{name}: image is over 100 megapixels") from None
    except UnidentifiedImageError:
        raise InputError(f"{name}: not an image of a known format ({', '.join(IMAGE_FORMATS)})") from None
    except Exception as error:  # on damaged files the decoders raise almost anything
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{name}: image cannot be read ({reason})") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits, which PIL also hands out as 32; its own conversion would clip
        image = image.convert("I")
        values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.int32).long()
        if values.min() < 0 or values.max() > 65535:
            raise InputError("image has more than 16 bits per channel")
        image = Image.frombytes("L", image.size, bytes(((values * 255 + 32767) // 65535).tolist()))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    image.load()
    return image.convert("RGB")


def preprocess_image(image: Image.Image, config: ImageConfig = ImageConfig()) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Patches float32 [P, 1176] and the grid (1, height, width) in patches, equal to transformers' Qwen2VLImageProcessor.

    Rows: the four patches of a merged 2 x 2 cell are neighbours. Columns: (channel, frame, row, column).
    """
    height, width = smart_resize(image.height, image.width, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
    resized = load_image(image).resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).view(height, width, 3).float() / 255
    pixels = (pixels - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)
    rows, columns = height // PATCH, width // PATCH
    patches = pixels.view(rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH, 3)
    patches = patches.permute(0, 3, 1, 4, 6, 2, 5).unsqueeze(5)  # cell row, cell column, row, column, C, 1, 14, 14
    patches = patches.expand(-1, -1, -1, -1, -1, TEMPORAL, -1, -1)
    return patches.reshape(rows * columns, 3 * TEMPORAL * PATCH * PATCH), (1, rows, columns)


# --- Chat ---------------------------------------------------------------------------------------------------------------------

DEFAULT_SYSTEM = "You are a helpful assistant."


def render_chat(messages: Sequence[dict], tokenizer: Tokenizer, *, image_tokens: Iterable[int] = (),
                add_generation_prompt: bool = False) -> tuple[list[int], list[bool]]:
    """Ids of a conversation in Qwen2.5-VL's published chat template, and which of them an assistant has to produce.

    messages: {"role": system|user|assistant, "content": text or a list of {"type": "image"} and {"type": "text", "text"}}.
    image_tokens: how many <|image_pad|> each image takes, in order. The mask is true on an assistant's text and its
    <|im_end|>, not on the newline behind it. Text between two control tokens is tokenised in one piece, as if the whole
    rendered string were; only an assistant's text is cut from its "assistant\\n", so that a conversation always begins
    with the ids that a sampler was prompted with (it differs where a response begins with a line break).
    """
    if messages and messages[0].get("role") != "system":
        messages = [{"role": "system", "content": DEFAULT_SYSTEM}, *messages]
    ids: list[int] = []
    mask: list[bool] = []

    def add(new: list[int], produced: bool = False):
        ids.extend(new)
        mask.extend([produced] * len(new))

    counts = list(image_tokens)
    images = 0
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant"):
            raise InputError(f"message: field 'role' must be system, user or assistant, not {role!r}")
        produced = role == "assistant"
        add([tokenizer.im_start])
        text = f"{role}\n"
        if produced:
            add(tokenizer.encode(text))
            text = ""
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content or ():
            if part.get("type") == "image":
                add(tokenizer.encode(text), produced)
                text = ""
                if images == len(counts):
                    raise InputError(f"message: more image parts than images ({len(counts)})")
                add([tokenizer.vision_start, *[tokenizer.image_pad] * counts[images], tokenizer.vision_end])
                images += 1
            elif part.get("type") == "text" and isinstance(part.get("text"), str):
                text += part["text"]
            else:
                raise InputError(f"message: a part must be an image or a text, not {part.get('type')!r}")
        add(tokenizer.encode(text), produced)
        add([tokenizer.im_end], produced)
        add(tokenizer.encode("\n"))
    if images != len(counts):
        raise InputError(f"message: {len(counts)} images but {images} image parts")
    if add_generation_prompt:
        add([tokenizer.im_start, *tokenizer.encode("assistant\n")])
    return ids, mask


@dataclass
class Prompt:
    """What a response is sampled after."""
    ids: list[int]
    patches: torch.Tensor | None = None  # [P, 1176], all images' rows one after the other
    grids: list[tuple[int, int, int]] = field(default_factory=list)  # per image, in patches


def make_prompt(text: str, images: Sequence[Image.Image], tokenizer: Tokenizer, image_config: ImageConfig, *,
                system: str | None = None) -> Prompt:
    """One user turn, the images before the text, ready for the assistant to go on."""
    pairs = [preprocess_image(image, image_config) for image in images]
    messages = [{"role": "system", "content": DEFAULT_SYSTEM if system is None else system},
                {"role": "user", "content": [{"type": "image"}] * len(pairs) + [{"type": "text", "text": text}]}]
    grids = [grid for _, grid in pairs]
    ids, _ = render_chat(messages, tokenizer, image_tokens=[h * w // MERGE**2 for _, h, w in grids], add_generation_prompt=True)
    return Prompt(ids, torch.cat([patches for patches, _ in pairs]) if pairs else None, grids)


# --- Prompts of the paper -----------------------------------------------------------------------------------------------------

TRAIN_PROMPT = (
    "You will solve a problem/request. You should provide your thoughts within <think> </think> tags before providing the "
    "answer.\nWrite your final answer within <answer> </answer> tags. Here is the question: {question}")
MCQ_PROMPT = (
    "You should provide your thoughts within <think> </think> tags, then answer with just one of the options below within "
    "<answer> </answer> tags (For example, if the question is \n'Is the earth flat?\n A: Yes \nB: No', you should answer with "
    "<think>...</think> <answer>B: No </answer>). Here is the question: {question} Options:\n\n{options}")
MATH_PROMPT = (
    "A conversation between User and Assistant. The user asks a question, and you as the assistant solves it. You should first "
    "think about the reasoning process in the mind and then provide the user with the answer. The reasoning process and answer "
    "are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning process here "
    "</think><answer> the final answer as the option letter or the number depending on the question </answer> (For example, if "
    "the question is \n'Is the earth flat?\n A: Yes \nB: No', you should answer with <think> your reasoning </think> "
    "<answer>B: No</answer>. If the question is 'What is 1+1?', you should answer with <think> your reasoning </think> "
    "<answer>2 </answer>).\n\nHere is the question: {question}")


@dataclass
class Example:
    """One question. With options, `answer` is one of their letters."""
    id: str
    question: str
    answer: str
    options: dict[str, str] | None = None  # letter -> text
    images: list[str | Path] = field(default_factory=list)  # paths and data URIs, for load_image
    response: str | None = None  # a whole worked response, for SFT
    domain: str | None = None
    meta: dict = field(default_factory=dict)  # all other fields of the record


def _option_lines(example: Example) -> str:
    return "\n".join(f"{letter}: {text}" for letter, text in (example.options or {}).items())


def question_text(example: Example) -> str:
    """The question, and its options (if any) as lines "A: text"."""
    return f"{example.question}\n{_option_lines(example)}" if example.options else example.question


def format_prompt(example: Example, style: str) -> str:
    """The user's text in one of the paper's prompts (train, mcq, math), or the bare question (direct).

    Options are lines "A: text". The paper's math prompt ends in " Options:\\n\\n{options}"; without options we leave that off.
    """
    if style == "direct":
        return question_text(example)
    if style == "train":
        return TRAIN_PROMPT.format(question=question_text(example))
    if style == "mcq":
        if not example.options:
            raise InputError(f"{example.id}: the mcq prompt needs options")
        return MCQ_PROMPT.format(question=example.question, options=_option_lines(example))
    if style == "math":
        options = f" Options:\n\n{_option_lines(example)}" if example.options else ""
        return MATH_PROMPT.format(question=example.question) + options
    raise InputError(f"prompt style must be train, mcq, math or direct, not {style!r}")


# --- Datasets -----------------------------------------------------------------------------------------------------------------

def read_examples(path: str | Path) -> Iterator[Example]:
    """The examples of a JSONL file (streamed) or a JSON array; the schema of each record is known by its fields.

    Plain: id?, question, answer, options?, image?, response?, domain?. OpenThoughts: conversations. Orz: [{from, value},
    {ground_truth}]. GSM8K: question, answer with ####. MedQA: question, options, answer_idx.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        raise InputError(f'{path}: Parquet is not read; convert it: python -c "import pandas; '
                         f"pandas.read_parquet('{path.name}').to_json('{path.stem}.jsonl', orient='records', lines=True)\"")
    empty = True
    for where, number, record in _records(path):
        empty = False
        yield _example(record, where, f"{path.stem}-{number}", path.parent)
    if empty:
        raise InputError(f"{path}: no examples in the file")


def _records(path: Path) -> Iterator[tuple[str, int, object]]:
    """(place for complaints, number from 1, record)."""
    try:
        with path.open("rb") as file:
            first = True
            for number, raw in enumerate(file, 1):
                where = f"{path}: line {number}"
                raw = raw.removeprefix(b"\xef\xbb\xbf").strip()
                if not raw:
                    continue
                try:
                    record = json.loads(raw)
                except (ValueError, RecursionError) as error:
                    if first and raw.startswith(b"["):
                        record = None
                    else:
                        raise InputError(f"{where}: malformed JSON ({error})") from None
                # An array that is not one Orz record is the whole file.
                if first and (record is None or isinstance(record, list) and not _is_orz(record)):
                    array = record
                    if array is None or file.read().strip():
                        array = read_json(path)
                    for item, record in enumerate(array, 1):
                        yield f"{path}: item {item}", item, record
                    return
                first = False
                yield where, number, record
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _is_orz(record: list) -> bool:
    return bool(record) and isinstance(record[0], dict) and "from" in record[0]


def _get(record: object, key: str, kind: type | tuple, where: str, default: object = ...) -> object:
    """record[key], checked; with a default the field may be missing or null. Numbers pass for text."""
    value = record.get(key) if isinstance(record, dict) else None
    if value is None:
        if default is ...:
            raise InputError(f"{where}: field '{key}' is missing")
        return default
    if kind is str and type(value) in (int, float):
        value = str(value)
    if not isinstance(value, kind):
        names = {str: "text", dict: "an object", list: "an array"}
        raise InputError(f"{where}: field '{key}' must be {names[kind]}, not {json.dumps(value)[:40]}")
    if default is ... and not value:
        raise InputError(f"{where}: field '{key}' is empty")
    return value


def _example(record: object, where: str, default_id: str, folder: Path) -> Example:
    if isinstance(record, list):
        return _orz(record, where, default_id)
    if not isinstance(record, dict):
        raise InputError(f"{where}: a record must be an object, not {json.dumps(record)[:40]}")
    common = {"id": _get(record, "id", str, where, default_id), "domain": _get(record, "domain", str, where, None)}
    if "conversations" in record:
        common |= _open_thoughts(record, where)
        used = {"conversations"}
    elif "question" in record or "answer" in record:
        common |= _question(record, where, folder)
        used = {"question", "options", "image", "response"} | ({"answer"} if "answer_idx" not in record else {"answer_idx"})
    else:
        raise InputError(f"{where}: unknown schema, with fields {', '.join(record) or '(none)'}")
    meta = common.pop("meta", {}) | {key: value for key, value in record.items() if key not in used | {"id", "domain"}}
    return Example(**common, meta=meta)


def _question(record: dict, where: str, folder: Path) -> dict:
    """Our plain schema, GSM8K and MedQA."""
    options = _get(record, "options", dict, where, None)
    for letter in options or {}:
        _get(options, letter, str, f"{where}: field 'options'")
    options = {letter: str(text) for letter, text in options.items()} if options else None
    key = "answer_idx" if "answer_idx" in record else "answer"
    answer, meta = _get(record, key, str, where), {}
    if options and answer not in options:
        letters = [letter for letter, text in options.items() if text == answer]
        if len(letters) != 1:
            raise InputError(f"{where}: field '{key}' is not one of the options: {answer[:40]!r}")
        answer = letters[0]
    if not options and "####" in answer:  # GSM8K: the worked solution, then the number
        meta["solution"], _, answer = answer.rpartition("####")
        answer = answer.strip().replace(",", "")
        if not answer:
            raise InputError(f"{where}: field '{key}' has nothing behind ####")
    images = record.get("image")
    images = [] if images is None else images if isinstance(images, list) else [images]
    if not all(isinstance(image, str) and image for image in images):
        raise InputError(f"{where}: field 'image' must be a path, a data URI or an array of them")
    return {"question": _get(record, "question", str, where), "answer": answer, "options": options, "meta": meta,
            "images": [image if image.startswith("data:") else folder / image for image in images],
            "response": _get(record, "response", str, where, None)}


OPEN_THOUGHTS = re.compile(r"\s*<\|begin_of_thought\|>(.*)<\|end_of_thought\|>\s*"
                           r"<\|begin_of_solution\|>(.*)<\|end_of_solution\|>\s*", re.DOTALL)


def _open_thoughts(record: dict, where: str) -> dict:
    """The tags of the released traces become the paper's; the system prompt that asks for the former goes to meta."""
    turns = _get(record, "conversations", list, where)
    where = f"{where}: field 'conversations'"
    if [turn.get("from") if isinstance(turn, dict) else None for turn in turns] != ["user", "assistant"]:
        raise InputError(f"{where} must be one user and one assistant turn")
    value = _get(turns[1], "value", str, where)
    match = OPEN_THOUGHTS.fullmatch(value)
    tags = re.findall(r"<\|(?:begin|end)_of_(?:thought|solution)\|>", value)
    if not match or len(tags) != 4 or not all(part.strip() for part in match.groups()):
        raise InputError(f"{where}: the response is not <|begin_of_thought|>...<|begin_of_solution|>...<|end_of_solution|>")
    thought, solution = (part.strip() for part in match.groups())
    # The line break and the space keep `</think>` three tokens of its own, the very ids that a forced exit appends.
    return {"question": _get(turns[0], "value", str, where), "answer": solution,
            "response": f"<think>\n{thought}\n</think> <answer>{solution}</answer>"}


def _orz(record: list, where: str, default_id: str) -> Example:
    if not _is_orz(record) or len(record) != 2:
        raise InputError(f"{where}: an array must be [{{from, value}}, {{ground_truth}}]")
    truth = _get(record[1], "ground_truth", dict, where)
    return Example(default_id, _get(record[0], "value", str, where), _get(truth, "value", str, f"{where}: field 'ground_truth'"),
                   meta={key: value for key, value in truth.items() if key != "value"})


# --- SFT ----------------------------------------------------------------------------------------------------------------------

def encode_example(example: Example, tokenizer: Tokenizer, *, style: str, max_length: int,
                   answer_only: bool = False) -> tuple[list[int], list[bool]]:
    """(ids, loss mask) of a text example, cut to max_length; the paper's non-CoT ablation trains on the answer only.

    A sequence that is cut has no <|im_end|>: nothing teaches the model to stop there. Where the prompt alone fills
    max_length the mask is all false; such examples are for the caller to drop.
    """
    if example.images:
        raise InputError(f"{example.id}: SFT is on text only, but the example has images")
    response = f"<answer>{example.answer}</answer>" if answer_only else example.response
    if response is None:
        raise InputError(f"{example.id}: field 'response' is missing")
    ids, mask = render_chat([{"role": "user", "content": format_prompt(example, style)},
                             {"role": "assistant", "content": response}], tokenizer)
    return ids[:max_length], mask[:max_length]


def collate(rows: Sequence[tuple[Sequence[int], Sequence[bool]]], pad_id: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids [B, T] and loss_mask [B, T] bool, padded on the right (attention is causal: any pad id will do)."""
    length = max(len(ids) for ids, _ in rows)
    input_ids = torch.full((len(rows), length), pad_id, dtype=torch.long)
    loss_mask = torch.zeros((len(rows), length), dtype=torch.bool)
    for row, (ids, mask) in enumerate(rows):
        input_ids[row, :len(ids)] = torch.tensor(ids)
        loss_mask[row, :len(ids)] = torch.tensor(mask)
    return input_ids, loss_mask


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """The order of n examples in an epoch: a function of (seed, epoch) alone, so that a resumed run sees the same."""
    return random.Random(f"{seed}/{epoch}").sample(range(n), n)
