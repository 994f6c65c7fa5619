"""Published schemas of datasets, and how a record of each becomes one of our plain schema.

Our plain schema is

    {"id"?, "question", "answer", "options"?, "image"?, "response"?, "domain"?, "accepted"?,
     "precision"?}

where options are {"A": text, ...}, an image is a path, a data URI or an array of them, accepted
are other right answers, and precision is the number of decimals that count. All of these have other
names as well: fields.py has the table.

The rule: a record is read by the names of its fields, whatever dataset it is of. Here is only what
a table of names cannot say. `SCHEMAS` lists by which fields such a dataset is known, and a function
for what else there is to do. To add a dataset whose names are not known, add them in fields.py; to
add one that needs more, add a line here.
"""

import re
from collections.abc import Callable
from reprlib import repr as short
from typing import NamedTuple

from data.fields import final_answer, named, optional, python_list, required, without
from data.options import read_options
from data.turns import (
    is_sharegpt,
    openthoughts,
    openthoughts_metadata,
    sharegpt,
    verl,
    with_question,
)
from hub.errors import InputError


def option_texts(record: dict, where: str) -> dict[str, str] | None:
    """Returns the options as letter -> text; None if there are none."""
    options = read_options(record, where)
    return None if options is None else options.texts


def listed_answers(record: dict, where: str) -> dict:
    """Returns the record, its answer as an array if it is the text of one: "['6', 'six']" (MMMU).

    Where there are options, the answer stays as it is.
    """
    answer = record.get("answer")
    if not isinstance(answer, str) or read_options(record, where):
        return record
    return record | {"answer": python_list(answer) or answer}


# --- Published schemas: each function takes a record, and returns it with our fields --------------


def orz(record: list, where: str) -> dict:
    """A record is an array: [{"value": question}, {"ground_truth": {"value": answer, ...}}]."""
    truth = required(record[1], "ground_truth", dict, where)
    answer = required(truth, "value", str, f"{where}: field 'ground_truth'")
    question = required(record[0], "value", str, where)
    return without(truth, "value") | {"question": question, "answer": answer}


def gsm8k(record: dict, where: str) -> dict:
    """The answer is a worked solution, "####", and a number.

    For SFT the solution is the thought, without the calculator's marks: "48/2 = <<48/2=24>>24".
    """
    solution, _, number = required(record, "answer", str, where).rpartition("####")
    solution = solution.strip()
    number = required({"answer": number.strip()}, "answer", str, where).replace(",", "")
    record = record | {"answer": number, "solution": solution}
    thought = re.sub(r"<<[^<>]*>>", "", solution)
    if thought and "response" not in record:
        record["response"] = f"<think>{thought}</think>\n<answer>{number}</answer>"
    return record


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
    """Options "N/A" stand for nothing: they fill up the ten of each question."""
    options = option_texts(record, where) or {}
    kept = {letter: text for letter, text in options.items() if text != "N/A"}
    return record | {"options": kept}


def mmmu(record: dict, where: str) -> dict:
    """Texts point to images: <image 1>. The subject is a field, or in the id: validation_Art_1."""
    domain = record.get("subject")
    if not domain:
        name = re.fullmatch(r"[a-z]+_(.+)_\d+", str(record.get("id")))
        domain = name[1] if name else record.get("subfield")
    return listed_answers(record, where) | {"domain": domain}


def mmmu_vision(record: dict, where: str) -> dict:
    """The question is in the image; so are the options, which our prompts repeat."""
    if named(record, "question"):
        return record
    return record | {"question": "Answer the question in the image."}


def mathvista(record: dict, where: str) -> dict:
    """The answer is the right choice's text, even if that is a letter."""
    options = option_texts(record, where) or {}
    metadata = optional(record, "metadata", dict, where) or {}
    letters = [letter for letter, text in options.items() if text == record.get("answer")]
    letters.append(record.get("answer"))
    rest = without(record, "choices") | {"domain": metadata.get("task")}
    return rest | {"options": options, "answer": letters[0]}


def opencompass(row: dict, where: str) -> dict:
    """A row of an OpenCompass TSV."""
    return listed_answers(row, where) | {"id": row["index"]}


def scored(record: dict, where: str) -> dict:
    """The options have a score each, of which the right one's is 1 (TruthfulQA, BIG-bench)."""
    field = "mc1_targets" if "mc1_targets" in record else "target_scores"
    scores = required(record, field, dict, where)
    if "labels" not in scores:
        scores = {"choices": list(scores), "labels": list(scores.values())}
    return without(record, "mc1_targets", "mc2_targets", "target_scores", "target") | scores


def medxpertqa(record: dict, where: str) -> dict:
    """The hub's questions end with their options, which our prompts show anyway."""
    question = required(record, "question", str, where)
    bare, mark, listed = question.rpartition("\nAnswer Choices:")
    options = option_texts(record, where) or {}
    repeated = bool(mark) and all(text in listed for text in options.values())
    return record | {"question": bare.strip() if repeated else question}


# --- The table ------------------------------------------------------------------------------------


class Schema(NamedTuple):
    """How a dataset's records are known, and read. The first schema that fits is taken."""

    name: str
    known_by: set[str]  # fields that a record must have
    convert: Callable[[dict, str], dict]  # what else there is to do
    lacks: frozenset[str] = frozenset()  # fields that a record must not have


SCHEMAS = (
    # open-thoughts/OpenThoughts-114k, and its config "metadata"
    Schema("openthoughts", {"conversations"}, convert=openthoughts),
    Schema(
        "openthoughts-metadata",
        {"problem", "deepseek_reasoning", "deepseek_solution"},
        convert=openthoughts_metadata,
    ),
    # GBaker/MedQA-USMLE-4-options-hf
    Schema("medqa-hf", {"sent1", "ending0", "label"}, convert=medqa_hf),
    # TIGER-Lab/MMLU-Pro
    Schema("mmlu-pro", {"question_id", "options", "category"}, convert=mmlu_pro),
    # MMMU/MMMU_Pro, "standard (... options)" and "vision"; MMMU/MMMU and lmms-lab/MMMU
    Schema("mmmu-pro", {"image_1", "options", "subject"}, convert=mmmu),
    Schema(
        "mmmu-pro-vision",
        {"image", "options", "subject"},
        convert=mmmu_vision,
        lacks=frozenset({"level"}),
    ),
    Schema("mmmu", {"image_1", "options"}, convert=mmmu),
    # AI4Math/MathVista
    Schema("mathvista", {"choices", "question_type", "answer_type"}, convert=mathvista),
    # TsinghuaC3I/MedXpertQA, and eval/data/input of its repository
    Schema("medxpertqa", {"question", "options", "medical_task"}, convert=medxpertqa),
    # volcengine/verl: DAPO-Math, geometry3k, ...
    Schema("verl", {"reward_model"}, convert=verl),
    # AILab-CVPR/SEED-Bench. An image is named with or without an ending.
    Schema(
        "seed-bench",
        {"choice_a", "data_id"},
        convert=lambda record, where: record | {"image": record["data_id"]},
        lacks=frozenset({"image"}),
    ),
    # truthfulqa/truthful_qa, "multiple_choice"; google/BIG-bench
    Schema("truthfulqa", {"question", "mc1_targets"}, convert=scored),
    Schema("big-bench", {"input", "target_scores"}, convert=scored),
)


def to_plain(record: object, where: str, *, is_tsv: bool) -> tuple[str, dict]:
    """Returns the name of a record's schema, and the record with our fields.

    Fields that mean nothing to us are left as they are. Raises InputError for an unknown schema.
    """
    # 1. Every record is an object, but those of Open-Reasoner-Zero's orz_math_57k_collected.json;
    # its tables have columns 0 and 1.
    if isinstance(record, dict) and record.keys() == {"0", "1"}:
        record = [record["0"], record["1"]]
    if isinstance(record, list) and len(record) == 2:
        return "orz", orz(record, where)
    if not isinstance(record, dict):
        raise InputError(
            f"{where}: a record must be an object or [{{from, value}}, {{ground_truth}}]"
        )
    if None in record:  # where csv puts them
        raise InputError(f"{where}: more cells than the first row")
    if optional(record, "error_type", str, where) not in ("ok", None):  # MMLU-Redux
        raise InputError(f"{where}: field 'error_type' says that the question is bad")
    # 2. These two are known by more than the names of fields.
    if is_tsv and "index" in record:
        return "opencompass", opencompass(record, where)
    if is_sharegpt(record):
        return "sharegpt", sharegpt(record, where)
    # 3. A question may be a conversation, and an answer may be in the response, in any schema.
    told = bool(named(record, "answer") or named(record, "key") or named(record, "solution"))
    record = with_question(record, told, where)
    if not told:
        record = with_answer(record, where)
    for schema in SCHEMAS:
        if schema.known_by <= record.keys() and not schema.lacks & record.keys():
            return schema.name, schema.convert(record, where)
    # openai/grade-school-math; openai/gsm8k
    if "####" in str(record.get("answer")) and not record.get("options"):
        return "gsm8k", gsm8k(record, where)
    # 4. Any other is read by the names of its fields, which may be a level lower: allenai/arc has
    # {"question": {"stem", "choices"}, "answerKey"}, so has MedQA of openlifescienceai.
    asks = named(record, "question")
    for field, value in record.items():
        if isinstance(value, dict) and named(value, "question") and asks in ([], [field]):
            record = without(record, field) | value
            break
    asks = named(record, "question")
    if not asks and not named(record, "answer"):
        raise InputError(f"{where}: unknown schema (fields: {', '.join(record)[:80]})")
    return ("plain" if "question" in asks and "answer" in record else "by names"), record


def with_answer(record: dict, where: str) -> dict:
    """Returns a record that has no answer with that of its response (databricks/dolly, alpaca).

    Records with options need an answer of their own.
    """
    fields = named(record, "worked")
    if not fields or named(record, "options"):
        return record
    response = required(record, fields[0], str, where)
    # Alpaca has it all once more as `text`.
    repeated = ["text"] if response in str(record.get("text")) else []
    answer = final_answer(response) or response
    return without(record, *fields, *repeated) | {"answer": answer, "response": response}
