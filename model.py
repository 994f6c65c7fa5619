"""Qwen2.5-VL (arXiv 2502.13923): the decoder, its positions, its model folders, and the KV cache.

The module tree is the checkpoint: `model.layers.0.self_attn.q_proj.weight` is both a path in this
file and a key in model.safetensors. Text-only Qwen2.5 folders load too, with no vision tower.

Shapes: B rows, T tokens, C width, H query heads, K key/value heads, D head dim, V vocabulary rows,
P image patches. Rows are padded on the right: attention is causal, so no real token ever sees the
padding, and training needs no mask.

RMSNorm and GatedMLP, which the vision tower has too, stand in vision.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hub.config import MERGE, Config, Grid
from hub.errors import InputError
from hub.weights import read_weights, write_model
from kernels import BlockedLinear, apply_rope, attention, logits_float32, token_log_probs
from vision import GatedMLP, RMSNorm, VisionTower

# --- Positions ---


def rope_positions(input_ids: Tensor, grids: list[Grid], config: Config) -> tuple[Tensor, Tensor]:
    """Returns the M-RoPE positions [3, B, T] of input_ids [B, T], and each row's next position [B].

    (Section 2.1.3; arXiv 2409.12191, figure 3.) A token has three positions: time, height, width.
    In text all three count on together. The tokens of an image share one time; from there, height
    counts the rows and width the columns of its merged cells. The text behind an image goes on
    behind the largest position in it. With an image of 2 x 2 merged cells, or grid (1, 4, 4):

        token   Look  <vision_start>  image image image image  <vision_end>  here     next
        time     0          1           2     2     2     2          4         5        6
        height   0          1           2     2     3     3          4         5        6
        width    0          1           2     3     2     3          4         5        6

    `grids` has the images in the order of their tokens. Raises InputError if they need more or
    fewer image tokens than there are.
    """
    B, T = input_ids.shape
    device = input_ids.device

    # Text alone needs no look at the ids, for which a GPU would have to be waited for.
    if not grids:
        return torch.arange(T, device=device).expand(3, B, T), torch.full((B,), T, device=device)

    rows = input_ids.tolist()
    num_tokens = sum(ids.count(config.image_token_id) for ids in rows)
    num_cells = sum(h * w // MERGE**2 for _, h, w in grids)
    if num_tokens != num_cells:
        raise InputError(f"{num_tokens} image tokens for images of {num_cells} merged cells")

    images = iter(grids)
    position_ids, next_position = [], []
    for ids in rows:
        triples = []  # (time, height, width) of each token so far
        position = 0  # of the next token, if it is text
        while len(triples) < T:
            if ids[len(triples)] != config.image_token_id:
                triples.append((position, position, position))
                position += 1
                continue
            # The first token of an image. We place all of them, row by row, and step over it.
            _, h, w = next(images)
            h, w = h // MERGE, w // MERGE
            for y in range(h):
                for x in range(w):
                    triples.append((position, position + y, position + x))
            position += max(h, w)
        position_ids.append(triples)
        next_position.append(position)
    position_ids = torch.tensor(position_ids, device=device).permute(2, 0, 1)
    return position_ids, torch.tensor(next_position, device=device)


def rope_angles(position_ids: Tensor, config: Config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns cos and sin [B, T, D] of position_ids [3, B, T].

    The D/2 frequencies are in three sections, of which the first turns with a token's time, the
    second with its height, the third with its width. In text this is plain RoPE.
    """
    half = config.head_dim // 2
    steps = torch.arange(half, device=position_ids.device).float()
    inv_freq = 1.0 / config.rope_theta ** (steps / half)
    angles = position_ids[..., None].float() * inv_freq  # [3, B, T, D/2]
    if config.mrope_section is None:
        angles = angles[0]
    else:
        time, height, width = angles.split(config.mrope_section, dim=-1)
        angles = torch.cat((time[0], height[1], width[2]), dim=-1)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


# --- The decoder ---


class Attention(nn.Module):
    """Causal grouped-query attention (arXiv 2305.13245): H / K query heads share keys and values.

    The maps to q, k and v have biases, the output map has none.
    """

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.layer = layer  # its number, by which a cache knows it
        self.head_dim = config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, kv_size)
        self.v_proj = nn.Linear(config.hidden_size, kv_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache=None, cu_seqlens=None, shared=None
    ) -> Tensor:
        """x [B, T, C] -> [B, T, C]. cos and sin [B, T, D]; the others are those of the model.

        A KVCache adds the keys and values of earlier tokens, a PromptCache keeps those of these.
        """
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)  # [B, T, H, D]
        k = self.k_proj(x).view(B, T, -1, self.head_dim)  # [B, T, K, D]
        v = self.v_proj(x).view(B, T, -1, self.head_dim)  # [B, T, K, D]

        # Positions turn queries and keys, never values. Keys go into the cache turned.
        q = apply_rope(q, cos, sin)
        k = apply_rope(k, cos, sin)
        key_lengths = None
        if cache is not None:
            k, v, key_lengths = cache.append(self.layer, k, v)

        # Rows that share a beginning are written out in full, for this alone.
        if shared is not None:
            in_full, first = shared
            q, k, v = (x.index_select(1, in_full) for x in (q, k, v))
        out = attention(q, k, v, causal=True, key_lengths=key_lengths, cu_seqlens=cu_seqlens)
        if shared is not None:
            out = out.index_select(1, first)
        return self.o_proj(out.flatten(2))


class DecoderLayer(nn.Module):
    """Attention, then the MLP. Each reads the residual stream x through a norm and adds to it.

    checkpointed: in training, keep the layer's input alone, and compute what lies between anew in
    the backward pass (Chen et al., arXiv 1604.06174). The gradients are the same to the bit.
    """

    checkpointed = False

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, *context) -> Tensor:
        """x [B, T, C] -> [B, T, C]. cos, sin and the context (cache, ...) are for attention."""
        if self.checkpointed and torch.is_grad_enabled():
            options = {"use_reentrant": False, "preserve_rng_state": False}  # nothing is random
            return checkpoint(self.block, x, cos, sin, *context, **options)
        return self.block(x, cos, sin, *context)

    def block(self, x: Tensor, cos: Tensor, sin: Tensor, *context) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, *context)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """`model.*` of the checkpoint."""

    def __init__(self, config: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, *context) -> Tensor:
        """Embeddings [B, T, C] -> hidden states behind the final norm [B, T, C]."""
        for layer in self.layers:
            x = layer(x, cos, sin, *context)
        return self.norm(x)


# --- The model ---


class Qwen2_5_VL(nn.Module):
    """Tokens (and images) in, hidden states out.

    The head is a call of its own, so training never makes the logits [B, T, V].
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.visual = VisionTower(config.vision) if config.vision is not None else None
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """Returns the head's weight [V, C], which is the embedding itself where it is tied."""
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.weight
        return self.lm_head.weight

    def decoder_weights(self) -> dict[str, nn.Parameter]:
        """Returns all weights but the vision tower's, by name."""
        named = self.named_parameters()
        return {name: weight for name, weight in named if not name.startswith("visual.")}

    def forward(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: list[Grid] | None = None,
        cache: "KVCache | PromptCache | None" = None,
        cu_seqlens: Tensor | None = None,
        shared: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Returns the hidden states [B, T, C], behind the final norm, of input_ids [B, T].

        pixel_values [P, 1176] has the patches of all images and image_grid_thw their grids, in the
        order of their tokens. `cu_seqlens` has the borders [0, n1, n1 + n2, ...] of sequences that
        are packed in a single row and do not see one another. Where they share beginnings, of which
        the row has one only (data.Pack), the borders are those of the S tokens in full, and
        `shared` says which of the T each of them is [S], and where each of the T comes first [T].
        Positions [3, B, T] belong to the request, not to the model: packed rows and tokens that
        follow a cache must bring theirs.
        """
        grids = image_grid_thw or []
        if (pixel_values is None) != (not grids):
            raise ValueError("pixel_values and image_grid_thw go together: one of them is missing")
        if position_ids is None:
            if cache is not None or cu_seqlens is not None:
                raise ValueError("packed rows and tokens behind a cache need their position_ids")
            position_ids, _ = rope_positions(input_ids, grids, self.config)

        # 1. What all layers need is moved to the device here, once.
        position_ids = position_ids.to(input_ids.device)
        if cu_seqlens is not None:
            cu_seqlens = cu_seqlens.to(input_ids.device)

        # 2. Embed the tokens, and put the images in the place of theirs.
        x = self.model.embed_tokens(input_ids)
        if grids:
            features = self.visual(pixel_values, grids)  # [image tokens, C]
            is_image = input_ids == self.config.image_token_id
            x = x.masked_scatter(is_image[..., None], features.to(x.dtype))

        # 3. Run the decoder.
        cos, sin = rope_angles(position_ids, self.config, x.dtype)
        return self.model(x, cos, sin, cache, cu_seqlens, shared)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., C] -> [..., V], in float32 (float64 stays)."""
        # The twin for sampling on a CPU may have a head of its own, and then decides the dtype.
        head = getattr(self, "lm_head", None)
        if isinstance(head, BlockedLinear):
            return head(hidden)
        return logits_float32(hidden, self.head_weight)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device="cpu", dtype=torch.float32) -> Self:
        """Loads a model folder; dtype None keeps the one on disk.

        Raises InputError listing what is missing, unexpected, misshapen, or not finite.
        """
        config = Config.from_pretrained(folder)
        with torch.device("meta"):  # names and shapes, without memory
            model = cls(config)
        if dtype is None:
            dtype = getattr(torch, config.torch_dtype)
        model.load_weights(folder, lambda name, tensor: tensor.to(device=device, dtype=dtype))
        return model.eval()

    def load_weights(self, folder: str | Path, place: Callable[[str, Tensor], Tensor]) -> None:
        """Sets the weights to a folder's; `place(name, tensor)` says where and how each is held."""
        state = read_weights(Path(folder), self.state_dict(), place)
        self.load_state_dict(state, assign=True)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Writes config.json and model.safetensors as published, in `dtype` or the weights' own."""
        write_model(Path(folder), self.config, self.state_dict(), dtype)


# --- Caches of keys and values, for sampling ---


class KVCache:
    """Keys and values of all layers in a fixed number of slots, allocated once.

    Each slot is filled to a length of its own; its next token is written there, over whatever an
    earlier sequence has left. Both tensors are [L, slots, K, S, D]: with the heads before the
    tokens, a head's keys are one matrix, and no product has to copy them.
    """

    def __init__(
        self, config: Config, slots: int, max_length: int, *, device="cpu", dtype=torch.float32
    ):
        L, K, D = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        self.keys = torch.zeros(L, slots, K, max_length, D, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.lengths = torch.zeros(slots, dtype=torch.long, device=device)
        self.slots = torch.arange(slots, device=device)
        self.longest = 0  # an upper bound of the lengths in use, known without asking the device

    @staticmethod
    def bytes_per_slot(config: Config, max_length: int, dtype: torch.dtype) -> int:
        """Returns the bytes of a slot: keys and values in all layers, and what it is sampled from.

        That are 16 rows [V] in float32, for logits, the steps of top-p, and their CUDA graph.
        """
        per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        return max_length * per_token * dtype.itemsize + 16 * 4 * config.vocab_size

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Writes one token, k and v [B, 1, K, D], behind each of the first B slots.

        Returns these slots' keys and values [B, S, K, D] and the number of keys in each [B]. Until
        all layers have written, `lengths` and `longest` are those before this token; then the
        caller sets them anew.
        """
        B = k.shape[0]
        slots, lengths = self.slots[:B], self.lengths[:B]
        self.keys[layer, slots, :, lengths] = k[:, 0]
        self.values[layer, slots, :, lengths] = v[:, 0]
        keys = self.keys[layer, :B, :, : self.longest + 1]
        values = self.values[layer, :B, :, : self.longest + 1]
        return keys.transpose(1, 2), values.transpose(1, 2), lengths + 1

    def fill(self, slot: int, keys: Tensor, values: Tensor) -> None:
        """Copies a prompt's keys and values [L, K, T, D] into a slot."""
        T = keys.shape[2]
        self.keys[:, slot, :, :T] = keys
        self.values[:, slot, :, :T] = values
        self.lengths[slot] = T

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Copies slots, one by one: a copy of all at once would need as much memory again."""
        end = self.longest
        for source, target in zip(sources, targets):
            self.keys[:, target, :, :end] = self.keys[:, source, :, :end]
            self.values[:, target, :, :end] = self.values[:, source, :, :end]
            self.lengths[target] = self.lengths[source]


def slots_that_fit(free_bytes: int, bytes_per_slot: int, most: int) -> int:
    """Returns how many slots there is memory for: `most` or fewer, and 0 where there is too little
    for one."""
    return min(most, max(0, free_bytes) // bytes_per_slot)


def prefill_memory(config: Config, tokens: int, dtype: torch.dtype) -> int:
    """Returns the bytes that it takes to run prompts of so many tokens, beside weights and slots.

    There are the activations, by the elements that are alive at the same time; the keys and values
    that wait for their slots; and 1 GiB for what cannot be counted: CUDA graphs, the libraries'
    workspaces, fragmentation.
    """
    elements = 4 * config.intermediate_size + 8 * config.hidden_size
    if config.vision is not None:  # four patches make a token
        elements = max(elements, MERGE**2 * 32 * config.vision.hidden_size)
    elements += 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return tokens * elements * dtype.itemsize + 2**30


class PromptCache:
    """Keeps the keys and values of T tokens of packed prompts, to be copied into slots of a
    KVCache. Both tensors are [L, K, T, D]."""

    def __init__(self, config: Config, tokens: int, *, device="cpu", dtype=torch.float32):
        L, K, D = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        self.keys = torch.empty(L, K, tokens, D, device=device, dtype=dtype)
        self.values = torch.empty_like(self.keys)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, None]:
        """Keeps a layer's k and v [1, T, K, D], of all prompts end to end, and returns them."""
        self.keys[layer] = k[0].transpose(0, 1)
        self.values[layer] = v[0].transpose(0, 1)
        return k, v, None

    def split(self, lengths: list[int]) -> list[tuple[Tensor, Tensor]]:
        """Returns the keys and values [L, K, T, D] of each prompt, where they lie."""
        return list(zip(self.keys.split(lengths, dim=2), self.values.split(lengths, dim=2)))


# --- Log-probs, for training ---


def score(
    model: Qwen2_5_VL, pack, *, temperature: float = 1.0, masked_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the log-prob of each scored token of a pack (data.Pack), and the entropy there.

    Both are [N] for N scored tokens, in nats, at the temperature and without `masked_ids`. SFT,
    the policy, the old policy and the reference are all measured by this one function.
    """
    hidden = model(
        pack.input_ids,
        position_ids=pack.position_ids,
        cu_seqlens=pack.cu_seqlens,
        shared=pack.shared,
    )
    # A token is predicted from the hidden state before it. The head sees these N states alone.
    return token_log_probs(
        hidden[0, pack.sources],
        model.head_weight,
        pack.input_ids[0, pack.targets],
        temperature=temperature,
        masked_ids=masked_ids,
    )
