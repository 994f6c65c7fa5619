r"""Are two final answers the same? Standard library only.

A reward is asked millions of times about whatever a policy comes up with, and the policy learns
whatever it accepts. So nothing is evaluated but what formulas.py understands, within caps that make
every call short. parsing.py makes of a text a list of answers, or a formula with a unit or a name
(x = 5); here units, names and lists are compared, in trees.py the formulas, by kind and by value.
What cannot be parsed or evaluated (sums, ellipses, 2^{2^{2018}}) is compared as a text or tree.

>>> is_equivalent(r"\frac{1}{\sqrt{2}}", r"\sqrt2/2"), is_equivalent("(x+1)^2", "x^2 + 2x + 1")
(True, True)
>>> is_equivalent(r"x = 1 \text{ or } x = -1", r"\pm 1"), is_equivalent("5 >= x", r"(-\infty, 5]")
(True, True)
>>> is_equivalent("0.333", "1/3"), is_equivalent("(1,2)", "(2,1)")
(False, False)

Where reasonable people differ, this is what we chose:
- 50% equals 50 (its unit dropped) and 0.5 (its value), but not 0.5%; degrees likewise.
- A unit, or the name in x = 5, is dropped if one side only has it; if both do, they must be the
  same (no conversion). 1010_2 is a text, and no number.
- 1,234 is one number; (1,234) is a pair. 1\frac12 is a mixed number, 1\frac32 is nothing.
- Numbers in a list or set may come in any order, letters and words not; (1, 2) is ordered, and
  equals the list 1, 2.
- A decimal is what it says: 0.33 is not 1/3, and of 1/3 \approx 0.33 the 1/3 counts. log without a
  base is ln. Numbers are real, and i is a letter.
- Letter case counts in formulas (R is not r), not in words or single letters.
- What is no number is not calculated with: times (4:00), dates, ranges (3-5) and runs of capitals
  (HTH) equal themselves only, 3 x 4 (a size) no other size. An identity that zero or infinity
  satisfies proves nothing: 0:0, 0/0, 0^0, \log_0 and \infty + 1 equal nothing.
"""

import re
from functools import partial

from answers.formulas import Node
from answers.parsing import Answer, parse_answer, parse_sentence, parse_truth
from answers.trees import agree_in_any_order, factors, plain_number, trees_agree
from answers.typography import MAX_CHARS
from answers.values import Budget


def answers_agree(one: Answer, other: Answer, budget: Budget) -> bool:
    """Returns whether two answers are the same: units and names first, then their values."""
    if one.text == other.text and one.unit == other.unit:  # 6 mHz is not 6 MHz
        return True
    if one.value is None or other.value is None:
        return False
    # 1. A line or a curve: y = 2x + 3, a name and a value, against the relation 2x - y + 3 = 0.
    for named, relation in ((one, other), (other, one)):
        if named.name and relation.value[0] == "chain" and set(relation.value[2]) == {"="}:
            line = "chain", (("var", named.name), named.value), ("=",)
            return trees_agree(line, relation.value, budget)
    # 2. Units and names must be the same if both sides have them. A 3 x 5 matrix is not 15.
    if one.unit and other.unit and one.unit != other.unit:
        return False
    if one.name and other.name and one.name != other.name:
        return False
    if any(side.unit and len(factors(side.value)) > 1 for side in (one, other)):
        return one.value == other.value
    # 3. The values.
    if "list" in (one.value[0], other.value[0]):
        return _lists_agree(one, other, budget)
    if trees_agree(one.value, other.value, budget):
        return True
    # 4. 50% is also 0.5, and 180 degrees are also pi.
    return one.unit != other.unit and trees_agree(_as_ratio(one), _as_ratio(other), budget)


def _as_ratio(answer: Answer) -> Node:
    """Returns a percentage as a fraction, degrees in radians, any other value as it is."""
    ratios = {"%": ("/", answer.value, ("num", 100)), "degree": ("call", "degrees", answer.value)}
    return ratios.get(answer.unit, answer.value)


def _lists_agree(one: Answer, other: Answer, budget: Budget) -> bool:
    r"""Returns whether a list agrees with what another answer has for a value. Four kinds do:

    a list     1, 2              2, 1                 in any order, also x = 1, x = 2
               x = 1, y = 2      y = 2, x = 1         by name, if all have names
               x = 1, y = 2      1, 2                 in order, if one side has several names
    a set      1, 2              \{2, 1\}             in any order
    a union    (0, 1), (2, 3)    (2, 3) \cup (0, 1)   in any order
    a tuple    1, 2              (1, 2)               in order, of names by the alphabet
    """
    kinds = {one.value[0], other.value[0]}
    sides = [_items(one), _items(other)]
    if None in sides:
        return False
    names = [[item.name for item in side] for side in sides]
    several = any(len(set(side) - {""}) > 1 for side in names)
    agree = partial(answers_agree, budget=budget)
    if kinds & {"set", "union"} or kinds == {"list"} and not several:
        return not several and agree_in_any_order(*sides, agree)
    if any(names[0] + names[1]) and not several:
        return False
    if "seq" in kinds or all(names[0] + names[1]):
        sides = [sorted(side, key=lambda item: item.name) for side in sides]
    return len(sides[0]) == len(sides[1]) and all(map(agree, *sides))


def _items(answer: Answer) -> tuple[Answer, ...] | None:
    """Returns the answers in a list, set, union or tuple; None for an interval and all else."""
    kind, *brackets, items = answer.value
    if kind == "list":
        return items
    if kind not in ("set", "union", "seq"):
        return None
    has_ends = len(items) == 2 and brackets in (["[]"], ["[)"], ["(]"])
    if kind == "seq" and (has_ends or re.fullmatch("[a-z]", answer.name)):  # x in (1, 2)
        return None
    return tuple(Answer(item, str(item)) for item in items)


def is_equivalent(predicted: str, truth: str, budget: Budget | None = None) -> bool:
    """Returns whether two answers agree. Never raises.

    Symmetric, but for sentences: an answer may state its value in one, a truth is what it is.
    Numbers are taken as text; what is neither, or is longer than MAX_CHARS, equals nothing. Several
    calls may share one budget.
    """
    texts = [as_text(predicted), as_text(truth)]
    budget = budget or Budget()
    one, other = parse_answer(texts[0]), parse_truth(texts[1])
    if one is None or other is None:
        return False
    if answers_agree(one, other, budget):
        return True
    if other.value is None:
        return False
    if one.value is None:
        one = parse_sentence(texts[0])
        return one is not None and answers_agree(one, other, budget)
    # What a comma in digits means shows the other side: 100,200 may be 100, 200, and 0,5 be 0.5.
    if (one.value[0] == "list") == (other.value[0] == "list"):
        return False
    for respelled in (_parted, _decimal):
        one, other = (parse_answer(respelled(text)) for text in texts)
        if one and other and answers_agree(one, other, budget):
            return True
    return False


def _parted(text: str) -> str:
    """Returns 100,200 as a list; 500,000 is none, whatever stands opposite."""
    return text if re.search(",0[0-9]|and|or", text) else text.replace(",", ", ")


_DECIMAL_COMMA = re.compile(  # 0,5 and 3,14 and 1.234,56 and 2,5 cm, but not 2,5 and 1,234
    r"[\s$]*(?!0,0+$)([-+]?(?:(?:0|[1-9][0-9]{0,2}(?:\.[0-9]{3})+),[0-9]+"
    r"|[0-9]+,(?:[0-9]{2}|[0-9]{4,})"
    r"|[0-9]+,[0-9](?= ?[a-zA-Z%\\€])))([^0-9,]*)"
)


def _decimal(text: str) -> str:
    """Returns a number with a decimal comma with a decimal point, any other text as it is."""
    match = _DECIMAL_COMMA.fullmatch(text)
    return match[1].replace(".", "").replace(",", ".") + match[2] if match else text


def rounds_to(answer: str, truth: str, decimals: int) -> bool:
    """Returns whether the answer, rounded, is the truth, rounded: 3.14159 is 3.14 to 2 decimals.

    This is MathVista's rule for decimal numbers (its evaluation/calculate_score.py).
    """
    sides = parse_answer(answer), parse_truth(truth)
    if None in sides or any(side.name for side in sides):
        return False
    numbers = [plain_number(side.value) for side in sides]
    if None in numbers or len({side.unit for side in sides} - {""}) > 1:
        return False
    return round(numbers[0], decimals) == round(numbers[1], decimals)


def as_text(value: object) -> str:
    """Returns a text as it is, and a number of a JSON file as text; "" for anything else."""
    if isinstance(value, int) and value.bit_length() > 4 * MAX_CHARS:
        return ""
    return str(value) if isinstance(value, (str, int, float)) else ""
