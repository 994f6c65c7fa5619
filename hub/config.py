"""config.json: the decoder's fields and the vision tower's, in the two shapes that hub folders have."""
from dataclasses import dataclass, fields
from pathlib import Path

from hub.errors import InputError, read_json



@dataclass(frozen=True)
class VisionConfig:
    """Fields as in the hub's `vision_config` (whose `in_chans` is in_channels here). Re-saved configs leave out the
    defaults, which are the 7B's. The weights' shapes are checked against all but num_heads, window_size and
    fullatt_block_indexes."""
    hidden_size: int                    # C
    out_hidden_size: int = 3584         # the decoder's width
    depth: int = 32                     # blocks
    num_heads: int = 16                 # H
    intermediate_size: int = 3420       # MLP
    in_channels: int = 3
    patch_size: int = 14                # pixels
    temporal_patch_size: int = 2        # frames; an image is repeated
    spatial_merge_size: int = 2         # patches, in each direction, that make one image token
    window_size: int = 112              # pixels
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)

    @property
    def patch_dim(self) -> int:
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class Config:
    """The decoder's fields as named in the hub's config.json, and the vision tower's (None for text-only Qwen2.5)."""
    hidden_size: int                    # C
    intermediate_size: int              # MLP
    num_hidden_layers: int
    num_attention_heads: int            # H
    num_key_value_heads: int            # K
    vocab_size: int                     # V: rows of the embedding; more than the tokenizer has ids
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int        # tokens that fit
    tie_word_embeddings: bool           # the head is the embedding
    torch_dtype: str = "float32"        # of the weights on disk
    eos_token_id: int | None = None
    image_token_id: int | None = None   # one per merged cell of an image
    video_token_id: int | None = None   # recognised only to be refused
    vision_start_token_id: int | None = None
    vision_end_token_id: int | None = None
    mrope_section: tuple[int, ...] | None = None  # rotary frequencies that turn with time, height, width
    vision: VisionConfig | None = None

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Config":
        path = Path(folder) / "config.json"
        return cls.from_dict(read_json(path), str(path))

    @classmethod
    def from_dict(cls, raw: dict, name: str = "config.json") -> "Config":
        """Reads the hub's flat config, a re-saved nested one (`text_config`), and both spellings of the rotary fields.

        Raises InputError naming `name` and the field, for what is missing, of the wrong type, or not supported here.
        """
        kind = raw.get("model_type")
        if kind not in ("qwen2_5_vl", "qwen2"):
            raise InputError(f"{name}: model_type {kind!r} is not supported (qwen2_5_vl, or qwen2 for text only)")
        text = section(raw, "text_config", name)
        flat = {**raw, **{k: v for k, v in text.items() if v is not None}}  # re-saves leave nulls behind
        # newer saves have the flag at the top, older ones inside text_config beside the top's default
        flat["tie_word_embeddings"] = raw.get("tie_word_embeddings") or text.get("tie_word_embeddings") or False
        if isinstance(flat.get("eos_token_id"), list) and flat["eos_token_id"]:
            flat["eos_token_id"] = flat["eos_token_id"][0]
        flat["torch_dtype"] = raw.get("torch_dtype") or raw.get("dtype") or flat.get("dtype") or "float32"
        rope = section(flat, "rope_parameters", name) or section(flat, "rope_scaling", name)
        rope_kind = rope.get("rope_type", rope.get("type", "default"))
        if rope_kind not in ("mrope", "default"):
            raise InputError(f"{name}: rope_scaling type {rope_kind!r} is not supported (mrope or default)")
        flat["rope_theta"] = rope.get("rope_theta", flat.get("rope_theta"))
        flat["mrope_section"], flat["vision"] = None, None
        if kind == "qwen2_5_vl":
            flat["mrope_section"] = rope.get("mrope_section")
            flat["vision"] = read_fields(VisionConfig, vision_fields(raw, name), f"{name}: vision_config")
        for field, wanted in (("hidden_act", "silu"), ("use_sliding_window", False)):
            if flat.get(field, wanted) != wanted:
                raise InputError(f"{name}: {field} {flat[field]!r} is not supported (only {wanted!r})")
        config = read_fields(cls, flat, name)
        config.check(name)
        return config

    def check(self, name: str) -> None:
        """Raises InputError where the fields contradict one another."""
        def require(condition: bool, message: str) -> None:
            if not condition:
                raise InputError(f"{name}: {message}")

        require(self.hidden_size % (2 * self.num_attention_heads) == 0,
                "hidden_size is not an even multiple of num_attention_heads")
        require(self.num_attention_heads % self.num_key_value_heads == 0,
                "num_attention_heads is not a multiple of num_key_value_heads")
        require(self.torch_dtype in ("float32", "float16", "bfloat16"),
                f"torch_dtype {self.torch_dtype!r} is not supported")
        if self.vision is not None:
            require(len(self.mrope_section or ()) == 3 and sum(self.mrope_section) * 2 == self.head_dim,
                    f"mrope_section {self.mrope_section} is not three numbers of sum {self.head_dim // 2}")
            require(self.vision.out_hidden_size == self.hidden_size,
                    "vision_config: out_hidden_size is not hidden_size")
            require(self.vision.hidden_size % (4 * self.vision.num_heads) == 0,
                    "vision_config: hidden_size is not a multiple of 4 * num_heads")
            require(self.vision.window_size >= self.vision.patch_size * self.vision.spatial_merge_size,
                    "vision_config: window_size is smaller than a merged cell")
            for field in ("image_token_id", "video_token_id"):
                require(getattr(self, field) is not None, f"{field} is missing")
                require(getattr(self, field) < self.vocab_size, f"{field} is not below vocab_size")

    def to_dict(self) -> dict:
        """The hub's flat config.json."""
        raw = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("vision", "mrope_section")}
        raw = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
               "use_sliding_window": False, **{k: v for k, v in raw.items() if v is not None}}
        if self.vision is not None:
            vision = {f.name: getattr(self.vision, f.name) for f in fields(VisionConfig)}
            vision["in_chans"] = vision.pop("in_channels")
            raw |= {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
                    "rope_scaling": {"type": "mrope", "mrope_section": self.mrope_section},
                    "vision_config": {"hidden_act": "silu", "tokens_per_second": 2, **vision}}
        return raw


def section(raw: dict, field: str, name: str) -> dict:
    """An object inside the config; empty where it is missing or null."""
    value = raw.get(field) or {}
    if not isinstance(value, dict):
        raise InputError(f"{name}: {field} has a bad value: {value!r}")
    return value


def vision_fields(raw: dict, name: str) -> dict:
    """The config's `vision_config`, with `in_chans` under its newer name."""
    vision = section(raw, "vision_config", name)
    if not vision:
        raise InputError(f"{name}: vision_config is missing")
    if vision.get("hidden_act", "silu") != "silu":
        raise InputError(f"{name}: vision_config: hidden_act {vision['hidden_act']!r} is not supported (only 'silu')")
    return {**vision, "in_channels": vision.get("in_channels", vision.get("in_chans", 3))}


def read_fields(cls: type, raw: dict, name: str):
    """Builds a config dataclass from the fields that it defines; numbers must be positive, or InputError."""
    values = {}
    for field in fields(cls):
        value = raw.get(field.name)
        if value is None:
            continue
        if field.type is int or field.type == int | None:
            good = type(value) is int and (value > 0 or field.name.endswith("_token_id") and value >= 0)
        elif field.type is float:
            good = type(value) in (int, float) and 0 < value < float("inf")
        elif field.type in (bool, str):
            good = isinstance(value, field.type)
        elif field.type == (VisionConfig | None):
            good = True
        else:  # a tuple of ints
            good = isinstance(value, (list, tuple)) and all(type(v) is int and v >= 0 for v in value)
            value = tuple(value) if good else value
        if not good:
            raise InputError(f"{name}: {field.name} has a bad value: {value!r}")
        values[field.name] = value
    try:
        return cls(**values)
    except TypeError as error:  # "missing 2 required positional arguments: 'a' and 'b'"
        raise InputError(f"{name}: missing {str(error).rpartition(': ')[2]}") from None
