r"""Are two trees of formulas.py the same? Standard library only.

Each kind is compared with its own kind: numbers and expressions by their values, equations side by
side, sets in any order, tuples and matrices entry by entry, inequalities and unions of intervals by
the numbers that they allow.

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
from itertools import product

from answers.formulas import INFINITY, MINUS_INFINITY, Node
from answers.values import Budget, Evaluator, Value, middle, random_points, values_agree

MIRRORED = {">": "<", ">=": "<="}


def trees_agree(one: Node, other: Node, budget: Budget) -> bool:
    """Returns whether two trees mean the same. What exceeds the budget agrees with nothing."""
    one, other = _without_braces(one), _without_braces(other)
    kinds = {one[0], other[0]}
    if one == other or kinds == {"num"}:
        return one == other
    if kinds & {"union", "both"} or kinds == {"chain", "seq"}:
        return regions_agree(one, other, budget)
    if kinds == {"chain"}:
        return regions_agree(one, other, budget) or _relations_agree(one, other, budget)
    if kinds == {"set"}:
        return agree_in_any_order(one[1], other[1], lambda x, y: trees_agree(x, y, budget))
    if kinds == {"seq"}:
        if _is_matrix(one) != _is_matrix(other):  # a single row or column is a tuple as well
            one, other = _as_tuple(one), _as_tuple(other)
        # Brackets tell the interval [1, 2] from (1, 2). Three numbers are no interval.
        same_kind = one[1] == other[1] or len(one[2]) > 2 or "" in (one[1], other[1])
        return same_kind and _all_agree(one[2], other[2], budget)
    if kinds == {"ratio"}:
        # a : b : c equals d : e : f if b/a = e/d and c/a = f/d. 0:0 equals nothing.
        shares = ([("/", term, side[1][0]) for term in side[1][1:]] for side in (one, other))
        return _all_agree(*shares, budget)
    ours, others = factors(one), factors(other)
    if len(ours) > 1 and len(others) > 1:  # 3 x 4 is not 2 x 6; three factors are in any order
        return sorted(ours) == sorted(others) and len(ours) > 2
    # All else is a number or an expression.
    return _scalars_agree(one, other, budget)


def _without_braces(node: Node) -> Node:
    """Returns 5 for {5}, but a set in a set as it is."""
    is_single = node[0] == "set" and len(node[1]) == 1 and node[1][0][0] != "set"
    return node[1][0] if is_single else node


def _is_matrix(node: Node) -> bool:
    return node[1] == "[]" and all(row[:2] == ("seq", "[]") for row in node[2])


def _as_tuple(node: Node) -> Node:
    """Returns a row or column as a tuple with any bracket."""
    rows = [row[2] for row in node[2]] if _is_matrix(node) else []
    if len(rows) == 1 or rows and {len(row) for row in rows} == {1}:
        return "seq", "", sum(rows, ())
    return node


def _all_agree(ours: Iterable[Node], others: Iterable[Node], budget: Budget) -> bool:
    """Returns whether there are as many trees on both sides, and each agrees with its opposite."""
    return len(ours) == len(others) and all(
        trees_agree(one, other, budget) for one, other in zip(ours, others)
    )


def agree_in_any_order(ones: Iterable, others: Iterable, agree: Callable) -> bool:
    """Returns whether each item agrees with another one of the other side, and none is left."""
    left = list(others)
    for one in ones:
        partner = next((place for place, other in enumerate(left) if agree(one, other)), None)
        if partner is None:
            return False
        del left[partner]
    return not left


# --- Numbers and expressions: by their values -----------------------------------------------------


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


# --- Relations in one variable: by the numbers that they allow ------------------------------------

Link = tuple[Node, str]  # a difference and its relation to 0: a > b is (b - a, "<")
_HOLDS = {
    "<": lambda value: value < 0,
    "<=": lambda value: value <= 0,
    "!=": lambda value: value != 0,
}


def regions_agree(one: Node, other: Node, budget: Budget) -> bool:
    r"""Returns whether two inequalities, intervals or unions of them allow the same numbers.

    x < 3          (-\infty, 3)        |x| > 2      (-\infty, -2) \cup (2, \infty)
    6 - 2x > 0     (-\infty, 3)        1 < x <= 5   (1, 5]
    x != 2         (-\infty, 2) \cup (2, \infty)

    They change at the roots of their links only, so it is enough to ask at each root, between them
    and beyond them.
    """
    names = variables(one) | variables(other) or {"x"}
    if len(names) > 1:
        return False
    (name,) = names
    sides = [_alternatives(node, name) for node in (one, other)]
    links = [link for side in sides for alternative in side or () for link in alternative]
    found = [_roots(difference, name, budget) for difference, _ in links]
    if None in sides or None in found:
        return False
    roots = sorted(root for roots in found for root in roots)
    if not roots:
        return bool(sides[0]) and bool(sides[1])
    between = [middle(*neighbours) for neighbours in zip(roots, roots[1:])]
    for number in [*roots, *between, roots[0] - 1, roots[-1] + 1]:
        evaluate = Evaluator({name: number}, budget).value_or_none
        said = []
        for side in sides:
            values = [[(evaluate(tree), sign) for tree, sign in links] for links in side]
            if any(value is None for alternative in values for value, _ in alternative):
                return False
            said.append(any(all(_HOLDS[sign](v) for v, sign in links) for links in values))
        if said[0] != said[1]:
            return False
    return True


def _alternatives(node: Node, name: str) -> list[list[Link]] | None:
    """Returns lists of links, of which all of one list must hold; None for other trees."""
    kind = node[0]
    if kind in ("union", "both"):
        parts = [_alternatives(part, name) for part in node[1]]
        if None in parts or kind == "both" and any(len(part) != 1 for part in parts):
            return None
        return sum(parts, []) if kind == "union" else [sum((part[0] for part in parts), [])]
    if kind == "seq" and len(node[2]) == 2:
        (opening, closing), (low, high) = node[1:]
        signs = ("<=" if opening == "[" else "<", "<=" if closing == "]" else "<")
        return _alternatives(("chain", (low, ("var", name), high), signs), name)
    if kind != "chain" or not variables(node):
        return None
    _, terms, signs = node
    if len(terms) == 3 and signs[0][0] in "<":  # infinite ends say nothing
        first, last = terms[0] == MINUS_INFINITY, 3 - (terms[2] == INFINITY)
        terms, signs = terms[first:last], signs[first : last - 1]
    links = _links(("chain", terms, signs))
    return [links] if all(sign in _HOLDS for _, sign in links) else None


def _roots(node: Node, name: str, budget: Budget) -> list[Value] | None:
    """Returns where a tree that is linear between the bars of |x| is 0; None for another tree."""
    pieces = _without_bars(node)
    if len(pieces) > 4:
        return None
    roots = [_linear_root(piece, name, budget) for piece in pieces]
    return None if None in roots else roots


def _without_bars(node: Node) -> list[Node]:
    """Returns the trees with u or -u for each |u|."""
    if node[:2] == ("call", "abs"):
        return [piece for u in _without_bars(node[2]) for piece in (u, ("neg", u))]
    parts = [_without_bars(part) if isinstance(part, tuple) else [part] for part in node]
    return list(product(*parts))


def _linear_root(node: Node, name: str, budget: Budget) -> Value | None:
    """Returns the root of a tree that is linear and not constant, None for another one."""
    places = (0, 1, Fraction(-5, 7), Fraction(37, 3), -1009)
    values = [Evaluator({name: x}, budget).value_or_none(node) for x in places]
    if None in values:
        return None
    line = Evaluator({"a": values[0], "b": values[1]}, budget)
    a, slope = ("var", "a"), ("-", ("var", "b"), ("var", "a"))
    for x, value in zip(places, values):
        there = line.value_or_none(("+", a, ("*", slope, ("num", x))))
        if there is None or not values_agree(there, value):
            return None
    return line.value_or_none(("/", ("neg", a), slope))


# --- Relations in several variables: link by link -------------------------------------------------


def _links(chain: Node) -> list[Link]:
    """Returns each link of a chain as a difference and its relation to 0: a > b is (b - a, "<")."""
    _, terms, signs = chain
    links = []
    for left, right, sign in zip(terms, terms[1:], signs):
        if sign in MIRRORED:
            left, right, sign = right, left, MIRRORED[sign]
        links.append((("-", left, right), sign))
    return links


def _relations_agree(one: Node, other: Node, budget: Budget) -> bool:
    """Returns whether two chains of relations agree link by link, forwards or backwards.

    The links of a < b <= c are a < b and b <= c.
    """
    links, other_links = _links(one), _links(other)
    return len(links) == len(other_links) and any(
        all(_links_agree(x, y, budget) for x, y in zip(links, order))
        for order in (other_links, other_links[::-1])
    )


def _links_agree(one: Link, other: Link, budget: Budget) -> bool:
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
    if len(ratios) < 3 or ratios[0] == 0 or sign in ("<", "<=") and ratios[0] < 0:
        return False
    return all(values_agree(ratio, ratios[0]) for ratio in ratios)


# --- What is in a tree ----------------------------------------------------------------------------


def variables(node: Node) -> frozenset[str]:
    """Returns the names of the variables in a tree."""
    if node[0] == "var":
        return frozenset((node[1],))
    below = [child for child in node if isinstance(child, tuple) and child]
    return frozenset().union(*map(variables, below))


def factors(node: Node) -> list[int]:
    """Returns the whole numbers that are multiplied, as in 3 x 4; none for another tree."""
    if node[0] == "num" and isinstance(node[1], int):
        return [node[1]]
    sides = [factors(side) for side in node[1:]] if node[0] == "*" else []
    return sum(sides, []) if all(sides) else []


def plain_number(node: Node | None) -> int | Fraction | None:
    """Returns the number that a tree is, perhaps with a minus sign; None if it is none."""
    if node and node[0] == "neg" and node[1][0] == "num":
        return -node[1][1]
    return node[1] if node and node[0] == "num" else None
