r"""What a \boxed{} holds, and whether an answer says more than that."""

import re
from functools import partial

from answers.parsing import is_value
from answers.typography import MAX_CHARS
from answers.units import changes, unit_of


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
# \text{ or } and \lor are or, \quad and \) are spaces.
_SPACING = re.compile(r"\\(?:text|mathrm) ?\{([^{}]*)\}|\\q?quad|\\[()\[\],;: \\]|[$*]")
_plainer = partial(_SPACING.sub, r" \1 ")
_JOINT = re.compile(
    r"[\s.,;&]*(?:and also|as well as|and|or)?[\s,]*(?:[a-z](?:_\{?[0-9a-z]\}?)? ?= ?\s*)?"
)
_FILLER = ",;:( \n\t"
_OPERATOR = r"[-+/^!<>|]|\\(?:times|cdot|div|pm|mp|leq?|geq?|neq?|lt|gt|lor|vee|pi)(?![a-zA-Z])"
_MORE_BEFORE = re.compile(rf"(?i)(?:{_OPERATOR}|\{{|\b(?:or|not|maybe|perhaps|possibly))[\s(]*$")
_MORE_BEHIND = re.compile(
    rf"(?i)[\s)}}.,]*(?:(?!\^\\circ|\^\{{\\circ)(?:{_OPERATOR})"
    r"|\b(?:or|not|maybe|perhaps|possibly|is (?:wrong|not|false))\b)"
)
_FURTHER_VALUE = re.compile(r"[\s.)}]*(?:[,;]|and\b)\s*(?=\S)")


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
        if between[1] and _JOINT.fullmatch(_plainer(between[2])):
            contents.insert(0, content)
        elif not strict or before < 0:
            break
        elif between[1] or not content or "box" not in content:  # a box in a box is one answer
            return None
        first = before
    behind = _plainer(behind)
    if not all(contents) or strict and _says_more(_plainer(text[:first]), behind):
        return None
    # \boxed{3} m is 3 m, not 3.
    unit = behind.strip(" .\n") if is_value(contents[-1]) else ""
    if unit and unit_of(unit, glued=False):
        contents[-1] += " " + unit
    return ", ".join(contents)


def _last_box(text: str, end: int | None = None) -> int:
    return max(text.rfind("\\boxed", 0, end), text.rfind("\\fbox", 0, end))


def _says_more(before: str, behind: str) -> bool:
    """Returns whether what stands beside a box is an operator, an "or", a doubt or a value."""
    further = _FURTHER_VALUE.match(behind)
    return bool(
        _MORE_BEFORE.search(before)
        or _MORE_BEHIND.match(behind)
        or changes(" ".join(behind.split()[:2]))  # 3 million
        or re.match("[a-zA-Z](?![a-zA-Z])", behind)  # 3x
        or is_value(before.rstrip(_FILLER).removesuffix("and").rstrip(_FILLER))
        or (further and is_value(behind[further.end() :]))
    )
