"""The one exception for what users can mend, and what is said of files that cannot be read."""

import json
from contextlib import suppress
from pathlib import Path


class InputError(ValueError):
    """Something that the user gave us is wrong.

    The message is one line that names the file and, where there are such, the line and the field.
    """


# What a file is by its first bytes, where it is not what its name says.
BEGINNINGS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file: `git lfs pull` gets it",
    b"\x1f\x8b": "compressed: unpack it with gunzip",
    b"PK\x03\x04": "a ZIP archive: unpack it",
    b"\xff\xfe": "in UTF-16: save it in UTF-8",
}
# What a folder is that lacks the files of a model, by a file that it has.
TELLTALES = {
    "adapter_config.json": "this is an adapter (LoRA): merge it into its base model",
    "model-*-of-*.safetensors": "there are shards, but not their index",
    "*.gguf": "this is a GGUF: take the model that it was made from",
    "pytorch_model*.bin": "its weights are pickles: save them as safetensors (save_pretrained)",
    "*.pth": "its weights are pickles: save them as safetensors",
    "snapshots/*/config.json": "this is a hub cache: the model folder is snapshots/...",
    "*.distcp": "this is a checkpoint of training: the model is in its run's model/",
}


def unreadable(path: str | Path, reason: str) -> InputError:
    """Returns the complaint about a file that is there and cannot be read: what it is, if its first
    bytes tell that, or else the reason."""
    beginning = b""
    with suppress(OSError), open(path, "rb") as file:
        beginning = file.read(32)
    kinds = [kind for known, kind in BEGINNINGS.items() if beginning.startswith(known)]
    return InputError(f"{path}: {(*kinds, reason)[0]}")


def missing_file(path: Path) -> InputError:
    """Returns the complaint about a file that a model folder lacks: with what the folder is."""
    folder = path.parent
    if not folder.is_dir():
        reason = "is a file, not a model folder" if folder.exists() else "no such folder"
        hint = "one of the hub is downloaded by `hf download NAME --local-dir FOLDER`"
        return InputError(f"{folder}: {reason} (sft.py makes what grpo.py starts from; {hint})")
    kinds = [f" ({kind})" for name, kind in TELLTALES.items() if any(folder.glob(name))]
    return InputError(f"{path}: no such file{(*kinds, '')[0]}")


def read_json(path: str | Path) -> dict:
    """Returns the object in a JSON file. Raises InputError, with the file's name and the reason."""
    try:
        raw = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise unreadable(path, f"malformed JSON ({error})") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: not a JSON object")
    return raw
