"""A JSONL file that a long command fills question by question, so that --resume goes on where it was stopped."""
import json
import os
import subprocess
import sys
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from hub.errors import InputError, read_json
from hub.options import ROOT



def checksum(path: str | Path) -> int:
    """CRC-32 of a file's bytes."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return crc


def git_commit() -> str | None:
    """Of this code; None where it is no checkout, or there is no git."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def json_lines(records: Iterable[dict]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def write_whole(path: Path, content: bytes) -> None:
    """Replaces a file, or on a full disk leaves the old one as it is."""
    temporary = Path(f"{path}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_unused(path: Path, config_path: Path, overwrite: bool) -> None:
    """Raises InputError where a file holds something that may not be replaced: what has no config beside it is not
    ours."""
    if not path.exists() or path.is_file() and path.stat().st_size == 0:
        return
    if not path.is_file() or not config_path.exists():
        raise InputError(f"{path} is there, and no such command has written it: use another --out")
    if not overwrite:
        raise InputError(f"{path} holds results: use --resume, --overwrite, or another --out")


def when_all_are_there(n: int, on_prompt: Callable[[int, list], None]) -> Callable[[int, int, object], None]:
    """An `on_completion` for the sampler that hands on a prompt's n completions, in order, once it has them all."""
    finished = defaultdict(dict)

    def on_completion(prompt: int, sample: int, completion: object) -> None:
        finished[prompt][sample] = completion
        if len(finished[prompt]) == n:
            on_prompt(prompt, [finished[prompt][i] for i in range(n)])

    return on_completion


class RecordFile:
    """FILE, and beside it FILE.config.json: the options, and checksums of the files that the records depend on.

    Records come in groups of `size` (a question's runs), equal in the fields `keys`, and a group is appended as soon as
    it is there. So whatever stops the command (Ctrl-C, kill -9, a full disk), all but the last group is whole; --resume
    drops a group that is not. `groups` has what is there, by the key fields' values; without a path, nothing else has.
    """
    FREE = ("resume", "overwrite", "out", "json", "device", "max_batch",  # options that may differ when it goes on
            "max_per_question")

    def __init__(self, path: str | Path | None, options: dict, inputs: Iterable[str | Path], *,
                 keys: tuple[str, ...], size: int):
        self.keys, self.size = keys, size
        self.groups: dict[tuple, list[dict]] = {}
        self.path = None if path is None else Path(path)
        if path is None:
            return
        self.config_path = Path(f"{path}.config.json")
        config = {"options": options, "crc32": {str(name): checksum(name) for name in inputs},
                  "commit": git_commit(), "python": sys.version.split()[0], "torch": torch.__version__}
        if options["resume"]:
            self.check_same(config)
            self.read_back()
        else:
            check_unused(self.path, self.config_path, options["overwrite"])
        self.finish(self.groups)  # before the options: records never stand beside those of another run
        write_whole(self.config_path, json.dumps(config, indent=2).encode() + b"\n")
        self.file = self.path.open("ab", buffering=0)  # nothing waits in Python that a full disk could not take

    def check_same(self, config: dict) -> None:
        """Raises InputError unless the file was begun with the same options on the same inputs."""
        if not self.path.exists():
            raise InputError(f"{self.path}: there is nothing to resume")
        before = {"options": {}, "crc32": {}} | read_json(self.config_path)
        changed = [f"--{k.replace('_', '-')} was {before['options'].get(k)!r}" for k, value in config["options"].items()
                   if k not in self.FREE and before["options"].get(k) != value]
        if changed:
            raise InputError(f"{self.path}: cannot resume with other options: {'; '.join(changed)}")
        changed = [name for name, crc in config["crc32"].items() if before["crc32"].get(name) != crc]
        if changed:
            raise InputError(f"{self.path}: cannot resume: {', '.join(changed)} changed since")

    def read_back(self) -> None:
        """The whole groups of the file."""
        *lines, _ = self.path.read_bytes().split(b"\n")  # behind the last line break: nothing, or half a record
        groups = defaultdict(list)
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                groups[tuple(record[key] for key in self.keys)].append(record)
            except (ValueError, TypeError, KeyError, RecursionError):
                raise InputError(f"{self.path}: line {number}: not a record of this command") from None
        self.groups = {key: group for key, group in groups.items() if len(group) == self.size}

    def append(self, group: list[dict]) -> None:
        """A question's records."""
        self.groups[tuple(group[0][key] for key in self.keys)] = group
        content = memoryview(json_lines(group) if self.path else b"")
        while content:  # a disk that fills up takes a part
            content = content[self.file.write(content):]

    def finish(self, order: Iterable[tuple]) -> None:
        """Writes the file again, its groups in order."""
        if self.path is not None:
            write_whole(self.path, json_lines(record for key in order for record in self.groups[key]))
