"""A command's options, from a dataclass; how a command ends; and the choice of device and dtype.

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
import types
from pathlib import Path

import torch
from safetensors import SafetensorError

from hub.config import Config
from hub.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
MICRO_BASE = ROOT / "micro" / "base"
MICRO_DATA = ROOT / "micro" / "data"
DTYPES = ("auto", "float32", "bfloat16")
DTYPE_HELP = "of the weights; auto is the folder's, but float32 on a CPU without bfloat16"


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
    if isinstance(kind, types.UnionType):  # `int | None` is typed as an int
        kind = kind.__args__[0]
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


def run_command(main) -> None:
    """Runs main(argv) as a command: what the user can mend is one line on stderr and exit code 2.

    An OSError is a file that cannot be read or a full disk, which safetensors reports in its own
    way; kernels/ raises one for an environment variable with a bad value. Ctrl-C is exit code 130.
    Any other exception is a bug of ours and keeps its traceback.
    """
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of `... | head` has seen enough. Python would complain once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (InputError, OSError, SafetensorError) as error:
        line = " ".join(str(error).split())
        print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def pick_device(name: str) -> torch.device:
    """Returns the device of --device; auto is a GPU if there is one.

    Raises InputError where it is neither a CPU nor a GPU of NVIDIA's or AMD's, or is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise InputError(f"--device must be auto, cpu or cuda, not {name}")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        # CUDA graphs and kernels run on the current device, whatever device their tensors are on.
        torch.cuda.set_device(device)
    return device


def pick_dtype(name: str, device: torch.device, on_disk: str) -> torch.dtype:
    """Returns the dtype that a model is loaded in, for --dtype and the dtype of its folder.

    auto is the folder's on a GPU. On a CPU it is float32, unless the folder's is bfloat16 and the
    processor has instructions for it. Without them bfloat16 is slow: on a CPU with AVX2, the 0.5B
    model wrote 9.9 tokens/s in it and 37 in float32 (16 samples behind a prompt of 287 tokens).
    """
    if name == "auto":
        name = on_disk
        if device.type == "cpu" and not (on_disk == "bfloat16" and cpu_computes_bfloat16()):
            name = "float32"
    return getattr(torch, name)


def cpu_computes_bfloat16() -> bool:
    """Returns whether the processor has instructions for bfloat16, as far as this torch can say."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        is_supported = getattr(torch.cpu, name, None)  # not every version of torch has it
        if is_supported is not None and is_supported():
            return True
    return False


def limit_threads(config: Config) -> None:
    """Uses one CPU thread for models as small as the micro one.

    Their matrix products are over before a second thread has begun; and on a busy machine, threads
    that wait for one another are many times slower (docs/log.md).
    """
    if config.hidden_size <= 256:
        torch.set_num_threads(1)
