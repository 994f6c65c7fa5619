r"""From a tree of formulas.py to its value: an exact fraction, or a decimal of 60 digits.

Standard library only. What is rational is computed exactly. Roots, pi, sines and the like have 60
digits, of which the last 15 are not believed: two values that differ only there are equal, and a
sum that leaves nothing else is 0. A sum that would lose a term has no value, e^{100} + 1. Numbers
are real: i is a letter like any other. Numbers and the work done are capped, so calls are short.

>>> half, x = ("/", ("num", 1), ("num", 2)), ("var", "x")
>>> Evaluator({"x": Fraction(3, 4)}, Budget())(("+", half, x))
Fraction(5, 4)
>>> root = ("call", "sqrt", ("num", 2))
>>> values_agree(Evaluator({}, Budget())(("*", root, root)), 2)
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
MAX_WORK = 2**19  # of one comparison: 64 for each node it visits, and the bits of exact numbers
MAX_ANGLE = 10**6  # in radians: whole turns that are taken off a larger angle cost it digits
NOISE = Decimal("1e-45")  # a relative difference that says nothing
LOST = Decimal("1e-30")  # a term that is smaller by this would be lost in a sum

_DIGITS = decimal.Context(
    prec=60, traps=[decimal.InvalidOperation, decimal.DivisionByZero, decimal.Overflow]
)
_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620")

Value = int | Fraction | Decimal


class NoValue(Exception):
    """The tree has no value there: out of its domain, of unknown kind, or too large."""


# What an evaluation may raise. ArithmeticError: overflow, 1/0.
NO_VALUE = (NoValue, ArithmeticError, RecursionError)


# --- Arithmetic: exact as long as it can be -------------------------------------------------------


def _exact(*values: Value) -> bool:
    return not any(isinstance(value, Decimal) for value in values)


def as_decimal(value: Value) -> Decimal:
    """Returns a value with 60 digits."""
    if isinstance(value, Decimal):
        return value
    with decimal.localcontext(_DIGITS):
        return Decimal(value.numerator) / value.denominator


def values_agree(one: Value, other: Value) -> bool:
    """Returns whether exact values are equal, or others but for their last digits."""
    if _exact(one, other):
        return one == other
    one, other = as_decimal(one), as_decimal(other)
    with decimal.localcontext(_DIGITS):
        return abs(one - other) <= NOISE * max(abs(one), abs(other))


def middle(a: Value, b: Value) -> Value:
    """Returns a number between two numbers."""
    with decimal.localcontext(_DIGITS):
        return _quotient(_sum(a, b), 2)


def _sum(a: Value, b: Value) -> Value:
    """Returns a + b, 0 if only noise is left. Raises NoValue if one would vanish in the other."""
    if _exact(a, b):
        return a + b
    a, b = as_decimal(a), as_decimal(b)
    smaller, larger = sorted((abs(a), abs(b)))
    if 0 < smaller < LOST * larger:
        raise NoValue
    return a + b if abs(a + b) > NOISE * larger else 0


def _product(a: Value, b: Value) -> Value:
    return a * b if _exact(a, b) else as_decimal(a) * as_decimal(b)


def _quotient(a: Value, b: Value) -> Value:
    return Fraction(a) / b if _exact(a, b) else as_decimal(a) / as_decimal(b)


def _power(base: Value, exponent: Value) -> Value:
    """Returns a power: exact for whole exponents, and for rational ones where the root is."""
    if not _exact(exponent):
        if base <= 0:
            raise NoValue
        return as_decimal(base) ** exponent
    if exponent.denominator > 1:  # x^(2/3) is the square of the cube root
        return _power(_root(base, exponent.denominator), exponent.numerator)
    exponent = int(exponent)
    if base == 0 and exponent <= 0:
        raise NoValue
    if not _exact(base):
        return base**exponent
    # Exact powers of 0 and 1 stay small; others are refused when too large.
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(exponent) * bits > MAX_BITS:
        if base not in (-1, 0, 1):
            raise NoValue
        exponent %= 2
    return Fraction(base) ** exponent


def _root(base: Value, degree: Value) -> Value:
    r"""Returns the real root, exact where it is rational: \sqrt[3]{-8} is -2."""
    if not _exact(degree) or degree.denominator > 1 or not 1 <= degree <= 1000:
        raise NoValue
    if base < 0:
        if degree % 2 == 0:
            raise NoValue
        return -_root(-base, degree)
    if _exact(base):
        top, bottom = (_whole_root(part, int(degree)) for part in base.as_integer_ratio())
        if top is not None and bottom is not None:
            return Fraction(top, bottom)
    return _decimal_root(as_decimal(base), degree)


def _decimal_root(base: Decimal, degree: int) -> Decimal:
    return base.sqrt() if degree == 2 else base ** (1 / Decimal(int(degree)))


def _whole_root(number: int, degree: int) -> int | None:
    """Returns the exact root of a number >= 0, None if there is none (or none that we find)."""
    root = int(_decimal_root(Decimal(number), degree).to_integral_value()) if number else 0
    return root if root**degree == number else None


# --- Functions ------------------------------------------------------------------------------------


def _sine(x: Decimal) -> Decimal:
    """Returns the sine by its Taylor series, of the angle without whole turns."""
    if abs(x) > MAX_ANGLE:
        raise NoValue
    x = x.remainder_near(2 * _PI)
    term = total = x
    place = 1
    while abs(term) > Decimal("1e-62"):
        place += 2
        term *= -x * x / (place * (place - 1))
        total += term
    return total if abs(total) > NOISE else Decimal(0)


def _cosine(x: Decimal) -> Decimal:
    return _sine(x + _PI / 2)


def _logarithm(x: Decimal) -> Decimal:
    if x <= 0:
        raise NoValue
    value = x.ln()
    return value if abs(value) > NOISE else Decimal(0)


def _arctangent(x: Decimal) -> Decimal:
    """Returns the arctangent by its Taylor series, of an angle that was halved four times."""
    for _ in range(4):
        x /= 1 + (1 + x * x).sqrt()
    power = total = x
    place = 1
    while abs(power) > Decimal("1e-62"):
        place += 2
        power *= -x * x
        total += power / place
    return 16 * total


def _arcsine(x: Decimal) -> Decimal:
    return 2 * _arctangent(x / (1 + (1 - x * x).sqrt()))


_FUNCTIONS: dict[str, Callable[[Decimal], Decimal]] = {
    "exp": Decimal.exp,
    "ln": _logarithm,
    "sin": _sine,
    "cos": _cosine,
    "tan": lambda x: _sine(x) / _cosine(x),
    "cot": lambda x: _cosine(x) / _sine(x),
    "sec": lambda x: 1 / _cosine(x),
    "csc": lambda x: 1 / _sine(x),
    "arcsin": _arcsine,
    "arccos": lambda x: as_decimal(_sum(_PI / 2, -_arcsine(x))),
    "arctan": _arctangent,
    "arccot": lambda x: _PI / 2 - _arctangent(x),
    "degrees": lambda x: x * _PI / 180,
}


def _rounded(name: str, x: Value) -> int:
    """Returns floor or ceil; none of what may lie on either side of a whole number."""
    rounding = math.floor if name == "floor" else math.ceil
    if not _exact(x) and values_agree(x, x.to_integral_value()):
        raise NoValue
    return rounding(x)


def _counted(name: str, n: Value, k: Value = 0) -> int:
    """Returns n! or n over k, for whole numbers that are not negative."""
    if not _exact(n, k) or n.denominator > 1 or k.denominator > 1 or n < 0 or k < 0:
        raise NoValue
    n, k = int(n), int(k)
    if name == "factorial" and n <= 2500:
        return math.factorial(n)
    if name == "binom" and min(k, abs(n - k)) * n.bit_length() <= MAX_BITS:
        return math.comb(n, k)
    raise NoValue


# --- Trees ----------------------------------------------------------------------------------------

_CONSTANTS = {"pi": _PI, "e": _DIGITS.exp(Decimal(1))}
_ARITHMETIC = {
    "+": _sum,
    "-": lambda a, b: _sum(a, -b),
    "*": _product,
    "/": _quotient,
    "^": _power,
    "neg": operator.neg,
}


@dataclass
class Budget:
    """The work that one comparison may still do, so that no answer keeps a training run waiting."""

    left: int = MAX_WORK

    def spend(self, node: Node, value: Value) -> None:
        """Pays for a node and its value. Raises NoValue if the value or the work is too much."""
        bits = value.numerator.bit_length() + value.denominator.bit_length() if _exact(value) else 0
        self.left -= bits + (64 if _exact(value) or node[0] not in ("call", "^") else 2048)
        if bits > 2 * MAX_BITS or self.left < 0:
            raise NoValue


@dataclass
class Evaluator:
    """Values of trees at one point: {variable: number}.

    Infinity has no value: infinity + 1 would equal infinity, and 1 / infinity nothing.

    log_base: what log means without a base: 10, or None for e.
    """

    point: dict[str, Value]
    budget: Budget
    log_base: int | None = None

    def __call__(self, node: Node) -> Value:
        """Returns the tree's value. Raises one of NO_VALUE if it has none."""
        with decimal.localcontext(_DIGITS):
            return self.value(node)

    def value_or_none(self, node: Node) -> Value | None:
        """Returns the tree's value, None if it has none."""
        try:
            return self(node)
        except NO_VALUE:
            return None

    def value(self, node: Node) -> Value:
        kind = node[0]
        if kind == "num":
            value = node[1]
        elif kind == "var" and node[1] in self.point:
            value = self.point[node[1]]
        elif kind == "const" and node[1] in _CONSTANTS:
            value = _CONSTANTS[node[1]]
        elif kind in _ARITHMETIC:
            value = _ARITHMETIC[kind](*map(self.value, node[1:]))
        elif kind == "call":
            value = self.call(node[1], *map(self.value, node[2:]))
        elif kind == "ratio" and len(node[1]) == 2:
            value = _quotient(*map(self.value, node[1]))
        elif kind in ("set", "seq") and len(node[-1]) == 1 and node[-1][0][0] not in ("set", "var"):
            value = self.value(node[-1][0])  # brackets that group: 2[x + 1]
        else:
            raise NoValue
        self.budget.spend(node, value)
        return value

    def call(self, name: str, x: Value, *others: Value) -> Value:
        """Returns a function's value. Roots, logarithms and binomials may have two arguments."""
        if name == "sqrt":
            return _root(x, *(others or (2,)))
        if name == "log":
            (base,) = others or (self.log_base,)
            value = _logarithm(as_decimal(x))
            return value if base is None else value / _logarithm(as_decimal(base))
        if name in ("floor", "ceil"):
            return _rounded(name, x)
        if name in ("factorial", "binom"):
            return _counted(name, x, *others)
        if name == "abs":
            return abs(x)
        if others or name not in _FUNCTIONS:  # \sin_2 x
            raise NoValue
        return _FUNCTIONS[name](as_decimal(x))


def random_points(names: frozenset[str]) -> Iterator[dict[str, Value]]:
    """Yields 16 points, numbers for the variables, the same in every process; without any, one.

    Turns 0 to 5 have small whole numbers, for exponents and factorials (in the order of the
    alphabet, as in k of n, or against it: n of m); 6 to 10 have rational ones; the others have some
    below 1 (for arcsin). Signs differ, of any two of the first four variables at some turn.
    """
    for turn in range(16 if names else 1):
        point = {}
        for rank, name in enumerate(sorted(names, reverse=turn % 2 == 1)):
            random = zlib.crc32(f"{turn} {name}".encode())
            against = rank + len(names)  # with the order turned round
            odd = {7: rank // 2, 8: rank, 9: against, 10: 1, 14: rank, 15: against}.get(turn, 0)
            if turn < 6:
                point[name] = 2 + 3 * rank + random % (3 + turn // 2)
            elif turn < 11:
                point[name] = (-1) ** odd * Fraction(1 + random % 30_000, 101)
            else:
                point[name] = (-1) ** odd * Fraction(1 + random % 996, 997)
        yield point
