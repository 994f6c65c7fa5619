"""A command's options: one dataclass, its fields from the command line, and how a command ends."""
import argparse
import math
import os
import sys
import types
from dataclasses import MISSING, field, fields
from pathlib import Path

import torch
from safetensors import SafetensorError

from hub.config import Config
from hub.errors import InputError



ROOT = Path(__file__).resolve().parent.parent
MICRO_BASE = ROOT / "micro" / "base"
MICRO_DATA = ROOT / "micro" / "data"


def option(default, text: str, *, low=None, high=None, choices=None, positional=False):
    """A field of an options dataclass: its default, its help, what it may be, and whether it goes without its name."""
    metadata = {"help": text, "low": low, "high": high, "choices": choices, "positional": positional}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(message)


def parse_options(cls: type, argv: list[str], recipes: dict[str, dict] | None = None):
    """An options dataclass from the command line: its defaults, then those of --recipe, then what was typed.

    `--some-name` sets the field some_name. Raises InputError for an unknown option or a malformed value.
    """
    parser = OneLineParser(description=cls.__doc__, allow_abbrev=False)
    if recipes:
        parser.add_argument("--recipe", default="micro", choices=list(recipes), help="a set of defaults (micro)")
    for f in fields(cls):
        kind = f.type.__args__[0] if isinstance(f.type, types.UnionType) else f.type  # of `int | None`, int
        default = f.default if f.default is not MISSING else f.default_factory()
        choices = f.metadata["choices"]
        extra = {"help": f"{f.metadata['help']} ({default})", "default": argparse.SUPPRESS}
        if kind is bool:
            extra["action"] = argparse.BooleanOptionalAction
        elif kind == list[str]:
            extra |= {"nargs": "+", "metavar": "VALUE"}
        else:
            extra |= {"type": kind, "choices": choices, "metavar": None if choices else kind.__name__.upper()}
        if f.metadata["positional"]:
            parser.add_argument(f.name, **extra | {"help": f.metadata["help"], "metavar": f.name.upper()})
        else:
            parser.add_argument("--" + f.name.replace("_", "-"), **extra)
    typed = vars(parser.parse_args(argv))
    options = cls(**{**(recipes[typed.pop("recipe")] if recipes else {}), **typed})
    for f in fields(cls):
        value, low, high = getattr(options, f.name), f.metadata["low"], f.metadata["high"]
        if type(value) in (int, float) and 1e18 < abs(value) < math.inf:  # torch and islice refuse such numbers in words of their own
            raise InputError(f"--{f.name.replace('_', '-')} is too large: {value}")
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"--{f.name.replace('_', '-')} must be a finite number, not {value}")
        if value is not None and (low is not None and value < low or high is not None and value > high):
            limits = f"at least {low}" if high is None else f"between {low} and {high}"
            raise InputError(f"--{f.name.replace('_', '-')} must be {limits}, not {value}")
    return options


def run_command(main) -> None:
    """Runs a command. What the user can mend is one line on stderr and exit code 2."""
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of `... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (InputError, OSError, SafetensorError) as error:  # the last: a disk that fills up
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def pick_device(name: str) -> torch.device:
    """auto: a GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise InputError(f"--device must be auto, cpu or cuda, not {name}")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None


def limit_threads(config: Config) -> None:
    """One CPU thread for models of the micro one's size. Their matrix products are over before a second thread has
    begun, and where the machine is busy, threads that wait for one another are many times slower (LOG.md)."""
    if config.hidden_size <= 256:
        torch.set_num_threads(1)
