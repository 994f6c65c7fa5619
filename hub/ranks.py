"""Which of how many processes this one is, as torchrun says it in environment variables."""

import os

from hub.errors import InputError


def number(name: str, default: int) -> int:
    """Returns the whole number in an environment variable; the default where it is empty or unset.

    Raises InputError for anything else.
    """
    text = os.environ.get(name, "").strip()
    if text and not (text.isascii() and text.isdigit()):
        raise InputError(f"the environment variable {name} must be a whole number, not {text!r}")
    return int(text) if text else default


def world_size() -> int:
    """Returns the number of processes."""
    count = number("WORLD_SIZE", 1)
    if count < 1:
        raise InputError("the environment variable WORLD_SIZE must be at least 1, not 0")
    return count


def rank() -> int:
    """Returns this process's number."""
    found = number("RANK", 0)
    if found >= world_size():
        raise InputError(
            f"the environment variable RANK is {found}, but WORLD_SIZE is {world_size()}: torchrun "
            "sets both; without torchrun unset them"
        )
    return found


def local_rank() -> int:
    """Returns this process's number on its machine, which is that of its GPU."""
    return number("LOCAL_RANK", 0)
