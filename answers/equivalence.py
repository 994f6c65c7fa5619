r"""Are two final answers the same? Standard library only.

A reward is asked millions of times about whatever a policy comes up with, and the policy learns whatever it accepts. So
answers are parsed and computed by formulas.py, within caps that make every call short, and compared by kind here:

1. `parse_answer`: a text is a list of answers, or a formula with a unit or a name (x = 5), or else just a text.
2. `answers_agree`: units and names first, then the values. Expressions with variables are the same if their values are,
   at several points that were drawn at random (Schwartz 1980; Zippel 1979: two different polynomials of degree d agree
   at a point drawn from a set of size s with a probability of at most d/s). Where one of them has no real value, a
   point says nothing.

What cannot be parsed or evaluated (sums, ellipses, 2^{2^{2018}}) is compared as a normalised string or tree.

>>> is_equivalent(r"\frac{1}{\sqrt{2}}", r"\sqrt2/2"), is_equivalent("(x+1)^2", "x^2 + 2x + 1")
(True, True)
>>> is_equivalent(r"x = 1 \text{ or } x = -1", r"\pm 1"), is_equivalent("5 >= x", r"(-\infty, 5]")
(True, True)
>>> is_equivalent("0.333", "1/3"), is_equivalent("(1,2)", "(2,1)")
(False, False)

Where reasonable people differ, this is what we chose:
- 50% equals 50 (its unit dropped) and 0.5 (its value), but not 0.5%; degrees likewise.
- A unit, or the name in x = 5, is dropped if one side only has it; if both do, they must be the same (no conversion).
  The base of 1010_2 is no unit: it is another number than 1010.
- 1,234 is one number; (1,234) is a pair. 1\frac12 is a mixed number, 1\frac32 neither that nor a product.
- Numbers in a list or set may come in any order, letters and words not; (1, 2) is ordered, and equals the list 1, 2.
- A decimal is what it says: 0.33 is not 1/3. log has base e or 10, whichever makes the two agree.
- Letter case counts in formulas (R is not r), not in words or single letters.
"""
import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

from answers.formulas import (MAX_CHARS, MAX_WORK, THOUSANDS, Node, NotMaths, Parser, plain, tokenise,
                              variables)
from answers.trees import has_kind, in_order_of_value, nodes_agree, relations_agree


@dataclass(frozen=True)
class Answer:
    """A parsed answer: its value (None: a text), its unit ("" if none), its name (x in x = 5), and its normalised text.
    A list has as its value ("list", answers)."""
    value: Node | None
    text: str
    unit: str = ""
    name: str = ""


# --- From a text to an answer -----------------------------------------------------------------------------------------

_UNITS = {alias: line.split()[0] for line in """
    % percent; $ ¤ dollar usd; ¢ cent; € euro; £; degree deg °; radian rad; cup; day; week; month; year yr; mph; unit
    mm millimeter millimetre; cm centimeter centimetre; m meter metre; km kilometer kilometre; in inch inche; yard yd
    ft foot feet; mile mi; g gram; kg kilogram; mg milligram; lb pound; oz ounce; l liter litre; men; of; / per
    th st nd rd; ml milliliter millilitre; s second sec; min minute; h hour hr""".replace("\n", ";").split(";")
    for alias in line.split()}
_NOT_UNITS = tuple("""zero three four five seven eight nine eleven twelve thirt twent fift sixt hundred thousand million
    billion trillion half halves third quarter tenth squared cubed factorial plus minus times over more less than modulo
    root maybe perhaps either else about remainder choose sqrt infty approx except fort sevent ninet ninth twelfth dozen
    score gross lakh crore quadr double triple divided multiplied added raised square wrong incorrect false nope none
    undefined unknown impossible infinite negative below above only when""".split())
_TAIL = re.compile(r"(.*?(?:[0-9)}\]!]|pi))( ?)([^\W\d_][^0-9(){}\\=<>+]{0,40}(?:\^?\{?(?<! )[23]\}?)?|[%¤¢€£°]"
                   r"(?: ?(?:[CF]|celsius|fahrenheit))?)", re.IGNORECASE)
_MONEY = re.compile(r"^([-+]?) ?([¤€£]) ?(.+)")
_TRIG_CALL = re.compile("sin|cos|tan|cot|sec|csc")
_BASE = re.compile(r"([0-9]+|[0-9A-F]+)_(?:\{([0-9]+)\}|([0-9]))")
_NAME = r"(?:\\angle ?)?\\?[a-zA-Z]+(?:\^\{-1\})?" \
        r"(?:_(?:\{[^{}]{1,12}\}|[a-zA-Z0-9]))?'*(?: ?\([a-zA-Z0-9, ]{1,12}\))?" \
        r"|\([a-z](?:, ?[a-z])+\)"
_NAMES = re.compile(rf"((?:(?:{_NAME}) ?(?:=|\\in(?![a-z])) ?)+)(?!=)(.+)")
_DATE = re.compile("[0-9]{1,4}([-/])[0-9]{1,2}\\1[0-9]{2,4}")
_POINT = re.compile(r"([A-Z]) ?(\([^()]*,[^()]*\))")
_INTEGER = re.compile(r"[-+]?(?:[0-9]+|[1-9][0-9]{0,2}(?:,[0-9]{3})+)")
_PARTED = re.compile(",|;|and|or")
_PIECES = re.compile(rf"{THOUSANDS}|[(\[{{)\]}},;]|\b(?:and|or)\b")


def _unit(text: str, glued: bool) -> str:
    """One spelling for a unit ("square metres" -> "m^2", "eggs" -> "egg"), "" where the words are not surely one."""
    unit, power = [], ""
    for word in re.findall(r"[^\W\d_]+|\^?[23]|\S", re.sub("[{}]", "", text.lower())):
        name = _UNITS.get(word) or _UNITS.get(word.removesuffix("s"))
        if unit == ["degree"] and word in ("c", "celsius", "f", "fahrenheit"):
            name = word[0]
        if word in ("square", "sq", "cubic"):
            power = "^3" if word == "cubic" else "^2"
        elif name and not (glued and len(word) == 1 and word.isalpha()):  # 3m may be 3 times m, 3 m is a length
            unit.append(name + power)
            power, glued = "", False
        elif word.lstrip("^") in ("2", "3") and unit:
            unit.append("^" + word.lstrip("^"))
        elif len(word) > 3 and word.isalpha() and not glued and not word.startswith(_NOT_UNITS):
            unit.append(word.removesuffix("s"))  # "18 eggs": any noun, since 18 is all that was asked for
        else:
            return ""
    return {"mile/h": "mph"}.get("".join(unit), "".join(unit))


_IDLE = re.compile(r"(?<=[0-9]) ?(\*) ?(?=[0-9])|(?<=[0-9])( )(?=[0-9])| |\*")
_KNOWN = re.compile("sqrt|pi|infty|sin|cos|tan|log|binom|frac|overline|sum")
_LONG_WORD, _SIGN = re.compile(r"[^\W\d_]{3}"), re.compile(r"[-0-9^_=+*/<>(:!]")


def _canonical(text: str) -> str:
    """The string that stands for a text: spaces and stars only matter between two digits, case only in formulas."""
    if " " in text or "*" in text:
        text = _IDLE.sub(lambda match: match[1] or match[2] or "", text)
    text = text.replace("\\\\", ";").replace("\\", "")  # a row's end counts
    return text if _SIGN.search(text) and not _LONG_WORD.search(_KNOWN.sub(" ", text)) else text.casefold()


def _split(text: str) -> list[str]:
    """The parts of a list: what commas, semicolons, "and" and "or" part outside of brackets."""
    parts, depth, start = [], 0, 0
    for match in _PIECES.finditer(text):
        if match[0] in "([{":
            depth += 1
        elif match[0] in ")]}":
            depth -= 1
        elif match[0] in (",", ";", "and", "or") and depth == 0:
            parts.append(text[start:match.start()].strip())
            start = match.end()
    return [part for part in (*parts, text[start:].strip()) if part]


def _interval(node: Node) -> tuple[str, Node] | None:
    """x > 3 or 1 < x <= 5 as the variable and an interval."""
    _, terms, signs = node
    if all(sign in (">", ">=") for sign in signs):
        terms, signs = terms[::-1], tuple({">": "<", ">=": "<="}[sign] for sign in reversed(signs))
    if not all(sign in ("<", "<=") for sign in signs) or len(terms) > 3:
        return None
    infinity = ("const", "infty")
    if len(terms) == 2 and terms[0][0] == "var":
        terms, signs = (("neg", infinity), *terms), ("<", *signs)
    elif len(terms) == 2:
        terms, signs = (*terms, infinity), (*signs, "<")
    low, x, high = terms
    if x[0] != "var" or variables(low) or variables(high):
        return None
    return x[1], ("seq", ("[" if signs[0] == "<=" else "(") + ("]" if signs[1] == "<=" else ")"), (low, high))


def _single(text: str) -> Answer:
    """An answer that is no list."""
    canonical, unit, name = _canonical(text), "", ""
    if _INTEGER.fullmatch(text):  # most answers
        return Answer(("num", int(text.replace(",", ""))), canonical)
    if "_" in text and (match := _BASE.fullmatch(text)):
        digits = ("num", int(match[1])) if match[1].isdigit() else ("var", match[1])
        return Answer(digits, canonical, f"base {match[2] or match[3]}")
    if _DATE.fullmatch(text):
        return Answer(None, canonical)
    body = text if text.isascii() else _MONEY.sub(r"\1\3 \2", text)  # -$5 -> -5 $
    match = _TAIL.fullmatch(body)
    unit = _unit(match[3], glued=not match[2]) if match else ""
    if unit and not (unit == "degree" and _TRIG_CALL.search(body)):
        answer = _formula(match[1], canonical, unit)
        if answer and not variables(answer.value):  # "S3 gallop" is no number of gallops
            return answer
    return _formula(body, canonical, "") or Answer(None, canonical)


def _formula(text: str, canonical: str, unit: str) -> Answer | None:
    """The answer in a formula, perhaps with a name: x = 5, x \\in [0, 1], O(0, 0). None if it is not maths."""
    name = ""
    try:
        if ("=" in text or "\\in" in text) and (match := _NAMES.fullmatch(text)):
            if not re.fullmatch("[a-zA-Z] ?= ?[a-zA-Z]", text):  # a = b is a relation
                name, text = "".join(re.sub(r"\\in(?![a-z])|[= \\]", " ", match[1]).split()), match[2]
        elif match := _POINT.fullmatch(text):  # O(0, 0)
            name, text = match.groups()
        return _interpret(Parser(tokenise(text)).parse(), canonical, unit, name)
    except (NotMaths, ValueError, RecursionError):
        return None


def _interpret(tree: Node, canonical: str, unit: str, name: str) -> Answer:
    if tree[0] == "chain":
        if (found := _interval(tree)) and not name:
            return Answer(found[1], canonical, unit, found[0])
        _, terms, signs = tree
        if set(signs) == {"="} and not (name and variables(tree)):
            budget = [MAX_WORK // 8]
            if not variables(tree) and all(nodes_agree(terms[0], term, budget) for term in terms[1:]):  # 1/2 = 0.5
                return Answer(terms[-1], canonical, unit, name)
    elif tree[0] == "set" and has_kind(tree, "pm", "mp"):  # {0, \pm 1}
        items = dict.fromkeys(_with_sign(item, plus) for item in tree[1] for plus in (True, False))
        return Answer(("set", tuple(items)), canonical, unit, name)
    elif has_kind(tree, "pm", "mp"):
        both = tuple(Answer(_with_sign(tree, sign == "+"), canonical + sign, unit, name) for sign in "+-")
        return Answer(("list", both), canonical)
    return Answer(tree, canonical, unit, name)


def _with_sign(node: Node, plus: bool) -> Node:
    """The tree with its plus-minus signs decided."""
    if node[0] in ("pm", "mp"):
        node = ("+" if (node[0] == "pm") == plus else "-", *node[1:])
    return tuple(_with_sign(child, plus) if isinstance(child, tuple) and child else child for child in node)


def _both_hold(one: Answer, other: Answer) -> Node | None:
    """x > 2 and x < 3 is the interval (2, 3); None if they are no two half-lines of one variable in opposite directions."""
    infinity = ("const", "infty")
    if not one.name or one.name != other.name or any(a.value[0] != "seq" or len(a.value[2]) != 2 for a in (one, other)):
        return None
    if one.value[2][0] == ("neg", infinity):
        one, other = other, one
    (_, ends, (low, high)), (_, other_ends, (other_low, other_high)) = one.value, other.value
    return ("seq", ends[0] + other_ends[1], (low, other_high)) if (high, other_low) == (infinity, ("neg", infinity)) \
        else None


@lru_cache(maxsize=64)
def parse_answer(text: str) -> Answer | None:
    """The answer that a text gives, None if it is empty or too long."""
    text = plain(text)
    if not text:
        return None
    parts = _split(text) if _PARTED.search(text) else [text]
    if len(parts) == 1:
        return _single(text)
    answers = []
    for part in parts:
        answers.append(_single(part))
        if answers[-1].value is None:  # "Yes, 3" is a text
            return Answer(None, _canonical(text))
    if len(answers) == 2 and " and " in text and (both := _both_hold(*answers)):
        return Answer(both, _canonical(text), name=answers[0].name)
    if all(answer.value[0] == "var" for answer in answers):  # and so is "A, B"
        return Answer(None, _canonical(text))
    parts = [answer.value[1] if answer.value[0] == "list" else (answer,) for answer in answers]  # 0, \pm 1 is three
    return Answer(("list", tuple(chain(*parts))), _canonical(text))


# Truths come again, and are kept parsed. What responses say seldom comes again (but is compared with every option), and
# would only be work for the garbage collector.
parse_truth = lru_cache(maxsize=4096)(parse_answer.__wrapped__)


# --- Comparison -------------------------------------------------------------------------------------------------------

def _lists_agree(a: Answer, b: Answer, budget: list[int]) -> bool:
    """Lists, or a list and something that holds several values."""
    items, node = (a.value[1], b.value) if a.value[0] == "list" else (b.value[1], a.value)
    if node[0] == "list":
        others = node[1]
        if len(items) != len(others):
            return False
        distinct = [len({item.name for item in side if item.name}) for side in (items, others)]
        in_order = max(distinct) > 1 and min(distinct) == 0  # x = 1, y = 2 against 1, 2
        if not in_order and all(item.name for item in (*items, *others)) and max(distinct) > 1:
            items, others = (sorted(side, key=lambda item: item.name) for side in (items, others))
        elif not in_order:
            items, others = in_order_of_value(items, budget), in_order_of_value(others, budget)
        return all(answers_agree(x, y, budget) for x, y in zip(items, others))
    if node[0] in ("set", "union"):
        return len({item.name for item in items} - {""}) < 2 and len(node[1]) == len(items) and all(
            nodes_agree(x.value, y, budget) for x, y in zip(in_order_of_value(items, budget), in_order_of_value(node[1], budget)))
    if node[0] == "seq" and (node[1] == "()" or len(node[2]) > 2):
        names = [item.name for item in items]
        in_order = not any(names) or names == sorted(set(names))  # x = 1, y = 2, but not y = 1, x = 2
        return in_order and len(node[2]) == len(items) and all(
            nodes_agree(x.value, y, budget) for x, y in zip(items, node[2]))
    return False


def answers_agree(a: Answer, b: Answer, budget: list[int]) -> bool:
    """Units and names first, then the values; percentages and degrees also by their value."""
    if a.text == b.text:
        return True
    if a.value is None or b.value is None:
        return False
    if a.name != b.name and "=" in _relation_signs(a, b):
        return relations_agree(_as_relation(a), _as_relation(b), budget)
    if a.unit != b.unit and (a.unit and b.unit or "base" in a.unit + b.unit):
        return False
    if a.name != b.name and a.name and b.name:
        return False
    if "list" in (a.value[0], b.value[0]):
        return _lists_agree(a, b, budget)
    if nodes_agree(a.value, b.value, budget):
        return True
    for one, other in ((a, b), (b, a)):
        if one.unit in ("%", "degree") and not other.unit:
            value = ("/", one.value, ("num", 100)) if one.unit == "%" else ("call", "degrees", one.value)
            if nodes_agree(value, other.value, budget):
                return True
    return False


def _relation_signs(a: Answer, b: Answer) -> tuple:
    """Where one is y = 2x + 3 (a name and a value) and the other 2x - y + 3 = 0 (a relation): the latter's sign."""
    for one, other in ((a, b), (b, a)):
        if one.name and other.value[0] == "chain" and one.value[0] not in ("list", "chain"):
            return other.value[2]
    return ()


def _as_relation(answer: Answer) -> Node:
    return answer.value if answer.value[0] == "chain" else ("chain", (("var", answer.name), answer.value), ("=",))


def is_equivalent(predicted: str, truth: str, budget: list[int] | None = None) -> bool:
    """Whether two answers agree. Symmetric; never raises. Several calls may share a budget: [MAX_WORK] at first."""
    texts = [as_text(answer) for answer in (predicted, truth)]
    if max(map(len, texts)) > MAX_CHARS:
        return False  # before a long text is looked up
    one, other = parse_answer(texts[0]), parse_truth(texts[1])
    if one is None or other is None:
        return False
    budget = [MAX_WORK] if budget is None else budget
    if answers_agree(one, other, budget):
        return True
    if (one.value and other.value and (one.value[0] == "list") != (other.value[0] == "list")  # 100,200 may be a list
            and not any(re.search(",0[0-9]|and|or", text) for text in texts)):
        one, other = (parse_answer(text.replace(",", ", ")) for text in texts)
        return bool(one and other) and answers_agree(one, other, budget)
    return False


def as_text(value) -> str:
    """Numbers of a JSON file as text; "" for anything that is neither text nor a number."""
    if isinstance(value, int) and value.bit_length() > 4 * MAX_CHARS:
        return ""
    return str(value) if isinstance(value, (str, int, float)) else ""
