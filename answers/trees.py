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
from decimal import Decimal
from fractions import Fraction

from answers.formulas import INFINITY, MINUS_INFINITY, Node
from answers.values import Budget, Value, as_decimal, random_points, value_of, values_agree


def trees_agree(one: Node, other: Node, budget: Budget) -> bool:
    """Returns whether two trees mean the same. What exceeds the budget agrees with nothing."""
    one, other = _without_braces(one), _without_braces(other)
    kinds = {one[0], other[0]}
    if one == other or kinds == {"num"}:
        return one == other
    if kinds & {"union", "both"} or kinds == {"chain", "seq"}:
        return _regions_agree(one, other, budget)
    if kinds == {"chain"}:
        return _regions_agree(one, other, budget) or _relations_agree(one, other, budget)
    if kinds == {"set"}:
        return agree_in_any_order(one[1], other[1], lambda x, y: trees_agree(x, y, budget))
    if kinds == {"seq"}:
        # Brackets tell the interval [1, 2] from (1, 2). Three numbers are none, nor is a column.
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
    trees: list[Node], names: frozenset[str], budget: Budget
) -> Iterator[list[Value]]:
    """Yields the trees' values at each random point where all of them have one.

    The points have a coordinate for each name; without names there is one point only.
    """
    for point in random_points(names):
        values = [value_of(tree, budget, point) for tree in trees]
        if None not in values:
            yield values


def _scalars_agree(one: Node, other: Node, budget: Budget) -> bool:
    """Returns whether two values are equal wherever both have one: at three points at least."""
    names = variables(one) | variables(other)
    agreed = 0
    for pair in _values_at_points([one, other], names, budget):
        if not values_agree(*pair):
            return False
        agreed += 1
    return agreed >= (3 if names else 1)


# --- Relations: by the numbers that they allow, or else link by link ------------------------------

_FAR = Decimal("1e99")  # infinity: farther than any number that is asked


def _regions_agree(one: Node, other: Node, budget: Budget) -> bool:
    r"""Returns whether two inequalities, intervals or unions of them allow the same numbers.

    x < 3          (-\infty, 3)                    1 < x <= 5   (1, 5]
    x != 2         (-\infty, 2) \cup (2, \infty)    |x| > 2      (-\infty, -2) \cup (2, \infty)

    What is allowed changes at their bounds only, so it is enough to ask at each bound, between two
    of them, and beyond them.
    """
    names = variables(one) | variables(other) or {"x"}
    if len(names) > 1:
        return False
    (name,) = names
    ends = [_end(term, name, 0, budget) for term in _terms(one) + _terms(other)]
    if None in ends:
        return False
    bounds = {bound for end in ends if abs(end) != _FAR for bound in (end, -end)}
    bounds = sorted(bounds | {Decimal(0)})
    between = [(low + high) / 2 for low, high in zip(bounds, bounds[1:])]
    numbers = (*bounds, *between, bounds[0] - 1, bounds[-1] + 1)
    allowed = [[_allows(side, name, x, budget) for x in numbers] for side in (one, other)]
    return allowed[0] == allowed[1] and any(allowed[0])


def _terms(node: Node) -> tuple[Node, ...]:
    """Returns all terms of inequalities and intervals; of another tree one without a value."""
    kind, *_, parts = node
    if kind in ("union", "both"):
        return sum(map(_terms, parts), ())
    if kind == "chain" and variables(node) and not set(parts) & {"=", "approx", "in"}:
        says_nothing = len(node[1]) == 2 and {INFINITY, MINUS_INFINITY} & {*node[1]}  # x < \infty
        return (("none",),) if says_nothing else node[1]
    return parts if kind == "seq" and len(parts) == 2 == len(node[1]) else (("none",),)


def _end(term: Node, name: str, x: Value, budget: Budget) -> Decimal | None:
    """Returns the value of a number, of infinity, x or |x|; None for other terms."""
    ends = {INFINITY: _FAR, MINUS_INFINITY: -_FAR, ("var", name): x}
    ends["call", "abs", ("var", name)] = abs(x)
    value = ends[term] if term in ends else value_of(term, budget)
    return None if value is None else as_decimal(value)


def _allows(node: Node, name: str, x: Value, budget: Budget) -> bool:
    kind, *_, parts = node
    if kind == "union":
        return any(_allows(part, name, x, budget) for part in parts)
    if kind == "both":
        return all(_allows(part, name, x, budget) for part in parts)
    if kind == "seq":
        terms = parts[0], ("var", name), parts[1]
        signs = ["<=" if bracket in "[]" else "<" for bracket in node[1]]
    else:
        _, terms, signs = node
    ends = [_end(term, name, x, budget) for term in terms]
    return all(_holds(*link) for link in zip(ends, signs, ends[1:]))


def _holds(a: Decimal, sign: str, b: Decimal) -> bool:
    if values_agree(a, b):
        return sign in ("<=", ">=")
    return sign == "!=" or (a < b) == ("<" in sign)


def _relations_agree(one: Node, other: Node, budget: Budget) -> bool:
    """Returns whether two chains say the same link by link: differences in a constant ratio.

    2x + 2y = 4 and x + y - 2 = 0 have the ratio 2 wherever it is computed. For inequalities it must
    be positive, since -x < 0 is not x < 0.
    """
    if one[2] != other[2]:
        return False
    names = variables(one) | variables(other)
    for place, sign in enumerate(one[2]):
        difference, other_difference = (
            ("-", *chain[1][place : place + 2]) for chain in (one, other)
        )
        # The ratio at all points where it has a value: at least three, not zero, all the same.
        quotient = ("/", difference, other_difference)
        ratios = [values[0] for values in _values_at_points([quotient], names, budget)]
        if len(ratios) < 3 or ratios[0] == 0 or "<" in sign and ratios[0] < 0:
            return False
        if not all(values_agree(ratio, ratios[0]) for ratio in ratios):
            return False
    return True


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
