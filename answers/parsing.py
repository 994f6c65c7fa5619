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
from dataclasses import dataclass
from functools import lru_cache

from answers.formulas import Node, parse_formula
from answers.tokens import ENGLISH, GREEK, THOUSANDS, NotMaths
from answers.trees import (
    MIRRORED,
    has_kind,
    is_rounding,
    plain_number,
    solve_linear,
    trees_agree,
    variables,
)
from answers.typography import plain
from answers.units import changes, unit_of
from answers.values import MAX_WORK, Budget


@dataclass(frozen=True)
class Answer:
    """A parsed answer."""

    value: Node | None  # of a list ("list", answers); of a text that is no maths None
    text: str  # normalised; equal texts are equal answers
    unit: str = ""
    name: str = ""  # the x of x = 5


# A number or formula, a space perhaps, and what may be its unit.
_TAIL = re.compile(
    r"(?i)(.*?(?:[0-9)}\]!]|pi))( ?)"
    r"([^\W\d_][^0-9(){}\\=<>+]{0,80}(?:\^?\{?(?<! )-?[1-3]\}?[^0-9(){}\\=<>+]{0,20}){0,3}"
    r"|[%¤¢€£¥₹°](?: ?(?:[CF]|celsius|fahrenheit))?)"
)
_MONEY = re.compile(r"(^|= ?)([-+]?) ?([¤€£¥₹]) ?(.+)")
_TRIG_CALL = re.compile("sin|cos|tan|cot|sec|csc")
_BASE = re.compile(r"([0-9]+|[0-9A-F]+)_(?:\{([0-9]+)\}|([0-9]))")
# What a value may be called: x, x_1, \theta, f', f(x), f^{-1}(x), \angle A, (x, y), |PQ|, P(X = 2),
# S_{\triangle ABC}, \frac{AB}{CD}, AB:CD, m + n, the area. Subscripts and arguments go first.
_GROUP = re.compile(
    r"_\{[^{}]*\}|_.|\^\{-1\}(?= ?\()|(?<=[a-zA-Z}']) ?\([^()]*\)|(?<![a-zA-Z0-9]) ?\|[A-Z z]+\|"
)
_NAMING = rf"\\(?:angle|triangle|overline|vec|sin|cos|tan|{'|'.join(GREEK)})(?![a-z])"
_QUANTITY = re.compile(
    r"\\frac\{?[A-Z]+\}?\{?[A-Z]+\}?|[a-zA-Z]+(?: ?[:/] ?[a-zA-Z]+)+|\([a-z](?:, ?[a-z])+\)"
    r"|[a-w](?: ?\+ ?[a-w])+"
    rf"|(?:(?:{_NAMING}|[a-zA-Z]+)'*(?:\{{[a-zA-Z ]*\}})?(?: |(?=\\)|$)){{1,8}}|"
)
# \sin A may be called so; \cos 2\pi has a value of its own.
_ANGLE = re.compile(r"(?:sin|cos|tan).*(?:[0-9]|pi)")
# Words that make of x something else: the opposite of x = 5, up to x = 5.
_OF = re.compile(r"(?<!value)(?<!number)(?<!area)(?<!length) of |\bto ")
_NO_WORDS = re.compile(r"\\[a-zA-Z]+|\b[A-Z]+\b")
_IS = re.compile(r"==?(?![<>=])|\\in(?![a-z])|\\approx")
# What looks like a number and is none: the date 2023-01-01, the range or score 3-5, 120/80 mmHg
_NO_NUMBER = re.compile(
    r"[0-9]{1,4}([-/])[0-9]{1,2}\1[0-9]{2,4}|[0-9]+(?: ?- ?[0-9]+)+|[0-9]+ ?/ ?[0-9]+(?: ?mm ?Hg)"
)
_SIZE = re.compile(r"[0-9]{1,4}(?: ?(?:\\times|\\cdot|\*) ?[0-9]{1,4})+")
# What a formula holds for: 2x (x > 0).
# A unit within a chain: x = 3 cm = 8 m.
_OTHER_UNIT = re.compile(r"= ?[0-9.,]+ ?[a-zA-Z]+(?:\^\{?[23]\}?)? ?(?:=|\\approx)")
_DOMAIN = re.compile(r"(?<=[a-z0-9)}])[ ,]+\(([a-z] ?(?:\\in|\\n?eq?|\\[lg]eq?|[<>!]=?)[^()]*)\)$")
_CLOCK = re.compile(r"([0-9]{1,2})(?:\s?:\s?([0-9]{2}))?(?:\s?:\s?([0-9]{2}))? ?([ap]m)?")
_RELATION = re.compile("[a-zA-Z] ?= ?[a-zA-Z]|[xyz] ?[xyz]+ ?=.*")  # no names: a = b, xy = 1
_POINT = re.compile(r"([A-Z]) ?(\([^()]*,[^()]*\))")
_EQUALS = re.compile(r"((?:[a-z] ?= ?){2,}) ?([^=,;]+)")
_INTEGER = re.compile(r"[-+]?(?:[0-9]+|[1-9][0-9]{0,2}(?:,[0-9]{3})+)")
_PARTED = re.compile(",|;|and|or")
_PIECES = re.compile(rf"{THOUSANDS}|[(\[{{)\]}},;]|\b(?:and|or)\b")
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
    is_symbol = len(text) == 2 and text.isupper() and text.lower() not in ENGLISH  # CO is not Co
    return text if is_formula or is_symbol else text.casefold()


def _split(text: str) -> list[str]:
    """Returns the parts between commas, semicolons, "and" and "or" outside of brackets."""
    parts = []
    depth = start = 0
    for match in _PIECES.finditer(text):
        depth += (match[0] in "([{") - (match[0] in ")]}")
        if match[0] in (",", ";", "and", "or") and depth == 0:
            parts.append(text[start : match.start()].strip())
            start = match.end()
    return [part for part in (*parts, text[start:].strip()) if part]


def _parse(text: str) -> Answer | None:
    """Returns the answer that a text gives; None if it is empty or too long."""
    text = plain(text)
    if not text:
        return None
    match = _EQUALS.fullmatch(text)
    if match:  # x = y = 2
        text = ", ".join(f"{name} = {match[2]}" for name in re.findall("[a-z]", match[1]))
    parts = _split(text) if _PARTED.search(text) else [text]
    if len(parts) == 1:
        return _single(text)
    # A list. All its parts must be maths: "Yes, 3" is a text, and so is "A, B".
    canonical = _canonical(text)
    answers = [_single(part) for part in parts]
    values = [answer.value for answer in answers]
    if None in values or all(value[0] == "var" for value in values):
        return Answer(None, canonical)
    # x > 2 and x < 3 is one interval.
    if len(answers) == 2 and " and " in text:
        both = _both_hold(*((answer.name, answer.value) for answer in answers))
        if both and both[0]:
            return Answer(both[1], canonical, name=both[0])
    # 0, \pm 1 is a list of three: lists in a list are dissolved.
    items = (one.value[1] if one.value[0] == "list" else (one,) for one in answers)
    return Answer(("list", sum(items, ())), canonical)


# Truths come again, and stay parsed. What a response says seldom comes again, but it is compared
# with every option of a question; more of it would only be work for the garbage collector.
parse_answer = lru_cache(maxsize=64)(_parse)
parse_truth = lru_cache(maxsize=4096)(_parse)


# What states the value behind it: words, that is no digits and no relations, and one of these.
_STATES = re.compile(
    r"(?i)(?:(?-i:^an?)|(?:^|(?<= ))(?:is|are|was|were|be|equal to|equals|gets?|gives?|obtain"
    r"|has|have|had|at|left|find that|[a-z]{3,}(?=: \[?\\begin)|(?:de|in)creases by|sold|made"
    r"|earned|spent|needs?|costs?|paid|saved|bought|used|ate|in all"
    r"|altogether|then|therefore|thus|hence|so|(?:total|value|answer|sum|number) of))[,:]? "
)
_WORDS = re.compile(rf"(?:[a-zA-Z'(){{}},:$+_ -]|{_NAMING})*")
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
        answers = [_parse(rest)] if before else []
        if _PARTED.search(rest):  # "72 clips in April and May" is no list
            answers.append(_single(rest))
        for answer in answers:
            if answer is not None and answer.value is not None and answer.value[0] != "var":
                return answer
    return None


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
    # 2. A date is compared as it is written, and so is a time of day.
    if _NO_NUMBER.fullmatch(text):
        return Answer(None, canonical)
    match = _CLOCK.fullmatch(text) if ":" in text or text.endswith("m") else None
    clock = _clock(*match.groups()) if match else None
    if clock:
        return Answer(None, clock)
    # 3. A formula with a unit behind it. "S3 gallop" is no number of gallops.
    body = text if text.isascii() else _MONEY.sub(r"\1\2\4 \3", text)  # -$5 -> -5 $
    match = _TAIL.fullmatch(body)
    unit = unit_of(match[3], glued=not match[2]) if match else None
    if unit is not None and not (unit == "degree" and _TRIG_CALL.search(body)):
        again = rf"{re.escape(match[2] + match[3])}(?= ?(?:=|\\approx))"  # 4/3 m \approx 1.33 m
        answer = _formula(re.sub(again, "", match[1]), canonical, unit)
        if answer and not variables(answer.value):
            return answer
    # 4. A formula, perhaps with its domain in brackets, or else a text.
    match = _DOMAIN.search(body) if body.endswith(")") else None
    domain = match[1].replace(" ", "") if match else ""
    body = body[: match.start()] if match else body
    return _formula(body, canonical, domain) or Answer(None, canonical)


def _clock(hour: str, minute: str | None, second: str | None, half: str | None) -> str | None:
    """Returns the time of day that 7:30 pm or 19:30 is; None for a ratio.

    11:30 may be either, but a ratio is in lowest terms, and none of these begins with a zero.
    """
    if int(hour) > 23 or max(int(minute or 0), int(second or 0)) > 59:
        return None
    hours = int(hour) % 12 + 12 * (half == "pm") if half else int(hour)
    terms = [part for part in (hour, minute, second) if part]
    is_ratio = math.gcd(*map(int, terms)) == 1 and not any(part[0] == "0" for part in terms)
    if not half and (is_ratio or not minute):
        return None
    return ":".join([str(hours), minute or "00"] + [second] * (second not in (None, "00")))


def _formula(text: str, canonical: str, unit: str, name: str = "") -> Answer | None:
    r"""Returns the answer in a formula, perhaps with a name: x = 5, x \in [0, 1], O(0, 0).

    Returns None if it is not maths. `name`: what stood before it.
    """
    if _NO_NUMBER.fullmatch(text) or _OTHER_UNIT.search(text):
        return None
    if _SIZE.fullmatch(text):
        sides = ("size", tuple(map(int, re.findall("[0-9]+", text))))
        return Answer(sides, canonical, unit, name)
    # 1. x = 5 and |PQ| = 5: the name goes. Only m + n = 113 is a sum with a value: x + y = 4,
    # a + b = 0 and x/x = 1 are relations.
    called, value = _name_and_value(text)
    if called is not None:
        answer = _formula(value, canonical, unit, "=".join(filter(None, (name, called))))
        is_relation = answer and answer.value in (("num", 0), ("num", 1))
        if not is_relation or not re.search("[+:/]", called):
            return answer
    # 2. So does the O of O(0, 0).
    point = None if name else _POINT.fullmatch(text)
    if point:
        name, text = point.groups()
    try:
        return _interpret(parse_formula(text), canonical, unit, name)
    except (NotMaths, ValueError, ArithmeticError, RecursionError):
        return None


def _name_and_value(text: str) -> tuple[str | None, str]:
    """Returns the name and the value in x = 5, or None and the text.

    Of "the solution x" the name is x, and "the area" is none, so it is "".
    """
    is_named = not _RELATION.fullmatch(text) and _IS.search(text)
    sign = is_named and _IS.search(_GROUP.sub(lambda match: "#" * len(match[0]), text))
    if not sign or not sign.start():
        return None, text
    quantity = _GROUP.sub("", text[: sign.start()]).strip()
    called = text[: sign.start()].strip()
    if not _QUANTITY.fullmatch(quantity) or _OF.search(quantity) or _ANGLE.search(called):
        return None, text
    if changes(_NO_WORDS.sub("", quantity)):
        return None, text
    if " " in re.sub(r"\\[a-z]+ |[+:/,] | [+:/,]", "", quantity):
        word = quantity.split(" ")[-1]
        called = "" if re.fullmatch("[a-zA-Z]{3,}", word) else word
    return re.sub(r"[\\{} ]", "", called), text[sign.end() :].strip()


def _interpret(tree: Node, canonical: str, unit: str, name: str) -> Answer:
    r"""Returns what a formula's tree says as an answer. Five forms are not taken as they are:

    x > 3              the interval (3, \infty), by the name of x
    1/2 = 0.5          its number, if all are the same
    2/3 \approx 0.67  the exact one
    \{0, \pm 1\}       the set with both signs
    2 \pm 1            the list of both values
    """
    has_signs = has_kind(tree, "pm", "mp")
    if tree[0] in ("pm", "mp") and tree[2] == ("num", 0):  # \pm 0 is one number
        raise NotMaths
    if tree[0] == "chain":
        _, terms, signs = tree
        says_nothing = len(terms) == 2 and {_INFINITY, _MINUS_INFINITY} & {*terms}  # x < \infty
        region = None if name or says_nothing else _region(terms, signs)
        if region:
            return Answer(region[1], canonical, unit, region[0])
        tree = _last_value(terms, signs, name) or tree
    elif tree[0] == "set" and has_signs:
        items = [_with_sign(item, plus) for item in tree[1] for plus in (True, False)]
        tree = ("set", tuple(dict.fromkeys(items)))
    elif has_signs:
        both = (_with_sign(tree, True), canonical + "+"), (_with_sign(tree, False), canonical + "-")
        return Answer(("list", tuple(Answer(*one, unit, name) for one in both)), canonical)
    return Answer(tree, canonical, unit, name)


def _last_value(terms: tuple[Node, ...], signs: tuple[str, ...], name: str) -> Node | None:
    """Returns the last exact number of a chain: 4 of x + 1 = 3 + 1 = 4, 2/3 of 2/3 = 0.67.

    Returns None if two of its numbers differ, by more than rounding, or for a relation: x + y = 4.
    """
    if not set(signs) <= {"=", "approx"}:
        return None
    numbers = [term for term in terms if not variables(term)]
    skipped = len(terms) - len(numbers)
    if len(numbers) < 2 - (name != "" or skipped > 1) or terms[skipped:] != tuple(numbers):
        return None
    if name and any(name in variables(term) for term in terms):  # x = 3 x = 8
        return None
    budget = Budget(MAX_WORK // 8)
    value = numbers[0]
    for number, sign in zip(numbers[1:], signs[skipped:]):
        if trees_agree(value, number, budget):
            value = number
        elif not is_rounding(value, number, 0 if sign == "approx" else 2, budget):
            return None
    return value


def _with_sign(node: Node, plus: bool) -> Node:
    r"""Returns the tree with \pm read as + and \mp as -, or the other way round."""
    if node[0] in ("pm", "mp"):
        node = ("+" if (node[0] == "pm") == plus else "-", *node[1:])
    return tuple(
        _with_sign(child, plus) if isinstance(child, tuple) and child else child for child in node
    )


_INFINITY = ("const", "infty")
_MINUS_INFINITY = ("neg", _INFINITY)
Region = tuple[str, Node] | None  # a variable, and where it may be


def _region(terms: tuple[Node, ...], signs: tuple[str, ...]) -> Region:
    r"""Returns the variable of a relation and where it may be, None for other relations.

    x < 3        (-\infty, 3)          1 < x <= 5   (1, 5], where both links hold
    |x| < 2      (-2, 2)               |x| > 2      (-\infty, -2) \cup (2, \infty)
    6 - 2x > 0   (-\infty, 3)          1 < |x| < 2  (-2, -1) \cup (1, 2)
    x != 2       (-\infty, 2) \cup (2, \infty)
    """
    if len(terms) == 3:
        if terms[1][:2] == ("call", "abs"):
            low, (_, _, x), high = terms
            below = _region((("neg", high), x, ("neg", low)), signs[::-1])
            is_apart = (plain_number(low) or -1) > 0
            return _either_holds(below, _region((low, x, high), signs)) if is_apart else None
        return _both_hold(_region(terms[:2], signs[:1]), _region(terms[1:], signs[1:]))
    left, right, sign = *terms[:2], signs[0]
    if left[0] != "var" and left[:2] != ("call", "abs"):  # 3 > x is x < 3
        left, right, sign = right, left, MIRRORED.get(sign, sign)
    if len(terms) > 2 or sign not in MIRRORED and sign != "!=":
        return None
    if variables(right) or left[0] != "var" and left[:2] != ("call", "abs"):
        solved = solve_linear(("-", left, right))  # 6 - 2x > 0 is x < 3
        if not solved:
            return None
        name, root, rises = solved
        left, right, sign = ("var", name), root, sign if rises else MIRRORED.get(sign, sign)
    # 1. Two halves: x != 2, and |x| < 2 is x < 2 and x > -2.
    if sign == "!=":
        halves = [_region((left, right), (half,)) for half in "<>"]
        return _either_holds(*halves) if left[0] == "var" else None
    if left[0] == "call":
        mirrored = (left[2], ("neg", right)), (MIRRORED[sign],)
        halves = _region(*mirrored), _region((left[2], right), (sign,))
        return _both_hold(*halves) if sign in ("<", "<=") else _either_holds(*halves)
    # 2. One half.
    if sign in ("<", "<="):
        return left[1], ("seq", "(]" if sign == "<=" else "()", (_MINUS_INFINITY, right))
    return left[1], ("seq", "[)" if sign == ">=" else "()", (right, _INFINITY))


def _either_holds(below: Region, above: Region) -> Region:
    """Returns the union of what two relations say about one variable."""
    return (below[0], ("union", (below[1], above[1]))) if below and above else None


def _both_hold(one: Region, other: Region) -> Region:
    """Returns the interval (2, 3) for x > 2 and x < 3; None for other pairs."""
    if not one or not other or one[0] != other[0]:
        return None
    if any(region[0] != "seq" or len(region[2]) != 2 for _, region in (one, other)):
        return None
    # From the one that is bounded below to the one that is bounded above.
    halves = sorted((one[1], other[1]), key=lambda half: half[2][0] == _MINUS_INFINITY)
    (_, brackets, (low, high)), (_, other_brackets, (other_low, other_high)) = halves
    if high != _INFINITY or other_low != _MINUS_INFINITY:
        return None
    return one[0], ("seq", brackets[0] + other_brackets[1], (low, other_high))
