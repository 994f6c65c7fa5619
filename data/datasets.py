"""Dataset readers: the files that people download, as one kind of `Example`.

    for example in read_examples("medqa.jsonl"): ...

There are three kinds of file. `*.parquet` has rows, and needs pyarrow. `*.tsv` is an OpenCompass
table. Every other file is JSON: one array if it begins with "[", else one record a line.

A record's schema is known by its fields (schemas.py). Text stays as it is published, markers such
as "<image 1>" too: our prompts put a question's images before its text, in the order of their
numbers, so "<image 2>" is the second of them.
"""

import csv
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

from tqdm import tqdm

from data.schemas import (
    IMAGE_FIELDS,
    PLAIN_FIELDS,
    letter_of,
    optional,
    read_images,
    read_options,
    read_precision,
    required,
    to_plain,
    without,
)
from hub.errors import InputError

T = TypeVar("T")


@dataclass
class Example:
    """One question. With options, `answer` is one of their letters."""

    id: str
    question: str
    answer: str
    options: dict[str, str] | None = None  # letter -> text
    images: list[str | Path | bytes] = field(default_factory=list)  # as `load_image` takes them
    response: str | None = None  # a whole worked response, for SFT
    domain: str | None = None
    meta: dict = field(default_factory=dict)  # all other fields of the record
    accepted: list[str] = field(default_factory=list)  # other answers that are right as well
    precision: int | None = None  # decimals that count in a numeric answer
    schema: str = field(default="plain", compare=False)  # what the record was recognised as
    where: str = field(default="", compare=False)  # file and line, for complaints

    @property
    def truths(self) -> list[str]:
        """Returns every right answer, `answer` first."""
        return [self.answer, *self.accepted]


def read_examples(path: str | Path, bad: list[str] | None = None) -> Iterator[Example]:
    """Yields the examples of a file, one by one.

    A bad record raises InputError, which names the file, the line and the field. With a list as
    `bad`, the complaint is appended to it instead, and reading goes on with the next record.
    Raises InputError for a file that cannot be read, or has no records.
    """
    path = Path(path)
    number = 0
    for number, (where, record) in enumerate(records(path), 1):
        try:
            # A line of JSON is parsed here, where a malformed one is a bad record like others.
            if isinstance(record, bytes):
                record = parse_json(record, where)
            example = to_example(record, where, path, number)
        except InputError as error:
            if bad is None:
                raise
            bad.append(str(error))
        else:
            yield example
    if number == 0:
        raise InputError(f"{path}: no examples in the file")


class Loaded(NamedTuple):
    """What `load_examples` made of a file."""

    items: list
    dropped: int  # examples that were too long
    bad: int  # records that were left out


def load_examples(
    path: str | Path,
    convert: Callable[[Example], T | None],
    *,
    skip_bad: bool = False,
    limit: int | None = None,
    too_long: str = "too long",
    unique_ids: bool = False,
) -> Loaded:
    """Returns convert(example) of the examples of a file, the first `limit` of them.

    Where convert returns None, the example is too long: it is dropped, counted, and stderr says
    `too_long`. A record that is bad, to the reader or to convert, raises InputError; with skip_bad
    it is left out and counted, and stderr shows the first few. Raises InputError where nothing is
    left, and, with unique_ids, where an id comes again.
    """
    bad: list[str] = []
    items: list[T] = []
    dropped = 0
    ids: set[str] = set()
    examples = read_examples(path, bad if skip_bad else None)
    for example in tqdm(examples, desc="reading", unit=" examples", delay=5):
        try:
            item = convert(example)
        except InputError as error:
            complaint = f"{example.where}: {error}"
            if not skip_bad:
                raise InputError(complaint) from None
            bad.append(complaint)
            continue
        if unique_ids and example.id in ids:
            complaint = f"field 'id' is not unique: {example.id!r} comes again"
            raise InputError(f"{example.where}: {complaint}")
        ids.add(example.id)
        if item is None:
            dropped += 1
        else:
            items.append(item)
        # What is dropped counts, so that a limit means the same questions for every model.
        if len(items) + dropped == limit:
            break

    # Nothing is left: say why. Else say on stderr what is missing.
    if not items and dropped:
        raise InputError(f"{path}: no example is left: {too_long}")
    if not items:
        raise InputError(f"{path}: none of the records is good; {bad[0]}")
    if bad:
        shown = [*bad[:3], "..."] if len(bad) > 3 else bad
        print(f"{path}: {len(bad)} bad records left out", *shown, sep="\n  ", file=sys.stderr)
    if dropped:
        n = len(items) + dropped
        print(f"{path}: {dropped} of {n} examples dropped: {too_long}", file=sys.stderr)
    return Loaded(items, dropped, len(bad))


# --- From a file to records ----------------------------------------------------------------------


def records(path: Path) -> Iterator[tuple[str, object]]:
    """Yields (where it stands, record) of each record. A line of JSON comes as bytes, unparsed."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            yield from parquet_records(path)
        elif suffix == ".tsv":
            yield from tsv_records(path)
        else:
            yield from json_records(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


def json_records(path: Path) -> Iterator[tuple[str, object]]:
    """Yields the items of one array, if the file is that; else its lines, as bytes."""
    with path.open("rb") as file:
        # White space may stand before the first record, and a byte order mark (EF BB BF).
        start = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
        file.seek(0)
        if start.startswith(b"["):
            for number, item in enumerate(parse_json(file.read(), str(path)), 1):
                yield f"{path}: item {number}", item
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}: line {number}", line.rstrip()


def parse_json(content: bytes, where: str) -> object:
    """Returns what a text in JSON says; InputError if it is malformed."""
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}"
        raise InputError(f"{where}: malformed JSON ({error.msg}, {place})") from None
    except ValueError as error:  # not UTF-8
        raise InputError(f"{where}: malformed JSON ({error})") from None


def tsv_records(path: Path) -> Iterator[tuple[str, dict]]:
    """Yields the rows of an OpenCompass TSV, without their empty cells.

    An `image` of up to 64 characters is the index of another row, before or behind, which has the
    image (VLMEvalKit, vlmeval/dataset/image_base.py). So the whole file is read first.
    """
    csv.field_size_limit(2**31 - 1)  # images are in base64
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: malformed TSV ({error})") from None
    images = {row.get("index"): row["image"] for row in rows if len(row.get("image") or "") > 64}
    for number, row in enumerate(rows, 1):
        row = {column: cell for column, cell in row.items() if cell}
        if row.get("image") in images:
            row["image"] = images[row["image"]]
        yield f"{path}: row {number}", row


def parquet_records(path: Path) -> Iterator[tuple[str, dict]]:
    """Yields the rows of a Parquet file, a few at a time."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            f"{path}: Parquet needs pyarrow (pip install pyarrow); files without images can be "
            f"converted where it is installed: pandas.read_parquet({path.name!r}).to_json("
            f"{path.stem + '.jsonl'!r}, orient='records', lines=True)"
        ) from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file ({error})") from None


# --- From a record to an example -----------------------------------------------------------------


def to_example(record: object, where: str, path: Path, number: int) -> Example:
    """Returns a record of any known schema as an example; InputError for a bad one."""
    schema, record = to_plain(record, where, is_tsv=path.suffix.lower() == ".tsv")
    options = read_options(record, where)
    answer = required(record, "answer", str, where)
    if options and answer not in options:
        answer = letter_of(answer, options, where)
    rest = without(record, *PLAIN_FIELDS, *IMAGE_FIELDS)
    return Example(
        id=optional(record, "id", str, where) or f"{path.stem}-{number}",
        question=required(record, "question", str, where),
        answer=answer,
        options=options,
        images=read_images(record, where, path.parent),
        response=optional(record, "response", str, where),
        domain=optional(record, "domain", str, where),
        meta={name: value for name, value in rest.items() if is_json(value)},
        accepted=[str(text) for text in optional(record, "accepted", list, where) or []],
        precision=read_precision(record, where),
        schema=schema,
        where=where,
    )


def is_json(value: object) -> bool:
    """Says whether a value can be written as JSON. Parquet also holds dates, bytes and the like."""
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
