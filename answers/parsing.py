r"""From a text to an answer: units, names, lists, formulas. Standard library only.

>>> parse_answer(r"x = \frac{1}{2} \text{ cm}")
Answer(value=('/', ('num', 1), ('num', 2)), text='x=frac{1}{2}cm', unit='cm', name='x')
>>> [item.value for item in parse_answer("3 or 4").value[1]]
[('num', 3), ('num', 4)]
>>> parse_answer("coronary sinus").value is None
True
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from answers.formulas import (
    MAX_WORK,
    THOUSANDS,
    Budget,
    Node,
    NotMaths,
    Parser,
    aliases,
    plain,
    tokenise,
    variables,
)
from answers.trees import MIRRORED, has_kind, trees_agree


@dataclass(frozen=True)
class Answer:
    """A parsed answer."""

    value: Node | None  # of a list ("list", answers); of a text that is no maths None
    text: str  # normalised; equal texts are equal answers
    unit: str = ""
    name: str = ""  # the x of x = 5


# --- From a text to an answer ---------------------------------------------------------------------

_UNITS = aliases("""
    % percent; $ ¤ dollar usd; ¢ cent; € euro; £; degree deg °; radian rad; cup; day; week; month
    year yr; mph; unit; mm millimeter millimetre; cm centimeter centimetre; m meter metre
    km kilometer kilometre; in inch inche; yard yd; ft foot feet; mile mi; g gram; kg kilogram
    mg milligram; lb pound; oz ounce; l liter litre; men; of; / per; th st nd rd
    ml milliliter millilitre; s second sec; min minute; h hour hr""")
# Words that change what a number says, so no unit begins with them: 3 million, 3 squared.
_NOT_UNITS = tuple(
    """zero three four five seven eight nine eleven twelve thirt twent fift sixt hundred thousand
    million billion trillion half halves third quarter tenth squared cubed factorial plus minus
    times over more less than modulo root maybe perhaps either else about remainder choose sqrt
    infty approx except fort sevent ninet ninth twelfth dozen score gross lakh crore quadr double
    triple divided multiplied added raised square wrong incorrect false nope none undefined unknown
    impossible infinite negative below above only when""".split()
)
# A number or formula, a space perhaps, and what may be its unit.
_TAIL = re.compile(
    r"(.*?(?:[0-9)}\]!]|pi))( ?)"
    r"([^\W\d_][^0-9(){}\\=<>+]{0,40}(?:\^?\{?(?<! )[23]\}?)?"
    r"|[%¤¢€£°](?: ?(?:[CF]|celsius|fahrenheit))?)",
    re.IGNORECASE,
)
_MONEY = re.compile(r"^([-+]?) ?([¤€£]) ?(.+)")
_TRIG_CALL = re.compile("sin|cos|tan|cot|sec|csc")
_BASE = re.compile(r"([0-9]+|[0-9A-F]+)_(?:\{([0-9]+)\}|([0-9]))")
# What may stand before = or \in: x, x_1, x_{max}, \theta, f', f(x), f^{-1}(x), \angle A, (x, y).
_NAME = (
    r"(?:\\angle ?)?\\?[a-zA-Z]+(?:\^\{-1\})?"
    r"(?:_(?:\{[^{}]{1,12}\}|[a-zA-Z0-9]))?'*(?: ?\([a-zA-Z0-9, ]{1,12}\))?"
    r"|\([a-z](?:, ?[a-z])+\)"
)
_NAMES = re.compile(rf"((?:(?:{_NAME}) ?(?:=|\\in(?![a-z])) ?)+)(?!=)(.+)")
_DATE = re.compile("[0-9]{1,4}([-/])[0-9]{1,2}\\1[0-9]{2,4}")
_POINT = re.compile(r"([A-Z]) ?(\([^()]*,[^()]*\))")
_INTEGER = re.compile(r"[-+]?(?:[0-9]+|[1-9][0-9]{0,2}(?:,[0-9]{3})+)")
_PARTED = re.compile(",|;|and|or")
_PIECES = re.compile(rf"{THOUSANDS}|[(\[{{)\]}},;]|\b(?:and|or)\b")


def _unit(text: str, glued: bool) -> str:
    """Returns one spelling of a unit: "square metres" -> "m^2", "eggs" -> "egg".

    Returns "" if the words are not surely a unit. `glued`: no space stands before them.
    """
    unit = []
    power = ""
    words = re.findall(r"[^\W\d_]+|\^?[23]|\S", re.sub("[{}]", "", text.lower()))
    for word in words:
        # A known unit, in the singular; F is only a unit behind "degree".
        name = _UNITS.get(word) or _UNITS.get(word.removesuffix("s"))
        if unit == ["degree"] and word in ("c", "celsius", "f", "fahrenheit"):
            name = word[0]
        if word in ("square", "sq"):
            power = "^2"
        elif word == "cubic":
            power = "^3"
        elif name and not (glued and len(word) == 1 and word.isalpha()):
            # 3 m is a length; 3m may be 3 times m.
            unit.append(name + power)
            power = ""
            glued = False
        elif word.lstrip("^") in ("2", "3") and unit:
            unit.append("^" + word.lstrip("^"))
        elif len(word) > 3 and word.isalpha() and not glued and not word.startswith(_NOT_UNITS):
            # "18 eggs": any noun will do, since 18 is all that was asked for.
            unit.append(word.removesuffix("s"))
        else:
            return ""
    spelling = "".join(unit)
    return "mph" if spelling == "mile/h" else spelling


_IDLE = re.compile(r"(?<=[0-9]) ?(\*) ?(?=[0-9])|(?<=[0-9])( )(?=[0-9])| |\*")
_KNOWN = re.compile("sqrt|pi|infty|sin|cos|tan|log|binom|frac|overline|sum")
_LONG_WORD = re.compile(r"[^\W\d_]{3}")
_SIGN = re.compile(r"[-0-9^_=+*/<>(:!]")


def _canonical(text: str) -> str:
    """Returns the string by which a text is compared with other texts.

    Spaces and stars only matter between two digits, and case only matters in formulas.
    """
    if " " in text or "*" in text:
        text = _IDLE.sub(lambda match: match[1] or match[2] or "", text)
    text = text.replace("\\\\", ";").replace("\\", "")  # a matrix row's end counts
    is_formula = _SIGN.search(text) and not _LONG_WORD.search(_KNOWN.sub(" ", text))
    return text if is_formula else text.casefold()


def _split(text: str) -> list[str]:
    """Returns the parts between commas, semicolons, "and" and "or" outside of brackets."""
    parts = []
    depth = 0
    start = 0
    for match in _PIECES.finditer(text):
        if match[0] in "([{":
            depth += 1
        elif match[0] in ")]}":
            depth -= 1
        elif match[0] in (",", ";", "and", "or") and depth == 0:
            parts.append(text[start : match.start()].strip())
            start = match.end()
    parts.append(text[start:].strip())
    return [part for part in parts if part]


def _parse(text: str) -> Answer | None:
    """Returns the answer that a text gives; None if it is empty or too long."""
    text = plain(text)
    if not text:
        return None
    parts = _split(text) if _PARTED.search(text) else [text]
    if len(parts) == 1:
        return _single(text)
    # A list. All its parts must be maths.
    canonical = _canonical(text)
    answers = []
    for part in parts:
        answer = _single(part)
        if answer.value is None:  # "Yes, 3" is a text
            return Answer(None, canonical)
        answers.append(answer)
    if all(answer.value[0] == "var" for answer in answers):  # and so is "A, B"
        return Answer(None, canonical)
    # x > 2 and x < 3 is one interval.
    if len(answers) == 2 and " and " in text:
        both = _both_hold(*answers)
        if both:
            return Answer(both, canonical, name=answers[0].name)
    # 0, \pm 1 is a list of three: lists in a list are dissolved.
    items = []
    for answer in answers:
        items += answer.value[1] if answer.value[0] == "list" else [answer]
    return Answer(("list", tuple(items)), canonical)


# Truths come again, and stay parsed. What a response says seldom comes again, but it is compared
# with every option of a question; more of it would only be work for the garbage collector.
parse_answer = lru_cache(maxsize=64)(_parse)
parse_truth = lru_cache(maxsize=4096)(_parse)


def is_value(text: str) -> bool:
    """Returns whether a text is maths, and more than a single letter."""
    answer = parse_answer(text)
    return answer is not None and answer.value is not None and answer.value[0] != "var"


def _single(text: str) -> Answer:
    """Returns the answer in a text that is no list."""
    canonical = _canonical(text)
    if _INTEGER.fullmatch(text):  # most answers
        return Answer(("num", int(text.replace(",", ""))), canonical)
    # 1. A number in another base: 1010_2, FF_{16}.
    match = _BASE.fullmatch(text) if "_" in text else None
    if match:
        digits = ("num", int(match[1])) if match[1].isdigit() else ("var", match[1])
        return Answer(digits, canonical, f"base {match[2] or match[3]}")
    # 2. A date is no quotient or difference.
    if _DATE.fullmatch(text):
        return Answer(None, canonical)
    # 3. A formula with a unit behind it. "S3 gallop" is no number of gallops.
    body = text if text.isascii() else _MONEY.sub(r"\1\3 \2", text)  # -$5 -> -5 $
    match = _TAIL.fullmatch(body)
    unit = _unit(match[3], glued=not match[2]) if match else ""
    if unit and not (unit == "degree" and _TRIG_CALL.search(body)):
        answer = _formula(match[1], canonical, unit)
        if answer and not variables(answer.value):
            return answer
    # 4. A formula, or else a text.
    return _formula(body, canonical, "") or Answer(None, canonical)


def _formula(text: str, canonical: str, unit: str) -> Answer | None:
    r"""Returns the answer in a formula, perhaps with a name: x = 5, x \in [0, 1], O(0, 0).

    Returns None if it is not maths.
    """
    name = ""
    named = _NAMES.fullmatch(text) if "=" in text or "\\in" in text else None
    if named and not re.fullmatch("[a-zA-Z] ?= ?[a-zA-Z]", text):  # a = b is a relation
        name = re.sub(r"\\in(?![a-z])|[= \\]", "", named[1])
        text = named[2]
    point = None if named else _POINT.fullmatch(text)
    if point:
        name, text = point.groups()
    try:
        return _interpret(Parser(tokenise(text)).parse(), canonical, unit, name)
    except (NotMaths, ValueError, RecursionError):
        return None


def _interpret(tree: Node, canonical: str, unit: str, name: str) -> Answer:
    r"""Returns what a formula's tree says as an answer. Four forms are not taken as they are:

    x > 3              the interval (3, \infty), by the name of x
    1/2 = 0.5          its last number, if all are the same
    \{0, \pm 1\}       the set with both signs
    2 \pm 1            the list of both values
    """
    has_signs = has_kind(tree, "pm", "mp")
    if tree[0] == "chain":
        _, terms, signs = tree
        interval = None if name else _interval(terms, signs)
        if interval:
            variable, tree = interval
            return Answer(tree, canonical, unit, variable)
        if set(signs) == {"="} and not variables(tree):
            budget = Budget(MAX_WORK // 8)
            if all(trees_agree(terms[0], term, budget) for term in terms[1:]):
                tree = terms[-1]
    elif tree[0] == "set" and has_signs:
        items = [_with_sign(item, plus) for item in tree[1] for plus in (True, False)]
        tree = ("set", tuple(dict.fromkeys(items)))
    elif has_signs:
        plus = Answer(_with_sign(tree, True), canonical + "+", unit, name)
        minus = Answer(_with_sign(tree, False), canonical + "-", unit, name)
        return Answer(("list", (plus, minus)), canonical)
    return Answer(tree, canonical, unit, name)


def _with_sign(node: Node, plus: bool) -> Node:
    r"""Returns the tree with \pm read as + and \mp as -, or the other way round."""
    if node[0] in ("pm", "mp"):
        node = ("+" if (node[0] == "pm") == plus else "-", *node[1:])
    return tuple(
        _with_sign(child, plus) if isinstance(child, tuple) and child else child for child in node
    )


_INFINITY = ("const", "infty")
_MINUS_INFINITY = ("neg", _INFINITY)


def _interval(terms: tuple[Node, ...], signs: tuple[str, ...]) -> tuple[str, Node] | None:
    """Returns the variable and the interval of x > 3 or 1 < x <= 5; None for other relations."""
    if all(sign in MIRRORED for sign in signs):  # 5 >= x > 1 is 1 < x <= 5
        terms = terms[::-1]
        signs = tuple(MIRRORED[sign] for sign in reversed(signs))
    if not all(sign in ("<", "<=") for sign in signs) or len(terms) > 3:
        return None
    # A half-line gets its infinite end.
    if len(terms) == 2 and terms[0][0] == "var":
        terms = (_MINUS_INFINITY, *terms)
        signs = ("<", *signs)
    elif len(terms) == 2:
        terms = (*terms, _INFINITY)
        signs = (*signs, "<")
    # In the middle the variable, at the ends numbers.
    low, variable, high = terms
    if variable[0] != "var" or variables(low) or variables(high):
        return None
    opening = "[" if signs[0] == "<=" else "("
    closing = "]" if signs[1] == "<=" else ")"
    return variable[1], ("seq", opening + closing, (low, high))


def _both_hold(one: Answer, other: Answer) -> Node | None:
    """Returns the interval (2, 3) for x > 2 and x < 3.

    Returns None if they are not two half-lines of one variable in opposite directions.
    """
    if not one.name or one.name != other.name:
        return None
    if any(answer.value[0] != "seq" or len(answer.value[2]) != 2 for answer in (one, other)):
        return None
    # From the one that is bounded below to the one that is bounded above.
    if one.value[2][0] == _MINUS_INFINITY:
        one, other = other, one
    _, brackets, (low, high) = one.value
    _, other_brackets, (other_low, other_high) = other.value
    if high != _INFINITY or other_low != _MINUS_INFINITY:
        return None
    return "seq", brackets[0] + other_brackets[1], (low, other_high)
