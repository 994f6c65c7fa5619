"""How a long command keeps what it has done, so that --resume goes on from there.

Two things are kept so: a training run's folder (training/run.py), and the --out file of evaluate.py
and tools/distill.py (training/record_file.py). They share two rules:

1. Beside the results stands a config: the options, and checksums of the files that the results
   depend on. With the same options and files a command goes on; with others it refuses.
2. Records are appended, one JSON object a line, as soon as they are there. Whatever stops the
   command (Ctrl-C, kill -9, a full disk), only the end of the file can be incomplete.
"""

import json
import subprocess
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hub.disk import put_in_place
from hub.errors import InputError, read_json
from hub.options import ROOT

# Options that may differ when a command goes on: they decide where and how often it writes, and in
# what portions it works, but not what comes out (up to rounding, where sums change their order).
MAY_DIFFER = {"resume", "overwrite", "out", "json", "device", "save_every", "max_per_question"}
MAY_DIFFER |= {"pack_tokens", "rollout_batch", "max_batch", "states_on", "checkpointing"}
# And those that decide how long a run goes on, what it keeps, and how it is watched.
MAY_DIFFER |= {"max_steps", "epochs", "stop_window", "stop_gain", "keep"}
MAY_DIFFER |= {"eval_every", "eval_data", "eval_new_tokens"}
# And what only the memory plan looks at.
MAY_DIFFER |= {"plan", "gpus", "gpu_gib"}


# --- The config beside the results ---


def checksum(path: str | Path) -> int:
    """Returns the CRC-32 of a file's bytes. Raises InputError if the file cannot be read."""
    crc = 0
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 24):
                crc = zlib.crc32(block, crc)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    return crc


def git_commit() -> str | None:
    """Returns the commit of this code; None where it is no checkout, or where there is no git."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def recorded_options(options: Any, dtype: torch.dtype) -> dict:
    """Returns a command's options (a dataclass) as they are written to its config.

    `--dtype auto` may be another precision on another machine: what it is here is written down.
    """
    return asdict(options) | {"dtype": str(dtype).removeprefix("torch.")}


def make_config(options: dict, inputs: Iterable[str | Path]) -> dict:
    """Returns what a command's results depend on: its options, checksums of the files `inputs`,
    and (for the reader only, they are not compared) the commit and the versions."""
    return {
        "options": options,
        "crc32": {str(path): checksum(path) for path in inputs},
        "commit": git_commit(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
    }


def write_json(path: Path, content: dict) -> None:
    """Writes a JSON file that people read, too."""
    write_whole(path, json.dumps(content, indent=2).encode() + b"\n")


def changed_options(before: dict, config: dict) -> dict:
    """Returns the options of `config` that are not as in the config `before`. Whether results are
    to be resumed or replaced is no such change."""
    changed = {}
    for name, value in config["options"].items():
        if name not in ("resume", "overwrite") and before["options"].get(name) != value:
            changed[name] = value
    return changed


def check_same(results: Path, config_path: Path, config: dict) -> None:
    """Raises InputError unless `config_path` holds the same options and checksums as `config`.
    The message names `results` and everything that differs."""
    before = {"options": {}, "crc32": {}} | read_json(config_path)
    changed = []
    for name in changed_options(before, config):
        if name not in MAY_DIFFER:
            changed.append(f"--{name.replace('_', '-')} was {before['options'].get(name)!r}")
    if changed:
        raise InputError(f"{results}: cannot resume with other options: {'; '.join(changed)}")
    # Only what was written down then is compared: an earlier version knew fewer of the files.
    for path, crc in before["crc32"].items():
        if config["crc32"].get(path) != crc:
            changed.append(path)
    if changed:
        raise InputError(f"{results}: cannot resume: {', '.join(changed)} changed since")


# --- Files of records ---


def json_lines(records: Iterable[dict]) -> bytes:
    """Returns the records as JSONL: one JSON object a line."""
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def write_whole(path: Path, content: bytes) -> None:
    """Replaces a file all at once: if the disk is full or the power fails, the old file stays."""
    temporary = Path(f"{path}.tmp")
    try:
        temporary.write_bytes(content)
        put_in_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def append_records(path: Path, records: Iterable[dict]) -> None:
    """Appends records to a JSONL file. When it returns, kill -9 no longer loses them."""
    with open(path, "ab") as file:
        file.write(json_lines(records))


def read_records(path: Path, fields: Iterable[str]) -> Iterator[tuple[dict, int]]:
    """Yields each record of a JSONL file, and the offset in bytes at which its line ends.

    A last line without a line break is half a record, and is left out. Raises InputError, which
    names the line, for anything that is not an object with these fields.
    """
    end = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict) or not record.keys() >= set(fields):
                raise InputError(f"{path}: line {number}: not a record of this command")
            end += len(line)
            yield record, end
