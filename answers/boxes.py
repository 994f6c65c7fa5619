r"""What a \boxed{} holds, and whether an answer says more than that."""

import re
from functools import partial

from answers.parsing import is_value
from answers.typography import MAX_CHARS
from answers.units import changes, unit_of

_MAX_BOXES = 16
_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
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


def _box(text: str, start: int) -> tuple[str | None, int]:
    r"""Returns what a box holds, a{b} of \boxed{a{b}} or 5 of \boxed 5$, and where it ends.

    Returns None if the box is never closed.
    """
    begin = _BOX.match(text, start).end()
    text = text[: begin + MAX_CHARS]
    if not text.startswith("{", begin):
        content = re.split(r"[$\n]", text[begin:], maxsplit=1)[0]
        return content, begin + len(content)
    depth = 0
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, begin):  # \{ is no group
        depth += (match[0] == "{") - (match[0] == "}")
        if depth == 0:
            return text[begin + 1 : match.start()], match.end()
    return None, begin


def _last_box(text: str, end: int | None = None) -> int:
    return max(text.rfind("\\boxed", 0, end), text.rfind("\\fbox", 0, end))


def boxed_answer(text: str, strict: bool) -> str | None:
    r"""Returns what the last box of a text holds: 4 of \boxed{2}, or no, \boxed{4}.

    Boxes that nothing but commas, "and" and "or" part are a list: \boxed{2} or \boxed{4} is 2, 4.
    Returns None if a box is not closed or, if `strict`, if the text gives one more answer: further
    boxes, 3 \boxed{4}, -\boxed{4}.
    """
    first = _last_box(text)
    content, last_end = _box(text, first)
    contents = [content]
    while None not in contents and len(contents) < _MAX_BOXES:
        before = _last_box(text, first)
        content, end = _box(text, before) if before >= 0 else ("", -1)
        if content and end <= first and _JOINT.fullmatch(_plainer(text[end:first])):
            contents.insert(0, content)
        elif not strict or before < 0:
            break
        elif not content or end <= first:
            return None
        else:  # a box in a box is one answer
            last_end = max(end, last_end)
        first = before
    behind = _plainer(text[last_end:])
    if not all(contents) or strict and _says_more(_plainer(text[:first]), behind):
        return None
    # \boxed{3} m is 3 m, not 3.
    unit = behind.strip(" .\n") if strict and is_value(contents[-1]) else ""
    if unit and unit_of(unit, glued=False):
        contents[-1] += " " + unit
    return ", ".join(contents)


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
