"""Published schemas of datasets: each a function that gives a record the fields of our own."""

import ast
import math
import re
import reprlib
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from hub.errors import InputError


LETTERS = "ABCDEFGHIJKLMNOP"  # of options


def _get(record: object, key: str, kind: type, where: str, default: object = ...) -> object:
    """record[key], checked; with a default it may be missing, null, NaN or empty. Numbers pass for text."""
    value = record.get(key) if isinstance(record, dict) else None
    if value in (None, "", [], {}) or value != value:
        if default is ...:
            raise InputError(f"{where}: field '{key}' is missing or empty")
        return default
    if kind is str and (type(value) is int or type(value) is float and math.isfinite(value)):
        value = str(
            value
        )  # whole numbers have 4,300 digits at most: Python's limit in JSON, and ours in `_literal`
    if not isinstance(value, kind):
        names = {str: "text", dict: "an object", list: "an array"}
        raise InputError(f"{where}: field '{key}' must be {names[kind]}, not {reprlib.repr(value)}")
    if kind is str and not _is_unicode(value):
        raise InputError(f"{where}: field '{key}' is not valid Unicode")
    return value


def _is_unicode(text: str) -> bool:
    """JSON can hold half a surrogate pair, which can be neither tokenised nor printed."""
    try:
        text.encode()
        return True
    except UnicodeEncodeError:
        return False


def _is_json(value: object, depth: int = 0) -> bool:
    """Parquet also holds dates, bytes and the like. RecursionError where later readers would run into one."""
    if depth > 100:
        raise RecursionError
    if isinstance(value, (dict, list)):
        return all(
            _is_json(part, depth + 1)
            for part in (value.values() if isinstance(value, dict) else value)
        )
    return value is None or isinstance(value, (str, int, float))


def _names(fields: Iterable) -> str:
    """On one line, not too long, and fit to be printed."""
    line = " ".join(", ".join(map(str, fields)).split())[:60]
    return "".join(c if c.isprintable() else "?" for c in line) or "none"


def _literal(text: str, where: str) -> list:
    """MMMU's options are the text of a Python list, of texts and numbers."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of LaTeX's backslashes
            value = ast.literal_eval(text[:100_000])
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = None
    if not isinstance(value, list) or not all(
        type(part) in (str, float) or type(part) is int and part.bit_length() < 10_000
        for part in value
    ):  # 0xff... has no limit
        raise InputError(f"{where} must be a list of texts, not {reprlib.repr(text)}")
    return value


def _options(record: dict, key: str, where: str) -> dict[str, str] | None:
    """The options by letter: given so, or as a list in the order of the letters, as a list of {key, value}, or as the
    text of a list. None if there are none."""
    value, where = record.get(key), f"{where}: field '{key}'"
    if isinstance(value, str) and value:
        value = _literal(value, where)
    if isinstance(value, list):
        if any(isinstance(option, dict) for option in value):
            value = [
                (_get(option, "key", str, where), _get(option, "value", str, where))
                for option in value
            ]
        else:
            value = list(zip([*LETTERS, *range(len(LETTERS), len(value))], value))
        if len(dict(value)) < len(value):
            raise InputError(f"{where} has a letter twice")
        value = dict(value)
    if not value or value != value:
        return None
    if not isinstance(value, dict):
        raise InputError(f"{where} must be an object or an array, not {reprlib.repr(value)}")
    value = {
        letter: text for letter, text in value.items() if text is not None
    }  # Parquet's objects have all keys
    if not all(letter in [*LETTERS] for letter in value):
        raise InputError(f"{where} must have letters from A to P as keys, not {_names(value)}")
    return {letter: _get(value, letter, str, where) for letter in value}


def _letter_of(text: str, options: dict[str, str], where: str) -> str:
    """The letter of the option that says `text`."""
    letters = [letter for letter, option in options.items() if option == text]
    if not letters:
        raise InputError(f"{where}: field 'answer' is none of the options: {reprlib.repr(text)}")
    return letters[0]


def _open_answer(record: dict, where: str) -> dict:
    """The answer of a question without options; the text of a Python list of texts means that any of them is right."""
    answer = _get(record, "answer", str, where)
    try:
        several = _literal(answer, where) if answer.startswith("[") else []
    except InputError:
        several = []
    if several and all(isinstance(text, str) and text for text in several):
        return {"answer": several[0], "accepted": several[1:]}
    return {"answer": answer}


def _precision(record: dict, where: str) -> int | None:
    value = _get(record, "precision", str, where, None)
    if value is None:
        return None
    if not re.fullmatch(r"1?[0-9](?:\.0)?", value):
        raise InputError(
            f"{where}: field 'precision' must be a small whole number, not {reprlib.repr(value)}"
        )
    return int(value.removesuffix(".0"))


IMAGE_FIELDS = ("decoded_image", "image", "images", *(f"image_{i}" for i in range(1, 8)))


def _images(record: dict, where: str, folder: Path) -> list[str | Path | bytes]:
    """All images, in order. MathVista and MathVision have a path and the decoded image: the latter is taken."""
    found = {}
    for key in IMAGE_FIELDS:
        value = record.get(key)
        images = [
            _image(image, f"{where}: field '{key}'", folder)
            for image in (value if isinstance(value, list) else [value])
        ]
        if isinstance(value, list) and None in images:
            raise InputError(f"{where}: field '{key}' has an empty entry")
        found[key] = [image for image in images if image is not None]
    if found["decoded_image"]:
        del found["image"]
    return [image for images in found.values() for image in images]


def _image(value: object, where: str, folder: Path) -> str | Path | bytes | None:
    if isinstance(value, dict) and value.keys() <= {
        "bytes",
        "path",
    }:  # how the hub's Parquet files hold images
        value = value.get("bytes") or value.get("path")
    if value in (None, "") or value != value:
        return None
    if isinstance(value, bytes) or isinstance(value, str) and value.startswith("data:"):
        return value
    if not isinstance(value, str) or len(value) > 4096 or not value.isprintable():
        raise InputError(
            f"{where} must be a path, a data URI, an image's bytes or an array of them, "
            f"not {reprlib.repr(value)}"
        )
    return folder / value


def _open_thoughts(record: dict, where: str) -> dict:
    """The released tags become the paper's. The system prompt, which asks for the former, stays in meta."""
    turns, where = _get(record, "conversations", list, where), f"{where}: field 'conversations'"
    if [turn.get("from") if isinstance(turn, dict) else None for turn in turns] != [
        "user",
        "assistant",
    ]:
        raise InputError(f"{where} must be a user's and an assistant's turn")
    value = _get(turns[1], "value", str, where)
    before, *parts = re.split(
        r"<\|((?:begin|end)_of_(?:thought|solution))\|>", value
    )  # text, then tag, text, ...
    if parts[::2] != OPEN_THOUGHTS_TAGS or any(text.strip() for text in (before, *parts[3::4])):
        raise InputError(
            f"{where}: the response is not <|begin_of_thought|> ... <|end_of_solution|>, each tag once"
        )
    rest = {key: value for key, value in record.items() if key != "conversations"}
    return rest | {
        "question": _get(turns[0], "value", str, where),
        **_worked(parts[1], parts[5], where),
    }


OPEN_THOUGHTS_TAGS = ["begin_of_thought", "end_of_thought", "begin_of_solution", "end_of_solution"]


def _open_thoughts_metadata(record: dict, where: str) -> dict:
    """The same set with its parts apart. A coding problem's starter code belongs to the question."""
    thought, solution = (
        _get(record, key, str, where) for key in ("deepseek_reasoning", "deepseek_solution")
    )
    question, code = (
        _get(record, "problem", str, where),
        _get(record, "starter_code", str, where, None),
    )
    rest = {
        key: value
        for key, value in record.items()
        if key not in ("problem", "deepseek_reasoning", "starter_code")
    }
    return rest | {
        "question": f"{question}\n{code}" if code else question,
        **_worked(thought, solution, where),
    }


def _worked(thought: str, solution: str, where: str) -> dict:
    """Answer and response. Tags of ours in the text would end the thoughts or the answer early."""
    thought, solution = thought.strip(), solution.strip()
    if not thought or not solution:
        raise InputError(f"{where}: the thought or the solution is empty")
    if tags := re.findall(r"</?(?:think|answer)>", thought + solution):
        raise InputError(f"{where}: the response has a tag of its own: {tags[0]}")
    # The line break and the space keep `</think>` three tokens of its own: the very ids that a forced exit appends.
    return {
        "answer": solution,
        "response": f"<think>\n{thought}\n</think> <answer>{solution}</answer>",
    }


def _orz(record: list, where: str) -> dict:
    truth = _get(record[1], "ground_truth", dict, where)
    answer = _get(truth, "value", str, f"{where}: field 'ground_truth'")
    rest = {key: value for key, value in truth.items() if key != "value"}
    return rest | {"question": _get(record[0], "value", str, where), "answer": answer}


def _orz_eval(record: dict, where: str) -> dict:
    turns = _get(record, "prompt", list, where)
    rest = {
        key: value
        for key, value in record.items()
        if key not in ("prompt", "final_answer", "choices")
    }
    return rest | {
        "question": _get(turns[0], "value", str, f"{where}: field 'prompt'"),
        "answer": _get(record, "final_answer", str, where),
        "options": _options(record, "choices", where),
    }


def _gsm8k(record: dict, where: str) -> dict:
    """`answer` is the solution, then a number."""
    solution, _, answer = _get(record, "answer", str, where).rpartition("####")
    return record | {"answer": answer.strip().replace(",", ""), "solution": solution.strip()}


def _medqa(record: dict, where: str) -> dict:
    """`answer` is the text of the right option, `answer_idx` its letter."""
    return record | {
        "options": _options(record, "options", where) or _get(record, "options", dict, where),
        "answer": _get(record, "answer_idx", str, where),
    }


def _medqa_hf(record: dict, where: str) -> dict:
    endings = {letter: _get(record, f"ending{i}", str, where) for i, letter in enumerate("ABCD")}
    label, second = _get(record, "label", str, where), _get(record, "sent2", str, where, None)
    if label not in ("0", "1", "2", "3"):
        raise InputError(f"{where}: field 'label' must be 0, 1, 2 or 3, not {reprlib.repr(label)}")
    question = _get(record, "sent1", str, where)
    return {
        "id": record.get("id"),
        "question": f"{question} {second}" if second else question,
        "options": endings,
        "answer": "ABCD"[int(label)],
    }


def _mmlu_pro(record: dict, where: str) -> dict:
    """Up to ten options; those that are "N/A" only fill up."""
    options = _options(record, "options", where) or {}
    return record | {
        "id": record.get("question_id"),
        "domain": record.get("category"),
        "options": {letter: text for letter, text in options.items() if text != "N/A"},
    }


def _mmmu(record: dict, where: str) -> dict:
    """Several images, options as the text of a list; the subject is in the id ("validation_Art_1") or beside it."""
    name = record.get("id")
    subject = re.fullmatch(r"[a-z]+_(.+)_\d+", name) if isinstance(name, str) else None
    options = _options(record, "options", where)
    record = record | {
        "options": options,
        "domain": record.get("subject")
        or (subject[1] if subject else None)
        or record.get("subfield"),
    }
    text = "\n".join([_get(record, "question", str, where), *(options or {}).values()])
    for number in re.findall(r"<image ([1-7])>", text):
        if not record.get(f"image_{number}"):
            raise InputError(
                f"{where}: field 'image_{number}' is missing, but the text has <image {number}>"
            )
    return record if options else record | _open_answer(record, where)


def _mmmu_vision(record: dict, where: str) -> dict:
    """The question is in the image; so are the options, which our prompts repeat."""
    return record | {
        "question": "Answer the question in the image.",
        "domain": record.get("subject"),
    }


def _mathvista(record: dict, where: str) -> dict:
    """`answer` is the text of the right choice. The official prompt names the unit behind the question."""
    options, question = _options(record, "choices", where), _get(record, "question", str, where)
    unit, answer = _get(record, "unit", str, where, None), _get(record, "answer", str, where)
    metadata = _get(record, "metadata", dict, where, {})
    rest = {key: value for key, value in record.items() if key not in ("choices", "unit", "pid")}
    return rest | {
        "id": record.get("pid"),
        "question": f"{question} (Unit: {unit})" if unit else question,
        "options": options,
        "answer": _letter_of(answer, options, where) if options else answer,
        "domain": metadata.get("task"),
    }


def _mathvision(record: dict, where: str) -> dict:
    """One image, whatever the markers say. Options may be mere letters: then the image has them."""
    return record | {"domain": record.get("subject")}


def _opencompass(row: dict, where: str) -> dict:
    """Options in columns A, B, ... or as the text of a list; images in base64, several as the text of a list."""
    rest = {
        key: cell
        for key, cell in row.items()
        if key not in (*LETTERS, "choices", "hint", "image", "image_path")
    }
    options = {letter: row[letter] for letter in LETTERS if letter in row} or _options(
        row, "choices", where
    )
    images = row.get("image", row.get("image_path", ""))
    images = (
        re.split(r"['\"], ['\"]", images[2:-2]) if images.startswith(("['", '["')) else [images]
    )
    if "image" in row:
        images = [f"data:image;base64,{image}" for image in images]
    question = _get(row, "question", str, where)
    answer = (
        {"answer": row.get("answer_option", row.get("answer"))}
        if options
        else _open_answer(row, where)
    )
    return rest | {
        "id": row.get("index"),
        "question": f"{row['hint']}\n{question}" if "hint" in row else question,
        "options": options,
        "image": images if images != [""] else None,
        "domain": row.get("category", row.get("task")),
        **answer,
    }


class Schema(NamedTuple):
    name: str
    fields: set[str]  # by which it is known: the first whose fields are all there
    convert: Callable[[dict, str], dict]
    lacks: frozenset[str] = frozenset()


SCHEMAS = (
    Schema("openthoughts", {"conversations"}, _open_thoughts),  # open-thoughts/OpenThoughts-114k
    Schema(
        "openthoughts-metadata",
        {"problem", "deepseek_reasoning", "deepseek_solution"},  # its config "metadata"
        _open_thoughts_metadata,
    ),
    Schema(
        "orz-eval", {"prompt", "final_answer"}, _orz_eval
    ),  # Open-Reasoner-Zero, data/eval_data/*.json
    Schema(
        "medqa", {"question", "answer_idx"}, _medqa
    ),  # jind11/MedQA; GBaker/MedQA-USMLE-4-options
    Schema("medqa-hf", {"sent1", "ending0", "label"}, _medqa_hf),  # GBaker/MedQA-USMLE-4-options-hf
    Schema("mmlu-pro", {"question_id", "options", "category"}, _mmlu_pro),  # TIGER-Lab/MMLU-Pro
    Schema(
        "mmmu-pro", {"image_1", "options", "subject"}, _mmmu
    ),  # MMMU/MMMU_Pro, "standard (... options)"
    Schema(
        "mmmu-pro-vision",
        {"image", "options", "subject"},
        _mmmu_vision,  # MMMU/MMMU_Pro, "vision"
        lacks=frozenset({"question", "level"}),
    ),
    Schema("mmmu", {"image_1", "options"}, _mmmu),  # MMMU/MMMU; lmms-lab/MMMU
    Schema(
        "mathvista", {"question", "question_type", "answer_type"}, _mathvista
    ),  # AI4Math/MathVista
    Schema(
        "mathvision", {"question", "options", "level", "subject"}, _mathvision
    ),  # MathLLMs/MathVision
)
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


def _plain(record: object, where: str, suffix: str) -> tuple[str, dict]:
    """The schema's name, and the record in our own: {"id"?, "question", "answer", "options"?, "image"?: a path, a data
    URI or an array of them, "response"?, "domain"?, "accepted"?: other right answers, "precision"?}."""
    if (
        isinstance(record, list) and len(record) == 2
    ):  # Open-Reasoner-Zero, data/orz_math_57k_collected.json
        return "orz", _orz(record, where)
    if not isinstance(record, dict):
        raise InputError(
            f"{where}: a record must be an object or [{{from, value}}, {{ground_truth}}]"
        )
    if suffix == ".tsv":
        return "opencompass", _opencompass(record, where)
    for schema in SCHEMAS:
        if schema.fields <= record.keys() and not schema.lacks & record.keys():
            return schema.name, schema.convert(record, where)
    if not {"question", "answer"} & record.keys():
        raise InputError(f"{where}: unknown schema (fields: {_names(record)})")
    if (
        isinstance(record.get("answer"), str)
        and "####" in record["answer"]
        and not record.get("options")
    ):
        return "gsm8k", _gsm8k(record, where)  # openai/grade-school-math; openai/gsm8k
    return "plain", record
