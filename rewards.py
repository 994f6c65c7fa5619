r"""Verifiable rewards: is the final answer of a response the true one? Standard library only.

The paper's reward is 1 if the final answer is equivalent to the truth, else 0, with nothing for format. It is all that
RL learns from, and a policy optimises what this file accepts, not what it means: an answer that hedges, hides a second
one, or echoes the prompt would be found sooner or later. So every rule errs on the side of "wrong": one answer, in its
place, in bounded time. Three steps:

1. `extract_answer`: behind the last </think>, the last <answer>..</answer>, else the last \boxed{..}, else "#### 18".
2. `is_equivalent` (equivalence.py) compares it with the truth: numbers exactly, expressions at random points.
3. `accuracy_reward` joins them; for multiple choice it compares the letters found by `choose`.

>>> extract_answer(r"<think>so \boxed{7}</think> It is <answer>\boxed{\frac{1}{2}}</answer>")
'\\frac{1}{2}'
>>> is_equivalent("$1,234.50", r"1234\frac12 \text{ dollars}"), is_equivalent("3 or 4", "3")
(True, False)
>>> accuracy_reward("<think>...</think><answer>B: No</answer>", "B", {"A": "Yes", "B": "No"})
1.0

An option letter beats an option whose text is that letter; a letter with another option's text is wrong.
"""
import re
from collections.abc import Sequence

from answers.equivalence import as_text, is_equivalent, parse_answer, parse_truth
from answers.formulas import MAX_CHARS, MAX_WORK, plain

__all__ = ["accuracy_reward", "choose", "extract_answer", "is_equivalent"]

# ---- 1. Where the answer is ------------------------------------------------------------------------------------------


def extract_answer(response: str) -> str | None:
    """The final answer in a response; None if there is none, thinking or box is not closed, or it is too long."""
    if not isinstance(response, str):
        return None
    text = response[response.rfind("</think>") + len("</think>"):] if "</think>" in response else response
    if "<think>" in text:  # opened and never closed: what follows are thoughts
        return None
    start = text.rfind("<answer>", 0, max(text.rfind("</answer>"), 0))  # the last one that is closed
    if start >= 0:
        text = text[start + len("<answer>"):text.find("</answer>", start)]
    box = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if box >= 0:
        if start >= 0 and _several(text, box):
            return None
        text = _box_content(text[box:])
    elif start < 0:
        line = text[text.rfind("####") + 4:].split("\n", 1)[0].strip() if "####" in text else ""
        text = line if re.match(r"[-+$]*\.?[0-9]", line) else ""  # "#### Step 2" is a heading, not an answer
    text = (text or "").strip()
    return text if 0 < len(text) <= MAX_CHARS else None


_FILLER = ",;:$*( \n\t"
_OPERATOR_BEHIND = re.compile(r"[\s$)]*[-+/^!](?!\\circ|\{\\circ)")
_FURTHER_VALUE = re.compile(r"[\s.$*)]*(?:[,;]|or\b|and\b)[\s$]*(?=\S)")


def _several(text: str, last: int) -> bool:
    r"""Whether an <answer> with a box (the last one is at `last`) gives two answers or another one than the box has:
    "\boxed{3} or \boxed{4}", "3 \boxed{4}", "-\boxed{4}"; a box inside a box is one."""
    first = re.search(r"\\(?:boxed|fbox)", text).start()
    nested = first < last and "box" in (_box_content(text[first:]) or "")
    if first < last and not nested:
        return True
    behind = text[first:].partition(f"{{{_box_content(text[first:])}}}")[2]
    before = text[:first].rstrip(_FILLER).removesuffix("or").removesuffix("and").rstrip(_FILLER)
    if before[-1:] in tuple("-+/^{") or _OPERATOR_BEHIND.match(behind) or _is_value(before):
        return True
    further = _FURTHER_VALUE.match(behind)
    return further is not None and _is_value(behind[further.end():])


def _is_value(text: str) -> bool:
    """Whether what stands beside a box is an answer of its own, and not "x =" or "The answer is"."""
    answer = parse_answer(text)
    return answer is not None and answer.value is not None and answer.value[0] != "var"


def _box_content(text: str) -> str | None:
    r"""What the box at the start of text holds: \boxed{a{b}} -> a{b}; \boxed 5$ -> 5; None if it is never closed."""
    text = re.sub(r"\\(?:boxed|fbox)\s*", "", text[:MAX_CHARS + 16], count=1)
    if not text.startswith("{"):
        return re.split(r"[$\n]", text, maxsplit=1)[0]
    depth = 0
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):  # an escaped \{ is no group
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0 and match[0] == "}":
            return text[1:match.start()]
    return None


# ---- 2. Multiple choice, and the reward ------------------------------------------------------------------------------

_LETTER = re.compile(  # the letter, what sets it off from a text, the text
    r"[(\[]?(?:(?:option|choice) ?:? ?)?[(\[]?([A-P])(?![\w'^])( - |[)\]]{0,2} ?[.:;,]?) ?(.*)", re.IGNORECASE)
_FURTHER = re.compile(r"(?:^|[,;/&(]|\b(?:or|and)\b) ?\(?([A-P])(?=[).:,;/&]| (?:or|and)\b| ?$)|\b([A-P])[:)]")
_NAMED = re.compile(r"""[(\["']([A-P])[)\]"']|(?:option|choice|answer) ?:? ?([A-P])\b""", re.IGNORECASE)
_PARTS = re.compile(r"[,;/=]|\b(?:or|and|but|not)\b")
_ECHO = re.compile(r"\(?B[:.)]{1,2} ?No", re.IGNORECASE)  # the example in the paper's prompts


def choose(answer: str, options: dict[str, str]) -> str | None:
    """The one option that an answer names, by letter, by letter and text, or by text; None if none or several."""
    text = plain(answer.replace("\n", "; "))
    if text in options:
        return text
    exact = [letter for letter, option in options.items() if _same_text(answer, option)]
    if len(exact) == 1:
        return exact[0]
    match, budget = _LETTER.fullmatch(text), [MAX_WORK]
    if match and match[1].upper() in options:
        letter, delimiter, rest = match[1].upper(), match[2].strip(), match[3].strip()
        same = [other for other, option in options.items() if is_equivalent(rest, option, budget)]
        if letter in same or not rest:
            return letter
        further = {a or b for a, b in _FURTHER.findall(rest) + _NAMED.findall(rest.upper())} & set(options) - {letter}
        parts = [part for part in _PARTS.split(rest) if part.strip()]
        same += [] if len(parts) < 2 else [other for other, option in options.items() if other != letter and any(
            is_equivalent(part, option, budget) for part in parts)]
        clear = delimiter and (match[1].isupper() or delimiter[0] in ":)]")
        if clear and not same and not further and not _ECHO.fullmatch(text):
            return letter
        if delimiter and match[1].isupper():
            return None  # a letter with another option's text, or several letters
    equivalent = [letter for letter, option in options.items() if is_equivalent(answer, option, budget)]
    return equivalent[0] if len(equivalent) == 1 else None


def _same_text(answer: str, option: str) -> bool:
    one, other = parse_answer(answer), parse_truth(option)
    return one is not None and other is not None and one.text == other.text


def _rounds_to(answer: str, truth: str, precision: int) -> bool:
    """MathVista's rule for decimals: the answer, rounded, is the truth (its evaluation/calculate_score.py)."""
    parsed = [parse_answer(text) for text in (answer, truth)]
    if None in parsed or any(p.name for p in parsed) or len({p.unit for p in parsed} - {""}) > 1:
        return False
    one, other = (_number(p.value) for p in parsed)
    return one is not None and other is not None and round(one, precision) == round(other, precision)


def _number(value: tuple | None) -> float | None:
    """Of a plain number with its sign, if it is not huge."""
    sign, value = (-1, value[1]) if value and value[0] == "neg" else (1, value)
    return sign * float(value[1]) if value and value[0] == "num" and value[1] < 10**15 else None


def accuracy_reward(response: str, truth: str | Sequence[str], options: dict[str, str] | None = None, *,
                    precision: int | None = None) -> float:
    """1.0 if the response's final answer is right, else 0.0; never raises.

    truth: of several, any one will do. options: {"A": text, ...}, letters up to P; truth is then a letter or an
    option's text. Without: `is_equivalent`. precision: decimals that an answer is rounded to (MathVista).
    """
    answer = extract_answer(response)
    if answer is None:
        return 0.0
    truths = [as_text(t) for t in truth] if isinstance(truth, (list, tuple)) else [as_text(truth)]
    return float(any(_is_right(answer, t, options, precision) for t in truths))


def _is_right(answer: str, truth: str, options: dict[str, str] | None, precision: int | None) -> bool:
    if options and isinstance(options, dict):
        texts = {key.upper(): as_text(text) for key, text in options.items() if re.fullmatch("[A-Pa-p]", as_text(key))}
        chosen = choose(answer, texts)
        return chosen is not None and len(truth) <= MAX_CHARS and chosen == choose(truth, texts)
    return is_equivalent(answer, truth) or type(precision) is int and _rounds_to(answer, truth, precision)
