"""The tokenizer of a model folder, and Qwen2.5-VL's chat template."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
from torch import Tensor

from hub.config import Config
from hub.errors import InputError, unreadable

DEFAULT_SYSTEM = "You are a helpful assistant."
# Where a text may be cut before it is tokenised: between a line break and a visible character.
LINE_START = re.compile(r"(?<=\n)(?=\S)")
STRETCH = 1000  # characters that are tokenised at a time, at the least


class Tokenizer:
    """A model folder's tokenizer.json, with the ids of the control tokens as attributes.

    `tokenizer.im_end` is the id of <|im_end|>, and so on for all of CONTROL.
    """

    VISION = ("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
    CONTROL = ("endoftext", "im_start", "im_end", *VISION)

    def __init__(self, core: tokenizers.Tokenizer, name: str = "tokenizer.json"):
        core.encode_special_tokens = True  # text never turns into control tokens, whatever it says
        core.no_truncation()  # files saved after training carry these two settings
        core.no_padding()
        self.core = core
        for token in self.CONTROL:
            token_id = core.token_to_id(f"<|{token}|>")
            if token_id is None:
                raise InputError(f"{name}: special token <|{token}|> is missing")
            setattr(self, token, token_id)
        self.stop_ids = (self.im_end, self.endoftext)
        self.known_ids = frozenset(core.get_vocab(with_added_tokens=True).values())
        self.vocab_size = max(self.known_ids) + 1

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Tokenizer":
        """Reads a model folder's tokenizer.json; InputError if it is not there or malformed."""
        path = Path(folder) / "tokenizer.json"
        try:
            core = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        except Exception as error:  # the Rust library raises the bare class
            raise unreadable(path, f"malformed tokenizer ({error})") from None
        return cls(core, str(path))

    def encode(self, text: str) -> list[int]:
        """Returns the ids of plain text; `<|im_end|>` and its like in the text stay text.

        Raises InputError for half a surrogate pair (see check_text).
        """
        check_text(text)
        return self.core.encode(text, add_special_tokens=False).ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text, as `encode` does, on all of the machine's cores.

        Long texts take the library twice as long as the same text in stretches of lines. They are
        cut where no token of Qwen2's can be: a line break ends what its pre-tokenizer looks at as
        one word, and starts nothing that a visible character belongs to.
        """
        for text in texts:
            check_text(text)
        cut = [stretches(text) for text in texts]
        flat = [stretch for parts in cut for stretch in parts]
        encoded = iter(self.core.encode_batch(flat, add_special_tokens=False))
        return [[i for _ in parts for i in next(encoded).ids] for parts in cut]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Returns the text of ids, with or without the control tokens among them."""
        return self.core.decode(list(ids), skip_special_tokens=skip_special)

    def never_sampled(self, vocab_rows: int) -> Tensor:
        """Returns the ids [N] below vocab_rows that no response may hold.

        These are the rows of the model's vocabulary that stand for no token, and the vision tokens.
        """
        allowed = self.known_ids - {getattr(self, token) for token in self.VISION}
        banned = [token_id for token_id in range(vocab_rows) if token_id not in allowed]
        return torch.tensor(banned, dtype=torch.long)


def check_text(text: str) -> None:
    """Raises InputError for half a surrogate pair: undecodable bytes on the command line become
    one, and JSON can hold it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"text is not valid Unicode: {text[:40]!a}") from None


def stretches(text: str) -> list[str]:
    """Returns a text as whole lines, as many at a time as have STRETCH characters or more."""
    found = []
    start = 0
    for match in LINE_START.finditer(text):
        if match.start() - start >= STRETCH:
            found.append(text[start : match.start()])
            start = match.start()
    return [*found, text[start:]]


def check_vocabulary(tokenizer: Tokenizer, config: Config) -> None:
    """Raises InputError where text could turn into ids that the model has no row for."""
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"tokenizer.json has ids up to {tokenizer.vocab_size - 1}, "
            f"config.json a vocab_size of {config.vocab_size} only"
        )


# --- The chat template ---


class Piece(NamedTuple):
    """A stretch of a conversation: the text between two control tokens, or control tokens.

    content: text that is yet to be tokenised, or ids. produced: whether an assistant has said it,
    so that the loss is about it.
    """

    content: str | list[int]
    produced: bool = False


def render_chat(
    messages: Sequence[dict],
    tokenizer: Tokenizer,
    *,
    image_tokens: Sequence[int] = (),
    add_generation_prompt: bool = False,
) -> tuple[list[int], list[bool]]:
    """Returns a conversation's ids in Qwen2.5-VL's published chat template, and its loss mask.

    messages: {"role": system|user|assistant, "content": text, or a list of {"type": "image"} and
    {"type": "text", "text": ...}}. image_tokens: the number of <|image_pad|> of each image, in
    order; InputError if there are more or fewer than image parts. The mask is true on an
    assistant's text and its <|im_end|>, not on the newline behind it.
    """
    pieces = chat_pieces(
        messages, tokenizer, image_tokens=image_tokens, add_generation_prompt=add_generation_prompt
    )
    return join_pieces(pieces, tokenizer.encode)


def encode_chats(
    chats: Sequence[list[Piece]], tokenizer: Tokenizer
) -> list[tuple[list[int], list[bool]]]:
    """Returns (ids, loss mask) of each conversation in pieces: what `render_chat` returns, faster.

    All texts are tokenised at once, and one that comes again and again ("assistant\\n") once.
    """
    contents = [piece.content for pieces in chats for piece in pieces]
    texts = list(dict.fromkeys(content for content in contents if isinstance(content, str)))
    ids_of = dict(zip(texts, tokenizer.encode_all(texts)))
    return [join_pieces(pieces, ids_of.__getitem__) for pieces in chats]


def join_pieces(
    pieces: Sequence[Piece], encode: Callable[[str], list[int]]
) -> tuple[list[int], list[bool]]:
    """Returns (ids, loss mask) of a conversation in pieces."""
    ids: list[int] = []
    mask: list[bool] = []
    for content, produced in pieces:
        new = encode(content) if isinstance(content, str) else content
        ids.extend(new)
        mask.extend([produced] * len(new))
    return ids, mask


def chat_pieces(
    messages: Sequence[dict],
    tokenizer: Tokenizer,
    *,
    image_tokens: Sequence[int] = (),
    add_generation_prompt: bool = False,
) -> list[Piece]:
    """Returns a conversation in pieces: `render_chat` before anything is tokenised.

    Text between two control tokens is tokenised in one piece, as it is when the rendered string
    is. An assistant's text alone is tokenised apart from the "assistant\\n" before it, so that
    training ids begin with the very ids that a sampler is prompted with (the two ways differ only
    for a text whose leading white space holds a line break).
    """
    if messages and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": DEFAULT_SYSTEM}, *messages]
    parts = [part for message in messages for part in content_parts(message["content"])]
    num_images = sum(part["type"] == "image" for part in parts)
    if num_images != len(image_tokens):
        raise InputError(f"messages: {len(image_tokens)} images for {num_images} image parts")

    pieces: list[Piece] = []

    def add(content: str | list[int], produced: bool = False) -> None:
        if isinstance(content, str):
            check_text(content)
        pieces.append(Piece(content, produced))

    pads = iter(image_tokens)
    for message in messages:
        # <|im_start|>role, and a line break. Of an assistant that is tokenised apart (see above).
        produced = message["role"] == "assistant"
        text = message["role"] + "\n"
        add([tokenizer.im_start])
        if produced:
            add(text)
            text = ""
        # The text goes on from part to part until an image's control tokens end the piece.
        for part in content_parts(message["content"]):
            if part["type"] == "text":
                text += part["text"]
            else:
                image = [tokenizer.image_pad] * next(pads)
                add(text, produced)
                add([tokenizer.vision_start, *image, tokenizer.vision_end])
                text = ""
        add(text, produced)
        add([tokenizer.im_end], produced)
        add("\n")
    if add_generation_prompt:
        add([tokenizer.im_start])
        add("assistant\n")
    return pieces


def content_parts(content: str | list[dict]) -> list[dict]:
    """Returns a message's content as a list of parts; a bare text is one of them."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
