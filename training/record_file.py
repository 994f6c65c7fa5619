"""The --out file of evaluate.py and tools/distill.py, which grows question by question."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

from hub.disk import follow_links
from hub.errors import InputError
from training.journal import (
    append_records,
    check_same,
    json_lines,
    make_config,
    read_records,
    write_json,
    write_whole,
)


def out_file(name: str | Path) -> Path:
    """Returns the file that an --out means, behind symbolic links. InputError for a folder,
    and for a file in none."""
    path = follow_links(name)
    if path.is_dir():
        raise InputError(f"--out {name} is a folder, not a file")
    if not path.parent.is_dir():
        raise InputError(f"--out {name}: there is no folder {path.parent}")
    return path


def check_unused(path: Path, config_path: Path, overwrite: bool) -> None:
    """Raises InputError if a file may not be replaced. Without a config beside it, it is not ours:
    not even --overwrite replaces it then."""
    if not path.exists():
        return
    if not config_path.exists():
        raise InputError(f"{path} is there, and no such command has written it: use another --out")
    if not overwrite:
        raise InputError(f"{path} holds results: use --resume, --overwrite, or another --out")


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """Returns for each path as much of its end as tells it from the others: its base name if no
    other has that, else with as many folders as it takes. Two files of one name are two files."""
    parts = {path: Path(path).parts for path in paths}
    names = {}
    for path, whole in parts.items():
        length = 1
        others = [other for other in parts.values() if other != whole]
        while any(other[-length:] == whole[-length:] for other in others):
            length += 1
        names[path] = "/".join(whole[-length:])
    return names


class RecordFile:
    """FILE with a command's records, and beside it FILE.config.json.

    Records come in groups of `size` (the runs of one question), equal in the fields `keys`. A group
    is appended as soon as it is there; with --resume, one that is not whole is dropped.

    groups: the whole groups, by the values of the key fields. If `path` is None, they are kept here
    and nothing is written.
    """

    def __init__(self, path, options: dict, inputs: Iterable, *, keys: tuple, size: int):
        """Raises InputError if the file holds other results, or on --resume none."""
        self.path = None if path is None else out_file(path)
        self.keys = keys
        self.size = size
        self.groups: dict[tuple, list[dict]] = {}
        if self.path is None:
            return
        config_path = Path(f"{self.path}.config.json")
        if options["resume"]:
            if not config_path.exists():
                raise InputError(f"{self.path}: there is nothing to resume")
            config = make_config(options, inputs)
            check_same(self.path, config_path, config)
            # No file yet: the command was stopped before its first question was answered.
            if self.path.exists():
                self.groups = self.read_groups()
                self.finish(self.groups)
        else:
            check_unused(self.path, config_path, options["overwrite"])
            config = make_config(options, inputs)
            # Before the config is written: records never stand beside another run's options.
            self.path.unlink(missing_ok=True)
        write_json(config_path, config)

    def key(self, record: dict) -> tuple:
        """Returns the values that all records of a group share."""
        return tuple(record[name] for name in self.keys)

    def read_groups(self) -> dict[tuple, list[dict]]:
        """Returns the whole groups of the file."""
        groups = defaultdict(list)
        for record, _ in read_records(self.path, self.keys):
            groups[self.key(record)].append(record)
        return {key: group for key, group in groups.items() if len(group) == self.size}

    def append(self, group: list[dict]) -> None:
        """Adds the records of one question."""
        self.groups[self.key(group[0])] = group
        if self.path is not None:
            append_records(self.path, group)

    def finish(self, order: Iterable[tuple]) -> None:
        """Writes the file again: the groups with these keys, in this order."""
        if self.path is None:
            return
        records = []
        for key in order:
            records += self.groups[key]
        write_whole(self.path, json_lines(records))


def when_all_are_there(n: int, on_prompt: Callable[[int, list], None]) -> Callable:
    """Returns an `on_completion` for the sampler, whose samples finish in any order. It calls
    `on_prompt(prompt, completions)` once all n completions of a prompt are there, in order."""
    finished = defaultdict(dict)

    def on_completion(prompt: int, sample: int, completion: object) -> None:
        finished[prompt][sample] = completion
        if len(finished[prompt]) == n:
            completions = finished.pop(prompt)
            on_prompt(prompt, [completions[i] for i in range(n)])

    return on_completion
