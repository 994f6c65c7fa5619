r"""What a \boxed{} holds, and whether an answer says more than that."""

import re

from answers.typography import MAX_CHARS
from answers.parsing import is_value


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


_FILLER = ",;:$*( \n\t"
_OPERATOR_BEHIND = re.compile(r"[\s$)]*[-+/^!](?!\\circ|\{\\circ)")
_FURTHER_VALUE = re.compile(r"[\s.$*)]*(?:[,;]|or\b|and\b)[\s$]*(?=\S)")


def says_more_than_its_box(text: str, last: int) -> bool:
    r"""Returns whether a text gives another answer than its last box (at `last`), or one more.

    \boxed{3} or \boxed{4}, 3 \boxed{4} and -\boxed{4} do; a box inside a box is one answer.
    """
    first = re.search(r"\\(?:boxed|fbox)", text).start()
    content = box_content(text[first:])
    if content is None or (first < last and "box" not in content):
        return True
    # What stands before the box: an operator, or a value, perhaps joined by "or".
    before = text[:first].rstrip(_FILLER).removesuffix("or").removesuffix("and").rstrip(_FILLER)
    if before.endswith(("-", "+", "/", "^", "{")) or is_value(before):
        return True
    # What stands behind it.
    behind = text[first:].partition("{" + content + "}")[2]
    if _OPERATOR_BEHIND.match(behind):
        return True
    further = _FURTHER_VALUE.match(behind)
    return further is not None and is_value(behind[further.end() :])
