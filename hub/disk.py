"""Files that are either whole or not there, also after a power failure."""

import os
from pathlib import Path


def sync(path: str | Path) -> None:
    """Returns once the content of a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def follow_links(path: str | Path) -> Path:
    """Returns the file or folder that a path means, behind symbolic links, whether it is there or
    not. What is written as --out is written there: a link stays a link."""
    return Path(os.path.realpath(path))


def put_in_place(new: Path, final: Path) -> None:
    """Gives the file or folder `new` the name `final`, at once: a reader sees the old or the new.

    `new` is first on the disk, so that after a power failure `final` is not an empty file; what a
    folder holds, its writer has to sync. A file is replaced, a folder must not be there yet.
    """
    sync(new)
    os.replace(new, final)
    sync(final.parent)
