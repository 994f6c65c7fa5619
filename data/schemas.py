"""Published schemas of datasets, and how a record of each becomes one of our plain schema.

Our plain schema is

    {"id"?, "question", "answer", "options"?, "image"?, "response"?, "domain"?, "accepted"?,
     "precision"?}

where options are {"A": text, ...}, an image is a path, a data URI or an array of them, accepted
are other right answers, and precision is the number of decimals that count. All of these have other
names as well: fields.py has the table. Here is only what a table of names cannot say. `SCHEMAS`, at
the end, lists the published schemas: by which fields each is known, which of its fields mean the
same as one of ours, and a function for what else there is to do. To add a dataset whose names are
not known, add them in fields.py; to add one that needs more, add a line here.
"""

import re
from collections.abc import Callable
from reprlib import repr as short
from typing import NamedTuple

from data.fields import (
    final_answer,
    from_json,
    named,
    optional,
    python_list,
    read_open_answer,
    required,
    without,
)
from data.options import LETTERS, read_options
from hub.errors import InputError

OPENTHOUGHTS_TAGS = ["begin_of_thought", "end_of_thought", "begin_of_solution", "end_of_solution"]


def option_texts(record: dict, where: str) -> dict[str, str] | None:
    """Returns the options as letter -> text; None if there are none."""
    options = read_options(record, where)
    return None if options is None else options.texts


def letter_of(text: str, options: dict[str, str], where: str) -> str:
    """Returns the letter of the option that says `text`; InputError if none does."""
    for letter, option in options.items():
        if option == text:
            return letter
    raise InputError(f"{where}: field 'answer' is none of the options: {short(text)}")


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
    """The answer is a worked solution, "####", and a number.

    For SFT the solution is the thought, without the calculator's marks: "48/2 = <<48/2=24>>24".
    """
    solution, _, number = required(record, "answer", str, where).rpartition("####")
    solution, number = solution.strip(), number.strip().replace(",", "")
    record = record | {"answer": number, "solution": solution}
    thought = re.sub(r"<<[^<>]*>>", "", solution)
    if thought and number and "response" not in record:
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
    return record if options else record | listed_answers(record, where)


def mmmu_vision(record: dict, where: str) -> dict:
    """The question is in the image; so are the options, which our prompts repeat."""
    return record | {"question": "Answer the question in the image."}


def mathvista(record: dict, where: str) -> dict:
    """The answer is the right choice's text. The official prompt has the unit with the question."""
    question = required(record, "question", str, where)
    answer = required(record, "answer", str, where)
    options = option_texts(record, where)
    unit = optional(record, "unit", str, where)
    metadata = optional(record, "metadata", dict, where) or {}
    return without(record, "pid", "choices", "unit") | {
        "question": f"{question} (Unit: {unit})" if unit else question,
        "options": options,
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
        return record | listed_answers(row, where)
    return record | {"answer": row.get("answer_option", row.get("answer"))}


def turns_of(turns: object) -> list[tuple[str, str]] | None:
    """Returns (speaker, text) of each turn of a conversation; None if it is none.

    ShareGPT says from and value, the chat APIs say role and content. The text may be an array of
    parts, of which those that are text count.
    """
    found = []
    for turn in turns if isinstance(turns, list) else []:
        if not isinstance(turn, dict):
            return None
        speaker = turn.get("from", turn.get("role"))
        text = turn.get("value", turn.get("content"))
        if isinstance(text, list):
            parts = [part.get("text") for part in text if isinstance(part, dict)]
            text = "\n".join(part for part in parts if isinstance(part, str))
        if not isinstance(speaker, str) or not isinstance(text, str):
            return None
        found.append((SPEAKERS.get(speaker, speaker), text.strip()))
    return found or None


SPEAKERS = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}


def asked(turns: object, where: str) -> str:
    """Returns what a prompt of turns asks: the user's turn. A system prompt is not kept."""
    spoken = turns_of(turns) or []
    texts = [text for speaker, text in spoken if speaker == "user"]
    if len(texts) != 1 or spoken[-1][0] != "user" or not texts[0]:
        raise InputError(f"{where} must be a conversation that ends with its only user's turn")
    return texts[0]


def sharegpt(record: dict, where: str) -> dict:
    """A conversation for SFT: one question and one response, behind a system prompt or none.

    The answer is what the response has in <answer> tags, else in its last box, else all of it.
    """
    field = "conversations" if "conversations" in record else "messages"
    spoken = turns_of(record[field]) or []
    texts = [text for speaker, text in spoken if speaker != "system"]
    speakers = [speaker for speaker, _ in spoken if speaker != "system"]
    if speakers != ["user", "assistant"] or not all(texts):
        raise InputError(f"{where}: field '{field}' must be a user's and an assistant's turn")
    question, response = texts
    answer = final_answer(response) or response
    return (
        {"answer": answer} | without(record, field) | {"question": question, "response": response}
    )


def is_sharegpt(record: dict) -> bool:
    """Says whether all there is to a record is a conversation; OpenThoughts has its own tags."""
    turns = record.get("conversations", record.get("messages"))
    if named(record, "question") or not isinstance(turns, list) or not turns:
        return False
    is_published = isinstance(turns[0], dict) and turns[0].get("from") == "user"
    return turns_of(turns) is not None and not is_published


# DAPO-Math-17k has its own instructions around each question.
DAPO = re.compile(
    r"Solve the following math problem step by step\. The last line of your response should be of "
    r"the form Answer: \$?Answer.*?\n\n(.*)\n\nRemember to put your answer on its own line after "
    r'"Answer:"\.?\s*',
    re.DOTALL,
)


def verl(record: dict, where: str) -> dict:
    """The prompt is a conversation, and the reward's model has the truth.

    Where extra_info has the question as well, that is the bare one, without instructions.
    """
    question = record["prompt"]
    if not isinstance(question, str):
        question = asked(question, f"{where}: field 'prompt'")
    extra = optional(record, "extra_info", dict, where) or {}
    bare = extra.get("question")
    if isinstance(bare, str) and bare.strip() and bare.strip() in question:
        question = bare.strip()
    wrapped = DAPO.fullmatch(question)
    truth = required(record, "reward_model", dict, where)
    where = f"{where}: field 'reward_model'"
    field = "ground_truth"
    truths = truth.get(field)
    if isinstance(truths, str):
        truths = from_json(truths)
    if isinstance(truths, dict):
        truths = truths.get("target", truths)
    answers, _ = read_open_answer({"answer": truths}, where)
    return without(record, "prompt", "reward_model") | {
        "question": wrapped[1] if wrapped else question,
        "answer": answers,
        "domain": record.get("ability"),
    }


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
    # TsinghuaC3I/MedXpertQA, and eval/data/input of its repository
    Schema("medxpertqa", {"question", "options", "medical_task"}, convert=medxpertqa),
    # volcengine/verl: DAPO-Math, geometry3k, ...
    Schema("verl", {"prompt", "reward_model"}, convert=verl),
    # AILab-CVPR/SEED-Bench
    Schema("seed-bench", {"choice_a", "data_id"}, {"image": "data_id"}),
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
    if is_sharegpt(record):
        return "sharegpt", sharegpt(record, where)
    for schema in SCHEMAS:
        if schema.known_by <= record.keys() and not schema.lacks & record.keys():
            for ours, theirs in schema.means.items():
                record = record | {ours: record.get(theirs)}
            if schema.convert is not None:
                record = schema.convert(record, where)
            return schema.name, record
    # openai/grade-school-math; openai/gsm8k
    if "####" in str(record.get("answer")) and not record.get("options"):
        return "gsm8k", gsm8k(record, where)
    # allenai/arc: {"question": {"stem", "choices"}, "answerKey"}
    if isinstance(record.get("question"), dict):
        record = without(record, "question") | record["question"]
    asks = named(record, "question")
    if not asks and not named(record, "answer"):
        raise InputError(f"{where}: unknown schema (fields: {', '.join(record)[:80]})")
    if asks and turns_of(record[asks[0]]):
        record = record | {asks[0]: asked(record[asks[0]], f"{where}: field '{asks[0]}'")}
    return ("plain" if "question" in asks and "answer" in record else "by names"), record
