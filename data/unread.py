"""What is left of a record, and what is missing: may the question need it?"""

import re
from collections import Counter
from pathlib import Path

from data.fields import NAMES, holds_image, is_empty, named, plain_name
from data.options import parse_text
from hub.errors import InputError

OPTION_WORDS = set(
    "option options choice choices candidate candidates alternative alternatives distractor "
    "distractors incorrect wrong endings".split()
)
IMAGE_WORDS = set(
    "image images img imgs picture pictures pic pics photo photos figure figures diagram chart "
    "scan screenshot radiograph xray dicom visual caption video videos audio frames".split()
)
CONTEXT_WORDS = set(
    "context contexts passage passages article paragraph paragraphs premise vignette background "
    "stimulus story scenario excerpt dialogue dialog transcript history facts information notes "
    "report findings document documents description text content essay email review news snippet "
    "code sentence sentences setup given tables hypothesis claim conclusion evidence narrative "
    "situation scene plot lyrics poem note intro preamble conditions rules material conversation "
    "utterance symptoms case statements reading theorem premises assumptions".split()
)
# What tells about the answer is no part of the question, nor is a smaller picture of the image.
SOLUTION_WORDS = set(
    "answer answers solution response explanation reasoning output rationale generated cot "
    "thinking analysis preview thumbnail".split()
)
# A part of the question, if the field's name begins with `question` or the like.
PART_WORDS = set("description detail details body context background content statement".split())
# A field whose name ends so describes something, and does not hold it: `image_license`.
ABOUT_WORDS = set(
    "type types description count num width number height size format mode license source sources "
    "class category categories style hash explanation explanations required needed quality split "
    "tag tags topic topics keyword keywords phrases step steps skill skills concepts generations "
    "generation solution solutions hint hints domains subjects authors references url urls "
    "languages tests cases messages turns conversations reasons metadata score scores rationale "
    "rationales response responses outputs predictions info title name names date author equation "
    "equations numbers operations decomposition entities".split()
)
# <image>, <image 1>, <image_1>, <|image_1|>, <ImageHere>, <img src="a.png">, ![](a.png)
IMAGE_MARK = re.compile(
    r"<\|?image[ \w|]*>|<img [^>]*src=[^>]*>|!\[[^]]*\]\([^)]*\)", re.IGNORECASE
)
# MAWPS has the numbers in another field.
GAP_MARK = re.compile(r"\b(?:N_\d\d|number\d)\b")
TOLD_NAMES = {*NAMES["answer"], *NAMES["accepted"]} - {*NAMES["options"]}


def words_of(name: str) -> list[str]:
    """Returns the words of a field's name: `answerChoice_a` has three."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return re.findall(r"[a-z]+|\d+", name.lower())


def refuse_unread(
    record: dict, read: set, where: str, question: str, options: bool, images: list, answer: str
) -> None:
    """Raises InputError for an unread field that looks as if it belonged to the question.

    `question` is the text of its own field. What is beside options and images may repeat them.
    """
    columns = Counter()
    chooses = not options and re.fullmatch(r"[A-Pa-p]|\d", answer)
    image_names = {Path(image).name for image in images if not isinstance(image, bytes)}
    for field, value in record.items():
        words = words_of(field)
        if field in read or is_empty(value) or value in ("[]", "{}") or not words:
            continue
        looks = None
        tells_answer = bool(SOLUTION_WORDS & set(words))
        names_image = bool(IMAGE_WORDS & set(words)) and Path(str(value)).name not in image_names
        is_number = isinstance(value, int | float) and words[-1] != "id"
        if OPTION_WORDS & set(words) and holds_image(value):
            looks = "options"
        elif not tells_answer and (not images or names_image) and holds_image(value):
            looks = "an image"
        elif is_part_of_question(field, words, value, question):
            looks = "a part of the question"
        elif words[-1] in ABOUT_WORDS and not set(words) <= CONTEXT_WORDS:
            continue
        elif not options and looks_like_options(words, value, answer):
            looks = "options"
        elif not images and not tells_answer and names_image and not is_number:
            looks = "an image"
        elif CONTEXT_WORDS & set(words) and not tells_answer and is_long(value):
            looks = "context"
        # Several columns of one name, such as reply_a and reply_b, and an answer that chooses.
        if words[-1] in ("a", "b", "1", "2") and set(words[-2:-1]) - ABOUT_WORDS:
            columns[(*words[:-1], words[-1].isdigit())] += isinstance(value, str | int | float)
            if chooses and columns[(*words[:-1], words[-1].isdigit())] > 1:
                looks = "options"
        if looks:
            raise InputError(
                f"{where}: field '{field}' looks like {looks}, but is no name that is known "
                "(data/fields.py): rename it, or remove it if the question does not need it"
            )


def refuse_missing(record: dict, where: str, text: str, images: list) -> None:
    """Raises InputError where the text, of question and options, points to what is not there.

    A file that was converted without its images would be answered blindly.
    """
    mark = IMAGE_MARK.search(text)
    if mark and not images:
        raise InputError(f"{where}: the text has {mark[0]}, but the record has no image")
    for number in re.findall(r"<image[ _]?([1-9])>", text) if "image_1" in record else ():
        if f"image_{number}" not in named(record, "image"):
            reason = f"is missing, but the text has <image {number}>"
            raise InputError(f"{where}: field 'image_{number}' {reason}")
    gap = GAP_MARK.search(text)
    if gap and "numbers" in map(plain_name, record):
        raise InputError(f"{where}: the question has {gap[0]} in the place of a number")


def is_part_of_question(field: str, words: list[str], value: object, question: str) -> bool:
    """Says whether a field is named like the question, and neither repeats it nor is in it."""
    is_part = words[0] in ("question", "problem", "query") and words[-1] in PART_WORDS
    if not is_part and plain_name(field) not in NAMES["question"] or not isinstance(value, str):
        return False
    one, other = ("".join(text.split()) for text in (value, question))
    return is_long(value) and one not in other and other not in one


def looks_like_options(words: list[str], value: object, answer: str) -> bool:
    """Says whether a field may hold options: by its name, or by what it holds.

    By what it holds: letters and their texts, or several short texts, of which the answer is one,
    or names one by its letter or its number. They may stand in one text, as "A. red; B. blue".
    """
    if isinstance(value, bool | int | float) or plain_name("".join(words)) in TOLD_NAMES:
        return False
    if OPTION_WORDS & set(words):
        return True
    if isinstance(value, str):
        value = parse_text(value)
    if isinstance(value, dict):
        names = {plain_name(name) for name in value}
        if {"1", "2"} <= names and (answer in names or answer in value.values()):
            return True
        is_named = bool(names & {"options", "choices"}) and bool(re.fullmatch("[A-P]", answer))
        return {"a", "b"} <= names or is_named
    if not isinstance(value, list) or len(value) < 2:
        return False
    if all(isinstance(one, dict) for one in value):
        return bool(re.fullmatch("[A-P]", answer))
    if not all(isinstance(text, str) and len(text) <= 200 for text in value):
        return False
    if answer in value:
        return len(set(value)) > 1
    is_index = bool(re.fullmatch(r"\d{1,2}", answer)) and int(answer) <= len(value)
    return is_index or bool(re.fullmatch("[A-P]", answer))


def is_long(value: object) -> bool:
    """Says whether a value is more than a name or a number."""
    return isinstance(value, list | dict) or isinstance(value, str) and len(value.split()) > 2
