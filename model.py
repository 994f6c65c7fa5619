"""Qwen2.5-VL (arXiv 2502.13923): the decoder, its multimodal rotary positions, its KV cache, and its model folders.

The module tree is the checkpoint: `model.layers.0.self_attn.q_proj.weight` is both a path in this file and a key in
model.safetensors. Text-only Qwen2.5 folders load too, with no vision tower.

Shapes: B rows, T tokens, C width, H query heads, K key/value heads, D head dim, V vocabulary rows, P image patches.
Rows are padded on the right: attention is causal, so no real token ever sees the padding and training needs no mask.
"""
import json
import os
import shutil
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from data import InputError, read_json
from kernels import PackedLinear, attention, can_pack, packed_twin
from vision import GatedMLP, Grid, RMSNorm, VisionConfig, VisionTower, apply_rope


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


class KVCache:
    """Keys and values of all layers in a fixed number of slots, allocated once; each slot is filled to its own length.

    [L, slots, K, S, D]: with the heads before the tokens, a head's keys are one matrix and no product has to copy them.
    A slot's next token is written at its length, over whatever an earlier sequence left there.
    """

    def __init__(self, config: Config, slots: int, max_length: int, *, device="cpu", dtype=torch.float32):
        shape = (config.num_hidden_layers, slots, config.num_key_value_heads, max_length, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(slots, dtype=torch.long, device=device)
        self.longest = 0  # an upper bound of the lengths in use, known without asking the device

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Writes one token, k and v [B, 1, K, D], behind each of the first B slots. Returns these slots' keys and values
        [B, S, K, D] and the keys per slot. Lengths are counted by the caller, once all layers have written."""
        B = k.shape[0]
        rows, lengths = torch.arange(B, device=k.device), self.lengths[:B]
        self.keys[layer, rows, :, lengths] = k[:, 0].to(self.keys.dtype)  # under autocast they come in two precisions
        self.values[layer, rows, :, lengths] = v[:, 0].to(self.values.dtype)
        keys, values = self.keys[layer, :B, :, :self.longest + 1], self.values[layer, :B, :, :self.longest + 1]
        return keys.transpose(1, 2), values.transpose(1, 2), lengths + 1

    def fill(self, slot: int, keys: Tensor, values: Tensor) -> None:
        """Copies a prompt's keys and values [L, K, T, D] into a slot."""
        T = keys.shape[2]
        self.keys[:, slot, :, :T], self.values[:, slot, :, :T] = keys, values
        self.lengths[slot] = T

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copies slots, with all that they hold."""
        end = self.longest
        self.keys[:, target, :, :end] = self.keys[:, source, :, :end]
        self.values[:, target, :, :end] = self.values[:, source, :, :end]
        self.lengths[target] = self.lengths[source]


class PromptCache:
    """Keeps the keys and values that a forward pass over packed prompts computes anyway, to be copied into slots."""

    def __init__(self):
        self.layers: list[tuple[Tensor, Tensor]] = []

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, None]:
        """k and v [1, T, K, D], of all prompts end to end."""
        self.layers.append((k[0].transpose(0, 1), v[0].transpose(0, 1)))
        return k, v, None

    def split(self, lengths: list[int]) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [L, K, T, D] of each prompt."""
        keys, values = (torch.stack([pair[i] for pair in self.layers]).split(lengths, dim=2) for i in (0, 1))
        return list(zip(keys, values))


Cache = KVCache | PromptCache | None


def rope_positions(input_ids: Tensor, grids: list[Grid], config: Config) -> tuple[Tensor, Tensor]:
    """M-RoPE positions (section 2.1.3; arXiv 2409.12191, figure 3): position_ids [3, B, T], next_position [B].

    Text advances all three rows (time, height, width) together. The tokens of an image share one time, and height and
    width count its merged cells from there; the text behind goes on from the largest of them. `grids` of all images,
    in the order in which their tokens stand in input_ids [B, T]. next_position is the one behind each row's last
    column. Raises InputError where image tokens and grids do not match, and for video.
    """
    B, T = input_ids.shape
    position_ids = torch.arange(T).expand(3, B, T)
    if config.vision is None:
        return position_ids.to(input_ids.device), torch.full((B,), T, device=input_ids.device)
    if (input_ids == config.video_token_id).any():
        raise InputError("video input is not supported: images only")
    position_ids, next_position = position_ids.clone(), torch.full((B,), T)
    is_image = (input_ids == config.image_token_id).cpu()
    merge, pending = config.vision.spatial_merge_size, list(grids)
    for b in is_image.any(1).nonzero().flatten().tolist():
        t = 0
        while (rest := is_image[b, t:].nonzero().flatten()).numel():
            t += int(rest[0])
            if not pending:
                raise InputError("there are image tokens without an image")
            _, h, w = pending.pop(0)
            h, w = h // merge, w // merge
            if not is_image[b, t:t + h * w].all() or t + h * w > T:
                raise InputError(f"an image of {h} x {w} merged cells needs {h * w} image tokens in a row")
            start = position_ids[0, b, t].item()
            cells = torch.arange(h * w)
            position_ids[0, b, t:t + h * w] = start
            position_ids[1, b, t:t + h * w] = start + cells // w
            position_ids[2, b, t:t + h * w] = start + cells % w
            t += h * w
            position_ids[:, b, t:] = start + max(h, w) + torch.arange(T - t)
            next_position[b] = start + max(h, w) + T - t
    if pending:
        raise InputError(f"{len(pending)} images have no image tokens")
    return position_ids.to(input_ids.device), next_position.to(input_ids.device)


def check_images(pixel_values: Tensor | None, grids: list[Grid], config: Config) -> None:
    """Raises InputError where patches [P, 1176] and grids do not belong together, or cannot be images."""
    if (pixel_values is None) == bool(grids):
        raise InputError("pixel_values and image_grid_thw go together: one of them is missing")
    if not grids:
        return
    if config.vision is None:
        raise InputError("this model has no vision tower: it takes no images")
    merge = config.vision.spatial_merge_size
    for t, h, w in grids:
        if t != 1 or h < merge or w < merge or h % merge or w % merge:
            raise InputError(f"image_grid_thw {(t, h, w)} is not one image of whole {merge} x {merge} cells")
    wanted = (sum(h * w for _, h, w in grids), config.vision.patch_dim)
    if tuple(pixel_values.shape) != wanted:
        raise InputError(f"pixel_values has shape {list(pixel_values.shape)}, the grids need {list(wanted)}")


def rope_angles(position_ids: Tensor, config: Config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [B, T, D] of position_ids [3, B, T]: each section of the frequencies follows its own row."""
    half = config.head_dim // 2
    inv_freq = 1.0 / config.rope_theta ** (torch.arange(half, device=position_ids.device).float() / half)
    angles = position_ids[..., None].float() * inv_freq                                                 # [3, B, T, D/2]
    if config.mrope_section is None:
        angles = angles[0]
    else:
        sections = angles.split(config.mrope_section, dim=-1)
        angles = torch.cat([section[i] for i, section in enumerate(sections)], dim=-1)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


class Attention(nn.Module):
    """Causal grouped-query attention (arXiv 2305.13245); q, k, v have biases, the output projection has none."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, kv_size)
        self.v_proj = nn.Linear(config.hidden_size, kv_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache, cu_seqlens: Tensor | None) -> Tensor:
        heads = (*x.shape[:2], -1, self.head_dim)
        q = apply_rope(self.q_proj(x).view(heads), cos, sin)                                             # [B, T, H, D]
        k = apply_rope(self.k_proj(x).view(heads), cos, sin)                                             # [B, T, K, D]
        v = self.v_proj(x).view(heads)
        k, v, key_lengths = cache.append(self.layer, k, v) if cache is not None else (k, v, None)
        return self.o_proj(attention(q, k, v, causal=True, key_lengths=key_lengths, cu_seqlens=cu_seqlens).flatten(2))


class DecoderLayer(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache, cu_seqlens: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, cu_seqlens)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """`model.*` of the checkpoint."""

    def __init__(self, config: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache, cu_seqlens: Tensor | None) -> Tensor:
        for layer in self.layers:
            x = layer(x, cos, sin, cache, cu_seqlens)
        return self.norm(x)


class Qwen2_5_VL(nn.Module):
    """Tokens (and images) in, hidden states out. The head is a separate call, so training never makes [B, T, V]."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.visual = VisionTower(config.vision) if config.vision is not None else None
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """[V, C]; the embedding itself where it is tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, input_ids: Tensor, *, position_ids: Tensor | None = None, pixel_values: Tensor | None = None,
                image_grid_thw: list[Grid] | Tensor | None = None, cache: Cache = None,
                cu_seqlens: Tensor | None = None) -> Tensor:
        """input_ids [B, T], right-padded -> hidden states behind the final norm [B, T, C].

        pixel_values [P, 1176] holds the patches of all images and image_grid_thw [N, 3] their grids, in the order of
        their tokens. position_ids [3, B, T] may be left out but for packed rows and tokens that follow a cache: positions
        and their offsets belong to the request, not to the model. `cu_seqlens`: the borders [0, n1, n1 + n2, ...] of
        the sequences that are packed in a single row and do not see one another.
        """
        grids = [tuple(map(int, grid)) for grid in image_grid_thw] if image_grid_thw is not None else []
        check_images(pixel_values, grids, self.config)
        if position_ids is None:
            if cache is not None or cu_seqlens is not None:
                raise ValueError("packed rows and tokens behind a cache need their position_ids")
            position_ids, _ = rope_positions(input_ids, grids, self.config)
        x = self.model.embed_tokens(input_ids)
        if pixel_values is not None:
            x = self.insert_images(x, input_ids, self.visual(pixel_values, grids))
        cos, sin = rope_angles(position_ids, self.config, x.dtype)
        return self.model(x, cos, sin, cache, cu_seqlens)

    def insert_images(self, x: Tensor, input_ids: Tensor, features: Tensor) -> Tensor:
        """Puts the image embeddings [N, C] at the image tokens of x [B, T, C]."""
        is_image = input_ids == self.config.image_token_id
        if int(is_image.sum()) != len(features):
            raise InputError(f"{int(is_image.sum())} image tokens for {len(features)} image embeddings")
        return x.masked_scatter(is_image[..., None], features.to(x.dtype))

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., C] -> [..., V]."""
        return self.lm_head(hidden) if "lm_head" in self._modules else F.linear(hidden, self.head_weight)

    def packed(self, *, release: bool = False) -> "Qwen2_5_VL":
        """For sampling: the same model over weights that are packed where that helps (kernels/linear.py) and follow this
        one's. `release` gives up this one's."""
        twin = packed_twin(self, release=release)
        if self.config.tie_word_embeddings and can_pack(self.head_weight):
            twin.lm_head = PackedLinear(self.model.embed_tokens, release=False)
        return twin

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device="cpu",
                        dtype: torch.dtype | None = torch.float32) -> "Qwen2_5_VL":
        """Loads a model folder, strictly; dtype None keeps the one on disk. Raises InputError listing what is wrong."""
        config = Config.from_pretrained(folder)
        with torch.device("meta"):
            model = cls(config)
        dtype = dtype or getattr(torch, config.torch_dtype)
        state = read_weights(Path(folder), model.state_dict(), config, device, dtype)
        model.load_state_dict(state, assign=True)
        return model.eval()

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Writes config.json and model.safetensors in the published layout, all or nothing; other files there stay."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {key: tensor.detach().to(device="cpu", dtype=dtype or tensor.dtype).contiguous()
                 for key, tensor in self.state_dict().items()}
        raw = self.config.to_dict() | {"torch_dtype": str(state["model.norm.weight"].dtype).removeprefix("torch.")}
        (folder / "config.json.tmp").write_text(json.dumps(raw, indent=2) + "\n")
        save_file(state, folder / "model.safetensors.tmp", metadata={"format": "pt"})
        for name in ("model.safetensors", "config.json"):
            os.replace(folder / f"{name}.tmp", folder / name)
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)  # of shards that stood here before


SIDE_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
              "merges.txt", "preprocessor_config.json", "generation_config.json", "chat_template.json",
              "chat_template.jinja")


def copy_side_files(source: str | Path, folder: str | Path) -> None:
    """Copies what a model folder holds besides config and weights."""
    for name in SIDE_FILES:
        if (Path(source) / name).exists() and Path(source).resolve() != Path(folder).resolve():
            shutil.copyfile(Path(source) / name, Path(folder) / name)


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files: one, or the shards that the index names."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise InputError(f"{index}: weight_map is missing or malformed")
    return [folder / Path(name).name for name in sorted(set(weight_map.values()))]  # .name: never outside the folder


def published_key(key: str) -> str:
    """transformers >= 4.52 nests the decoder and the tower under `model.`; the published layout does not."""
    return key.replace("model.language_model.", "model.", 1).replace("model.visual.", "visual.", 1)


def read_weights(folder: Path, wanted: dict[str, Tensor], config: Config, device,
                 dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors of a model folder under their published names. Every missing, unexpected, misshapen or non-finite
    one is listed in one InputError."""
    state, seen, problems = {}, set(), []
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as shard:
                for key in shard.keys():
                    name, tensor = published_key(key), shard.get_tensor(key)
                    seen.add(name)
                    if name == "lm_head.weight" and config.tie_word_embeddings:
                        state[name] = tensor  # some re-saves write the tied head: it must then be the embedding
                    elif name not in wanted:
                        problems.append(f"{path.name}: unexpected {key}")
                    elif tensor.shape != wanted[name].shape:
                        expected = list(wanted[name].shape)
                        problems.append(f"{path.name}: {key} has shape {list(tensor.shape)}, expected {expected}")
                    elif not tensor.isfinite().all():
                        problems.append(f"{path.name}: {key} has NaN or infinite values")
                    else:
                        state[name] = tensor.to(device=device, dtype=dtype)
        except FileNotFoundError:
            raise InputError(f"{path}: no such file") from None
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: not a readable safetensors file: {error}") from None
    if config.tie_word_embeddings and (head := state.pop("lm_head.weight", None)) is not None:
        embedding = state.get("model.embed_tokens.weight", torch.empty(0, device=device))
        if not torch.equal(head.to(device=device, dtype=dtype), embedding):
            problems.append("lm_head.weight differs from the embedding although tie_word_embeddings is true")
    problems += [f"missing {key}" for key in wanted if key not in seen]
    if problems:
        shown = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise InputError(f"{folder}: {shown}")
    return state
