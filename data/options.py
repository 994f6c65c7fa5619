"""Options in every shape that they are published in, and which of them a record calls right.

The rule: each field that names the answer stands for the set of letters that it may mean. The
right option is the one letter that is in all of these sets. No letter, or several: a bad record.
"""

import re
from reprlib import repr as short
from typing import NamedTuple

from data.fields import (
    OPEN_KEYS,
    from_json,
    holds_image,
    is_empty,
    named,
    plain_name,
    python_list,
    required,
)
from hub.errors import InputError

LETTERS = "ABCDEFGHIJKLMNOP"  # of options
# The fields of an option that is an object.
NAME_FIELDS = ("key", "letter", "label", "id", "aid", "aoVal", "name", "option")
TEXT_FIELDS = ("value", "content", "text", "atext", "answer", "option", "choice", "description")
# Columns, one an option: choice_a, option1, ending0, opa, A.
COLUMN = re.compile(
    r"(|choices?|options?|opt|op|answers?|ans|candidate|ending|sol|alternative|answerchoice|"
    r"answeroption|optiontext|choicetext|mcanswer)([a-p]|\d{1,2})"
)
# Where an option begins in a text of all options; and one that begins with its letter or number.
MARKS = (
    # a ) 38 , b ) 27; (A) red (B) blue
    r"(?:^|[\n,;]|(?<=\s)(?=\())\s*\(?([A-Pa-p])\s?[).:、．：]",
    r"(?:^|\s)([A-P])[).:、．：]",  # A. red B. blue
    r"(?:^|\n)\s*([A-P])\s",  # A red, and B blue in the next line
)
BEGINNING = re.compile(r"\(?(?:([A-Pa-p])[).:、．：]\s*|(\d{1,2})[).:、．：]\s+)(\S.*)", re.DOTALL)


class Options(NamedTuple):
    """The options of a record."""

    texts: dict[str, str]  # letter -> text
    names: dict[str, str] = {}  # what the record calls an option -> its letter: "1", "choiceb"
    lettered: bool = False  # whether the record itself has the letters
    fields: list[str] = []  # of the record


class Ambiguous(InputError):
    """An index may count from 0 or from 1; `default` is what is meant if the file does not tell."""

    def __init__(self, message: str, default: int | None):
        super().__init__(message)
        self.default = default


def read_options(record: dict, where: str) -> Options | None:
    """Returns the options of a record; None if it has none."""
    fields = named(record, "options")
    # `answers` are options only where a key or a letter chooses one of them (ReClor).
    if plain_name(fields[-1] if fields else "") == "answers":
        answers = record[fields[-1]]
        chooses = named(record, "key") or names_letter(record)
        if len(fields) > 1 or not chooses or not isinstance(answers, list) or len(answers) < 2:
            fields.pop()
    found = []
    for field in fields:
        options = one_field(record[field], f"{where}: field '{field}'")
        found.append(options and options._replace(fields=[field]))
    found.append(column_options(record, where))
    shapes = [options for options in found if options is not None]
    if not shapes:
        return wrong_answers(record, where)
    for other in shapes[1:]:
        if list(other.texts.values()) != list(shapes[0].texts.values()):
            one, two = shapes[0].fields[0], other.fields[0]
            raise InputError(f"{where}: fields '{one}' and '{two}' both look like options")
    if len(shapes[0].texts) < 2:
        raise InputError(f"{where}: field '{shapes[0].fields[0]}' has only one option")
    return shapes[0]._replace(fields=[f for shape in shapes for f in shape.fields])


def names_letter(record: dict) -> bool:
    """Says whether a field that has the answer, or says which option it is, is a mere letter."""
    fields = [*named(record, "answer"), *named(record, "key")]
    return any(re.fullmatch("[A-Pa-p]", str(record[field])) for field in fields)


def one_field(options: object, where: str) -> Options | None:
    """Returns the options that one field holds; None if there are none."""
    pairs = pairs_of(parse_text(options) if isinstance(options, str) else options, where)
    while pairs and pairs[-1][0] is None and is_empty(pairs[-1][1]):  # fills up
        pairs.pop()
    return by_letter(pairs, where) if pairs else None


def pairs_of(options: object, where: str) -> list[tuple[str | None, object]]:
    """Returns (name, text) of each option; the name is None where options are mere texts.

    An object {name: text}; an array of texts; an array of objects such as {"key": letter, "value":
    text} (MedQA) or {letter: text}; {"label": [...], "text": [...]} (ARC).
    """
    if is_empty(options):
        return []
    if isinstance(options, dict) and isinstance(options.get("text"), list):
        texts, labels = options["text"], options.get("label")
        is_named = isinstance(labels, list) and len(labels) == len(texts)
        return list(zip(labels if is_named else [None] * len(texts), texts))
    if isinstance(options, dict):
        # Parquet's objects have the letters of all rows; those that a row lacks are null.
        return [(name, text) for name, text in options.items() if text is not None]
    if not isinstance(options, list):
        raise InputError(f"{where} must be an object or a list of texts, not {short(options)}")
    options = [one[0] if isinstance(one, list) and len(one) == 1 else one for one in options]
    if not isinstance(options[0], dict):
        return [(None, text) for text in options]
    if all(isinstance(one, dict) and len(one) == 1 for one in options):
        pairs = [next(iter(one.items())) for one in options]
        if len(dict(pairs)) > 1:
            return pairs
    if any(map(holds_image, options)):
        raise InputError(f"{where} has images: options must be texts")
    fields = options[0].keys()
    name_field = next((name for name in NAME_FIELDS if name in fields), None)
    text_field = next((name for name in TEXT_FIELDS if name in fields and name != name_field), None)
    if name_field is None and text_field is None:
        name_field = "key"
    names = [required(option, name_field, str, where) if name_field else None for option in options]
    return [
        (name, required(option, text_field or "value", str, where))
        for name, option in zip(names, options)
    ]


def parse_text(text: str) -> object:
    """Returns the list or object that a text of options is; the text itself if it is none."""
    parsed = from_json(text)
    if isinstance(parsed, str):
        parsed = python_list(text)
    if not isinstance(parsed, str):
        return parsed
    for pattern in MARKS:
        marks = list(re.finditer(pattern, text))
        letters = "".join(mark[1].upper() for mark in marks)
        ends = [*(mark.start() for mark in marks[1:]), len(text)]
        texts = [text[mark.end() : end].strip(" ,;\n") for mark, end in zip(marks, ends)]
        is_all = len(marks) > 1 and not text[: marks[0].start()].strip()
        if is_all and letters == LETTERS[: len(letters)]:
            return dict(zip(letters, texts))
    return text


def by_letter(pairs: list[tuple[str | None, object]], where: str) -> Options:
    """Returns options by letter, from the name and the text of each.

    Names are letters, or the numbers from 0 or 1 on, perhaps behind a word: A, (a), choice_a,
    option 1. A text may begin with its name as well: "(A) red", "1. red" (AGIEval). Raises
    InputError for other names, and for what is no text.
    """
    if len(pairs) > len(LETTERS):
        raise InputError(f"{where} must have letters from A to P, not {len(pairs)} options")
    if any(holds_image(text) for _, text in pairs):
        raise InputError(f"{where} has images: options must be texts")
    names = [name if name is None else plain_name(str(name)) for name, _ in pairs]
    fields = [LETTERS[i] if pair[0] is None else str(pair[0]) for i, pair in enumerate(pairs)]
    texts = [required({field: text}, field, str, where) for field, (_, text) in zip(fields, pairs)]
    begun = [BEGINNING.fullmatch(text.strip()) for text in texts]
    if None not in begun:
        marks = [(match[1] or match[2]).lower() for match in begun]
        if marks in in_order(len(marks)) or sorted(marks) == in_order(len(marks))[0]:
            texts = [match[3] for match in begun]
            names = marks if None in names else names
    if None in names:
        return Options(dict(zip(LETTERS, texts)))
    ends = [match and match[2] for match in map(COLUMN.fullmatch, names)]
    if set(ends) <= set(LETTERS.lower()) and len(set(ends)) == len(ends):
        letters = [end.upper() for end in ends]
        return Options(dict(zip(letters, texts)), dict(zip(names, letters)), lettered=True)
    if ends not in in_order(len(ends)):
        found = ", ".join(fields)[:80]
        raise InputError(f"{where} must be named by letters from A to P, not {found}")
    return Options(dict(zip(LETTERS, texts)), dict(zip([*names, *ends], LETTERS[: len(ends)] * 2)))


def in_order(n: int) -> list[list[str]]:
    """Returns the names that n options may have in this order: a, b, ...; 0, 1, ...; 1, 2, ..."""
    numbers = [str(i) for i in range(n + 1)]
    return [list(LETTERS.lower()[:n]), numbers[:-1], numbers[1:]]


def column_options(record: dict, where: str) -> Options | None:
    """Returns options that are columns of their own: at least two, from a, A, 0 or 1 on.

    Mere small letters and numbers may be anything, as in a + b. They are options where the answer
    is a letter, or the name or the text of one of them.
    """
    groups = {}
    mere = {field: text for field, text in record.items() if re.fullmatch(r"[a-p]|\d\d?", field)}
    answers = [str(record[field]) for field in (*named(record, "answer"), *named(record, "key"))]
    are_chosen = any(answer in (*mere, *mere.values()) for answer in answers)
    are_chosen = are_chosen or names_letter(record)
    for field, value in record.items():
        match = COLUMN.fullmatch(plain_name(field))
        is_text = isinstance(value, str | int | float) and not isinstance(value, bool)
        if match and is_text and not is_empty(value) and value != "nan":
            if match[1] or field not in mere or are_chosen:
                groups.setdefault((match[1], match[2].isdigit()), {})[match[2]] = field
    for columns in groups.values():
        ends = sorted(columns, key=lambda end: (len(end), end))
        fields = [columns[end] for end in ends]
        is_lettered = ends[0] == "a"
        if len(ends) > 1 and not ends[0].isdigit() and not is_lettered:
            raise InputError(f"{where}: field '{fields[0]}' looks like an option, but A is missing")
        if len(ends) > 1 and (is_lettered or ends in in_order(len(ends))):
            options = by_letter([(field, record[field]) for field in fields], where)
            return options._replace(fields=fields)
    return None


def wrong_answers(record: dict, where: str) -> Options | None:
    """Returns the right answer and the wrong ones that a record names (GPQA, SciQ), by alphabet."""
    wrong = {}
    for field, value in record.items():
        name = plain_name(field)
        if re.fullmatch(r"(incorrectanswers?|wronganswers?|distractors?)\d*", name):
            if not is_empty(value):
                values = value if isinstance(value, list) else [value]
                wrong[field] = [required({field: one}, field, str, where) for one in values]
    right = named(record, "answer")
    if not wrong or not right:
        return None
    field = right[0]
    right = required(record, field, str, where)
    if re.fullmatch("[A-P]", right):
        wrong_field = list(wrong)[0]
        raise InputError(
            f"{where}: field '{wrong_field}' has the wrong options, but '{field}' is no text"
        )
    texts = sorted({right, *(text for values in wrong.values() for text in values)})
    return by_letter([(None, text) for text in texts], where)._replace(fields=list(wrong))


# --- Which option is right ------------------------------------------------------------------------


def read_letter(
    record: dict, options: Options, where: str, base: int | None
) -> tuple[str, list[str]]:
    """Returns the right option's letter, and the fields that say so.

    base: what indices count from, 0 or 1; None if that is not known.
    """
    answers = [field for field in named(record, "answer") if field not in options.fields]
    keys = [field for field in named(record, "key") if not isinstance(record[field], bool | dict)]
    fields = [*answers, *keys]
    if not fields:
        raise InputError(f"{where}: field 'answer' is missing or empty")
    meant: dict[str, set[str]] = {}
    for field in fields:
        if meant and isinstance(record[field], list | dict | bool):
            continue
        letters = letters_meant(record[field], field, options, where, base)
        is_letter = re.fullmatch("[A-P]", str(record[field])) and field in keys
        if meant and is_letter and not letters and plain_name(field) not in OPEN_KEYS:
            found = short(record[field])
            raise InputError(f"{where}: field '{field}' is none of the options: {found}")
        for other, before in meant.items():
            if letters and not letters & before:
                raise InputError(f"{where}: fields '{other}' and '{field}' name different options")
        if letters:
            meant[field] = letters
    if not meant:
        found = short(record[fields[0]])
        raise InputError(f"{where}: field '{fields[0]}' is none of the options: {found}")
    common = set.intersection(*meant.values())
    if len(common) != 1:
        raise ambiguous(record, list(meant), options, common, where, base)
    return common.pop(), list(meant)


def ambiguous(
    record: dict, fields: list[str], options: Options, meant: set[str], where: str, base: int | None
) -> InputError:
    """Returns the complaint about an answer that may mean several options."""
    value = record[fields[0]]
    message = (
        f"{where}: field '{fields[0]}' may mean option {' or '.join(sorted(meant))}: {short(value)}"
        " can be read as a letter, an option's text or an index that counts from 0 or from 1; give "
        "options and answer by letters"
    )
    texts = [text.strip() for text in options.texts.values()]
    if base is not None or str(value).strip() in texts:
        return InputError(message)
    # A number in JSON counts from 0, as the hub's class labels do. MedMCQA's `cop` does both, and
    # QuALITY counts from 1.
    for field in fields:
        is_index = isinstance(record[field], int | float)
        is_index = is_index or plain_name(field).endswith(("index", "idx"))
        if is_index and plain_name(field) not in ("cop", "goldlabel"):
            return Ambiguous(message, 0)
    return Ambiguous(message, None)


def folded(text: str) -> str:
    """Returns a text as texts are compared that do not agree to the letter."""
    return text.strip().rstrip(".").casefold()


def letters_meant(
    value: object, field: str, options: Options, where: str, base: int | None
) -> set[str]:
    """Returns the letters that a field may mean: as a letter, a name, an option's text, an index.

    An array of marks, one an option, means the option that is marked by 1 or true. Where the record
    itself has the letters, a letter is just that. Raises InputError for several right options.
    """
    texts = options.texts
    if isinstance(value, list) and len(value) == len(texts):
        if all(one in (0, 1) for one in value) and sum(value) == 1:
            return {list(texts)[value.index(1)]}
    if isinstance(value, bool):
        said = ("yes", "true") if value else ("no", "false")
        return {letter for letter, option in texts.items() if folded(option) in said}
    if isinstance(value, list):
        if len(value) != 1:
            raise InputError(f"{where}: field '{field}' names several right options")
        value = value[0]
    if not isinstance(value, str | int | float):
        found = short(value)
        raise InputError(f"{where}: field '{field}' must be text, not {found}")
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    text = re.sub(r"^\\boxed\{(.*)\}$", r"\1", text.strip())
    # 1. A letter: B, (B), b., B: Blue
    letters = set()
    match = re.fullmatch(r"(?i:option |choice )?\(?([A-Pa-p])(?:\)?[.:]?|\)?[.:)]\s*(.+))", text)
    if match and match[1].upper() in texts:
        letter = match[1].upper()
        if match[2] is None or folded(match[2]) == folded(texts[letter]):
            letters.add(letter)
    if letters and (options.lettered or match[2]):
        return letters
    # 2. An option's text: as it stands, else without case and a full stop.
    same = [letter for letter, option in texts.items() if option.strip() == text]
    alike = [letter for letter, option in texts.items() if folded(option) == folded(text)]
    letters |= set(same[:1] or alike)
    # 3. The name of an option. A number in a `label` or the like is an index, as on the hub.
    name = plain_name(text)
    is_index = name.isdigit() and plain_name(field).endswith(("label", "index", "idx"))
    if name in options.names and not is_index:
        return letters | {options.names[name]}
    # 4. An index.
    if re.fullmatch(r"\d{1,2}", text):
        for low in (0, 1) if base is None else (base,):
            if 0 <= int(text) - low < len(texts):
                letters.add(list(texts)[int(text) - low])
    return letters
