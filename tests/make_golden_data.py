"""Makes tests/golden/data_* with transformers 5.23 and its PIL image processor:

    python tests/make_golden_data.py FOLDER_OF_THE_PUBLISHED_TOKENIZER

data_tokenizer/tokenizer.json is an excerpt of the published tokenizer with its real ids: all merges
that can take part in tokenising the texts below, so on these texts it gives the very ids of the
whole. The script checks that it does.
"""

import hashlib
import json
import random
import re
import sys
from pathlib import Path

import numpy
from PIL import Image
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
    smart_resize,
)

OUT = Path(__file__).parent / "golden"
CHAT_TEMPLATE = (  # of Qwen2.5-VL's chat_template.json
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>"
    "{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}"
    "<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture "
    "{{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "<|im_start|>assistant\n{% endif %}"
)

USER, REPLY = "What is 7 x 8?", "<think>\n7 x 8 = 56.\n</think> <answer>56</answer>"
IMAGE = {"type": "image"}


def text(value: str) -> dict:
    return {"type": "text", "text": value}


CHATS = {  # name: messages, image tokens, generation prompt
    "default_system": ([{"role": "user", "content": USER}], [], True),
    "own_system": (
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": USER}],
        [],
        True,
    ),
    "empty_system": (
        [{"role": "system", "content": ""}, {"role": "user", "content": USER}],
        [],
        True,
    ),
    "reply": (
        [{"role": "user", "content": USER}, {"role": "assistant", "content": REPLY}],
        [],
        False,
    ),
    "two_turns": (
        [
            {"role": "user", "content": USER},
            {"role": "assistant", "content": REPLY},
            {"role": "user", "content": "Wait, why?"},
            {"role": "assistant", "content": "Because."},
        ],
        [],
        False,
    ),
    "two_turns_open": (
        [
            {"role": "user", "content": USER},
            {"role": "assistant", "content": "56"},
            {"role": "user", "content": "Why?"},
        ],
        [],
        True,
    ),
    "leading_newlines": ([{"role": "user", "content": "\n\n  What?\n"}], [], True),
    "leading_space": (
        [{"role": "user", "content": " What"}, {"role": "assistant", "content": " 56 \n"}],
        [],
        False,
    ),
    "empty": ([{"role": "user", "content": ""}, {"role": "assistant", "content": ""}], [], False),
    "assistant_first": (
        [{"role": "assistant", "content": "56"}, {"role": "user", "content": USER}],
        [],
        True,
    ),
    "image": ([{"role": "user", "content": [IMAGE, text(USER)]}], [4], True),
    "images": (
        [
            {
                "role": "user",
                "content": [text("A: "), IMAGE, IMAGE, text("\n\nB"), text("ut"), IMAGE],
            }
        ],
        [1, 6, 2],
        True,
    ),
    "text_parts": (
        [
            {"role": "user", "content": [text("Becau"), text("se\n"), text("\n7")]},
            {"role": "assistant", "content": [text("Wa"), text("it")]},
        ],
        [],
        False,
    ),
    "image_alone": ([{"role": "user", "content": [IMAGE]}], [3], False),
    "unicode": (
        [{"role": "user", "content": "caf\u00e9 cafe\u0301 \u65e5\u672c \U0001f600\u00a0x"}],
        [],
        True,
    ),
    "code": (
        [{"role": "user", "content": "if x:\n    y = 'it''s'\r\n\treturn  1234\n\n\n"}],
        [],
        True,
    ),
}
PIECES = [
    "<think>",
    "<think>\n",
    "</think>",
    "</think>\n\n",
    ".</think>",
    ")</think>",
    "</think><answer>B",
    "<answer>",
    "Wait",
    "\nFinal Answer:",
    "<|begin_of_thought|>",
    "<|im_end|>",
    "a<|image_pad|>b",
    "<|endoftext|>",
    "1234",
    "<tool_call>",
]
SIZES = [
    (512, 512),
    (480, 640),
    (1080, 1920),
    (10, 10),
    (70, 126),
    (1365, 2048),
    (200, 1000),
    (14, 2000),
    (1, 200),
    (200, 1),
    (28, 28),
    (42, 42),
    (56, 56),
    (6000, 8000),
    (9999, 60),
    (27, 29),
    (98, 154),
]
BOUNDS = [(3136, 12845056), (262144, 262144), (3136, 1003520), (200704, 301056)]
PICTURES = [
    (123, 211, 3136, 12845056),
    (56, 56, 3136, 12845056),
    (20, 33, 3136, 12845056),
    (300, 200, 3136, 20000),
    (64, 97, 12544, 12544),
    (28, 448, 3136, 12845056),
    (5, 900, 3136, 12845056),
]


def excerpt(published: dict, texts: list[str]) -> dict:
    """The tokenizer with only the merges whose result is inside one of the texts' pre-tokens."""
    core = Tokenizer.from_str(json.dumps(published))
    pieces = set()
    for value in texts:
        for token in core.pre_tokenizer.pre_tokenize_str(core.normalizer.normalize_str(value)):
            pieces.add(token[0])
    inside = {
        piece[i:j]
        for piece in pieces
        for i in range(len(piece))
        for j in range(i + 1, len(piece) + 1)
    }
    merges = [
        merge
        for merge in published["model"]["merges"]
        if "".join(merge if isinstance(merge, list) else merge.split(" ")) in inside
    ]
    keep = {"".join(merge if isinstance(merge, list) else merge.split(" ")) for merge in merges}
    vocab = {
        token: i
        for token, i in published["model"]["vocab"].items()
        if token in keep or len(token) == 1
    }
    # The library numbers added tokens anew behind the vocabulary, unless it finds them there.
    vocab |= {token["content"]: token["id"] for token in published["added_tokens"]}
    return published | {"model": published["model"] | {"vocab": vocab, "merges": merges}}


def picture(height: int, width: int) -> Image.Image:
    """Smooth and noisy parts; tests/test_data.py has the same lines."""
    noise = random.Random(height * 10000 + width)
    places = ((x, y, c) for y in range(height) for x in range(width) for c in range(3))
    values = ((x * 3 + y * 5 * c + noise.randrange(40)) % 256 for x, y, c in places)
    return Image.frombytes("RGB", (width, height), bytes(values))


def write_json(name: str, value: dict) -> None:
    (OUT / name).write_text(json.dumps(value, separators=(",", ":")))


def chat_case(
    hf: PreTrainedTokenizerFast, messages: list[dict], counts: list[int], generation: bool
) -> tuple[str, dict]:
    """Returns a chat as text and as a case of data_chat.json; counts: tokens of each image."""
    rendered = hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
    for count in counts:  # what the published processor does with its placeholder
        rendered = rendered.replace("<|image_pad|>", "<|held|>" * count, 1)
    rendered = rendered.replace("<|held|>", "<|image_pad|>")
    return rendered, {
        "messages": messages,
        "image_tokens": counts,
        "add_generation_prompt": generation,
        "ids": hf(rendered, add_special_tokens=False).input_ids,
    }


def write_chats(published: dict) -> None:
    """Writes data_chat.json, and the excerpt of the tokenizer that suffices for it."""
    core = Tokenizer.from_str(json.dumps(published))
    hf = PreTrainedTokenizerFast(tokenizer_object=core, chat_template=CHAT_TEMPLATE)
    chats, texts = {}, list(PIECES)
    for name, chat in CHATS.items():
        rendered, chats[name] = chat_case(hf, *chat)
        texts += re.split(r"<\|(?:im_start|im_end|vision_start|vision_end|image_pad)\|>", rendered)
    texts += ["assistant\n"]

    path = OUT / "data_tokenizer" / "tokenizer.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    small = excerpt(published, texts)
    path.write_text(json.dumps(small, ensure_ascii=False, separators=(",", ":")))
    check = PreTrainedTokenizerFast(tokenizer_file=str(path))
    for case in chats.values():
        rendered = core.decode(case["ids"], skip_special_tokens=False)
        assert check(rendered, add_special_tokens=False).input_ids == case["ids"]

    core.encode_special_tokens = True
    pieces = {piece: core.encode(piece, add_special_tokens=False).ids for piece in PIECES}
    write_json("data_chat.json", {"chats": chats, "pieces": pieces})


def picture_case(height: int, width: int, low: int, high: int) -> dict:
    """Returns what the published processor makes of a picture, between two bounds on its pixels."""
    processor = Qwen2VLImageProcessorPil(min_pixels=low, max_pixels=high)
    out = processor(images=[picture(height, width)], return_tensors="pt")
    patches = out["pixel_values"].float().numpy()
    return {
        "height": height,
        "width": width,
        "min_pixels": low,
        "max_pixels": high,
        "grid": out["image_grid_thw"][0].tolist(),
        "shape": list(patches.shape),
        "sha256": hashlib.sha256(numpy.ascontiguousarray(patches).tobytes()).hexdigest(),
        "first": patches[0, :3].tolist(),
        "last": patches[-1, -3:].tolist(),
    }


def write_images() -> None:
    """Writes data_images.json: sizes that images are scaled to, and patches of some pictures."""
    sizes = [
        [h, w, low, high, *smart_resize(h, w, factor=28, min_pixels=low, max_pixels=high)]
        for h, w in SIZES
        for low, high in BOUNDS
    ]
    pictures = [picture_case(*one) for one in PICTURES]
    write_json("data_images.json", {"sizes": sizes, "pictures": pictures})


def main(folder: str):
    write_chats(json.loads((Path(folder) / "tokenizer.json").read_text()))
    write_images()


if __name__ == "__main__":
    main(sys.argv[1])
