r"""From a text to an answer: units, names, lists, formulas. Standard library only.

>>> parse_answer(r"x = \frac{1}{2} \text{ cm}")
Answer(value=('/', ('num', 1), ('num', 2)), text='x=frac{1}{2}cm', unit='cm', name='x')
>>> [item.value for item in parse_answer("3 or 4").value[1]]
[('num', 3), ('num', 4)]
>>> parse_answer("coronary sinus").value is None
True
"""

import math
import re
from dataclasses import dataclass, replace
from functools import lru_cache

from answers.formulas import ENGLISH, THOUSANDS, Node, NotMaths, is_product, parse_formula
from answers.trees import plain_number, trees_agree, variables
from answers.typography import plain
from answers.units import changes, unit_of
from answers.values import MAX_WORK, Budget, as_decimal, value_of


@dataclass(frozen=True)
class Answer:
    """A parsed answer."""

    value: Node | None  # of a list ("list", answers); of a text that is no maths None
    text: str  # normalised; equal texts are equal answers
    unit: str = ""  # or where a letter of a formula is from, "k in Z"
    name: str = ""  # the x of x = 5


# --- A text as a whole: one answer or a list ------------------------------------------------------

_IDLE = re.compile(r"(?<=[0-9]) ?(\*) ?(?=[0-9])|(?<=[0-9])( )(?=[0-9])| |\*|\\")
_SCRIPT = re.compile(r"([_^])\{([0-9a-zA-Z]+)\}(?![0-9a-zA-Z])")
_KNOWN = re.compile("sqrt|pi|infty|sin|cos|tan|log|binom|frac|overline|sum|abs")
_LONG_WORD = re.compile(r"[^\W\d_]{3}")
_SIGN = re.compile(r"[-0-9^_=+*/<>(:!]")
_PIECES = re.compile(rf"{THOUSANDS}|[(\[{{)\]}},;]|\b(?:and|or)\b")
_SIGNED_SET = re.compile(r"\\\{([^{}]*\\pm[^{}]*)\\\}")
# What a letter may be, which may go without saying: 2k, k \in \mathbb{Z}; 2k (k > 0).
_DOMAIN = re.compile(
    r"(?<=[^\s,])(?:[, ]+\(?|\()(?:(?:where|for|with) )?(?:any |all |every )?\\?[a-z] ?"
    r"(?:\\in ?(?:\\mathbb)? ?\{?[NZR]\}?[_^{}*+]*|> ?0|(?:is |are )?(?:an? |any )?"
    r"(?:positive |non-?negative |natural )?(?:integer|whole number|number)s?)\)?$"
)
_POSITIVE = re.compile("N|[*+>]|positive|negative|natural")


def _canonical(text: str) -> str:
    """Returns the string by which a text is compared with other texts.

    Spaces and stars only matter between two digits, and case only matters in formulas.
    """
    text = _IDLE.sub(lambda match: match[1] or match[2] or "", _SCRIPT.sub(r"\1\2", text))
    is_formula = _SIGN.search(text) and not _LONG_WORD.search(_KNOWN.sub(" ", text))
    is_symbol = len(text) == 2 and text.isupper() and text.lower() not in ENGLISH  # CO is not Co
    return text if is_formula or is_symbol else text.casefold()


def _split(text: str) -> list[str]:
    r"""Returns the parts between commas, semicolons, "and" and "or" outside of brackets.

    2 \pm 1 is two parts.
    """
    if signed := _SIGNED_SET.fullmatch(text):
        text = signed[1]
    parts = []
    depth = start = 0
    for match in _PIECES.finditer(text):
        depth += (match[0] in "([{") - (match[0] in ")]}")
        if match[0] in (",", ";", "and", "or") and depth == 0:
            parts.append(text[start : match.start()].strip())
            start = match.end()
    signed = []
    for part in filter(None, (*parts, text[start:].strip())):
        if "\\pm" in part and not re.search(r"\\pm ?0$|[(\[]", part):
            signed.append(part.replace("\\pm", "+").replace("\\mp", "-"))
            part = part.replace("\\pm", "-").replace("\\mp", "+")
        signed.append(part)
    return signed


def _parse(text: str) -> Answer | None:
    """Returns the answer that a text gives; None if it is empty or too long."""
    text = plain(text)
    if not text:
        return None
    canonical = _canonical(text)
    domain = _DOMAIN.search(text)
    if not domain:
        return _list(text, canonical)
    unit = "k in N" if _POSITIVE.search(domain[0]) else "k in Z"
    return replace(_list(text[: domain.start()], canonical), unit=unit)


def _list(text: str, canonical: str) -> Answer:
    """Returns the answer in a text, which is a list if commas or words part it."""
    parts = _split(text)
    if len(parts) == 1:
        return _single(parts[0], canonical)
    # All parts of a list must be maths: "Yes, 3" is a text, and so is "A, B".
    answers = [_single(part, _canonical(part)) for part in parts]
    values = [answer.value for answer in answers]
    if None in values or all(value[0] == "var" for value in values):
        return Answer(None, canonical)
    # x > 2 and x < 3 is one interval, and x < 2 or x > 3 is a union.
    if any(value[0] == "chain" and "=" not in value[2] for value in values):
        return Answer(("both" if " and " in text else "union", tuple(values)), canonical)
    # Lists in a list are dissolved.
    items = (one.value[1] if one.value[0] == "list" else (one,) for one in answers)
    return Answer(("list", sum(items, ())), canonical)


# Truths come again, and stay parsed. What a response says seldom comes again, but it is compared
# with every option of a question; more of it would only be work for the garbage collector.
parse_answer = lru_cache(maxsize=64)(_parse)
parse_truth = lru_cache(maxsize=4096)(_parse)


def is_value(text: str) -> bool:
    """Returns whether a text is maths, and more than a single letter."""
    answer = parse_answer(text)
    return answer is not None and answer.value is not None and answer.value[0] != "var"


# --- One answer -----------------------------------------------------------------------------------

# A number or formula, a space perhaps, and what may be its unit.
_TAIL = re.compile(
    r"(?i)(.*?(?:[0-9)}\]!]|pi))( ?)"
    r"([^\W\d_][^0-9(){}\\=<>+]{0,80}(?:\^?\{?(?<! )-?[1-3]\}?[^0-9(){}\\=<>+]{0,20}){0,3}"
    r"|[%¤¢€£¥₹°](?: ?(?:[CF]|celsius|fahrenheit))?)"
)
_INTEGER = re.compile(r"[-+]?(?:[0-9]+|[1-9][0-9]{0,2}(?:,[0-9]{3})+)")
# What looks like a number and is none: the date 2023-01-01, the range or score 3-5, 120/80 mmHg,
# the times 7:30 pm and 7:05, a unit within a chain (x = 3 cm = 8 m).
_NO_NUMBER = re.compile(
    r"[0-9]{1,4}([-/])[0-9]{1,2}\1[0-9]{2,4}|[0-9]+(?: ?- ?[0-9]+)+|[0-9]+ ?/ ?[0-9]+ ?mm ?Hg"
    r"|[0-9:]+ [ap]m|[0-9]+:0[0-9]|.*= ?[0-9.,]+ ?[a-zA-Z]+(?:\^\{?[23]\}?)? ?(?:=|\\approx).*"
)
_CLOCK = re.compile(r"([01]?[0-9]|2[0-3]):([0-5][0-9])(?::[0-5][0-9])?")
_TRIG_CALL = re.compile("sin|cos|tan|cot|sec|csc")
_WORDY_NAME = re.compile(r"(?:the )?([a-zA-Z]{3,}) ?=(?!=) ?")  # the area = 9


def _single(text: str, canonical: str) -> Answer:
    """Returns the answer in a text that is no list."""
    if _INTEGER.fullmatch(text):  # most answers
        return Answer(("num", int(text.replace(",", ""))), canonical)
    # 1. A date is compared as it is written, and so is a time of day: 4:20 is no ratio, 3:5 is.
    clock = _CLOCK.fullmatch(text) if ":" in text else None
    if _NO_NUMBER.fullmatch(text) or clock and math.gcd(int(clock[1]), int(clock[2])) > 1:
        return Answer(None, canonical)
    words = _WORDY_NAME.match(text)
    if words and not changes(words[1]) and not is_product(words[1]):
        text = text[words.end() :]
    # 2. A formula with a unit behind it. "S3 gallop" is no number of gallops.
    match = _TAIL.fullmatch(text)
    unit = unit_of(match[3], glued=not match[2]) if match else None
    if unit is not None and not (unit == "degree" and _TRIG_CALL.search(text)):
        again = rf"{re.escape(match[2] + match[3])}(?= ?(?:=|\\approx))"  # 4/3 m \approx 1.33 m
        answer = _formula(re.sub(again, "", match[1]), canonical, unit)
        if answer.value and (answer.value[0] == "chain" or not variables(answer.value)):
            return answer
    # 3. A formula or else a text.
    return _formula(text, canonical)


def _formula(text: str, canonical: str, unit: str = "") -> Answer:
    """Returns the answer in a formula; one without a value if it is not maths."""
    if _NO_NUMBER.fullmatch(text):
        return Answer(None, canonical)
    try:
        name, value = _named(parse_formula(text))
    except (NotMaths, ArithmeticError, RecursionError):
        return Answer(None, canonical)
    names = name.split(" = ")  # x = y = 2
    answers = tuple(Answer(value, canonical, unit, name) for name in names)
    return answers[0] if len(names) == 1 else Answer(("list", answers), canonical)


def _spelled(node: Node) -> str:
    r"""Returns the name that a tree is, "" if it is none: x, |PQ|, \sin A, AB:CD, m + n, (x, y)."""
    kind = node[0]
    if kind == "var":
        return node[1]
    if kind not in ("call", "+", "/", "ratio", "seq"):
        return ""
    sign, parts = (node[1], node[2:]) if kind == "call" else (kind, node[1:])
    names = ",".join(map(_spelled, parts if kind in ("call", "+", "/") else node[-1]))
    fits = {
        "+": not re.search("^[A-Zx-z]|,[A-Zx-z]", names),  # x + y = 4 is a relation
        "/": names.isupper(),
        "call": sign in ("sin", "cos", "tan") or sign == "abs" and re.fullmatch("[A-Z]+|z", names),
    }
    is_name = fits.get(kind, True) and not re.search("^,|,,|,$|^$", names)
    return f"{sign}({names})" if is_name else ""


def _named(tree: Node) -> tuple[str, Node]:
    r"""Returns a name, "" if there is none, and a value. Of equations the value alone counts:

    x = 5                5, by the name of x         x \in [0, 1]         the interval
    1/2 = 0.5            the last, if all are equal  2/3 \approx 0.67     the exact one
    S = \pi r^2 = 16\pi  the number at the end       x = y = 2            2, by both names
    """
    if tree[0] == "*" and tree[1][0] == "var" and tree[1][1].isupper() and tree[2][0] == "seq":
        return tree[1][1], tree[2]  # O(0, 0)
    if tree[0] != "chain" or not set(tree[2]) <= {"=", "approx", "in"}:
        return "", tree
    _, terms, signs = tree
    name = _spelled(terms[0])
    value = _last_value(terms[bool(name) :], signs[bool(name) :], bool(name))
    if value is None or not name:
        return "", value or tree
    # x = 3x is a relation, and so are x = y, a + b = 0 and a/b = 1.
    of_letters = value[0] == "var" and len(name) == 1
    of_several = terms[0][0] in ("+", "/", "ratio") and value in (("num", 0), ("num", 1))
    if of_letters or of_several or any(name in variables(term) for term in terms[1:]):
        return "", tree
    letters = [_spelled(term) for term in terms[:-1]]
    return " = ".join(letters) if all(len(one) == 1 for one in letters) else name, value


def _last_value(terms: tuple[Node, ...], signs: tuple[str, ...], is_named: bool) -> Node | None:
    """Returns the last exact number of a chain: 4 of x + 1 = 3 + 1 = 4, 2/3 of 2/3 \approx 0.67.

    Returns None if two of its numbers differ, by more than rounding, or for a relation: x + y = 4.
    """
    if is_named and len(terms) == 1:
        return terms[0]
    numbers = [term for term in terms if not variables(term)]
    skipped = len(terms) - len(numbers)
    if len(numbers) < 2 - (is_named or skipped > 1) or terms[skipped:] != tuple(numbers):
        return None
    budget = Budget(MAX_WORK // 8)
    value = numbers[0]
    for number, sign in zip(numbers[1:], signs[skipped:]):
        if trees_agree(value, number, budget):
            value = number
        elif not _is_rounding(value, number, 0 if sign == "approx" else 2, budget):
            return None
    return value


def _is_rounding(node: Node, rounded: Node, decimals: int, budget: Budget) -> bool:
    """Returns whether a number with so many decimals or more is a value, rounded or cut off."""
    number, digits = value_of(node, budget), plain_number(rounded)
    if number is None or digits is None:
        return False
    places = next((n for n in range(12) if digits * 10**n % 1 == 0), 12)
    left_out = abs(as_decimal(number)) - abs(as_decimal(digits))
    return places >= decimals and -0.501 < left_out * 10**places < 1


# --- One answer in a sentence ---------------------------------------------------------------------

# What states the value behind it: words, that is no digits and no relations, and one of these.
_STATES = re.compile(
    r"(?i)(?:(?-i:^an?)|(?:^|(?<= ))(?:is|are|was|were|be|equal to|equals|gets?|gives?|obtain"
    r"|has|have|had|at|left|find that|[a-z]{3,}(?=: \[)|(?:de|in)creases by|sold|made"
    r"|earned|spent|needs?|costs?|paid|saved|bought|used|ate|in all"
    r"|altogether|then|therefore|thus|hence|so|(?:total|value|answer|sum|number) of))[,:]? "
)
_WORDS = re.compile(r"(?:[a-zA-Z'(){},:$+_ -])*")
# ... but not the number of something else.
_NO_STATEMENT = re.compile(
    r"(?i)\b(?:step|question|problem|part|case|type|stage|grade|level|figure|phase|class"
    r"|exercise|page) (?:number )?(?:is )?$"
)


@lru_cache(maxsize=64)
def parse_sentence(text: str) -> Answer | None:
    """Returns the one value that a sentence states, with its unit: 72 of "A total of 72 clips".

    Returns None for other sentences, and for those with words that may change what the value says.
    """
    text = plain(text)
    ends = [match.end() for match in _STATES.finditer(text)][:8] if " " in text else []
    for start in (0, *ends):
        before, rest = text[:start], text[start:]
        if not _WORDS.fullmatch(before) or changes(before) or _NO_STATEMENT.search(before):
            continue
        # "72 clips in April and May" is no list.
        for answer in (_parse(rest) if before else None, _single(rest, rest)):
            if answer and answer.value and answer.value[0] != "var":
                return answer
    return None
