"""Qwen2.5-VL (arXiv 2502.13923): the decoder, its multimodal rotary positions, its KV cache, and its model folders.

The module tree is the checkpoint: `model.layers.0.self_attn.q_proj.weight` is both a path in this file and a key in
model.safetensors. Text-only Qwen2.5 folders load too, with no vision tower.

Shapes: B rows, T tokens, C width, H query heads, K key/value heads, D head dim, V vocabulary rows, P image patches.
Rows are padded on the right: attention is causal, so no real token ever sees the padding and training needs no mask.
"""
import json
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from hub.config import Config
from hub.errors import InputError
from hub.weights import read_weights
from kernels import PackedLinear, attention, can_pack, packed_twin, token_log_probs
from vision import GatedMLP, Grid, RMSNorm, VisionTower, apply_rope



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


def score(model: Qwen2_5_VL, pack, *, temperature: float = 1.0,
          masked_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns the log-prob of each scored token of a pack (data.Pack), given those before it, and the entropy there.

    Both [N] for N scored tokens, in nats, at the temperature and without `masked_ids`: what SFT, the policy, the old
    policy and the reference are all measured by. The head sees the N positions alone, so [T, V] never exists.
    """
    hidden = model(pack.input_ids, position_ids=pack.position_ids, cu_seqlens=pack.cu_seqlens)
    scored = pack.scored[0, 1:]
    return token_log_probs(hidden[0, :-1][scored], model.head_weight, pack.input_ids[0, 1:][scored],
                           temperature=temperature, masked_ids=masked_ids)
