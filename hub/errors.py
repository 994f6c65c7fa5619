"""The one exception for what users can mend, and the reader of JSON files that raises it."""

import json
from pathlib import Path


class InputError(ValueError):
    """Something that the user gave us is wrong.

    The message is one line that names the file and, where there are such, the line and the field.
    """


def read_json(path: str | Path) -> dict:
    """Returns the object in a JSON file. Raises InputError, with the file's name and the reason."""
    try:
        raw = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: malformed JSON ({error})") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: not a JSON object")
    return raw
