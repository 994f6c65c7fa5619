"""Published schemas of datasets, and how a record of each becomes one of our plain schema.

Our plain schema is

    {"id"?, "question", "answer", "options"?, "image"?, "response"?, "domain"?, "accepted"?,
     "precision"?}

where options are {"A": text, ...}, an image is a path, a data URI or an array of them, accepted
are other right answers, and precision is the number of decimals that count. `SCHEMAS`, at the end,
lists the published ones: by which fields each is known, which of its fields mean the same as one
of ours, and a function for what else there is to do. To add a dataset, add a line there.
"""

import ast
import re
from collections.abc import Callable
from pathlib import Path
from reprlib import repr as short
from typing import NamedTuple

from data.uris import is_uri
from hub.errors import InputError

PLAIN_FIELDS = (
    "id",
    "question",
    "answer",
    "options",
    "response",
    "domain",
    "accepted",
    "precision",
)
IMAGE_FIELDS = ("decoded_image", "image", "images", *(f"image_{i}" for i in range(1, 8)))
LETTERS = "ABCDEFGHIJKLMNOP"  # of options
OPENTHOUGHTS_TAGS = ["begin_of_thought", "end_of_thought", "begin_of_solution", "end_of_solution"]
KINDS = {str: "text", dict: "an object", list: "an array"}


# --- One field of a record, checked. `where` begins each complaint: the file and the line ---------


def is_empty(value: object) -> bool:
    """Says whether a field holds nothing: null, an empty text, array or object, or NaN.

    NaN is what pandas makes of null.
    """
    return value in (None, "", [], {}) or value != value


def optional(record: object, field: str, kind: type, where: str) -> object:
    """Returns a record's field, which must be of a kind (str, dict or list); None if it is empty.

    A number passes for text. Raises InputError for a field of another kind.
    """
    value = record.get(field) if isinstance(record, dict) else None
    if is_empty(value):
        return None
    if kind is str and type(value) in (int, float):
        return str(value)
    if not isinstance(value, kind):
        kind = KINDS[kind]
        raise InputError(f"{where}: field '{field}' must be {kind}, not {short(value)}")
    return value


def required(record: object, field: str, kind: type, where: str) -> object:
    """Returns a record's field like `optional`, but raises InputError if it is empty."""
    value = optional(record, field, kind, where)
    if value is None:
        raise InputError(f"{where}: field '{field}' is missing or empty")
    return value


def without(record: dict, *fields: str) -> dict:
    """Returns a copy of the record that lacks these fields."""
    return {field: value for field, value in record.items() if field not in fields}


# --- Fields that are published in several forms ---------------------------------------------------


def read_options(record: dict, where: str) -> dict[str, str] | None:
    """Returns the options as letter -> text; None if there are none.

    They may be given so, as an array in the order of the letters, as an array of {"key": letter,
    "value": text} (MedQA), or as the text of a Python list (MMMU).
    """
    options = record.get("options")
    where = f"{where}: field 'options'"
    # Whatever the form, it becomes letter -> text.
    if isinstance(options, str):
        options = python_list(options)
    if is_empty(options):
        return None
    if isinstance(options, list) and isinstance(options[0], dict):
        letters = [required(option, "key", str, where) for option in options]
        texts = [required(option, "value", str, where) for option in options]
        options = dict(zip(letters, texts))
    elif isinstance(options, list):
        options = {chr(ord("A") + i): text for i, text in enumerate(options)}
    if not isinstance(options, dict):
        raise InputError(f"{where} must be an object or a list of texts, not {short(options)}")
    # Parquet's objects have the letters of all rows; those that a row lacks are null.
    letters = [letter for letter, text in options.items() if text is not None]
    if not set(letters) <= set(LETTERS):
        found = ", ".join(letters)[:80]
        raise InputError(f"{where} must have letters from A to P as keys, not {found}")
    return {letter: required(options, letter, str, where) for letter in letters}


def python_list(text: str) -> list | str:
    """Returns the list of texts and numbers that a text is in Python; if it is none, the text."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    is_list = isinstance(value, list) and all(isinstance(one, str | int | float) for one in value)
    return value if is_list else text


def letter_of(text: str, options: dict[str, str], where: str) -> str:
    """Returns the letter of the option that says `text`; InputError if none does."""
    for letter, option in options.items():
        if option == text:
            return letter
    raise InputError(f"{where}: field 'answer' is none of the options: {short(text)}")


def read_open_answer(record: dict, where: str) -> dict:
    """Returns the answer of a question without options, and other answers that are right as well.

    The text of a Python list of texts means that each of them is right (MMMU).
    """
    answer = required(record, "answer", str, where)
    answers = python_list(answer)
    # "['6', 'six']" are two answers, but "[1, 2]" is one, which is a list of numbers.
    are_texts = all(isinstance(text, str) and text for text in answers)
    if isinstance(answers, list) and answers and are_texts:
        return {"answer": answers[0], "accepted": answers[1:]}
    return {"answer": answer}


def read_precision(record: dict, where: str) -> int | None:
    """Returns the number of decimals that count; None if the record names none."""
    precision = optional(record, "precision", str, where)
    if precision is None:
        return None
    if not re.fullmatch(r"\d{1,2}(\.0)?", precision):
        found = short(precision)
        raise InputError(f"{where}: field 'precision' must be a small whole number, not {found}")
    return int(float(precision))


def read_images(record: dict, where: str, folder: Path) -> list[str | Path | bytes]:
    """Returns all images of a record, in the order of IMAGE_FIELDS; paths are from `folder` on."""
    images = []
    for field in IMAGE_FIELDS:
        if field == "image" and record.get("decoded_image"):
            continue  # MathVista and MathVision have the path beside the image itself
        value = record.get(field)
        values = value if isinstance(value, list) else [value]
        for one in values:
            if isinstance(one, dict):  # how the hub's Parquet files hold an image
                one = one.get("bytes") or one.get("path")
            if is_empty(one):
                continue
            if isinstance(one, bytes) or isinstance(one, str) and is_uri(one):
                images.append(one)
            elif isinstance(one, str) and len(one) < 4096:
                images.append(folder / one)
            else:  # base64 that does not say so is too long for a path
                raise InputError(
                    f"{where}: field '{field}' must be a path, a data URI, an image's bytes or "
                    f"an array of them, not {short(one)}"
                )
    return images


# --- Published schemas: each function takes a record, and returns it with our fields --------------


def openthoughts(record: dict, where: str) -> dict:
    """The released tags become the paper's.

    The system prompt, which asks for the released ones, stays as a field that we do not read.
    """
    turns = required(record, "conversations", list, where)
    where = f"{where}: field 'conversations'"
    speakers = [turn.get("from") if isinstance(turn, dict) else None for turn in turns]
    if speakers != ["user", "assistant"]:
        raise InputError(f"{where} must be a user's and an assistant's turn")
    # Splitting at the tags gives text, tag, text, tag, ..., text.
    released = required(turns[1], "value", str, where)
    before, *parts = re.split(r"<\|((?:begin|end)_of_(?:thought|solution))\|>", released)
    tags, texts = parts[::2], parts[1::2]
    outside = [before, *texts[1::2]]  # of thought and solution
    if tags != OPENTHOUGHTS_TAGS or any(text.strip() for text in outside):
        raise InputError(
            f"{where}: the response is not <|begin_of_thought|> ... <|end_of_solution|>, "
            "each tag once"
        )
    rest = without(record, "conversations")
    rest["question"] = required(turns[0], "value", str, where)
    return rest | worked_response(texts[0], texts[2], where)


def openthoughts_metadata(record: dict, where: str) -> dict:
    """The same set with its parts apart. Starter code, of a coding problem, is in the question."""
    question = required(record, "question", str, where)
    code = optional(record, "starter_code", str, where)
    thought = required(record, "deepseek_reasoning", str, where)
    solution = required(record, "deepseek_solution", str, where)
    rest = without(record, "problem", "starter_code", "deepseek_reasoning")
    rest["question"] = f"{question}\n{code}" if code else question
    return rest | worked_response(thought, solution, where)


def worked_response(thought: str, solution: str, where: str) -> dict:
    """Returns the fields answer and response of a worked solution.

    Raises InputError for a text that has tags of ours: they would end thought or answer early.
    """
    thought = thought.strip()
    solution = solution.strip()
    if not thought or not solution:
        raise InputError(f"{where}: the thought or the solution is empty")
    tag = re.search(r"</?(?:think|answer)>", thought + solution)
    if tag:
        raise InputError(f"{where}: the response has a tag of its own: {tag[0]}")
    # The line break and the space keep `</think>` three tokens of its own: the very ids that a
    # forced exit appends (sample.py).
    response = f"<think>\n{thought}\n</think> <answer>{solution}</answer>"
    return {"answer": solution, "response": response}


def orz(record: list, where: str) -> dict:
    """A record is an array: [{"value": question}, {"ground_truth": {"value": answer, ...}}]."""
    truth = required(record[1], "ground_truth", dict, where)
    answer = required(truth, "value", str, f"{where}: field 'ground_truth'")
    question = required(record[0], "value", str, where)
    return without(truth, "value") | {"question": question, "answer": answer}


def orz_eval(record: dict, where: str) -> dict:
    """The question is the only turn of a conversation."""
    turns = required(record, "prompt", list, where)
    question = required(turns[0], "value", str, f"{where}: field 'prompt'")
    return without(record, "prompt", "final_answer", "choices") | {"question": question}


def gsm8k(record: dict, where: str) -> dict:
    """The answer is a worked solution, "####", and a number."""
    solution, _, number = required(record, "answer", str, where).rpartition("####")
    return record | {"answer": number.strip().replace(",", ""), "solution": solution.strip()}


def medqa_hf(record: dict, where: str) -> dict:
    """The question is in one or two parts, and the right ending is given by its number."""
    question = required(record, "sent1", str, where)
    second = optional(record, "sent2", str, where)
    endings = {letter: record.get(f"ending{i}") for i, letter in enumerate("ABCD")}
    label = required(record, "label", str, where)
    if label not in ("0", "1", "2", "3"):
        raise InputError(f"{where}: field 'label' must be 0, 1, 2 or 3, not {short(label)}")
    return {
        "id": record.get("id"),
        "question": f"{question} {second}" if second else question,
        "options": endings,
        "answer": "ABCD"[int(label)],
    }


def mmlu_pro(record: dict, where: str) -> dict:
    """There are up to ten options; those that are "N/A" only fill up."""
    options = read_options(record, where) or {}
    kept = {letter: text for letter, text in options.items() if text != "N/A"}
    return record | {"options": kept}


def mmmu(record: dict, where: str) -> dict:
    """Texts point to images: <image 1>. The subject is a field, or in the id: validation_Art_1."""
    options = read_options(record, where)
    domain = record.get("domain")
    if not domain:
        name = re.fullmatch(r"[a-z]+_(.+)_\d+", str(record.get("id")))
        domain = name[1] if name else record.get("subfield")
    # A file that was converted without its images would be answered blindly.
    texts = [required(record, "question", str, where), *(options or {}).values()]
    for number in re.findall(r"<image ([1-7])>", "\n".join(texts)):
        if not record.get(f"image_{number}"):
            raise InputError(
                f"{where}: field 'image_{number}' is missing, but the text has <image {number}>"
            )
    record = record | {"options": options, "domain": domain}
    return record if options else record | read_open_answer(record, where)


def mmmu_vision(record: dict, where: str) -> dict:
    """The question is in the image; so are the options, which our prompts repeat."""
    return record | {"question": "Answer the question in the image."}


def mathvista(record: dict, where: str) -> dict:
    """The answer is the right choice's text. The official prompt has the unit with the question."""
    question = required(record, "question", str, where)
    answer = required(record, "answer", str, where)
    options = read_options(record, where)
    unit = optional(record, "unit", str, where)
    metadata = optional(record, "metadata", dict, where) or {}
    return without(record, "pid", "choices", "unit") | {
        "question": f"{question} (Unit: {unit})" if unit else question,
        "answer": letter_of(answer, options, where) if options else answer,
        "domain": metadata.get("task"),
    }


def opencompass(row: dict, where: str) -> dict:
    """A row of an OpenCompass TSV.

    Options are in columns A, B, ... or, as the text of a list, in `choices`. An image is in base64;
    several are the text of a list.
    """
    if None in row:
        raise InputError(f"{where}: more cells than the first row")
    question = required(row, "question", str, where)
    options = {letter: row[letter] for letter in LETTERS if letter in row} or row.get("choices")
    images = row.get("image", row.get("image_path", ""))
    images = python_list(images)
    images = images if isinstance(images, list) else [images]
    if "image" in row:
        images = [f"data:image;base64,{image}" for image in images]
    record = without(row, *LETTERS, "choices", "hint", "image_path") | {
        "id": row.get("index"),
        "question": f"{row['hint']}\n{question}" if "hint" in row else question,
        "options": options,
        "image": images,
        "domain": row.get("category", row.get("task")),
    }
    if not options:
        return record | read_open_answer(row, where)
    return record | {"answer": row.get("answer_option", row.get("answer"))}


# --- The table ------------------------------------------------------------------------------------


class Schema(NamedTuple):
    """How a dataset's records are known, and read. The first schema that fits is taken."""

    name: str
    known_by: set[str]  # fields that a record must have
    means: dict[str, str] = {}  # our field -> the published one that means the same
    convert: Callable[[dict, str], dict] | None = None  # what else there is to do
    lacks: frozenset[str] = frozenset()  # fields that a record must not have


SCHEMAS = (
    # open-thoughts/OpenThoughts-114k, and its config "metadata"
    Schema("openthoughts", {"conversations"}, convert=openthoughts),
    Schema(
        "openthoughts-metadata",
        {"problem", "deepseek_reasoning", "deepseek_solution"},
        {"question": "problem"},
        openthoughts_metadata,
    ),
    # Open-Reasoner-Zero, data/eval_data/*.json
    Schema(
        "orz-eval",
        {"prompt", "final_answer"},
        {"answer": "final_answer", "options": "choices"},
        orz_eval,
    ),
    # jind11/MedQA; GBaker/MedQA-USMLE-4-options; GBaker/MedQA-USMLE-4-options-hf
    Schema("medqa", {"question", "options", "answer_idx"}, {"answer": "answer_idx"}),
    Schema("medqa-hf", {"sent1", "ending0", "label"}, convert=medqa_hf),
    # TIGER-Lab/MMLU-Pro
    Schema(
        "mmlu-pro",
        {"question_id", "options", "category"},
        {"id": "question_id", "domain": "category"},
        mmlu_pro,
    ),
    # MMMU/MMMU_Pro, "standard (... options)" and "vision"; MMMU/MMMU and lmms-lab/MMMU
    Schema("mmmu-pro", {"image_1", "options", "subject"}, {"domain": "subject"}, mmmu),
    Schema(
        "mmmu-pro-vision",
        {"image", "options", "subject"},
        {"domain": "subject"},
        mmmu_vision,
        lacks=frozenset({"question", "level"}),
    ),
    Schema("mmmu", {"image_1", "options"}, convert=mmmu),
    # AI4Math/MathVista
    Schema(
        "mathvista",
        {"question", "question_type", "answer_type"},
        {"id": "pid", "options": "choices"},
        mathvista,
    ),
    # MathLLMs/MathVision. Options may be mere letters: then the image has their texts.
    Schema("mathvision", {"question", "options", "level", "subject"}, {"domain": "subject"}),
)


def to_plain(record: object, where: str, *, is_tsv: bool) -> tuple[str, dict]:
    """Returns the name of a record's schema, and the record with our fields.

    Fields that mean nothing to us are left as they are. Raises InputError for an unknown schema.
    """
    # Open-Reasoner-Zero, data/orz_math_57k_collected.json
    if isinstance(record, list) and len(record) == 2:
        return "orz", orz(record, where)
    if not isinstance(record, dict):
        raise InputError(
            f"{where}: a record must be an object or [{{from, value}}, {{ground_truth}}]"
        )
    if is_tsv:
        return "opencompass", opencompass(record, where)
    for schema in SCHEMAS:
        if schema.known_by <= record.keys() and not schema.lacks & record.keys():
            for ours, theirs in schema.means.items():
                record = record | {ours: record.get(theirs)}
            if schema.convert is not None:
                record = schema.convert(record, where)
            return schema.name, record
    if not {"question", "answer"} & record.keys():
        raise InputError(f"{where}: unknown schema (fields: {', '.join(record)[:80]})")
    # openai/grade-school-math; openai/gsm8k
    if "####" in str(record.get("answer")) and not record.get("options"):
        return "gsm8k", gsm8k(record, where)
    return "plain", record
