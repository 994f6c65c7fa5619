"""Records that are conversations: OpenThoughts, ShareGPT and the chat APIs, verl.

A function of a schema's name takes a record of it, and returns it with our fields (schemas.py).
"""

import re

from data.fields import (
    final_answer,
    from_json,
    named,
    optional,
    read_open_answer,
    required,
    without,
)
from hub.errors import InputError

OPENTHOUGHTS_TAGS = ["begin_of_thought", "end_of_thought", "begin_of_solution", "end_of_solution"]
SPEAKERS = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
# DAPO-Math-17k has its own instructions around each question.
DAPO = re.compile(
    r"Solve the following math problem step by step\. The last line of your response should be of "
    r"the form Answer: \$?Answer.*?\n\n(.*)\n\nRemember to put your answer on its own line after "
    r'"Answer:"\.?\s*',
    re.DOTALL,
)


# --- OpenThoughts ---


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
    question = required(record, "problem", str, where)
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


# --- Conversations of one question ---


def turns_of(turns: object) -> list[tuple[str, str]] | None:
    """Returns (speaker, text) of each turn of a conversation; None if it is none.

    ShareGPT says from and value, the chat APIs say role and content. The text may be an array of
    parts, texts and images; an image leaves its mark.
    """
    found = []
    for turn in turns if isinstance(turns, list) else []:
        if not isinstance(turn, dict):
            return None
        speaker = turn.get("from", turn.get("role"))
        text = turn.get("value", turn.get("content"))
        if isinstance(text, list):
            parts = [part if isinstance(part, dict) else {} for part in text]
            marks = ["<image>" if "image" in str(part.get("type")) else None for part in parts]
            texts = [part.get("text", mark) for part, mark in zip(parts, marks)]
            text = "\n".join(texts) if all(isinstance(one, str) for one in texts) else None
        if not isinstance(speaker, str) or not isinstance(text, str):
            return None
        found.append((SPEAKERS.get(speaker, speaker), text.strip()))
    return found or None


def pictured(record: dict, turns: list) -> dict:
    """Returns the record with the images that its turns hold, if it has no field of images."""
    texts = [turn.get("value", turn.get("content")) for turn in turns]
    parts = [part for text in texts if isinstance(text, list) for part in text]
    held = [part.get("image", part.get("image_url")) for part in parts]
    held = [image for image in held if image]
    return record if named(record, "image") or not held else record | {"images": held}


def with_question(record: dict, told: bool, where: str) -> dict:
    """Returns the record with its question as text, if that is a conversation (RLVR, verl).

    The question is the only user's turn; a system prompt is not kept. told: whether the record has
    the answer in a field of its own, so that its conversation is a mere question.
    """
    asks = named(record, "question")[:1]
    for field in asks or ("messages", "conversations"):
        spoken = turns_of(record.get(field))
        ends_asking = bool(spoken) and spoken[-1][0] == "user"
        is_question = ends_asking and told or field in asks
        if not spoken or not is_question:
            continue
        texts = [text for speaker, text in spoken if speaker == "user"]
        if len(texts) != 1 or not ends_asking or not texts[0]:
            reason = "must be a conversation that ends with its only user's turn"
            raise InputError(f"{where}: field '{field}' {reason}")
        return without(pictured(record, record[field]), field) | {"question": texts[0]}
    return record


def sharegpt(record: dict, where: str) -> dict:
    """A conversation for SFT: one question and one response, behind a system prompt or none.

    The answer is what the response has in <answer> tags, else in its last box, else all of it.
    """
    field = "conversations" if "conversations" in record else "messages"
    record = pictured(record, record[field])
    spoken = turns_of(record[field]) or []
    texts = [text for speaker, text in spoken if speaker != "system"]
    speakers = [speaker for speaker, _ in spoken if speaker != "system"]
    if speakers != ["user", "assistant"] or not all(texts):
        raise InputError(f"{where}: field '{field}' must be a user's and an assistant's turn")
    question, response = texts
    answer = final_answer(response) or response
    return (
        {"answer": answer}
        | without(record, field, *named(record, "question"))
        | {"question": question, "response": response}
    )


def is_sharegpt(record: dict) -> bool:
    """Says whether a record is a conversation, its question perhaps beside it; not OpenThoughts."""
    turns = record.get("conversations", record.get("messages"))
    spoken = turns_of(turns)
    if not spoken:
        return False
    begun = [record[field] for field in named(record, "question")]
    told = named(record, "answer") or named(record, "solution")
    if begun and (told or not any(text == str(begun[0]).strip() for _, text in spoken)):
        return False
    is_published = turns[0].get("from") == "user" and ("system" in record or "<|" in str(turns))
    is_prompt = spoken[-1][0] == "user" and bool(named(record, "answer"))
    return not is_published and not is_prompt


def verl(record: dict, where: str) -> dict:
    """The prompt was a conversation, and the reward's model has the truth.

    Where extra_info has the question as well, that is the bare one, without instructions.
    """
    [field, *_] = named(record, "question") or ["prompt"]
    question = required(record, field, str, where)
    extra = optional(record, "extra_info", dict, where) or {}
    bare = extra.get("question")
    if isinstance(bare, str) and bare.strip() and bare.strip() in question:
        question = bare.strip()
    wrapped = DAPO.fullmatch(question)
    truths = required(record, "reward_model", dict, where).get("ground_truth")
    if isinstance(truths, str):
        truths = from_json(truths)
    if isinstance(truths, dict):
        truths = truths.get("target", truths)
    answers, _ = read_open_answer({"ground_truth": truths}, f"{where}: field 'reward_model'")
    return without(record, field, "reward_model") | {
        "question": wrapped[1] if wrapped else question,
        "answer": answers,
    }
