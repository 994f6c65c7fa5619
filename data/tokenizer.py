"""The tokenizer of a model folder, and Qwen2.5-VL's chat template."""

from collections.abc import Sequence
from pathlib import Path

import tokenizers
import torch

from hub.config import Config
from hub.errors import InputError


class Tokenizer:
    """A model folder's `tokenizer.json`, with the control tokens of Qwen2.5-VL's chat format as attributes (ids)."""

    CONTROL = (
        "endoftext",
        "im_start",
        "im_end",
        "vision_start",
        "vision_end",
        "vision_pad",
        "image_pad",
        "video_pad",
    )

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
            raise InputError(
                f"{path}: malformed tokenizer ({' '.join(str(error).split())})"
            ) from None
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
        vision = {
            self.vision_start,
            self.vision_end,
            self.vision_pad,
            self.image_pad,
            self.video_pad,
        }
        banned = [i for i in range(vocab_rows) if i not in self.known_ids or i in vision]
        return torch.tensor(banned, dtype=torch.long)


DEFAULT_SYSTEM = "You are a helpful assistant."


def render_chat(
    messages: Sequence[dict],
    tokenizer: Tokenizer,
    *,
    image_tokens: Sequence[int] = (),
    add_generation_prompt: bool = False,
) -> tuple[list[int], list[bool]]:
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
            raise InputError(
                f"message: field 'role' must be system, user or assistant, not {role!r}"
            )
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
                count = (
                    image_tokens[images] if images < len(image_tokens) else 0
                )  # complained of below
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


def check_vocabulary(tokenizer: Tokenizer, config: Config) -> None:
    """Raises InputError where text could turn into ids that the model has no row for."""
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"tokenizer.json has ids up to {tokenizer.vocab_size - 1}, "
            f"config.json a vocab_size of {config.vocab_size} only"
        )
