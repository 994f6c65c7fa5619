r"""From a tree of formulas.py to its value: an exact fraction, or a decimal of 40 digits.

Standard library only. What is rational is computed exactly. Roots, pi, sines and the like have 40
digits, of which the last 10 are not believed: two values that differ only there are equal, and a
sum that leaves nothing else is 0. A sum that would lose a term has no value, e^{100} + 1. Numbers
are real: i is a letter like any other. Numbers and the work done are capped, so calls are short.

>>> half, x = ("/", ("num", 1), ("num", 2)), ("var", "x")
>>> value_of(("+", half, x), Budget(), {"x": Fraction(3, 4)})
Fraction(5, 4)
>>> root = ("call", "sqrt", ("num", 2))
>>> values_agree(value_of(("*", root, root), Budget()), 2)
True
"""

import decimal
import math
import operator
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from answers.formulas import Node

MAX_BITS = 2**15  # of an exact number: 2019^{2020} has 22,178
MAX_WORK = 2**19  # of one comparison, see Budget
MAX_ANGLE = 10**6  # in radians: whole turns that are taken off a larger angle cost it digits
NOISE = Decimal("1e-30")  # a relative difference that says nothing
LOST = Decimal("1e-20")  # a term that is smaller by this would be lost in a sum

_TRAPS = [decimal.InvalidOperation, decimal.DivisionByZero, decimal.Overflow, decimal.Underflow]
_DIGITS = decimal.Context(prec=40, Emin=-20_000, Emax=20_000, traps=_TRAPS)
_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")
_CONSTANTS = {"pi": _PI, "e": _DIGITS.exp(Decimal(1))}

Value = int | Fraction | Decimal


class NoValue(Exception):
    """The tree has no value there: out of its domain, of unknown kind, or too large."""


# --- Arithmetic: exact as long as it can be -------------------------------------------------------


def as_decimal(value: Value) -> Decimal:
    """Returns a value with 40 digits."""
    if isinstance(value, Decimal):
        return value
    with decimal.localcontext(_DIGITS):
        return Decimal(value.numerator) / value.denominator


def _alike(a: Value, b: Value) -> tuple[Value, Value]:
    """Returns two numbers as they are if both are exact, else as decimals."""
    if isinstance(a, Decimal) or isinstance(b, Decimal):
        return as_decimal(a), as_decimal(b)
    return a, b


def values_agree(one: Value, other: Value) -> bool:
    """Returns whether exact values are equal, or others but for their last digits."""
    one, other = _alike(one, other)
    if one == other or not isinstance(one, Decimal):
        return one == other
    with decimal.localcontext(_DIGITS):
        return abs(one - other) <= NOISE * max(abs(one), abs(other))


def _sum(a: Value, b: Value) -> Value:
    """Returns a + b, 0 if only noise is left. Raises NoValue if one would vanish in the other."""
    a, b = _alike(a, b)
    if isinstance(a, Decimal):
        smaller, larger = sorted((abs(a), abs(b)))
        if 0 < smaller < LOST * larger:
            raise NoValue
        if abs(a + b) <= NOISE * larger:
            return 0
    return a + b


def _quotient(a: Value, b: Value) -> Value:
    a, b = _alike(a, b)
    return a / b if isinstance(a, Decimal) else Fraction(a) / b


def _power(base: Value, exponent: Value) -> Value:
    """Returns a power: exact for whole exponents, and for rational ones where the root is."""
    if isinstance(exponent, Decimal):
        if base <= 0:
            raise NoValue
        return (as_decimal(base).ln() * exponent).exp()
    if exponent.denominator > 1:  # x^(2/3) is the square of the cube root
        return _power(_root(base, exponent.denominator), exponent.numerator)
    exponent = int(exponent)
    if base == 0 and exponent <= 0:
        raise NoValue
    if isinstance(base, Decimal):
        return base**exponent
    # Exact powers of 0 and 1 stay small; others are refused when too large.
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(exponent) * bits > MAX_BITS:
        if base not in (-1, 0, 1):
            raise NoValue
        exponent %= 2
    return Fraction(base) ** exponent


def _root(base: Value, degree: Value = 2) -> Value:
    r"""Returns the real root, exact where it is rational: \sqrt[3]{-8} is -2."""
    if degree not in range(1, 1000) or base < 0 and degree % 2 == 0:
        raise NoValue
    if base < 0:
        return -_root(-base, degree)
    x = as_decimal(base)
    root = x.sqrt() if degree == 2 or x == 0 else (x.ln() / int(degree)).exp()
    if isinstance(base, Decimal):
        return root
    nearest = Fraction(root).limit_denominator(10**9)
    return nearest if nearest**degree == base else root


# --- Functions ------------------------------------------------------------------------------------


def _sine(x: Decimal) -> Decimal:
    """Returns the sine by its Taylor series, of the angle without whole turns."""
    if abs(x) > MAX_ANGLE:
        raise NoValue
    x = x.remainder_near(2 * _PI)
    term = total = x
    place = 1
    while abs(term) > Decimal("1e-42"):
        place += 2
        term *= -x * x / (place * (place - 1))
        total += term
    return total if abs(total) > NOISE else Decimal(0)


def _cosine(x: Decimal) -> Decimal:
    return _sine(x + _PI / 2)


def _arctangent(x: Decimal) -> Decimal:
    """Returns the arctangent: a float and what it lacks, whose tangent is (x - t) / (1 + x t)."""
    angle = Decimal(math.atan(x))
    sine, cosine = _sine(angle), _cosine(angle)
    return angle + (x * cosine - sine) / (cosine + x * sine)


def _arcsine(x: Decimal) -> Decimal:
    return 2 * _arctangent(x / (1 + (1 - x * x).sqrt()))


def _logarithm(x: Decimal) -> Decimal:
    if x <= 0 or 0 < abs(x - 1) <= NOISE:
        raise NoValue
    return x.ln()


def _floor(x: Value) -> int:
    """Returns the floor. A decimal that may lie on either side of a whole number has none."""
    if isinstance(x, Decimal) and values_agree(x, x.to_integral_value()):
        raise NoValue
    return math.floor(x)


def _factorial(n: Value) -> int:
    if isinstance(n, Decimal) or n.denominator > 1 or not 0 <= n <= 2500:
        raise NoValue
    return math.factorial(int(n))


def _binomial(n: Value, k: Value) -> int:
    if isinstance(n, Decimal) or isinstance(k, Decimal) or n % 1 or k % 1 or min(n, k) < 0:
        raise NoValue
    if min(k, abs(n - k)) * n.numerator.bit_length() > MAX_BITS:
        raise NoValue
    return math.comb(int(n), int(k))


_SMOOTH: dict[str, Callable[[Decimal], Value]] = {
    "exp": Decimal.exp,
    "ln": _logarithm,
    "sin": _sine,
    "cos": _cosine,
    "tan": lambda x: _sine(x) / _cosine(x),
    "cot": lambda x: _cosine(x) / _sine(x),
    "sec": lambda x: 1 / _cosine(x),
    "csc": lambda x: 1 / _sine(x),
    "arcsin": _arcsine,
    "arccos": lambda x: _sum(_PI / 2, -_arcsine(x)),
    "arctan": _arctangent,
    "degrees": lambda x: x * _PI / 180,
}
# Every sign and function that has a value.
_VALUES: dict[str, Callable[..., Value]] = {
    "+": _sum,
    "-": lambda a, b: _sum(a, -b),
    "*": lambda a, b: operator.mul(*_alike(a, b)),
    "/": _quotient,
    "^": _power,
    "neg": operator.neg,
    "abs": abs,
    "sqrt": _root,
    "log": lambda x, base: _logarithm(as_decimal(x)) / _logarithm(as_decimal(base)),
    "floor": _floor,
    "ceil": lambda x: -_floor(-x),
    "factorial": _factorial,
    "binom": _binomial,
    **{name: lambda x, f=function: f(as_decimal(x)) for name, function in _SMOOTH.items()},
}


# --- Trees ----------------------------------------------------------------------------------------


@dataclass
class Budget:
    """The work that one comparison may still do, so that no answer keeps a training run waiting.

    A node costs 64 and its bits, a root, a power or a function that is no exact number 3,200.
    """

    left: int = MAX_WORK

    def spend(self, node: Node, value: Value) -> None:
        """Pays for a node. Raises NoValue if its value or the work is too much."""
        is_exact = not isinstance(value, Decimal)
        bits = value.numerator.bit_length() + value.denominator.bit_length() if is_exact else 0
        self.left -= 64 + bits if is_exact or node[0] not in ("call", "^") else 3200
        if bits > 2 * MAX_BITS or self.left < 0:
            raise NoValue


def value_of(node: Node, budget: Budget, point: dict[str, Value] | None = None) -> Value | None:
    """Returns a tree's value at a point, {variable: number}; None if it has none.

    Infinity has none: infinity + 1 would equal infinity, and 1 / infinity nothing.
    """
    try:
        if budget.left < 0:
            return None
        with decimal.localcontext(_DIGITS):
            return _value(node, budget, point or {})
    except (NoValue, ArithmeticError, RecursionError):  # ArithmeticError: overflow, 1/0
        return None


def _value(node: Node, budget: Budget, point: dict[str, Value]) -> Value:
    kind, *parts = node
    if kind == "num":
        return node[1]
    if kind == "var" and node[1] in point:
        return point[node[1]]
    if kind == "const" and node[1] in _CONSTANTS:
        return _CONSTANTS[node[1]]
    if kind == "ratio" and len(node[1]) == 2:
        kind, parts = "/", node[1]
    elif kind == "call":
        kind, *parts = parts
    elif kind in ("set", "seq") and len(node[-1]) == 1 and node[-1][0][0] not in ("set", "var"):
        return _value(node[-1][0], budget, point)  # brackets that group: 2[x + 1]
    if kind not in _VALUES:
        raise NoValue
    value = _VALUES[kind](*[_value(part, budget, point) for part in parts])
    budget.spend(node, value)
    return value


def random_points(names: frozenset[str]) -> Iterator[dict[str, Value]]:
    """Yields 14 points, numbers for the variables, the same in every process; without any, one.

    The first have small whole numbers, for exponents and factorials (in the order of the alphabet,
    as in k of n, or against it: n of m), then come larger fractions, and such as are below 1 (for
    arcsin). Signs differ, of any two of the first four variables at some turn.
    """
    for turn in range(14 if names else 1):
        point = {}
        for rank, name in enumerate(sorted(names, reverse=turn % 2 == 1)):
            random = zlib.crc32(f"{turn} {name}".encode())
            sign = (-1) ** {8: rank // 2, 9: rank, 10: 1, 13: rank}.get(turn, 0)
            if turn < 6:
                point[name] = 2 + 3 * rank + random % (3 + turn // 2)
            elif turn < 11:
                point[name] = sign * Fraction(1 + random % 30_000, 101)
            else:
                point[name] = sign * Fraction(1 + random % 996, 997)
        yield point
