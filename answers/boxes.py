r"""What a \boxed{} holds, and whether an answer says more than that."""

import re

from answers.parsing import is_value
from answers.typography import MAX_CHARS


def box_content(text: str) -> str | None:
    r"""Returns what the box at the start of a text holds: \boxed{a{b}} -> a{b}; \boxed 5$ -> 5.

    Returns None if the box is never closed.
    """
    text = re.sub(r"\\(?:boxed|fbox)\s*", "", text[: MAX_CHARS + 16], count=1)
    if not text.startswith("{"):
        return re.split(r"[$\n]", text, maxsplit=1)[0]
    depth = 0
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):  # an escaped \{ is no group
        if match[0] == "{":
            depth += 1
        elif match[0] == "}":
            depth -= 1
            if depth == 0:
                return text[1 : match.start()]
    return None


_MAX_BOXES = 16
_JOINT = re.compile(r"[\s$.,;&]*(?:and|or)?[\s$,]*(?:[a-z](?:_[0-9a-z])? ?= ?[\s$]*)?")
_FILLER = ",;:$*( \n\t"
_OPERATOR_BEHIND = re.compile(r"[\s$)}]*[-+/^!](?!\\circ|\{\\circ)")
_FURTHER_VALUE = re.compile(r"[\s.$*)}]*(?:[,;]|or\b|and\b)[\s$]*(?=\S)")


def boxed_answer(text: str, strict: bool) -> str | None:
    r"""Returns what the last box of a text holds: 4 of \boxed{2}, or no, \boxed{4}.

    Boxes that nothing but commas, "and" and "or" part are a list: \boxed{2} or \boxed{4} is 2, 4.
    Returns None if a box is not closed or, if `strict`, if the text gives one more answer: further
    boxes, 3 \boxed{4}, -\boxed{4}.
    """
    first = _last_box(text)
    content = box_content(text[first:])
    behind = text[first:].partition(f"{{{content}}}")[2] if strict and content else ""
    contents = [content]
    while None not in contents and len(contents) < _MAX_BOXES:
        before = _last_box(text, first)
        content = box_content(text[before:]) if before >= 0 else None
        between = text[before:first].partition(f"{{{content}}}") if content else ("", "", "")
        if between[1] and _JOINT.fullmatch(between[2]):
            contents.insert(0, content)
        elif not strict or before < 0:
            break
        elif between[1] or not content or "box" not in content:  # a box in a box is one answer
            return None
        first = before
    if None in contents or strict and _says_more(text[:first], behind):
        return None
    return ", ".join(contents)


def _last_box(text: str, end: int | None = None) -> int:
    return max(text.rfind("\\boxed", 0, end), text.rfind("\\fbox", 0, end))


def _says_more(before: str, behind: str) -> bool:
    """Returns whether what stands beside a box is an operator or a value, perhaps behind "or"."""
    before = before.rstrip(_FILLER).removesuffix("or").removesuffix("and").rstrip(_FILLER)
    if before.endswith(("-", "+", "/", "^", "{")) or is_value(before):
        return True
    if _OPERATOR_BEHIND.match(behind):
        return True
    further = _FURTHER_VALUE.match(behind)
    return further is not None and is_value(behind[further.end() :])
