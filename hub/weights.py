"""Safetensors in and out, and the other files of a model folder."""
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hub.config import Config
from hub.errors import InputError, read_json



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
