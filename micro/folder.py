"""Writes the files of a micro model folder that stand beside its weights and tokenizer."""

import json
from pathlib import Path

from data import Tokenizer

WIDTH = 128  # of the shipped base: its hidden_size
HEAD = 32  # the size of a head, at every width: mrope_section fits it


def make_config(tokenizer: Tokenizer, width: int = WIDTH) -> dict:
    """Returns the fields of a flat config.json. Some vocabulary rows (65 to 128) are padding.

    `width` is the decoder's hidden size, a multiple of 64; the vision tower is always the same.
    """
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.endoftext,
        "eos_token_id": tokenizer.im_end,
        "vision_start_token_id": tokenizer.vision_start,
        "vision_end_token_id": tokenizer.vision_end,
        "vision_token_id": tokenizer.vision_pad,
        "image_token_id": tokenizer.image_pad,
        "video_token_id": tokenizer.video_pad,
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": width * 11 // 4,
        "max_position_embeddings": 4096,
        "max_window_layers": 4,
        "num_attention_heads": width // HEAD,
        "num_hidden_layers": 4,
        "num_key_value_heads": width // HEAD // 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": 3,
            "hidden_act": "silu",
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_heads": 4,
            "in_chans": 3,
            "out_hidden_size": width,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [2],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 12]},
        "vocab_size": (tokenizer.vocab_size // 64 + 2) * 64,
    }


def write_json(path: Path, fields: dict) -> None:
    """Writes fields as a JSON file."""
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def write_side_files(folder: Path, config: dict) -> None:
    """Writes the config, and the settings of preprocessing and generation."""
    write_json(folder / "config.json", config)
    write_json(
        folder / "preprocessor_config.json",
        {
            "min_pixels": 3136,
            "max_pixels": 802816,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
        },
    )
    write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": config["bos_token_id"],
            "pad_token_id": config["bos_token_id"],
            "do_sample": True,
            "eos_token_id": [config["eos_token_id"], config["bos_token_id"]],
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "transformers_version": config["transformers_version"],
        },
    )
