"""A command's options, from a dataclass, and how a command ends.

    @dataclass
    class Options:
        sheep: int = option(10, "how many sheep there are", low=1)
        black: bool = option(False, "count the black ones, too")

    options = parse_options(Options, ["--sheep", "12", "--black"])

gives Options(sheep=12, black=True).
"""

import argparse
import dataclasses
import math
import os
import sys
import time
import traceback
import types
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from hub.errors import InputError
from hub.ranks import rank, world_size

ROOT = Path(__file__).resolve().parent.parent
MICRO_BASE = ROOT / "micro" / "base"
MICRO_DATA = ROOT / "micro" / "data"


def option(default, text: str, *, low=None, high=None, choices=None, positional=False):
    """Returns a field of an options dataclass.

    `text` explains it in --help. A number must be from `low` to `high`, a text one of `choices`.
    A `positional` one is typed without its name, and must be given.
    """
    limits = {"low": low, "high": high, "choices": choices}
    metadata = {"text": text, "positional": positional, **limits}
    # Each Options object gets a list of its own.
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class OneLineParser(argparse.ArgumentParser):
    """argparse prints its whole usage before it says what is wrong; ours says what is wrong."""

    def error(self, message: str):
        raise InputError(message)

    def print_help(self, file=None):
        print(self.format_help(), end="", file=file)  # argparse would not mind a full disk


def parse_options(cls: type, argv: list[str], recipes: dict[str, dict] | None = None):
    """Returns an options dataclass that is filled from the command line.

    A field some_name is set by --some-name. What is typed wins over the values of the --recipe,
    and those over the defaults. Raises InputError for an unknown option and for a bad value.
    """
    # Fields that are not typed are not in the result (SUPPRESS), so that a recipe can set them.
    parser = OneLineParser(
        description=cls.__doc__, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    if recipes:
        parser.add_argument(
            "--recipe",
            default="micro",
            choices=list(recipes),
            help="the set of values to start from (micro)",
        )
    for field in dataclasses.fields(cls):
        add_argument(parser, field)

    values = vars(parser.parse_args(argv))
    if recipes:
        values = recipes[values.pop("recipe")] | values
    options = cls(**values)
    check_limits(options)
    return options


def add_argument(parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
    """Adds a field to the parser; its type decides what may be typed."""
    text, choices = field.metadata["text"], field.metadata["choices"]
    if field.metadata["positional"]:
        nargs = "+" if field.type == list[str] else None
        parser.add_argument(field.name, nargs=nargs, metavar=field.name.upper(), help=text)
        return
    name = "--" + field.name.replace("_", "-")
    kind = field.type
    if isinstance(kind, types.UnionType):  # `int | None` is typed as an int, or as None
        kind = or_none(kind.__args__[0])
    if kind == list[str]:
        text = f"{text} ({' '.join(field.default_factory())})"
        parser.add_argument(name, nargs="+", metavar="VALUE", help=text)
    elif kind is bool:  # --name and --no-name
        text = f"{text} ({field.default})"
        parser.add_argument(name, action=argparse.BooleanOptionalAction, help=text)
    else:
        text = f"{text} ({field.default})"
        metavar = None if choices else kind.__name__.upper()
        parser.add_argument(name, type=kind, choices=choices, metavar=metavar, help=text)


def or_none(kind: type) -> Callable[[str], object]:
    """Returns a parser of `kind` that takes the word None, too."""

    def parse(text: str):
        return None if text == "None" else kind(text)

    parse.__name__ = kind.__name__  # which argparse names in its complaints
    return parse


def check_limits(options) -> None:
    """Raises InputError for a number outside its limits, as infinity and NaN always are."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        low, high = field.metadata["low"], field.metadata["high"]
        if value is None or low is None:
            continue
        name = "--" + field.name.replace("_", "-")
        if high is None and not low <= value < math.inf:
            raise InputError(f"{name} must be at least {low}, not {value}")
        if high is not None and not low <= value <= high:
            raise InputError(f"{name} must be between {low} and {high}, not {value}")


def run_command(main: Callable[[list[str]], None]) -> None:
    """Runs main(argv) as a command: what the user can mend is one line on stderr and exit code 2.

    An OSError is a file that cannot be read or a full disk, which safetensors reports in its own
    way; kernels/ raises one for an environment variable with a bad value. Ctrl-C is exit code 130.
    Any other exception is a bug of ours and keeps its traceback.
    """
    mend_streams()
    number, count, code = 0, 1, 0
    try:
        number, count = rank(), world_size()
        main(sys.argv[1:])
    except BrokenPipeError:  # the reader of `... | head` has seen enough
        code = 1
    except (InputError, OSError, SafetensorError) as error:
        # Of several processes that refuse the same, one shall say so: the others wait, and torchrun
        # ends them as soon as the first has ended.
        if number > 0:
            time.sleep(2)
        complain(error)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        # One of several processes must not wait for the others at its end.
        if count == 1:
            raise
        traceback.print_exc()
        code = 1
    flushed = flush_streams()
    code = code or flushed
    # One of several that were connected ends at once, without Python's clean-up: threads of
    # torch.distributed that are still there then abort it now and then (gloo, torch 2.13;
    # docs/log.md), after all was done.
    if count > 1:
        os._exit(code)
    sys.exit(code)


def complain(error: Exception) -> None:
    """Says in one line on stderr what is wrong. Where nobody can hear it, the exit code tells."""
    line = " ".join(str(error).split())
    with suppress(OSError):
        print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)


def mend_streams() -> None:
    """A standard stream that is closed is one to nowhere, not an error; and a character that the
    terminal's encoding lacks is printed as its number, as in \\u4e2d."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            # It takes the number of the closed one: no file of ours shall, which C code may write
            # its messages to.
            setattr(sys, name, open(os.devnull, mode))
        elif mode == "w" and getattr(stream, "errors", None) in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def flush_streams() -> int:
    """Writes out what stdout and stderr still hold. Returns an exit code, which is 0 if that went
    well, 1 if the reader has gone, and 2 for what else can go wrong, as on a full disk."""
    code = 0
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            # Python would try once more at its end, and complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            code = 1
            if not isinstance(error, BrokenPipeError):
                complain(error)
                code = 2
    return code
