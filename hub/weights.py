"""The weights of a model folder, read and written, and the folder's other files."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hub.config import Config, quantised_weights
from hub.disk import put_in_place
from hub.errors import InputError, missing_file, read_json, unreadable

SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",  # what transformers 5 writes in place of both
    "generation_config.json",
    "chat_template.json",
    "chat_template.jinja",
)
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
INDEX = "model.safetensors.index.json"
# Weights in any other dtype (safetensors' names) have been quantised.
STORED_DTYPES = ("F64", "F32", "F16", "BF16")
# What quantisers put in place of a weight or beside it, by the last part of its name.
QUANTISERS = {
    "qweight": "AWQ or GPTQ",
    "qzeros": "AWQ or GPTQ",
    "SCB": "bitsandbytes, 8 bits",
    "absmax": "bitsandbytes, 4 bits",
    "weight_packed": "compressed-tensors",
}
# What older versions saved although it is computed: tables of the rotary embedding.
BUFFERS = ("inv_freq", "original_inv_freq", "cos_cached", "sin_cached")


def copy_side_files(source: str | Path, folder: str | Path) -> None:
    """Copies what a model folder holds besides its config and its weights."""
    if Path(source).resolve() == Path(folder).resolve():
        return
    for name in SIDE_FILES:
        if (Path(source) / name).exists():
            shutil.copyfile(Path(source) / name, Path(folder) / name)


# --- Reading ---


def read_weights(
    folder: Path, expected: dict[str, Tensor], place: Callable[[str, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Returns all tensors of a model folder under their published names.

    `expected` has the name and the shape of every tensor that the model needs (tensors on the meta
    device will do). `place(name, tensor)` gets each as it was read, on the host, and returns what
    is to be kept of it: on which device, in which precision, how much. So the host never holds more
    than what `place` keeps there. Raises one InputError that lists whatever is missing, unexpected,
    there twice, misshapen, or not finite; and another one for quantised weights.
    """
    index = read_index(folder)
    files = weight_files(folder)
    check_not_quantised(files, index)
    # A model whose head is its embedding has no tensor for the head, but some re-saves write one.
    tied = HEAD not in expected
    allowed = expected | {HEAD: expected[EMBEDDING]} if tied else expected

    # 1. Take what is there, file by file.
    state, twins, seen, problems = {}, {}, {}, []
    for path in files:
        for key, tensor in read_tensors(path, index):
            name = published_name(key)
            problem = find_problem(key, tensor, allowed.get(name))
            if name in seen:
                problem = f"{key} is {seen[name]} once more"
            seen[name] = key
            if problem is not None:
                problems.append(f"{path.name}: {problem}")
                continue
            if tied and name in (HEAD, EMBEDDING):
                twins[name] = tensor
            if name in expected:
                state[name] = place(name, tensor)

    # 2. What is not there, though the index says so, or the model needs it?
    for key, file in (index or {}).items():
        if not is_buffer(key) and published_name(key) not in seen:
            problems.append(f"{file}: missing {key}, which {INDEX} assigns to it")
            seen[published_name(key)] = key
    problems += [f"missing {name}" for name in expected if name not in seen]

    # 3. A tied head that was written all the same must be the embedding.
    if len(twins) == 2 and not torch.equal(twins[HEAD], twins[EMBEDDING]):
        problems.append(f"{HEAD} differs from the embedding although tie_word_embeddings is true")

    if problems:
        shown = "; ".join(problems[:10])
        if len(problems) > 10:
            shown += f"; and {len(problems) - 10} more"
        raise InputError(f"{folder}: {shown}")
    return state


def read_index(folder: Path) -> dict[str, str] | None:
    """Returns which file has which tensor, by the folder's index; None where there is no index.

    The index decides: a tensor in a file that it does not assign to that file is left over from
    another save, and is not read.
    """
    path = folder / INDEX
    if not path.exists():
        return None
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path}: weight_map is missing or malformed")
    # Only the last part of a path counts: nothing is read outside the folder.
    return {key: Path(str(file)).name for key, file in weight_map.items()}


def weight_files(folder: Path) -> list[Path]:
    """Returns the folder's safetensors files: a single one, or the shards that its index names."""
    index = read_index(folder)
    names = ["model.safetensors"] if index is None else sorted(set(index.values()))
    return [folder / name for name in names]


def model_files(folder: Path) -> list[Path]:
    """Returns the files of a model folder that results depend on: weights, shape, tokenizer, and
    how images are prepared. Raises InputError where weights are missing."""
    weights = weight_files(folder)
    for path in weights:
        if not path.exists():
            raise missing_file(path)
    names = ("config.json", "tokenizer.json", "preprocessor_config.json")
    return [*weights, *(folder / name for name in names if (folder / name).exists())]


@contextmanager
def opened(path: Path) -> Iterator[safe_open]:
    """Yields a safetensors file. Raises InputError if it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        if path.name == "model.safetensors":
            raise missing_file(path) from None
        raise InputError(f"{path}: no such file, though {INDEX} names it") from None
    except (OSError, SafetensorError) as error:
        raise unreadable(path, f"not a readable safetensors file: {error}") from None


def assigned(file: safe_open, path: Path, index: dict[str, str] | None) -> list[str]:
    """Returns the names of a file's tensors that are to be read."""
    keys = [key for key in file.keys() if not is_buffer(key)]
    if index is None:
        return keys
    return [key for key in keys if index.get(key) == path.name]


def read_tensors(path: Path, index: dict[str, str] | None) -> Iterator[tuple[str, Tensor]]:
    """Yields a file's tensors that are to be read, one at a time. Raises InputError."""
    with opened(path) as file:
        for key in assigned(file, path, index):
            yield key, file.get_tensor(key)


def check_not_quantised(files: list[Path], index: dict[str, str] | None) -> None:
    """Raises InputError for quantised weights: names tell who made them, dtypes that they are.

    Only the files' headers are read.
    """
    for path in files:
        with opened(path) as file:
            keys = assigned(file, path, index)
            dtypes = [file.get_slice(key).get_dtype() for key in keys]
        kinds = [QUANTISERS.get(key.rpartition(".")[2]) for key in keys]
        kinds += ["FP8" if dtype.startswith("F8") else dtype for dtype in dtypes]
        for kind in kinds:
            if kind is not None and kind not in STORED_DTYPES:
                raise quantised_weights(str(path), kind)


def is_buffer(key: str) -> bool:
    """Returns whether a tensor is one that is computed here, whatever a file says of it."""
    return key.rpartition(".")[2] in BUFFERS


def published_name(key: str) -> str:
    """Returns a tensor's name in the published layout.

    transformers >= 4.52 has both parts of the model inside "model.": model.language_model.norm is
    the published model.norm, and model.visual.merger is visual.merger.
    """
    key = key.replace("model.language_model.", "model.", 1)
    return key.replace("model.visual.", "visual.", 1)


def find_problem(key: str, tensor: Tensor, expected: Tensor | None) -> str | None:
    """Returns what is wrong with a tensor, or None. `expected` is None where none was expected."""
    if expected is None:
        return f"unexpected {key}"
    if tensor.shape != expected.shape:
        return f"{key} has shape {list(tensor.shape)}, expected {list(expected.shape)}"
    if not tensor.isfinite().all():
        return f"{key} has NaN or infinite values"
    return None


# --- Writing ---


def write_model(
    folder: Path, config: Config, state: dict[str, Tensor], dtype: torch.dtype | None
) -> None:
    """Writes config.json and model.safetensors in the published form; other files there stay.

    `dtype` None keeps the weights' own. Both files are written under other names first and then
    take their places, so a full disk or a crash while writing leaves the former model whole. Raises
    OSError where they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stored = {}
    for name, tensor in state.items():
        tensor = tensor.detach().to(device="cpu", dtype=dtype or tensor.dtype)
        stored[name] = tensor.contiguous()
    stored_dtype = str(stored[EMBEDDING].dtype).removeprefix("torch.")
    raw = config.to_dict() | {"torch_dtype": stored_dtype}

    new_config = folder / "config.json.tmp"
    new_weights = folder / "model.safetensors.tmp"
    try:
        new_config.write_text(json.dumps(raw, indent=2) + "\n")
        save_file(stored, new_weights, metadata={"format": "pt"})
        new_weights.chmod(new_config.stat().st_mode)  # others may read the one as the other
        put_in_place(new_weights, folder / "model.safetensors")
        put_in_place(new_config, folder / "config.json")
    except SafetensorError as error:  # what it says of a full disk
        raise OSError(str(error)) from None
    finally:
        new_config.unlink(missing_ok=True)
        new_weights.unlink(missing_ok=True)
    # An index of shards that stood here before would be read in preference.
    (folder / INDEX).unlink(missing_ok=True)
