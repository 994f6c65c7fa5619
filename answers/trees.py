"""Are two trees of formulas.py the same? Standard library only."""
from answers.formulas import (ROUNDS, Evaluator, Node, approximate, children, random_point, value_or_none, values_agree,
                              variables)


def has_kind(node: Node, *kinds: str) -> bool:
    return node[0] in kinds or any(has_kind(child, *kinds) for child in children(node))


def _scalars_agree(a: Node, b: Node, budget: list[int]) -> bool:
    """Equal values wherever both have one, at three points at least."""
    names = variables(a) | variables(b)
    for log_base in (0, 10) if "log" in str(a) + str(b) else (0,):
        seen = 0
        for turn in range(ROUNDS if names else 1):
            evaluator = Evaluator(random_point(names, turn), budget, log_base)
            one, other = value_or_none(evaluator, a), value_or_none(evaluator, b)
            if one is not None and other is not None:
                if not values_agree(one, other):
                    break
                seen += 1
        else:
            if seen >= (3 if names else 1):
                return True
    return False


def relations_agree(a: Node, b: Node, budget: list[int]) -> bool:
    """Two chains of equations or inequalities: link by link, the differences of their sides are in a constant ratio."""
    ours, others = ([(terms[i], terms[i + 1], sign) for i, sign in enumerate(signs)] for _, terms, signs in (a, b))
    return len(ours) == len(others) and any(
        all(_links_agree(x, y, budget) for x, y in zip(ours, order)) for order in (others, others[::-1]))


def _links_agree(a: tuple, b: tuple, budget: list[int]) -> bool:
    differences, signs = [], []
    for left, right, sign in (a, b):
        if sign in (">", ">="):
            left, right, sign = right, left, {">": "<", ">=": "<="}[sign]
        differences.append(("-", left, right))
        signs.append(sign)
    names = variables(differences[0]) | variables(differences[1])
    ratios = []
    for turn in range(ROUNDS):
        evaluator = Evaluator(random_point(names, turn), budget)
        ratio = value_or_none(evaluator, ("/", *differences))
        if ratio is not None:
            ratios.append(ratio)
    return (signs[0] == signs[1] and names != frozenset() and len(ratios) >= 3
            and all(values_agree(ratio, ratios[0]) for ratio in ratios) and not values_agree(ratios[0], 0)
            and (signs[0] in ("=", "!=") or approximate(ratios[0]).value.real > 0))


def in_order_of_value(items: tuple, budget: list[int]) -> list:
    """Nodes or answers in an order that does not depend on their spelling."""
    def key(item) -> tuple:
        node = getattr(item, "value", item)
        if node[0] in ("seq", "set", "union"):
            return 1, *(key(child) for child in node[-1])
        value = value_or_none(Evaluator(random_point(variables(node), 0), budget), node)
        if value is None:
            return 2, str(node)
        number = complex(approximate(value).value)
        return 0, float(f"{number.real:.9g}") + 0.0, float(f"{number.imag:.9g}") + 0.0
    try:
        return sorted(items, key=key)
    except (TypeError, ArithmeticError):  # kinds that cannot be ordered
        return list(items)


def nodes_agree(a: Node, b: Node, budget: list[int]) -> bool:
    """Two trees, by kind."""
    if a == b:
        return True
    a, b = (node[1][0] if node[0] == "set" and len(node[1]) == 1 else node for node in (a, b))  # {5} is 5
    kinds = {a[0], b[0]}
    if kinds <= {"set", "union"} and len(kinds) == 1:
        return len(a[1]) == len(b[1]) and all(
            nodes_agree(x, y, budget) for x, y in zip(in_order_of_value(a[1], budget), in_order_of_value(b[1], budget)))
    if "matrix" in kinds:
        return _matrices_agree(a, b, budget)
    if kinds == {"seq"}:
        return (a[1] == b[1] or len(a[2]) > 2) and len(a[2]) == len(b[2]) and all(
            nodes_agree(x, y, budget) for x, y in zip(a[2], b[2]))
    if kinds == {"chain"}:
        return relations_agree(a, b, budget)
    if kinds == {"ratio"} and len(a[1]) == len(b[1]):
        return all(_scalars_agree(("*", a[1][0], y), ("*", b[1][0], x), budget) for x, y in zip(a[1][1:], b[1][1:]))
    if kinds & {"set", "union", "seq", "chain"}:
        return False
    return _scalars_agree(a, b, budget)


def _matrices_agree(a: Node, b: Node, budget: list[int]) -> bool:
    """Entry by entry. A single row or column also equals the tuple of its entries."""
    if a[0] == b[0]:
        return len(a[1]) == len(b[1]) and all(
            len(r) == len(s) and all(nodes_agree(x, y, budget) for x, y in zip(r, s)) for r, s in zip(a[1], b[1]))
    matrix, other = (a, b) if a[0] == "matrix" else (b, a)
    entries = [entry for row in matrix[1] for entry in row]
    return (min(len(matrix[1]), len(matrix[1][0])) == 1 and other[0] == "seq" and len(other[2]) == len(entries)
            and all(nodes_agree(x, y, budget) for x, y in zip(entries, other[2])))
