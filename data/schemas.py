"""Published schemas of datasets, and how a record of each becomes one of our plain schema.

Our plain schema is

    {"id"?, "question", "answer", "options"?, "image"?, "response"?, "domain"?, "accepted"?,
     "precision"?}

where options are {"A": text, ...}, an image is a path, a data URI or an array of them, accepted
are other right answers, and precision is the number of decimals that count. All of these have other
names as well: fields.py has the table. Here is only what a table of names cannot say. `SCHEMAS`, at
the end, lists the published schemas: by which fields each is known, and a function for what else
there is to do. To add a dataset whose names are not known, add them in fields.py; to add one that
needs more, add a line here.
"""

import re
from collections.abc import Callable
from reprlib import repr as short
from typing import NamedTuple

from data.fields import final_answer, named, optional, python_list, required, without
from data.options import read_options
from data.turns import (
    asked,
    is_sharegpt,
    openthoughts,
    openthoughts_metadata,
    pictured,
    sharegpt,
    turns_of,
    verl,
)
from hub.errors import InputError


def option_texts(record: dict, where: str) -> dict[str, str] | None:
    """Returns the options as letter -> text; None if there are none."""
    options = read_options(record, where)
    return None if options is None else options.texts


def listed_answers(record: dict, where: str) -> dict:
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
    """There are up to ten options; those that are "N/A" only fill up."""
    options = option_texts(record, where) or {}
    kept = {letter: text for letter, text in options.items() if text != "N/A"}
    return record | {"options": kept}


def mmmu(record: dict, where: str) -> dict:
    """Texts point to images: <image 1>. The subject is a field, or in the id: validation_Art_1."""
    options = option_texts(record, where)
    domain = record.get("subject")
    if not domain:
        name = re.fullmatch(r"[a-z]+_(.+)_\d+", str(record.get("id")))
        domain = name[1] if name else record.get("subfield")
    record = record | {"options": options, "domain": domain}
    return record if options else record | listed_answers(record, where)


def mmmu_vision(record: dict, where: str) -> dict:
    """The question is in the image; so are the options, which our prompts repeat."""
    return record | {"question": "Answer the question in the image."}


def mathvista(record: dict, where: str) -> dict:
    """The answer is the right choice's text, even if that is a letter."""
    options = option_texts(record, where) or {}
    metadata = optional(record, "metadata", dict, where) or {}
    letters = [letter for letter, text in options.items() if text == record.get("answer")]
    letters.append(record.get("answer"))
    rest = without(record, "choices") | {"options": options, "domain": metadata.get("task")}
    return rest | {"answer": letters[0]}


def opencompass(row: dict, where: str) -> dict:
    """A row of an OpenCompass TSV."""
    domain = row.get("category", row.get("task"))
    record = row | {"id": row["index"], "domain": domain}
    return record if read_options(row, where) else record | listed_answers(row, where)


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
    return record | {
        "question": bare.strip() if repeated else question,
        "domain": record.get("medical_task"),
    }


# --- The table ------------------------------------------------------------------------------------


class Schema(NamedTuple):
    """How a dataset's records are known, and read. The first schema that fits is taken."""

    name: str
    known_by: set[str]  # fields that a record must have
    convert: Callable[[dict, str], dict] | None = None  # what else there is to do
    lacks: frozenset[str] = frozenset()  # fields that a record must not have


SCHEMAS = (
    # open-thoughts/OpenThoughts-114k, and its config "metadata"
    Schema("openthoughts", {"conversations"}, convert=openthoughts),
    Schema(
        "openthoughts-metadata",
        {"problem", "deepseek_reasoning", "deepseek_solution"},
        convert=openthoughts_metadata,
    ),
    # jind11/MedQA; GBaker/MedQA-USMLE-4-options; GBaker/MedQA-USMLE-4-options-hf
    Schema("medqa", {"question", "options", "answer_idx"}),
    Schema("medqa-hf", {"sent1", "ending0", "label"}, convert=medqa_hf),
    # TIGER-Lab/MMLU-Pro
    Schema("mmlu-pro", {"question_id", "options", "category"}, convert=mmlu_pro),
    # MMMU/MMMU_Pro, "standard (... options)" and "vision"; MMMU/MMMU and lmms-lab/MMMU
    Schema("mmmu-pro", {"image_1", "options", "subject"}, convert=mmmu),
    Schema(
        "mmmu-pro-vision",
        {"image", "options", "subject"},
        convert=mmmu_vision,
        lacks=frozenset({"question", "level"}),
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
    # MathLLMs/MathVision. Options may be mere letters: then the image has their texts.
    Schema("mathvision", {"question", "options", "level", "subject"}),
)


def to_plain(record: object, where: str, *, is_tsv: bool) -> tuple[str, dict]:
    """Returns the name of a record's schema, and the record with our fields.

    Fields that mean nothing to us are left as they are. Raises InputError for an unknown schema.
    """
    # Open-Reasoner-Zero, data/orz_math_57k_collected.json; its tables have columns 0 and 1
    if isinstance(record, dict) and record.keys() == {"0", "1"}:
        record = [record["0"], record["1"]]
    if isinstance(record, list) and len(record) == 2:
        return "orz", orz(record, where)
    if isinstance(record, dict) and None in record:  # where csv puts them
        raise InputError(f"{where}: more cells than the first row")
    if not isinstance(record, dict):
        raise InputError(
            f"{where}: a record must be an object or [{{from, value}}, {{ground_truth}}]"
        )
    if optional(record, "error_type", str, where) not in ("ok", None):  # MMLU-Redux
        raise InputError(f"{where}: field 'error_type' says that the question is bad")
    if is_tsv and "index" in record:
        return "opencompass", opencompass(record, where)
    told = named(record, "answer") or named(record, "key") or named(record, "solution")
    if is_sharegpt(record):
        return "sharegpt", sharegpt(record, where)
    # allenai/RLVR, verl, orz-eval: the turns before an answer
    asks = named(record, "question")
    for field in (*asks[:1], "messages", "conversations"):
        spoken = turns_of(record.get(field))
        if spoken and (field in asks or not asks and told and spoken[-1][0] == "user"):
            question = asked(record[field], f"{where}: field '{field}'")
            record = pictured(record, record[field]) | {"question": question}
            record = without(record, *{field} - {"question"})
            break
    # databricks/dolly, tatsu-lab/alpaca: the response is the answer
    worked = named(record, "worked")
    if worked and not told and not named(record, "options"):
        response = required(record, worked[0], str, where)
        answer = final_answer(response) or response
        # Alpaca has it all once more as `text`.
        repeated = ["text"] if response in str(record.get("text")) else []
        record = without(record, *worked, *repeated) | {"answer": answer, "response": response}
    for schema in SCHEMAS:
        if schema.known_by <= record.keys() and not schema.lacks & record.keys():
            if schema.convert is not None:
                record = schema.convert(record, where)
            return schema.name, record
    # openai/grade-school-math; openai/gsm8k
    if "####" in str(record.get("answer")) and not record.get("options"):
        return "gsm8k", gsm8k(record, where)
    # allenai/arc: {"question": {"stem", "choices"}, "answerKey"}; MedQA of openlifescienceai
    for field, value in record.items():
        if isinstance(value, dict) and named(value, "question") and asks in ([], [field]):
            record = without(record, field) | value
            break
    asks = named(record, "question")
    if not asks and not named(record, "answer"):
        raise InputError(f"{where}: unknown schema (fields: {', '.join(record)[:80]})")
    return ("plain" if "question" in asks and "answer" in record else "by names"), record
