"""Images that are named by a URI: a data URI holds the image, a file URI is a path."""

import base64
import os
import re
from urllib.parse import unquote, unquote_to_bytes

from hub.errors import InputError


def is_uri(text: str) -> bool:
    """Returns whether a text names an image by a URI, and so is no path from some folder on."""
    return re.match(r"data:|file:|https?://", text, re.IGNORECASE) is not None


def follow_uri(uri: str) -> bytes | str:
    """Returns the bytes that a data URI holds, or the path that a file URI names.

    Raises InputError for an address on the web, since nothing is downloaded, and for an empty path.
    """
    scheme, _, rest = uri.partition(":")
    if scheme.lower() == "data":
        return data_uri_bytes(rest)
    if scheme.lower() != "file":
        raise InputError("images are not downloaded: give the file")
    # file:///home/a.png, file://localhost/home/a.png, file:/home/a.png; and, as qwen_vl_utils reads
    # it, file://a.png. It also takes what is there as it stands; by the standard %20 is a space.
    path = rest.removeprefix("//")
    if path.startswith("localhost/"):
        path = path.removeprefix("localhost")
    if not path:
        raise InputError("a file URI must name a file")
    return path if os.path.exists(path) else unquote(path)


def data_uri_bytes(rest: str) -> bytes:
    """Returns what stands in a data URI behind its "data:" (RFC 2397).

    Base64 may be broken into lines, lack its padding, or be of the kind for URLs, as in the wild.
    """
    kind, comma, content = rest.partition(",")
    if not comma:
        raise InputError("a data URI must have a comma before its data")
    content = unquote_to_bytes(content)
    if not kind.rstrip().lower().endswith(";base64"):
        return content
    content = b"".join(content.split()).rstrip(b"=").translate(bytes.maketrans(b"-_", b"+/"))
    return base64.b64decode(content + b"=" * (-len(content) % 4), validate=True)
