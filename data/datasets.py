"""Dataset readers: the files that people download, as one kind of `Example`.

    for example in read_examples("medqa.jsonl"): ...

There are four kinds of file. `*.parquet` has rows, and needs pyarrow. `*.tsv` is an OpenCompass
table, `*.csv` any other. Every other file is JSON: one array if it begins with "[", one object of
records by their ids if it is a single object, else one record a line.

A record becomes an example in four steps:

    records     finds it in the file
    to_plain    does what a schema needs beside other names of fields (schemas.py, turns.py)
    to_example  reads each meaning by its names: question, images, answer (fields.py), options and
                which of them is right (options.py); and puts the example together
    refuse_*    refuses it if something is left or missing that the question may need (unread.py)

Text stays as it is published, markers such as "<image 1>" too: our prompts put a question's images
before its text, in the order of their numbers, so "<image 2>" is the second of them.
"""

import csv
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from reprlib import repr as short
from typing import BinaryIO, NamedTuple, TypeVar

from tqdm import tqdm

from data.fields import (
    NAMES,
    named,
    optional,
    plain_name,
    read_images,
    read_open_answer,
    read_precision,
    read_question,
)
from data.options import Ambiguous, read_letter, read_options
from data.schemas import to_plain
from data.tokenizer import check_text
from data.unread import refuse_missing, refuse_unread
from hub.errors import BEGINNINGS, InputError, unreadable

T = TypeVar("T")

BLOCK = 200  # examples that `load_examples` finishes at a time
# These fields are no part of Example.meta, even if they are empty.
OURS = {*"id question answer response domain accepted precision unit".split()}
OURS |= {*NAMES["image"], *NAMES["options"]}


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
    sources: dict = field(default_factory=dict, compare=False)  # meaning -> fields it is from
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
    base = None  # what the file's indices count from, 0 or 1; None as long as it is not known
    has_been_asked = False
    for number, (where, record) in enumerate(records(path), 1):
        try:
            # A line of JSON is parsed here, where a malformed one is a bad record like others.
            if isinstance(record, bytes):
                record = parse_json(record, where)
            try:
                example = to_example(record, where, path, number)
            except Ambiguous as error:
                if not has_been_asked:
                    base = index_base(path)
                    has_been_asked = True
                counts_from = error.default if base is None else base
                if counts_from is None:
                    raise
                example = to_example(record, where, path, number, counts_from)
        except InputError as error:
            if bad is None:
                raise
            bad.append(str(error))
        else:
            yield example
    if number == 0:
        raise InputError(f"{path}: no examples in the file")


def index_base(path: Path) -> int | None:
    """Returns what the indices of a file count from, 0 or 1; None if it does not tell.

    The first record decides that has an index of 0, or one as high as there are options. Such a
    record can be read without knowing the base, and with one base only. One that can be read with
    one base, but not without, tells nothing: its options are numbers.
    """
    for number, (where, record) in enumerate(records(path), 1):
        found = []
        for base in (None, 0, 1):
            try:
                parsed = parse_json(record, where) if isinstance(record, bytes) else record
                to_example(parsed, where, path, number, base)
                found.append(base)
            except InputError:
                pass
        if len(found) == 2 and found[0] is None:
            return found[1]
    return None


class Loaded(NamedTuple):
    """What `load_examples` made of a file."""

    items: list
    dropped: int  # examples that were too long
    bad: int  # records that were left out


def load_examples(
    path: str | Path,
    convert: Callable[[Example], T],
    finish: Callable[[list[T]], list] = list,
    *,
    skip_bad: bool = False,
    limit: int | None = None,
    too_long: str = "too long",
    unique_ids: bool = False,
) -> Loaded:
    """Returns finish([convert(example), ...]) of the examples of a file, the first `limit` of them.

    `finish` is for what is faster for many at once, tokenising above all: it gets BLOCK converted
    examples at a time, in order, and returns as many items. An item that is None is too long: it is
    dropped, counted, and stderr says `too_long`. A record that is bad, to the reader or to convert,
    raises InputError; with skip_bad it is left out and counted, and stderr shows the first few.
    Raises InputError where nothing is left, and, with unique_ids, where an id comes again.
    """
    bad: list[str] | None = [] if skip_bad else None
    # What is dropped counts, so that a limit means the same questions for every model.
    converted = islice(convert_all(path, convert, bad, unique_ids), limit)
    items = []
    dropped = 0
    while block := list(islice(converted, BLOCK)):
        finished = finish(block)
        kept = [item for item in finished if item is not None]
        items += kept
        dropped += len(finished) - len(kept)

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
    return Loaded(items, dropped, len(bad or ()))


def convert_all(
    path: str | Path, convert: Callable[[Example], T], bad: list[str] | None, unique_ids: bool
) -> Iterator[T]:
    """Yields convert(example) of the examples of a file, as load_examples says, with a bar."""
    ids: set[str] = set()
    for example in tqdm(read_examples(path, bad), desc="reading", unit=" examples", delay=5):
        try:
            item = convert(example)
        except InputError as error:
            complaint = f"{example.where}: {error}"
            if bad is None:
                raise InputError(complaint) from None
            bad.append(complaint)
            continue
        if unique_ids and example.id in ids:
            complaint = f"field 'id' is not unique: {example.id!r} comes again"
            raise InputError(f"{example.where}: {complaint}")
        ids.add(example.id)
        yield item


# --- From a file to records ----------------------------------------------------------------------


def records(path: Path) -> Iterator[tuple[str, object]]:
    """Yields (where it stands, record) of each record. A line of JSON comes as bytes, unparsed."""
    suffix = path.suffix.lower()
    try:
        with path.open("rb") as file:
            if file.read(32).startswith(tuple(BEGINNINGS)):
                raise unreadable(path, "")
        if suffix == ".parquet":
            yield from parquet_records(path)
        elif suffix in (".tsv", ".csv"):
            yield from table_records(path, "\t" if suffix == ".tsv" else ",")
        else:
            yield from json_records(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


def json_records(path: Path) -> Iterator[tuple[str, object]]:
    """Yields the items of one array or object, if the file is that; else its lines, as bytes."""
    with path.open("rb") as file:
        # White space may stand before the first record, and a byte order mark (EF BB BF).
        start = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
        file.seek(0)
        if start.startswith(b"["):
            for number, item in enumerate(parse_json(file.read(), str(path)), 1):
                yield f"{path}: item {number}", item
            return
        items = object_of_records(file, str(path))
        if items is not None:
            yield from items
            return
        file.seek(0)
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}: line {number}", line.rstrip()


def object_of_records(file: BinaryIO, where: str) -> list[tuple[str, object]] | None:
    """Returns the records of a file that is one JSON object; None if it has a record a line.

    The object has the records by their ids (MathVista), or has one array of them, as in
    {"questions": [...]}. Or it is a record itself, over several lines.
    """
    lines = (line for line in file if line.strip())
    try:
        content = json.loads(next(lines, b"").decode("utf-8-sig"))
        if next(lines, None) is not None:
            return None
        is_line = True
    except (ValueError, RecursionError):
        file.seek(0)
        try:
            content = json.loads(file.read().decode("utf-8-sig"))
        except (ValueError, RecursionError):
            return None
        is_line = False
    if not isinstance(content, dict) or not content:
        return None
    known = any(plain_name(name) in names for name in content for names in NAMES.values())
    arrays = [name for name, value in content.items() if is_array_of_records(value)]
    if len(arrays) == 1 and not known:
        items = enumerate(content[arrays[0]], 1)
        return [(f"{where}: item {number}", item) for number, item in items]
    if all(isinstance(value, dict) for value in content.values()) and not known:
        return [
            (f"{where}: item {short(key)}", item if named(item, "id") else {"id": key} | item)
            for key, item in content.items()
        ]
    return None if is_line else [(f"{where}: item 1", content)]


def is_array_of_records(value: object) -> bool:
    """Says whether a value may be the records of a file."""
    if not isinstance(value, list) or not value or not all(isinstance(one, dict) for one in value):
        return False
    first = value[0]
    return bool(named(first, "question")) or "conversations" in first or "messages" in first


def parse_json(content: bytes, where: str) -> object:
    """Returns what a text in JSON says; InputError if it is malformed."""
    try:
        return json.loads(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}"
        raise InputError(f"{where}: malformed JSON ({error.msg}, {place})") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, or too deep
        raise InputError(f"{where}: malformed JSON ({error})") from None


def table_records(path: Path, delimiter: str) -> Iterator[tuple[str, dict]]:
    """Yields the rows of a table, without their empty cells, which pandas writes as nan.

    In an OpenCompass TSV, an `image` of up to 64 characters is the index of another row, before or
    behind, which has the image (VLMEvalKit, vlmeval/dataset/image_base.py). So the whole file is
    read first. A cell that begins with a quotation mark ends with one, and doubles those within.
    """
    csv.field_size_limit(2**31 - 1)  # images are in base64
    kind = path.suffix[1:].upper()
    with path.open(encoding="utf-8-sig", newline="") as file:
        # strict: a stray quotation mark would take the rows behind it into its cell.
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            rows = list(reader)
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: malformed {kind} ({error})") from None
        except csv.Error as error:
            line = reader.line_num
            raise InputError(f"{path}: malformed {kind} ({error}, up to line {line})") from None
    images = {
        row["index"]: row["image"]
        for row in rows
        if row.get("index") and len(row.get("image") or "") > 64
    }
    for number, row in enumerate(rows, 1):
        row = {name: cell for name, cell in row.items() if cell not in (None, "", "nan")}
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


def to_example(
    record: object, where: str, path: Path, number: int, base: int | None = None
) -> Example:
    """Returns a record of any known schema as an example; InputError for a bad one.

    base: what the file's indices count from; None if that is not known.
    """
    schema, record = to_plain(record, where, is_tsv=path.suffix.lower() == ".tsv")
    # 1. Each reader returns what it found, and the fields that it is from.
    sources = {}
    options = read_options(record, where)
    if options:
        sources["options"] = options.fields
        answer, sources["answer"] = read_letter(record, options, where, base)
        answers = [answer]
    else:
        answers, sources["answer"] = read_open_answer(record, where)
    question, sources["question"] = read_question(record, where)
    images, sources["image"] = read_images(record, where, path.parent)
    for meaning in ("id", "domain", "accepted", "response", "precision"):
        sources[meaning] = named(record, meaning)[:1]

    # 2. Nothing that belongs to the question may be left, or missing.
    used = {name for names in sources.values() for name in names}
    bare = str(record[sources["question"][0]])
    refuse_unread(record, used, where, bare, bool(options), images, answers[0])
    text = "\n".join([question, *(options.texts.values() if options else ())])
    refuse_missing(record, where, text, images)

    # 3. The rest needs no reader of its own.
    def first(meaning: str, kind: type) -> object:
        """Returns the record's field of a meaning, None if it has none."""
        fields = sources[meaning]
        return optional(record, fields[0], kind, where) if fields else None

    domains = record[sources["domain"][0]] if sources["domain"] else []
    domains = domains if isinstance(domains, list) else [domains]
    accepted = [*answers[1:], *map(str, first("accepted", list) or [])]
    # Fields that say which answer is right stay in meta, as they were published.
    shown = {name for part in ("question", "options", "image") for name in sources.get(part, ())}
    rest = {name: value for name, value in record.items() if name not in shown}
    name = first("id", str) or f"{path.stem}-{number}"
    check_text(name)
    return Example(
        id=name,
        question=question,
        answer=answers[0],
        options=options.texts if options else None,
        images=images,
        response=first("response", str),
        domain=", ".join(map(str, domains)) or None,
        meta={k: v for k, v in rest.items() if plain_name(k) not in OURS and is_json(v)},
        accepted=accepted,
        precision=read_precision(record, where),
        schema=schema,
        sources={meaning: fields for meaning, fields in sources.items() if fields},
        where=where,
    )


def is_json(value: object) -> bool:
    """Says whether a value can be written as JSON. Parquet also holds dates, bytes and the like."""
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
