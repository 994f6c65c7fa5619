"""Dataset readers: the files that people download, as one kind of `Example`.

    for example in read_examples("medqa.jsonl"): ...

Files are JSONL, one JSON array, an OpenCompass TSV, or Parquet (where pyarrow is installed); all but the array are
streamed. A record's schema is known by its fields: `SCHEMAS` (schemas.py) lists them, each with where it is published. Text stays as
it is published, markers such as "<image 1>" too: our prompts put a question's images before its text, in the order of
their numbers, so "<image 2>" is the second of them.
"""

import csv
import json
import reprlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

from tqdm import tqdm

from data.schemas import (
    IMAGE_FIELDS,
    PLAIN_FIELDS,
    _get,
    _images,
    _is_json,
    _letter_of,
    _options,
    _plain,
    _precision,
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
    images: list[str | Path | bytes] = field(
        default_factory=list
    )  # paths, data URIs, files' bytes: for load_image
    response: str | None = None  # a whole worked response, for SFT
    domain: str | None = None
    meta: dict = field(default_factory=dict)  # all other fields of the record
    accepted: list[str] = field(default_factory=list)  # other answers that are right as well
    precision: int | None = None  # decimals that count in a numeric answer
    schema: str = field(default="plain", compare=False)  # what the record was recognised as
    where: str = field(default="", compare=False)  # file and line, for complaints

    @property
    def truths(self) -> list[str]:
        """Every right answer, `answer` first."""
        return [self.answer, *self.accepted]


def read_examples(path: str | Path, bad: list[str] | None = None) -> Iterator[Example]:
    """The examples of a file. A bad record raises InputError; if a list is given as `bad`, the complaint is appended to
    it instead and reading goes on. A file without a single good record is an error all the same."""
    path, good, number = Path(path), 0, 0
    for number, (where, record) in enumerate(_records(path), 1):
        try:
            example = _example(record, where, f"{path.stem}-{number}", path)
        except (InputError, RecursionError) as error:
            complaint = (
                error
                if isinstance(error, InputError)
                else InputError(f"{where}: nested too deeply")
            )
            if bad is None:
                raise complaint from None
            bad.append(str(complaint))
        else:
            good += 1
            yield example
    if not good:
        raise InputError(
            f"{path}: none of the {number} records is good; {bad[-number]}"
            if number
            else f"{path}: no examples in the file"
        )


def convert_examples(
    path: str | Path, convert: Callable[[Example], T], bad: list[str] | None = None
) -> Iterator[T]:
    """convert(example) of each example of a file. A complaint of convert's, which need name no file, is one about the
    record: it is raised or, with a list as `bad`, collected."""
    converted, before = 0, len(bad or [])
    for example in read_examples(path, bad):
        try:
            value = convert(example)
        except InputError as error:
            if bad is None:
                raise InputError(f"{example.where}: {error}") from None
            bad.append(f"{example.where}: {error}")
        else:
            converted += 1
            yield value
    if not converted:
        raise InputError(f"{path}: none of the records is good; {bad[before]}")


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
    too_long: str,
) -> Loaded:
    """Returns convert(example) of the examples of a file, the first `limit` of them.

    Where convert returns None, the example is too long: it is dropped, counted, and stderr says `too_long`. A record
    that is bad, to the reader or to convert, raises InputError; with skip_bad it is left out, counted and shown.
    Raises InputError where nothing is left.
    """
    bad = [] if skip_bad else None
    found = list(
        tqdm(
            islice(convert_examples(path, convert, bad), limit),
            desc="reading",
            unit=" examples",
            delay=5,
        )
    )
    report_bad(path, bad)
    items = [item for item in found if item is not None]
    dropped = len(found) - len(items)
    if not items:
        raise InputError(f"{path}: no example is left: {too_long}")
    if dropped:
        print(f"{path}: {dropped} of {len(found)} examples dropped: {too_long}", file=sys.stderr)
    return Loaded(items, dropped, len(bad or []))


def repeated_id(examples: list[Example]) -> str:
    """Complains of the first id that comes again."""
    seen = set()
    for example in examples:
        if example.id in seen:
            return f"field 'id' is not unique: {reprlib.repr(example.id)} comes again ({example.where})"
        seen.add(example.id)
    raise ValueError("all ids are different")


def report_bad(path: str | Path, bad: list[str] | None) -> None:
    """Says on stderr how many records were left out, and what is wrong with the first few."""
    if bad:
        shown = [*bad[:3], *["..."] * (len(bad) > 3)]
        print(f"{path}: {len(bad)} bad records left out", *shown, sep="\n  ", file=sys.stderr)


def _records(path: Path) -> Iterator[tuple[str, object]]:
    try:
        reader = {".parquet": _parquet_records, ".tsv": _tsv_records}.get(
            path.suffix.lower(), _json_records
        )
        yield from reader(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


def _json_records(path: Path) -> Iterator[tuple[str, object]]:
    """Of one array if the file is that (and not lines that are arrays themselves, as Orz's may be); else, the lines."""
    with path.open("rb") as file:
        first = next((line for line in file if line.strip(b"\xef\xbb\xbf \t\r\n")), b"")
        if first.lstrip(b"\xef\xbb\xbf \t").startswith(b"[") and not _is_pair(_parsed(first, "")):
            try:
                array = json.loads(first + file.read())
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}: malformed JSON ({error})") from None
            array = [array] if _is_pair(array) else array  # a single pair over several lines
            yield from ((f"{path}: item {item}", record) for item, record in enumerate(array, 1))
            return
        file.seek(0)
        for number, line in enumerate(file, 1):
            if line.strip():
                yield (where := f"{path}: line {number}"), _parsed(line, where)


def _parsed(line: bytes, where: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg}, column {error.colno}" if hasattr(error, "colno") else error
        return InputError(f"{where}: malformed JSON ({reason})")


def _is_pair(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], dict)
        and "from" in value[0]
    )


def _tsv_records(path: Path) -> Iterator[tuple[str, object]]:
    """Rows of an OpenCompass TSV, without their empty cells. An `image` of up to 64 characters is the index of the row
    that has the image (VLMEvalKit, vlmeval/dataset/image_base.py), before or behind: two passes find these images."""

    def rows() -> Iterator[dict]:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            for row in csv.DictReader(
                file, delimiter="\t"
            ):  # what is beyond the last column comes under None
                yield {key: cell for key, cell in row.items() if cell not in (None, "")}

    def refers(row: dict) -> bool:
        return 0 < len(row.get("image", "")) <= 64

    csv.field_size_limit(2**31 - 1)
    try:
        wanted = {row["image"] for row in rows() if refers(row)}
        images = (
            {
                row["index"]: row["image"]
                for row in rows()
                if row.get("index") in wanted and "image" in row and not refers(row)
            }
            if wanted
            else {}
        )
        for number, row in enumerate(rows(), 1):
            where = f"{path}: row {number}"
            if None in row:
                yield where, InputError(f"{where}: more cells than the first row")
            elif refers(row) and row["image"] not in images:
                yield (
                    where,
                    InputError(
                        f"{where}: field 'image' is no image, nor the index of a row that has one"
                    ),
                )
            else:
                yield where, row | {"image": images[row["image"]]} if refers(row) else row
    except csv.Error as error:
        raise InputError(f"{path}: malformed TSV ({error})") from None


def _parquet_records(path: Path) -> Iterator[tuple[str, dict]]:
    """Rows of a Parquet file, a few at a time."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            f"{path}: Parquet needs pyarrow (pip install pyarrow); files without images can be converted "
            f"where it is installed: pandas.read_parquet({path.name!r}).to_json("
            f"{path.stem + '.jsonl'!r}, orient='records', lines=True)"
        ) from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except Exception as error:  # on damaged files it raises almost anything
        raise InputError(
            f"{path}: not a readable Parquet file ({' '.join(str(error).split())[:200]})"
        ) from None


def _example(record: object, where: str, default_id: str, path: Path) -> Example:
    if isinstance(record, InputError):
        raise record
    schema, record = _plain(record, where, path.suffix.lower())
    options, answer = _options(record, "options", where), _get(record, "answer", str, where)
    if options and answer not in options:
        answer = _letter_of(answer, options, where)
    accepted = _get(record, "accepted", list, where, [])
    return Example(
        _get(record, "id", str, where, default_id),
        _get(record, "question", str, where),
        answer,
        options,
        _images(record, where, path.parent),
        _get(record, "response", str, where, None),
        _get(record, "domain", str, where, None),
        {
            key: value
            for key, value in record.items()
            if key not in (*PLAIN_FIELDS, *IMAGE_FIELDS) and _is_json(value)
        },
        [_get({"accepted": text}, "accepted", str, where) for text in accepted],
        _precision(record, where),
        schema,
        where,
    )
