r"""Are two trees of formulas.py the same? Standard library only.

Each kind is compared with its own kind: numbers and expressions by their values, equations and
inequalities side by side, sets in any order, tuples and matrices entry by entry.

Expressions with variables are the same if their values are, at several points that were drawn at
random (Schwartz 1980; Zippel 1979: two different polynomials of degree d agree at a point drawn
from a set of size s with a probability of at most d/s). Where one of the two has no real value, a
point says nothing.

>>> half, tenths = ("/", ("num", 1), ("num", 2)), ("/", ("num", 5), ("num", 10))
>>> trees_agree(half, tenths, Budget()), trees_agree(("var", "x"), half, Budget())
(True, False)
"""

from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction

from answers.formulas import Node
from answers.values import (
    Approx,
    Budget,
    Evaluator,
    Value,
    approximate,
    random_points,
    values_agree,
)

MIRRORED = {">": "<", ">=": "<=", "<": ">", "<=": ">="}


def trees_agree(one: Node, other: Node, budget: Budget) -> bool:
    """Returns whether two trees mean the same. What exceeds the budget agrees with nothing."""
    # {5} is 5, but not a set in a set.
    one, other = (
        node[1][0]
        if node[0] == "set" and [item[0] != "set" for item in node[1]] == [True]
        else node
        for node in (one, other)
    )
    kinds = {one[0], other[0]}
    if one == other or kinds == {"num"}:
        return one == other
    # What has several entries or sides, by kind.
    if "matrix" in kinds:
        return _matrices_agree(one, other, budget)
    if kinds == {"set"} or kinds == {"union"}:
        return agree_in_any_order(one[1], other[1], lambda x, y: trees_agree(x, y, budget))
    if kinds == {"seq"}:
        # Brackets tell the interval [1, 2] from (1, 2). Three numbers are no interval.
        return (one[1] == other[1] or len(one[2]) > 2) and _all_agree(one[2], other[2], budget)
    if kinds == {"chain"}:
        return relations_agree(one, other, budget)
    if kinds == {"ratio"} and len(one[1]) == len(other[1]):
        # a : b : c equals d : e : f if b/a = e/d and c/a = f/d. 0:0 equals nothing.
        shares = ([("/", term, side[1][0]) for term in side[1][1:]] for side in (one, other))
        return _all_agree(*shares, budget)
    if kinds == {"size"}:  # 3 x 4 is not 2 x 6; three factors are in any order
        return sorted(one[1]) == sorted(other[1]) if len(one[1]) > 2 else False
    if kinds & {"set", "union", "seq", "chain"}:
        return False
    # All else is a number or an expression.
    return _scalars_agree(one, other, budget)


def _all_agree(ours: Iterable[Node], others: Iterable[Node], budget: Budget) -> bool:
    """Returns whether there are as many trees on both sides, and each agrees with its opposite."""
    return len(ours) == len(others) and all(
        trees_agree(one, other, budget) for one, other in zip(ours, others)
    )


def _values_at_points(
    trees: list[Node], names: frozenset[str], budget: Budget, log_base: int | None = None
) -> Iterator[list[Value]]:
    """Yields the trees' values at each random point where all of them have one.

    The points have a coordinate for each name; without names there is one point only.
    """
    for point in random_points(names):
        values = [Evaluator(point, budget, log_base).value_or_none(tree) for tree in trees]
        if None not in values:
            yield values


def _scalars_agree(one: Node, other: Node, budget: Budget) -> bool:
    """Returns whether two values are equal wherever both have one: at three points at least.

    log has base e or 10, whichever fits.
    """
    names = variables(one) | variables(other)
    for log_base in (None, 10) if "'log'" in str((one, other)) else (None,):
        seen = 0
        for values in _values_at_points([one, other], names, budget, log_base):
            if not values_agree(*values):
                break
            seen += 1
        else:
            if seen >= (3 if names else 1):
                return True
    return False


def plain_number(node: Node | None) -> int | Fraction | None:
    """Returns the number that a tree is, perhaps with a minus sign; None if it is none."""
    if node and node[0] == "neg" and node[1][0] == "num":
        return -node[1][1]
    return node[1] if node and node[0] == "num" else None


def is_rounding(node: Node, rounded: Node, decimals: int, budget: Budget) -> bool:
    """Returns whether a decimal is a number cut off or rounded behind its last digit.

    decimals: how many the decimal must have at least.
    """
    digits, number = plain_number(rounded), Evaluator({}, budget).value_or_none(node)
    if digits is None or number is None or isinstance(approximate(number).value, complex):
        return False
    places = next((n for n in range(12) if digits * 10**n % 1 == 0), 12)
    sign = -1 if digits < 0 else 1
    left_out = sign * (approximate(number).value - float(digits)) * 10**places
    return places >= decimals and -0.501 < left_out < 1


def solve_linear(node: Node) -> tuple[str, Node, bool] | None:
    """Returns the variable, the root, and whether the tree rises; None unless it is linear."""
    names = sorted(variables(node))
    points = (0, 1, Fraction(-5, 7), Fraction(37, 3), -1009)
    if len(names) != 1:
        return None
    values = [Evaluator({names[0]: x}, Budget(2**14)).value_or_none(node) for x in points]
    if any(value is None or isinstance(value, Approx) for value in values):
        return None
    slope = values[1] - values[0]
    if not slope or any(value != values[0] + slope * x for x, value in zip(points, values)):
        return None
    return names[0], ("num", Fraction(-values[0]) / slope), slope > 0


def relations_agree(one: Node, other: Node, budget: Budget) -> bool:
    """Returns whether two chains of relations agree link by link, forwards or backwards.

    The links of a < b <= c are a < b and b <= c.
    """
    links, other_links = _links(one), _links(other)
    return len(links) == len(other_links) and any(
        all(_links_agree(x, y, budget) for x, y in zip(links, order))
        for order in (other_links, other_links[::-1])
    )


def _links(chain: Node) -> list[tuple[Node, str]]:
    """Returns each link of a chain as a difference and its relation to 0: a > b is (b - a, "<")."""
    _, terms, signs = chain
    links = []
    for left, right, sign in zip(terms, terms[1:], signs):
        if sign in (">", ">="):
            left, right, sign = right, left, MIRRORED[sign]
        links.append((("-", left, right), sign))
    return links


def _links_agree(one: tuple[Node, str], other: tuple[Node, str], budget: Budget) -> bool:
    """Returns whether two relations to 0 say the same: their left sides are in a constant ratio.

    2x + 2y = 4 and x + y - 2 = 0 have the ratio 2 wherever it is computed. For inequalities it must
    be positive, since -x < 0 is not x < 0.
    """
    (difference, sign), (other_difference, other_sign) = one, other
    names = variables(difference) | variables(other_difference)
    if sign != other_sign or not names:
        return False
    # The ratio at all points where it has a value: at least three, not zero, all the same.
    quotient = ("/", difference, other_difference)
    ratios = [values[0] for values in _values_at_points([quotient], names, budget)]
    if len(ratios) < 3 or values_agree(ratios[0], 0):
        return False
    # An exact ratio may be beyond a float's range, so it is not made one.
    first = ratios[0].value.real if isinstance(ratios[0], Approx) else ratios[0]
    if sign in ("<", "<=") and first <= 0:
        return False
    return all(values_agree(ratio, ratios[0]) for ratio in ratios)


def agree_in_any_order(ones: Iterable, others: Iterable, agree: Callable) -> bool:
    """Returns whether each item agrees with another one of the other side, and none is left."""
    if len(ones) != len(others):
        return False
    left = list(others)
    for one in ones:
        partner = next((place for place, other in enumerate(left) if agree(one, other)), None)
        if partner is None:
            return False
        del left[partner]
    return True


def _matrices_agree(one: Node, other: Node, budget: Budget) -> bool:
    """Returns whether the entries agree. A single row or column also equals a tuple."""
    if one[0] == other[0]:
        is_shape = len(one[1]) == len(other[1])
        return is_shape and _all_agree(sum(one[1], ()), sum(other[1], ()), budget)
    matrix, other = (one, other) if one[0] == "matrix" else (other, one)
    rows = matrix[1]
    is_vector = other[0] == "seq" and 1 in (len(rows), len(rows[0]))
    return is_vector and _all_agree(sum(rows, ()), other[2], budget)


def children(node: Node) -> list[Node]:
    """Returns the trees right below; items of a list, or rows of a matrix, are a tuple of trees."""
    return [child for child in node if isinstance(child, tuple) and child]


def variables(node: Node) -> frozenset[str]:
    """Returns the names of the variables in a tree."""
    if node[0] == "var":
        return frozenset((node[1],))
    return frozenset().union(*map(variables, children(node)))


def has_kind(node: Node, *kinds: str) -> bool:
    """Returns whether the tree has a node of one of these kinds."""
    return node[0] in kinds or any(has_kind(child, *kinds) for child in children(node))
