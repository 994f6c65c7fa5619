"""A model folder's config.json: the fields of decoder and vision tower, read and written."""

import math
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path

from hub.errors import InputError, missing_file, read_json

# How every Qwen2.5-VL cuts an image. The tower and the preprocessing (data/images.py) both take
# these from here, and folders that say otherwise are refused.
PATCH = 14  # pixels on a patch's side
MERGE = 2  # patches on a merged cell's side: 2 x 2 patches become one image token
TEMPORAL = 2  # frames in a patch; a still image is repeated
PATCH_DIM = 3 * TEMPORAL * PATCH * PATCH  # 1176 numbers in a patch: channel, frame, row, column

Grid = tuple[int, int, int]  # an image's (frames, rows, columns) of patches; frames is always 1


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower's fields, named as in the config's `vision_config`.

    Re-saved configs leave out what has transformers' default; the defaults here are the same.
    """

    hidden_size: int  # C
    out_hidden_size: int = 3584  # the decoder's width
    depth: int = 32  # blocks
    num_heads: int = 16  # H
    intermediate_size: int = 3420  # of the MLP
    window_size: int = 112  # pixels
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)  # blocks without windows


@dataclass(frozen=True)
class Config:
    """The decoder's fields, named as in the published config.json, and the vision tower's."""

    hidden_size: int  # C
    intermediate_size: int  # of the MLP
    num_hidden_layers: int  # L
    num_attention_heads: int  # H
    num_key_value_heads: int  # K
    vocab_size: int  # V: rows of the embedding; more than the tokenizer has ids
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int  # tokens that fit
    tie_word_embeddings: bool = False  # the head is the embedding
    torch_dtype: str = "float32"  # of the weights on disk
    eos_token_id: int | None = None
    image_token_id: int | None = None  # one for each merged cell of an image
    video_token_id: int | None = None  # videos are not supported
    vision_start_token_id: int | None = None
    vision_end_token_id: int | None = None
    mrope_section: tuple[int, ...] | None = None  # frequencies that follow time, height, width
    vision: VisionConfig | None = None  # None in the text-only models

    @property
    def head_dim(self) -> int:
        """Returns D, the width of one head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def is_small(self) -> bool:
        """Returns whether the model is as small as the micro one: it fits anywhere."""
        return self.hidden_size <= 256

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Config":
        """Reads a model folder's config.json; see `from_dict`."""
        path = Path(folder) / "config.json"
        if not path.exists():
            raise missing_file(path)
        raw = read_json(path)
        if "options" in raw:
            raise InputError(f"{folder}: is a run folder: its model is in {Path(folder) / 'model'}")
        return cls.from_dict(raw, str(path))

    @classmethod
    def from_dict(cls, raw: dict, name: str = "config.json") -> "Config":
        """Reads the object of a config.json, of any generation (see PLACES).

        Raises InputError with the file's name and the field for a model that is not Qwen2.5 or
        Qwen2.5-VL, for a setting that is not implemented, for a missing field, and for a vision
        tower that does not fit the decoder.
        """
        # 1. Is it a model that we can compute?
        kind = raw.get("model_type")
        if kind not in ("qwen2_5_vl", "qwen2"):
            raise InputError(f"{name}: model_type {kind!r} is not supported (qwen2_5_vl or qwen2)")
        for part in ("text_config", "vision_config"):
            if not isinstance(raw.get(part) or {}, dict):
                raise InputError(f"{name}: {part} is not a JSON object")
        flat = flatten(raw)
        for field in ("quantization_config", "compression_config", "quantization"):
            if flat.get(field):
                raise quantised_weights(name, find(flat, f"{field}.quant_method") or field)
        for field, values in SUPPORTED.items():
            value = find(flat, field)
            if value is not None and value not in values:
                raise InputError(f"{name}: {field} {value!r} is not supported (only {values})")

        # 2. A text-only one has no vision tower, and positions of one dimension.
        if kind == "qwen2":
            return build(cls, flat | {"mrope_section": None}, name)

        # 3. The others have a tower, which must fit the decoder.
        tower = flat.get("vision_config") or {}
        flat["vision"] = build(VisionConfig, tower, f"{name}: vision_config")
        config = build(cls, flat, name)
        if config.image_token_id is None:
            raise InputError(f"{name}: image_token_id is missing")
        section, half = config.mrope_section, config.head_dim // 2
        if section is None or len(section) != 3 or sum(section) != half:
            raise InputError(f"{name}: mrope_section {section} is not three numbers of sum {half}")
        if config.vision.out_hidden_size != config.hidden_size:
            raise InputError(f"{name}: vision_config: out_hidden_size is not hidden_size")
        if config.vision.hidden_size % config.vision.num_heads:
            raise InputError(f"{name}: vision_config: num_heads do not divide hidden_size")
        return config

    def to_dict(self) -> dict:
        """Returns the object of a config.json as published: any program reads that form."""
        raw = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
        raw |= {"hidden_act": "silu", "use_sliding_window": False}
        for field, value in asdict(self).items():
            if value is not None and field not in ("vision", "mrope_section"):
                raw[field] = value
        if self.vision is not None:
            raw["architectures"] = ["Qwen2_5_VLForConditionalGeneration"]
            raw["model_type"] = "qwen2_5_vl"
            raw["rope_scaling"] = {"type": "mrope", "mrope_section": self.mrope_section}
            raw["vision_config"] = asdict(self.vision) | FIXED_VISION
        return raw


# What the published vision_config says besides: the same for every size.
FIXED_VISION = {
    "in_chans": 3,
    "hidden_act": "silu",
    "patch_size": PATCH,
    "temporal_patch_size": TEMPORAL,
    "spatial_merge_size": MERGE,
    "tokens_per_second": 2,
}

# Fields that change what is computed, and the values that are implemented.
SUPPORTED = {
    "torch_dtype": ["float32", "float16", "bfloat16"],
    "hidden_act": ["silu"],
    "use_sliding_window": [False],
    "rope_type": ["mrope", "default"],  # two names of the same; yarn is another thing
    "vision_config.hidden_act": ["silu"],
    "vision_config.patch_size": [PATCH],
    "vision_config.temporal_patch_size": [TEMPORAL],
    "vision_config.spatial_merge_size": [MERGE],
}

# There are three generations of config.json: flat, as published; the decoder's fields inside
# "text_config", as transformers >= 4.52 saves it; and with "rope_parameters" besides, as
# transformers 5 does. These fields changed their places ("a.b" is b in the object a):
PLACES = {
    "torch_dtype": ["torch_dtype", "dtype"],
    "rope_theta": ["rope_theta", "rope_parameters.rope_theta"],
    "rope_type": ["rope_scaling.type", "rope_scaling.rope_type", "rope_parameters.rope_type"],
    "mrope_section": ["rope_scaling.mrope_section", "rope_parameters.mrope_section"],
}


def flatten(raw: dict) -> dict:
    """Returns a config.json's fields in the flat form, under the names of Config."""
    flat = dict(raw)
    text = raw.get("text_config") or {}
    flat |= {field: value for field, value in text.items() if value is not None}
    for field in ("torch_dtype", "dtype"):
        if raw.get(field) is not None:
            flat[field] = raw[field]  # the top's wins over the decoder's
    for field, places in PLACES.items():
        for place in places:
            value = find(flat, place)
            if value is not None:
                flat[field] = value
    # The 4.52s write the flag into text_config, beside a false one at the top.
    flat["tie_word_embeddings"] = bool(
        raw.get("tie_word_embeddings") or text.get("tie_word_embeddings")
    )
    # Some text-only models list several ids that end a text.
    if isinstance(flat.get("eos_token_id"), list):
        flat["eos_token_id"] = next(iter(flat["eos_token_id"]), None)
    return flat


def quantised_weights(name: str, kind: str) -> InputError:
    """Returns the complaint about a folder whose weights were quantised: what it is, what to do."""
    return InputError(
        f"{name}: quantised weights ({kind}) are not supported: take the model that they were "
        "made from, or save them dequantised, in bfloat16"
    )


def find(raw: dict, place: str):
    """Returns the value at a place such as "rope_scaling.type"; None if there is none."""
    value = raw
    for key in place.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def build(cls: type, raw: dict, name: str):
    """Returns a config dataclass, filled from `raw`. Raises InputError for a missing field, and for
    a value that is not of the field's type."""
    values = {}
    for field in fields(cls):
        value = raw.get(field.name)
        if value is not None:
            if not is_of(value, field.type):
                raise InputError(f"{name}: {field.name} {value!r} is malformed")
            values[field.name] = tuple(value) if isinstance(value, list) else value
        elif field.default is MISSING:
            raise InputError(f"{name}: {field.name} is missing")
    return cls(**values)


def is_of(value, kind: type) -> bool:
    """Returns whether a value fits a field's type. Sizes are above 0, ids and numbers of blocks may
    be 0; what has no numbers is checked elsewhere."""
    if kind in (int, float):
        return type(value) in (int, kind) and 0 < value < math.inf
    if "int" in str(kind):  # int | None, tuple[int, ...]
        numbers = value if "tuple" in str(kind) else [value]
        return isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)
    return True
