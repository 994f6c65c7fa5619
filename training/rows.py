"""SFT's rows are tokenised once: by the first process, before the model is loaded.

The other processes get them sent, and --resume finds them in the run folder:

    rows.npz    ids [T], scored [T], lengths [rows]: all rows end to end, five bytes a token
                examples, a JSON list of their ids; and key, what the rows are a function of

It may be deleted at any time. A file with another key is as good as none, and so is a damaged one
(a zip file has a CRC-32 of each array).
"""

import json
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import tokenizers
import torch
from torch import Tensor

from data.sequences import Row
from hub.disk import put_in_place
from hub.options import ROOT
from training.journal import checksum
from training.parallel import is_first, tensors_of_first
from training.run import Run


class RowFile:
    """A run's rows.npz. `option_names`: the options that a row depends on, besides the data."""

    def __init__(self, run: Run, option_names: Iterable[str]):
        options = run.config["options"]
        # Another reader of data makes other rows, too.
        files = [Path(options["model"]) / "tokenizer.json", *sorted((ROOT / "data").glob("*.py"))]
        key = {
            "options": {name: options[name] for name in ("data", *option_names)},
            "data": run.config["crc32"][options["data"]],
            "crc32": [checksum(path) for path in files],
            "tokenizers": tokenizers.__version__,
        }
        self.key = json.dumps(key)
        self.path = run.folder / "rows.npz"
        self.found = False

    def rows(self, make: Callable[[], list[Row]]) -> list[Row]:
        """Returns the rows of the file if it has this key, else make().

        All processes must call it: the first one reads or makes, the others get.
        """
        self.joined = tensors_of_first(lambda: self.read() or join(make()))
        return split(self.joined)

    def read(self) -> dict[str, Tensor] | None:
        """Returns what `join` made of the rows in the file; None where that is of no use."""
        try:
            with np.load(self.path) as file:
                if str(file["key"]) != self.key:
                    return None
                joined = {name: torch.from_numpy(file[name]) for name in file if name != "key"}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            print(f"{self.path}: damaged, so the data are tokenised anew", file=sys.stderr)
            return None
        self.found = True
        return joined

    def keep(self) -> None:
        """Writes the rows that `rows` returned, unless they were found in the file.

        To be called when the run has begun, not before: a run that is refused leaves no folder.
        """
        if not is_first() or (self.found and self.path.exists()):
            return
        new = Path(f"{self.path}.tmp")
        try:
            with open(new, "wb") as file:
                np.savez(file, key=self.key, **self.joined)
            put_in_place(new, self.path)
        except OSError as error:
            new.unlink(missing_ok=True)
            print(f"{self.path}: not kept ({error.strerror or error})", file=sys.stderr)


def join(rows: list[Row]) -> dict[str, Tensor]:
    """Returns rows end to end, as a few large tensors."""
    names = json.dumps([row.example for row in rows]).encode()
    return {
        "ids": torch.cat([row.ids for row in rows]),
        "scored": torch.cat([row.scored for row in rows]),
        "lengths": torch.tensor([len(row.ids) for row in rows]),
        "examples": torch.frombuffer(bytearray(names), dtype=torch.uint8),
    }


def split(joined: dict[str, Tensor]) -> list[Row]:
    """Returns the rows that were joined, as views."""
    lengths = joined["lengths"].tolist()
    names = json.loads(joined["examples"].numpy().tobytes())
    parts = zip(joined["ids"].split(lengths), joined["scored"].split(lengths), names)
    return [Row(*part) for part in parts]
