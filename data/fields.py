"""What the fields of a record mean: one table of names, and the readers that follow from it.

The rule: what could change what a record asks is read, or the record is refused by that field's
name. A field that `MEANINGS` names is read under any of its names; one that it does not name, but
that looks like options, an image or context, makes the record bad.

Names are compared without case, spaces, `_` and `-`: "Correct Answer" is "correctanswer".
Options and the answer that is one of them are in options.py, what is not read in unread.py.
"""

import ast
import json
import re
from functools import cache
from pathlib import Path
from reprlib import repr as short

from data.uris import follow_uri, is_uri
from hub.errors import InputError

# Of several fields with one meaning, the one that stands first here counts. (The context is all of
# them, and so are the images.)
MEANINGS = {
    "id": "id question_id qid pid uid unique_id problem_id",
    "question": "question problem query question_text problem_text problem_statement question_stem "
    "stem prompt sentence ctx goal qtext original_text s_question inputs input instruction "
    "open_ended_verifiable_question text",
    # Text that stands before the question, because it cannot be answered without.
    "context": "context contexts passage passages flores_passage article paragraph body premise "
    "background story narrative situation scenario vignette case clinical_case case_report "
    "patient_note clinical_note document dialogue dialog transcript abstract excerpt statement "
    "stimulus hint table text prompt instruction input problem sentence stem",
    "options": "options option choices candidates alternatives endings answer_choices "
    "answer_options possible_answers candidate_answers option_list choice_list options_text "
    "choices_text multiple_choice_options mc_choices choice opts answer_list answer_option_list "
    "answers",
    "answer": "answer_number final_answer final_ans answer correct_answer ground_truth gt_answer "
    "gold_answer golden_answer reference_answer standard_answer best_answer right_answer ans "
    "expected_answer ground_truth_answer ground_true_answer multiple_choice_answer answer_value "
    "final_decision target gold gt answers correct_answers gold_answers golden_answers targets "
    "l_solutions",
    # Where there are options, these too say which of them is right: by letter or number.
    "key": "answer_idx answer_index answer_key answer_letter answer_option answer_label "
    "answer_choice correct_idx correct_index correct_option correct_choice correct_letter "
    "correct_choice_idx correct_choice_index correct_option_index correct_answer_idx "
    "correct_answer_index correct_answer_id correct_answer_num gold_idx gold_index target_idx "
    "correct cop ra gold_label label labels",
    # Where there is no answer: it stands in <answer> tags or a box.
    "solution": "solution",
    "image": "decoded_image image images image_0 image_1 image_2 image_3 image_4 image_5 image_6 "
    "image_7 image_8 image_9 image_path image_paths image_file image_files image_filename "
    "image_name img imgs img_path img_paths img_name img_file img_filename figure figures "
    "figure_path diagram picture photo image_bytes image_base64 base64_image image_b64 image_data "
    "question_image image_url image_urls img_url image_local_name",
    # These are an image if they end like one.
    "file": "file_name file path image_id img_id data_id",
    "unit": "unit units answer_unit",
    "domain": "domain medical_task ability subject category task",
    "accepted": "accepted accepted_answers aliases answer_aliases",
    "response": "response",
    # Where nothing else says the answer: it is what this ends with, or all of it.
    "worked": "response completion output",
    "precision": "precision",
}
OPEN_KEYS = {"label", "labels", "correct"}  # may be anything, where there are no options
# Base64 that does not say so: what PNG, JPEG, GIF and WebP begin with.
BASE64 = re.compile(r"(iVBORw|/9j/|R0lGOD|UklGR)[A-Za-z0-9+/=\s]{60}")
IMAGE_FILE = re.compile(r"\S.*\.(png|jpe?g|webp|gif|bmp|tiff?|svg|dcm|nii|mp4)", re.IGNORECASE)
# These are another image, where the first is no path: all others may be the path of that one.
PICTURES = {"figure", "figures", "diagram", "picture", "photo", "questionimage"}
KINDS = {str: "text", dict: "an object", list: "an array"}


@cache
def plain_name(name: str) -> str:
    """Returns a field's name as names are compared."""
    return re.sub(r"[\W_]", "", name).lower()


NAMES = {meaning: [plain_name(name) for name in MEANINGS[meaning].split()] for meaning in MEANINGS}


# --- One field of a record, checked. `where` begins each complaint: the file and the line ---------


def is_empty(value: object) -> bool:
    """Says whether a field holds nothing: null, a blank text, an empty array or object, or NaN.

    NaN is what pandas makes of null.
    """
    if isinstance(value, str):
        return not value.strip()
    return value in (None, [], {}) or value != value


def optional(record: object, field: str, kind: type, where: str) -> object:
    """Returns a record's field, which must be of a kind (str, dict or list); None if it is empty.

    A number passes for text. Raises InputError for a field of another kind.
    """
    value = record.get(field) if isinstance(record, dict) else None
    if is_empty(value):
        return None
    if kind is str and type(value) in (int, float):
        is_whole = isinstance(value, float) and value.is_integer()  # 27.0, as tables have 27
        return str(int(value) if is_whole else value)
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


def named(record: dict, meaning: str) -> list[str]:
    """Returns the record's fields of this meaning that hold something, in the table's order."""
    found = {}
    for field, value in record.items():
        if not is_empty(value):
            found.setdefault(plain_name(field), field)
    return [found[name] for name in NAMES[meaning] if name in found]


def python_list(text: str) -> list | str:
    """Returns the list of texts and numbers that a text is in Python; if it is none, the text."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    is_list = isinstance(value, list) and all(isinstance(one, str | int | float) for one in value)
    return value if is_list else text


def from_json(text: str) -> object:
    """Returns the array or object that a text is in JSON; if it is none, the text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, list | dict) else text


# --- The question and what belongs to it ----------------------------------------------------------


def read_question(record: dict, where: str) -> tuple[str, list[str]]:
    """Returns the whole text of the question, and the fields that it is from.

    Context stands before the question, a line each; the unit of the answer stands behind it, as in
    MathVista's official prompt.
    """
    [field, *_] = named(record, "question") or ["question"]
    question = required(record, field, str, where)
    fields = [field]
    lines = []
    for name in named(record, "context"):
        value = record[name]
        if name == field or isinstance(value, bool | int | float) or value == "nan":
            continue
        # Some files have question and context together in one more field.
        is_whole = plain_name(name) in ("text", "prompt")
        if is_whole and (not isinstance(value, str) or question in value):
            continue
        fields.append(name)
        text = context_text(value, f"{where}: field '{name}'")
        if text not in question:
            lines.append(text)
    for name in named(record, "unit")[:1]:
        unit = required(record, name, str, where)
        if not unit.isdigit():  # unit 3 is a chapter
            fields.append(name)
            question = f"{question} (Unit: {unit})"
    return "\n".join([*lines, question]), fields


def context_text(value: object, where: str) -> str:
    """Returns a field's text, or the texts of its array (also as PubMedQA nests it) as lines."""
    texts = value.get("contexts") if isinstance(value, dict) else value
    texts = texts if isinstance(texts, list) else [texts]
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{where} looks like context, but is no text: {short(value)}")
    return "\n".join(texts)


def read_open_answer(record: dict, where: str) -> tuple[list[str], list[str]]:
    """Returns the right answers of a question without options, and the fields that they are from.

    An array means that each of its texts is right; an array of numbers is one answer. Raises
    InputError where a field names an option, or says by a number or by `false` what is meant.
    """
    # 1. The number of a class, or `false` for an answer that is wrong (MultiRC), is no answer.
    keys = named(record, "key")
    for key in keys:
        if (
            plain_name(key) in OPEN_KEYS
            and isinstance(record[key], int)
            and record[key] is not True
        ):
            raise InputError(f"{where}: field '{key}' may not be the answer; if it is, call it so")
    # 2. Where no field is named so, a worked solution may end with the answer.
    fields = named(record, "answer")
    if not fields:
        solution = named(record, "solution")
        answer = solution and final_answer(optional(record, solution[0], str, where) or "")
        if answer:
            return [answer], solution
    # 3. A letter or an index without options says that we do not know the options.
    keys = [key for key in keys if plain_name(key) not in OPEN_KEYS]
    keys = [key for key in keys if re.fullmatch(r"[A-Pa-p]|\d{1,2}", str(record[key]))]
    if keys:
        reason = "is missing or empty" if not fields else "may be an option's text"
        raise InputError(
            f"{where}: field 'answer' {reason}; field '{keys[0]}' names an option, but there are "
            "no fields that are known to be options"
        )
    # 4. What the field says: text, yes or no, or several answers.
    [field, *_] = fields or named(record, "key") or ["answer"]
    value = record.get(field)
    if isinstance(value, bool):
        return (["yes", "true"] if value else ["no", "false"]), [field]
    if isinstance(value, dict):  # SQuAD, TriviaQA
        value = value.get("text") or [value.get("value"), *(value.get("aliases") or [])]
    if isinstance(value, list) and len(value) > 1:
        is_one = all(type(one) in (int, float) for one in value)
        value = str(value) if is_one else value
    if not isinstance(value, list):
        answer = required({field: value}, field, str, where)
        is_box = answer.startswith(r"\boxed{") and answer.endswith("}")
        is_wrapped = is_box and answer.count("boxed") == 1 or answer.endswith("</answer>")
        return [final_answer(answer) or answer if is_wrapped else answer], [field]
    texts = [optional({field: one}, field, str, where) for one in value]
    if None in texts or not texts:
        raise InputError(f"{where}: field '{field}' has an empty answer")
    if len(texts) > 1 and all(re.fullmatch("[A-P]", text) for text in texts):
        raise InputError(f"{where}: field '{field}' names several right options")
    return list(dict.fromkeys(texts)), [field]


def final_answer(solution: str) -> str | None:
    r"""Returns what a worked solution answers: in <answer> tags, else in its last \boxed{...}.

    Without both, it is what stands behind "####" or "the answer is" at the end; and a solution of a
    few words is an answer itself. Returns None where nothing of that is there.
    """
    tags = re.findall(r"<answer>(.*?)</answer>", solution, re.DOTALL)
    if tags:
        return tags[-1].strip() or None
    _, box, rest = solution.rpartition(r"\boxed{")
    if not box:
        said = re.search(r"(?:####|[Tt]he (?:final )?answer is:?) *([^\n]+?)\.?\s*$", solution)
        if said:
            return said[1]
        is_sentence = len(solution.split()) > 5 or solution.rstrip().endswith(".")
        return None if is_sentence else solution.strip() or None
    depth = 1
    for place, sign in enumerate(rest):
        depth += (sign == "{") - (sign == "}")
        if depth == 0:
            return rest[:place].strip() or None
    return None


def read_precision(record: dict, where: str) -> int | None:
    """Returns the number of decimals that count; None if the record names none."""
    precision = optional(record, "precision", str, where)
    if precision is None:
        return None
    if not re.fullmatch(r"\d{1,2}(\.0)?", precision):
        found = short(precision)
        raise InputError(f"{where}: field 'precision' must be a small whole number, not {found}")
    return int(float(precision))


def read_images(record: dict, where: str, folder: Path) -> tuple[list[str | Path | bytes], list]:
    """Returns all images of a record, and the fields that they are from.

    They are in the order of `MEANINGS`; paths are from `folder` on. Where fields hold the same
    image, one by its path and one by its bytes, it is taken once.
    """
    images = []
    fields = named(record, "image")
    for field in named(record, "file"):
        if not fields and IMAGE_FILE.fullmatch(str(record[field])):
            fields = [field]
    for field in fields:
        again = bool(images) and not re.fullmatch(r"image\d", plain_name(field))
        # MathVista and MathVision have the path beside the image itself, others its address.
        is_address = re.match(r"https?:", str(record[field]), re.IGNORECASE)
        is_path = plain_name(field) not in PICTURES
        are_paths = all(isinstance(image, Path) for image in images)
        if again and (is_address or is_path and not are_paths):
            continue
        found = images_of(record[field], f"{where}: field '{field}'", folder)
        if again:
            found = [
                one for one in found if not any(same_file(one, image, folder) for image in images)
            ]
        images += found
    return images, fields


def same_file(one: object, other: object, folder: Path) -> bool:
    """Says whether of two paths, as the record has them, the longer ends with the shorter."""
    if not isinstance(one, Path) or not isinstance(other, Path):
        return one == other
    published = [p.relative_to(folder) if p.is_relative_to(folder) else p for p in (one, other)]
    parts, others = sorted((path.parts for path in published), key=len)
    return others[len(others) - len(parts) :] == parts


def images_of(value: object, where: str, folder: Path) -> list[str | Path | bytes]:
    """Returns the images of one field."""
    if isinstance(value, str) and value.startswith("["):
        value = python_list(value)
    values = value if isinstance(value, list) else [value]
    images = []
    for one in values:
        if isinstance(one, dict):  # how the hub's Parquet files hold an image
            known = [one.get(name) for name in ("bytes", "path", "image", "url")]
            known = [held for held in known if not is_empty(held)]
            if not known and not all(is_empty(held) for held in one.values()):
                raise InputError(f"{where} must have its image as bytes or path: {short(one)}")
            one = known[0] if known else None
        if is_empty(one):
            continue
        if isinstance(one, str) and re.match(r"https?:", one, re.IGNORECASE):
            raise InputError(f"{where} is an address: load the image, and write its path there")
        if isinstance(one, str) and re.match(r"file:", one, re.IGNORECASE):
            one = follow_uri(one)
        if isinstance(one, str) and BASE64.match(one):
            one = f"data:image;base64,{one}"
        if isinstance(one, bytes) or isinstance(one, str) and is_uri(one):
            images.append(one)
        elif isinstance(one, str) and len(one) < 4096:
            images.append(folder / one)
        else:  # other base64 is too long for a path
            raise InputError(
                f"{where} must be a path, a data URI, an image's bytes or an array of them, "
                f"not {short(one)}"
            )
    return images


def holds_image(value: object) -> bool:
    """Says whether a value is an image's bytes, URI or path, or holds one, whatever its name is."""
    if isinstance(value, str):
        begins = value.startswith("data:image") or BASE64.match(value)
        return bool(begins or IMAGE_FILE.fullmatch(value))
    if isinstance(value, dict):
        held = [one for one in value.values() if isinstance(one, str | bytes)]
        return "bytes" in value or any(map(holds_image, held))
    if isinstance(value, list):
        return any(holds_image(one) for one in value if isinstance(one, str | bytes | dict))
    return isinstance(value, bytes)
