"""Tiny model folders, complete in every part, for tests in milliseconds and without a network.

Weights are a fixed function of a tensor's name and shape (numpy's RandomState, whose streams never
change), so the golden values in tests/golden, made from such a folder by transformers, need no
weights beside them.

    make_folder(path, "vl")                     # config, weights, tokenizer, image processor
    make_folder(path, "text", shards=3)         # text-only Qwen2.5, in three files with an index
    make_folder(path, "vl_tied", layout="new")  # keys and nested config of transformers >= 4.52
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
KNOWN_IDS = 272  # 256 bytes, 8 merges, 8 special tokens
VOCAB_ROWS = 288  # of the embedding: the last 16 have no token, as in the published models

# heads, kv heads, head dim, tied head, vision tower
VARIANTS = {
    "vl": (4, 2, 16, False, True),  # groups of 2, as in most small models
    "vl_tied": (4, 4, 16, True, True),  # no grouping; the 3B's tied head
    "vl_group7": (7, 1, 16, False, True),  # the 7B's group size, not a power of two
    "vl_group8": (16, 2, 8, True, True),  # the 3B's group size
    "text": (4, 2, 16, False, False),  # Qwen2ForCausalLM
    "text_tied": (4, 2, 16, True, False),
}
GRIDS = {
    "square": (1, 16, 16),
    "cut": (1, 10, 14),
    "one_window": (1, 4, 4),
    "strip": (1, 2, 32),
}  # h, w in patches


def special_ids(vocab_size: int = KNOWN_IDS) -> dict[str, int]:
    """The ids of the special tokens, by their names without brackets: the last that are known."""
    return {name[2:-2]: vocab_size - len(SPECIAL) + i for i, name in enumerate(SPECIAL)}


def config_dict(variant: str = "vl", *, vocab_rows: int = VOCAB_ROWS) -> dict:
    """The variant's flat config.json, as the hub has it."""
    heads, kv_heads, head_dim, tied, has_vision = VARIANTS[variant]
    ids = special_ids()
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "bos_token_id": ids["endoftext"],
        "eos_token_id": ids["im_end"],
        "hidden_act": "silu",
        "hidden_size": heads * head_dim,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "max_position_embeddings": 512,
        "max_window_layers": 2,
        "num_attention_heads": heads,
        "num_hidden_layers": 2,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": vocab_rows,
    }
    if has_vision:
        config |= {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "vision_start_token_id": ids["vision_start"],
            "vision_end_token_id": ids["vision_end"],
            "vision_token_id": ids["vision_pad"],
            "image_token_id": ids["image_pad"],
            "video_token_id": ids["video_pad"],
            "rope_scaling": {
                "type": "mrope",
                "mrope_section": [2, 3, 3] if head_dim == 16 else [2, 1, 1],
            },
            "vision_config": {
                "depth": 4,
                "hidden_act": "silu",
                "hidden_size": 32,
                "intermediate_size": 44,
                "num_heads": 2,
                "in_chans": 3,
                "out_hidden_size": heads * head_dim,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "spatial_patch_size": 14,
                "window_size": 112,
                "fullatt_block_indexes": [1, 3],
                "tokens_per_second": 2,
                "temporal_patch_size": 2,
            },
        }
    return config


def nested_config(config: dict) -> dict:
    """A flat config as transformers 4.52 to 4.57 re-saves it, with a `text_config`."""
    top = (
        "architectures",
        "image_token_id",
        "video_token_id",
        "vision_start_token_id",
        "vision_end_token_id",
        "vision_token_id",
        "tie_word_embeddings",
        "vision_config",
    )
    nested = {k: v for k, v in config.items() if k in top}
    text = {k: v for k, v in config.items() if k not in top and k != "torch_dtype"}
    text["rope_scaling"] = {**text["rope_scaling"], "type": "default", "rope_type": "default"}
    return {
        **nested,
        "model_type": "qwen2_5_vl",
        "dtype": config["torch_dtype"],
        "text_config": {
            **text,
            "model_type": "qwen2_5_vl_text",
            "image_token_id": None,
            "video_token_id": None,
        },
    }


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint by its published name, written without help of model.py."""
    c, mlp = config["hidden_size"], config["intermediate_size"]
    kv = c // config["num_attention_heads"] * config["num_key_value_heads"]
    out = {"model.embed_tokens.weight": (config["vocab_size"], c), "model.norm.weight": (c,)}
    for i in range(config["num_hidden_layers"]):
        layer = {
            "input_layernorm.weight": (c,),
            "post_attention_layernorm.weight": (c,),
            "self_attn.q_proj.weight": (c, c),
            "self_attn.q_proj.bias": (c,),
            "self_attn.k_proj.weight": (kv, c),
            "self_attn.k_proj.bias": (kv,),
            "self_attn.v_proj.weight": (kv, c),
            "self_attn.v_proj.bias": (kv,),
            "self_attn.o_proj.weight": (c, c),
            "mlp.gate_proj.weight": (mlp, c),
            "mlp.up_proj.weight": (mlp, c),
            "mlp.down_proj.weight": (c, mlp),
        }
        out |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    if not config["tie_word_embeddings"]:
        out["lm_head.weight"] = (config["vocab_size"], c)
    if "vision_config" in config:
        v = config["vision_config"]
        c, mlp, cell = v["hidden_size"], v["intermediate_size"], v["hidden_size"] * 4
        for i in range(v["depth"]):
            block = {
                "norm1.weight": (c,),
                "norm2.weight": (c,),
                "attn.qkv.weight": (3 * c, c),
                "attn.qkv.bias": (3 * c,),
                "attn.proj.weight": (c, c),
                "attn.proj.bias": (c,),
                "mlp.gate_proj.weight": (mlp, c),
                "mlp.gate_proj.bias": (mlp,),
                "mlp.up_proj.weight": (mlp, c),
                "mlp.up_proj.bias": (mlp,),
                "mlp.down_proj.weight": (c, mlp),
                "mlp.down_proj.bias": (c,),
            }
            out |= {f"visual.blocks.{i}.{name}": shape for name, shape in block.items()}
        out |= {
            "visual.patch_embed.proj.weight": (c, 3, 2, 14, 14),
            "visual.merger.ln_q.weight": (c,),
            "visual.merger.mlp.0.weight": (cell, cell),
            "visual.merger.mlp.0.bias": (cell,),
            "visual.merger.mlp.2.weight": (v["out_hidden_size"], cell),
            "visual.merger.mlp.2.bias": (v["out_hidden_size"],),
        }
    return out


def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Gives activations, scores and logits of order 1; no norm or bias could be left out unseen."""
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith(".bias"):
        value = 0.2 * noise
    elif len(shape) == 1:
        value = 1 + 0.2 * noise
    else:
        value = noise / np.prod(shape[1:]) ** 0.5
    return torch.from_numpy(value.astype(np.float32))


def new_key(name: str) -> str:
    """The key's name in the layout of transformers >= 4.52."""
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def make_folder(
    path: str | Path,
    variant: str = "vl",
    *,
    layout: str = "old",
    shards: int = 1,
    vocab_rows: int = VOCAB_ROWS,
) -> Path:
    """Writes a complete model folder and returns its path. layout "old": flat config and keys as
    published; "new": nested config and keys as transformers >= 4.52 has them. shards > 1: that
    many files and an index.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = config_dict(variant, vocab_rows=vocab_rows)
    state = {name: weight(name, shape) for name, shape in shapes(config).items()}
    if layout == "new":
        config, state = (
            nested_config(config),
            {new_key(name): tensor for name, tensor in state.items()},
        )
    (path / "config.json").write_text(json.dumps(config, indent=2))
    write_weights(path, state, shards)
    make_tokenizer(path)
    ids = special_ids()
    (path / "generation_config.json").write_text(
        json.dumps(
            {
                "bos_token_id": ids["endoftext"],
                "pad_token_id": ids["endoftext"],
                "do_sample": True,
                "eos_token_id": [ids["im_end"], ids["endoftext"]],
                "repetition_penalty": 1.05,
                "temperature": 1e-6,
            }
        )
    )
    if "vision_config" in config:
        (path / "preprocessor_config.json").write_text(
            json.dumps(
                {
                    "min_pixels": 3136,
                    "max_pixels": 12845056,
                    "patch_size": 14,
                    "temporal_patch_size": 2,
                    "merge_size": 2,
                    "image_mean": [0.48145466, 0.4578275, 0.40821073],
                    "image_std": [0.26862954, 0.26130258, 0.27577711],
                    "image_processor_type": "Qwen2VLImageProcessor",
                    "processor_class": "Qwen2_5_VLProcessor",
                }
            )
        )
    return path


def write_weights(path: Path, state: dict[str, torch.Tensor], shards: int = 1) -> None:
    """model.safetensors, or shards dealt out in turn with their index."""
    if shards == 1:
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
        return
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    weight_map = {key: names[i % shards] for i, key in enumerate(state)}
    for name in names:
        save_file(
            {k: v for k, v in state.items() if weight_map[k] == name},
            path / name,
            metadata={"format": "pt"},
        )
    index = {
        "metadata": {"total_size": sum(v.nbytes for v in state.values())},
        "weight_map": weight_map,
    }
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def make_tokenizer(path: str | Path, *, vocab_size: int = KNOWN_IDS) -> Path:
    """Writes tokenizer.json: Qwen2.5's byte-level BPE in small. The 256 bytes, merges, and the
    special tokens last; vocab_size ids in all.
    """
    merges = [
        ("t", "h"),
        ("th", "e"),
        ("a", "n"),
        ("i", "n"),
        ("o", "u"),
        ("e", "r"),
        ("Ġ", "the"),
        ("an", "d"),
    ]
    merges = merges[: vocab_size - 256 - len(SPECIAL)]
    vocab = {
        token: i
        for i, token in enumerate(
            [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
        )
    }
    assert len(vocab) == vocab_size - len(SPECIAL), "there are 8 merges at most"
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(name, normalized=False, special=True) for name in SPECIAL]
    )
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def patches(grids: list[tuple[int, int, int]], seed: int = 0) -> torch.Tensor:
    """Pixel values [P, 1176] of one noise image per grid; an image's values depend on its own grid
    and seed only.
    """
    return torch.cat(
        [
            torch.from_numpy(
                np.random.RandomState(seed + 1000 * h + w)
                .standard_normal((h * w, 1176))
                .astype(np.float32)
            )
            for _, h, w in grids
        ]
    )


def row(seed: int, length: int, grids: list[tuple[int, int, int]] = ()) -> list[int]:
    """Token ids: `length` random text tokens, the images spread among them, each between its vision
    start and end.
    """
    ids = special_ids()
    text = np.random.RandomState(seed).randint(0, ids["endoftext"], length).tolist()
    out, part = [], -(-length // (len(grids) + 1))
    for i in range(len(grids) + 1):
        out += text[i * part : (i + 1) * part]
        if i < len(grids):
            _, h, w = grids[i]
            out += [ids["vision_start"], *[ids["image_pad"]] * (h * w // 4), ids["vision_end"]]
    return out


class Case:
    """Rows padded on the right to input_ids [B, T], their lengths [B], all images' grids, and
    labels for a loss over all real tokens but the first, or over those that `response` marks
    (-100 elsewhere; not yet shifted).
    """

    def __init__(
        self,
        rows: list[list[int]],
        grids: list[tuple[int, int, int]] = (),
        response: list[range] = (),
    ):
        width = max(map(len, rows))
        self.input_ids = torch.tensor(
            [ids + [special_ids()["endoftext"]] * (width - len(ids)) for ids in rows]
        )
        self.lengths, self.grids = torch.tensor([len(ids) for ids in rows]), list(grids)
        counted = torch.arange(width) < self.lengths[:, None]
        if response:
            counted = torch.tensor([[t in span for t in range(width)] for span in response])
        self.labels = self.input_ids.masked_fill(~counted, -100)


def cases(variant: str) -> dict[str, Case]:
    """The inputs of the golden outputs."""
    out = {"text": Case([row(0, 24), row(1, 15)])}
    if variant.startswith("vl"):
        many = [GRIDS["cut"], GRIDS["square"], GRIDS["one_window"]]
        out["one"] = Case([row(2, 7, [GRIDS["square"]])], [GRIDS["square"]])
        out["images"] = Case(
            [row(3, 10, many), row(4, 8), row(5, 14, [GRIDS["strip"]])], [*many, GRIDS["strip"]]
        )
    return out


def sft_case() -> Case:
    """Three right-padded rows, of which a response in the middle or at the end is learnt."""
    return Case(
        [row(6, 20), row(7, 13), row(8, 17)], response=[range(8, 20), range(5, 9), range(12, 17)]
    )


FEATURE_GRIDS = [*GRIDS.values(), (1, 34, 46)]  # images of the golden vision features


def summary(
    hidden: torch.Tensor, logits: torch.Tensor, lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the golden files keep of hidden [B, T, C] and logits [B, T, V]: every 4th and 16th
    column of real tokens.
    """
    real = torch.arange(hidden.shape[1]) < lengths[:, None]
    return hidden[real][:, ::4], logits[real][:, ::16]


def gradient_summary(grad: torch.Tensor) -> torch.Tensor:
    """What the golden files keep of a gradient: its norm, and 16 values spread over it."""
    flat = grad.detach().flatten()
    return torch.cat((flat.norm()[None], flat[torch.linspace(0, len(flat) - 1, 16).long()]))
