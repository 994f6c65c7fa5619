r"""From a tree of formulas.py to its value: exact as long as it can be, else a float with a bound.

Standard library only. A float carries a bound on its error, which every operation lets grow; so
"equal" can be told from "close". Numbers and the work done are capped, so every call is short.

>>> half, x = ("/", ("num", 1), ("num", 2)), ("var", "x")
>>> Evaluator({"x": Fraction(3, 4)}, Budget())(("+", half, x))
Fraction(5, 4)
>>> root = ("call", "sqrt", ("num", 2))
>>> values_agree(Evaluator({}, Budget())(("*", root, root)), 2)
True
"""

import cmath
import math
import operator
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

from answers.formulas import Node

MAX_BITS = 2**15  # of an exact number: 2019^{2020} has 22,178
MAX_WORK = 2**19  # of one comparison: 64 for each node it visits, and the bits of exact numbers
EPSILON = 2.3e-16  # a float's relative rounding error
MAX_ERROR = 1e-3  # of a float: in a larger one another term could hide, as the 1 of e^{100} + 1


class NoValue(Exception):
    """The tree has no value there: out of its domain, of unknown kind, or too large."""


# What an evaluation may raise. ArithmeticError: overflow, 1/0; ValueError: a domain's border.
NO_VALUE = (NoValue, ArithmeticError, ValueError, RecursionError)


# --- Exact numbers, and floats with a bound on their error ----------------------------------------


@dataclass(frozen=True)
class Approx:
    """A float or complex number that is within `error` of the true value."""

    value: float | complex
    error: float


Value = int | Fraction | Approx


def _exact(*values: Value) -> bool:
    return not any(isinstance(value, Approx) for value in values)


def approximate(value: Value) -> Approx:
    """Returns a value as a float with its error. Raises OverflowError beyond a float's range."""
    if isinstance(value, Approx):
        return value
    number = float(value)
    return Approx(number, abs(number) * EPSILON)


def _real(value: Value) -> Approx:
    """Returns a real value as a float. Raises NoValue for a complex one."""
    number = approximate(value)
    if isinstance(number.value, complex):
        raise NoValue
    return number


def values_agree(one: Value, other: Value) -> bool:
    """Returns whether exact values are equal, or others are within (8 times) their errors."""
    if _exact(one, other):
        return one == other
    try:
        a, b = approximate(one), approximate(other)
        return abs(a.value - b.value) <= 8 * (a.error + b.error)
    except OverflowError:  # an exact number beyond a float's range
        return False


def _apply(function: Callable, *arguments: Value) -> Value:
    """Returns a function's value: what exact numbers give is exact, else see `_bounded`."""
    return function(*arguments) if _exact(*arguments) else _bounded(function, *arguments)


_STEP = 64  # in errors: a step that is not lost between two neighbouring floats


def _bounded(function: Callable, *arguments: Value) -> Approx:
    """Returns a function's value as a float, with a bound on its error.

    The bound is how far the value moves when each argument moves by its own error (a step of 64
    errors, divided by 64), and the rounding of the value itself. Raises NoValue where too little is
    left but rounding errors, tan(pi/2).
    """
    numbers = [approximate(argument) for argument in arguments]
    points = [number.value for number in numbers]
    value = function(*points)
    error = 2 * EPSILON * abs(value)
    for place, number in enumerate(numbers):
        moved = points.copy()
        moved[place] += _STEP * number.error
        try:
            there = function(*moved)
        except ValueError:  # the border of the domain: arcsin(1)
            moved[place] -= 2 * _STEP * number.error
            there = function(*moved)
        error += abs(there - value) / _STEP
    if not error <= MAX_ERROR or 1e-6 < error > 1e-6 * abs(value):  # NaN is not <= anything
        raise NoValue
    return Approx(value, error)


def _quotient(a: Value, b: Value) -> Value:
    """Returns a / b. Raises NoValue, or ZeroDivisionError, where b may be zero."""
    if _exact(a, b):
        return Fraction(a) / b
    divisor = approximate(b)
    if abs(divisor.value) <= _STEP * divisor.error:
        raise NoValue
    return _bounded(operator.truediv, a, b)


def _power(base: Value, exponent: Value, real: bool) -> Value:
    """Returns a power: exact for whole exponents, and for rational ones where the root is."""
    # 1. Real or complex exponents. Real ones need a base that is surely positive.
    if not _exact(exponent):
        if not isinstance(exponent.value, complex) and _real(base).value <= _real(base).error:
            raise NoValue
        return _bounded(operator.pow, base, exponent)
    # 2. x^(2/3) is the square of the cube root.
    if exponent.denominator > 1:
        return _power(_root(base, exponent.denominator, real), exponent.numerator, real)
    # 3. Whole exponents.
    exponent = int(exponent)
    if exponent == 0 and approximate(base).value == 0:
        raise NoValue
    if exponent < 0:
        return _quotient(1, _power(base, -exponent, real))
    if not _exact(base):
        return _bounded(lambda number: number**exponent, base)
    # 4. ... of exact numbers. Powers of 0 and 1 stay small; others are refused when too large.
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if exponent * bits > MAX_BITS:
        if base not in (-1, 0, 1):
            raise NoValue
        exponent = 2 - exponent % 2
    return base**exponent


def _root(base: Value, degree: Value, real: bool) -> Value:
    r"""Returns the degree-th root, exact where it is rational: \sqrt[3]{-8} is -2.

    Of a negative number it is the real root, or else the principal one (NoValue if `real`).
    """
    if not _exact(degree) or degree.denominator > 1 or not 1 <= degree <= 1000:
        raise NoValue
    # 1. Exactly: the roots of numerator and denominator.
    if _exact(base):
        if base < 0 and degree % 2:
            return _apply(operator.neg, _root(-base, degree, real))
        top, bottom = (_integer_root(abs(part), degree) for part in base.as_integer_ratio())
        if base >= 0 and top is not None and bottom is not None:
            return Fraction(top, bottom) if bottom > 1 else top
        # A float cannot tell \sqrt{10^{16} + 1} from 10^8, nor sqrt(p / q) = sqrt(p q) / q.
        whole = abs(base.numerator) * base.denominator ** (degree - 1) if degree < 5 else 0
        near = math.isqrt(whole) if degree == 2 else round(whole ** (1 / degree))
        if any(abs(whole - root**degree) * 2**46 < whole for root in (near, near + 1)):
            raise NoValue
    # 2. As a float.
    number = approximate(base)
    if not isinstance(number.value, complex) and number.value < 0:
        if real:
            raise NoValue
        number = Approx(complex(number.value), number.error)
    return _bounded(lambda value: value ** (1 / degree), number)


def _integer_root(number: int, degree: int) -> int | None:
    """Returns the exact root of a number >= 0, None if there is none (or none that we find)."""
    root = math.isqrt(number) if degree == 2 else round(number ** (1 / degree))
    return root if root**degree == number else None


def _whole(name: str, x: Value, k: Value = 0) -> int:
    """Returns the value of a function to whole numbers, or of x >= 0 and k >= 0 that are whole."""
    if name in ("lfloor", "lceil"):
        rounding = math.floor if name == "lfloor" else math.ceil
        if _exact(x):
            return rounding(x)
        # A float has a floor unless it may lie on either side of a whole number.
        number = _real(x)
        low, high = (rounding(number.value + 8 * sign * number.error) for sign in (-1, 1))
        if low == high:
            return low
    elif _exact(x, k) and x.denominator == k.denominator == 1 and x >= 0 and k >= 0:
        x, k = int(x), int(k)
        if name == "factorial" and x <= 2500:
            return math.factorial(x)
        if name == "binom" and min(k, abs(x - k)) * x.bit_length() <= MAX_BITS:
            return math.comb(x, k)
    raise NoValue


def _smooth(library) -> dict[str, Callable]:
    """Returns the functions of a number, made from math's or, for complex ones, from cmath's."""
    direct = ("sin", "cos", "tan", "sinh", "cosh", "tanh", "exp")
    return {
        **{name: getattr(library, name) for name in direct},
        **{"arc" + name: getattr(library, "a" + name) for name in ("sin", "cos", "tan")},
        "ln": library.log,
        "cot": lambda x: 1 / library.tan(x),
        "sec": lambda x: 1 / library.cos(x),
        "csc": lambda x: 1 / library.sin(x),
        "arccot": lambda x: math.pi / 2 - library.atan(x),
    }


_REAL_FUNCTIONS, _COMPLEX_FUNCTIONS = _smooth(math), _smooth(cmath)
_CONSTANTS = {"pi": Approx(math.pi, 2e-16), "e": Approx(math.e, 2e-16), "i": Approx(1j, 0.0)}
_ARITHMETIC = {"+": operator.add, "-": operator.sub, "*": operator.mul, "neg": operator.neg}


@dataclass
class Budget:
    """The work that one comparison may still do, so that no answer keeps a training run waiting."""

    left: int = MAX_WORK

    def spend(self, value: Value) -> None:
        """Pays for a node and its value. Raises NoValue if the value or the work is too much."""
        parts = (value.numerator, value.denominator) if _exact(value) else ()
        bits = sum(part.bit_length() for part in parts)
        self.left -= 64 + bits
        if bits > 2 * MAX_BITS or self.left < 0:
            raise NoValue


@dataclass
class Evaluator:
    """Values of trees at one point: {variable: number}.

    With variables, roots and logarithms of negative numbers have no value; without, they are
    complex. Infinity has none: infinity + 1 would equal infinity, and 1 / infinity nothing.

    log_base: what log means without a base: 10, or None for e.
    """

    point: dict[str, Value]
    budget: Budget
    log_base: int | None = None

    def __call__(self, node: Node) -> Value:
        """Returns the tree's value. Raises one of NO_VALUE if it has none."""
        kind = node[0]
        if kind == "num":
            value = node[1]
        elif kind == "var":
            value = self.point[node[1]]
        elif kind == "const" and node[1] in _CONSTANTS:
            value = _CONSTANTS[node[1]]
        elif kind in _ARITHMETIC:
            value = _apply(_ARITHMETIC[kind], *map(self, node[1:]))
        elif kind == "/":
            value = _quotient(self(node[1]), self(node[2]))
        elif kind == "^":
            value = _power(self(node[1]), self(node[2]), real=bool(self.point))
        elif kind == "call":
            value = self.call(node[1], *map(self, node[2:]))
        elif kind == "size":
            value = math.prod(node[1])
        elif kind == "ratio" and len(node[1]) == 2:
            value = _quotient(*map(self, node[1]))
        else:
            raise NoValue
        self.budget.spend(value)
        return value

    def value_or_none(self, node: Node) -> Value | None:
        """Returns the tree's value, None if it has none."""
        try:
            return self(node)
        except NO_VALUE:
            return None

    def call(self, name: str, x: Value, *others: Value) -> Value:
        """Returns a function's value. Roots, logarithms and binomials may have two arguments."""
        if name in ("sqrt", "root"):
            return _root(x, *(others or (2,)), real=bool(self.point))
        if name == "log":
            (base,) = others or (self.log_base,)
            if base is None:
                return self.call("ln", x)
            if _real(base).value <= 0:  # \log_0 x, \log_{-1} x
                raise NoValue
            return _quotient(self.call("ln", x), self.call("ln", base))
        if name in ("lfloor", "lceil", "factorial", "binom"):
            return _whole(name, x, *others)
        if name == "degrees":
            return _quotient(_apply(operator.mul, x, _CONSTANTS["pi"]), 180)
        if name == "abs":
            return _apply(abs, x)
        if others or name not in _REAL_FUNCTIONS:  # \sin_2 x
            raise NoValue
        number = approximate(x).value
        # Without variables ln(-1) is i pi.
        is_complex = isinstance(number, complex) or name == "ln" and number < 0 and not self.point
        return _bounded((_COMPLEX_FUNCTIONS if is_complex else _REAL_FUNCTIONS)[name], x)


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
