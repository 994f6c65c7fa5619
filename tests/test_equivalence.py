"""The equivalence engine: development table, its parts, wrong pairs, hostile strings, limits."""

import doctest
import math
import random
from decimal import Decimal
from fractions import Fraction

import pytest

from answers import equivalence, formulas, parsing, trees, typography, units, values
from answers.equivalence import answers_agree, is_equivalent
from answers.formulas import NotMaths, parse_formula
from answers.parsing import parse_answer
from answers.trees import variables
from answers.typography import MAX_CHARS, plain
from answers.values import MAX_BITS, Budget, as_decimal, value_of, values_agree
from benchmarks import constant_answers
from benchmarks import rewards as bench

FIELD = bench.answer_blocks("answers_field.txt")
BLOCKS = bench.answer_blocks()


def tree(text: str):
    return parse_formula(plain(text))


def value(text: str, **point):
    return value_of(tree(text), Budget(), point)


# --- The development table ---


@pytest.mark.parametrize("block", BLOCKS + FIELD, ids=lambda block: block["="][0])
def test_block(block):
    spellings, others, loosely = block["="], block["!"], block["~"]
    for other in spellings + loosely:
        assert is_equivalent(spellings[0], other) and is_equivalent(other, spellings[0]), other
    for one in spellings:
        for other in others:
            assert not is_equivalent(one, other) and not is_equivalent(other, one), (one, other)
    for sentence in block[">"]:
        assert is_equivalent(sentence, spellings[0]), sentence


def test_half_of_the_field_table_is_false():
    labels = [same for _, _, same in bench.labelled_pairs(FIELD)]
    assert len(labels) > 400 and sum(labels) <= len(labels) / 2


def test_no_constant_answer_is_right_for_several_truths():
    """What is neither a number nor a word: degenerate identities, letters, pieces of formulas."""
    truths = [block["="][0] for block in BLOCKS + FIELD]
    assert constant_answers.suspects(constant_answers.constants(1), truths) == {}


def test_the_table_is_large_and_its_first_lines_differ():
    firsts = [block["="][0] for block in BLOCKS]
    assert len(bench.labelled_pairs(BLOCKS)) > 750
    for i, one in enumerate(firsts):
        for other in firsts[:i]:
            assert not is_equivalent(one, other), (one, other)


WRAPPERS = ["${}$", r"\({}\)", " {} ", r"\boxed{{{}}}", "The answer is {}", "**{}**", "{}."]


def test_wrapping_changes_nothing():
    for block in BLOCKS:
        for answer in block["="]:
            if "$" not in answer and "\\(" not in answer and "answer" not in answer.lower():
                for wrapper in WRAPPERS:
                    assert is_equivalent(wrapper.format(answer), answer), (wrapper, answer)


FORMS = [r"\frac{{{}}}{{{}}}", "{}/{}", r"{}\sqrt{{{}}}", "{}+{}x", "({},{})"]


def test_random_wrong_pairs():
    """Numbers that were drawn to be near misses: another digit, a sign, a digit more."""
    g = random.Random(0)
    for _ in range(10_000):
        top = g.randint(1, 10 ** g.randint(1, 9))
        bottom = g.randint(2, 10 ** g.randint(1, 4))
        true = Fraction(top, bottom)
        form = g.choice(FORMS)
        longer = 10 * top + g.randint(0, 9)
        wrong = g.choice([(top + 1, bottom), (-top, bottom), (longer, bottom), (top, bottom + 1)])
        if form[0] in r"\{" and "sqrt" not in form and "x" not in form and Fraction(*wrong) == true:
            continue
        one, other = form.format(top, bottom), form.format(*wrong)
        if "sqrt" in form and top**2 * bottom == wrong[0] * abs(wrong[0]) * wrong[1]:
            continue
        assert not is_equivalent(one, other) and not is_equivalent(other, one), (one, other)


# --- Its parts ---

X, Y, TWO, THREE = ("var", "x"), ("var", "y"), ("num", 2), ("num", 3)
TREES = [
    ("2+3x", ("+", TWO, ("*", THREE, X))),
    ("2x^3", ("*", TWO, ("^", X, THREE))),
    ("-x^2", ("neg", ("^", X, TWO))),
    ("x-y-2", ("-", ("-", X, Y), TWO)),
    ("x^y^2", ("^", X, ("^", Y, TWO))),
    ("x/2y", ("*", ("/", X, TWO), Y)),
    (r"\frac23", ("/", TWO, THREE)),
    (r"\frac{x}2", ("/", X, TWO)),
    ("3 2/3", ("+", THREE, ("/", TWO, THREE))),
    (r"2\sqrt3", ("*", TWO, ("call", "sqrt", THREE))),
    (r"\sqrt[3]x", ("call", "sqrt", X, THREE)),
    (r"\sin 2x", ("call", "sin", ("*", TWO, X))),
    (r"\sin^2 x", ("^", ("call", "sin", X), TWO)),
    (r"\sin(x)y", ("*", ("call", "sin", X), Y)),
    (r"\log_2 3", ("call", "log", THREE, TWO)),
    ("x!", ("call", "factorial", X)),
    ("|x|", ("call", "abs", X)),
    ("(x, 2]", ("seq", "(]", (X, TWO))),
    (r"\{2, x\}", ("set", (TWO, X))),
    ("2 <= x < 3", ("chain", (TWO, X, THREE), ("<=", "<"))),
    (r"(2,x) \cup (x,3)", ("union", (("seq", "()", (TWO, X)), ("seq", "()", (X, THREE))))),
    ("x_1 x_{12}", ("*", ("var", "x_1"), ("var", "x_12"))),
    ("2:3", ("ratio", (TWO, THREE))),
    (
        r"\begin{pmatrix} 2 & x \\ 3 & y \end{pmatrix}",
        ("seq", "[]", (("seq", "[]", (TWO, X)), ("seq", "[]", (THREE, Y)))),
    ),
]


@pytest.mark.parametrize("text, expected", TREES)
def test_trees(text, expected):
    assert tree(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "2 3",
        "x2",
        "--5",
        "2 +",
        "(2",
        "2)",
        "[2]3(",
        r"\frac{2}",
        "3\\frac{4}{3}",
        "hello",
        r"\sum x",
        "2..3",
        "x^",
        "(" * 30 + "2" + ")" * 30,
        "2+" * 80,
        r"\{2)",
        "&",
    ],
)
def test_what_is_not_understood_is_said(text):
    with pytest.raises(NotMaths):
        tree(text)


def test_exact_values():
    g = random.Random(1)
    for _ in range(300):
        a, b, c = (Fraction(g.randint(-99, 99), g.randint(1, 99)) for _ in range(3))
        text = f"(({a}) + ({b}) * ({c})) / 7 - ({a})^3"
        assert value(text) == (a + b * c) / 7 - a**3 and not isinstance(value(text), Decimal)
    assert value(r"\binom{10}{3} + 5! + \lfloor -7/2 \rfloor") == 120 + 120 - 4
    assert value(r"\sqrt{49/4} + \sqrt[3]{-8}") == 3.5 - 2


def test_decimals_are_right_to_35_digits():
    """Sums of square roots, against integer square roots with more digits."""
    g = random.Random(2)
    for _ in range(300):
        numbers = [g.randint(2, 10**6) for _ in range(6)]
        scale = 10**70
        roots = " + ".join(rf"\sqrt{{{n}}}" for n in numbers)
        got = as_decimal(value(rf"0 + {roots} - \sqrt{{{numbers[0]}}}"))
        true = sum(math.isqrt(n * scale**2) for n in numbers[1:])
        assert abs(Fraction(got) - Fraction(true, scale)) < Fraction(1, 10**34)


@pytest.mark.parametrize("name", ["sin", "cos", "tan", "arcsin", "arccos", "arctan", "exp", "ln"])
def test_functions_equal_those_of_the_math_module(name):
    of_math = getattr(math, {"ln": "log"}.get(name, name.replace("arc", "a")))
    for x in (0.001, 0.3, 0.71, 0.999, 1.0) + (() if name.startswith("arc") else (1.5, 3.0, 77.7)):
        assert math.isclose(value(rf"\{name}(x)", x=Fraction(x)), of_math(x), rel_tol=1e-13)


@pytest.mark.parametrize(
    "text",
    [
        r"1/0",
        r"0/(1-1)",
        r"\tan(\pi/2)",
        r"\ln 0",
        "(1/2)!",
        "9^{9^{9}}",
        "99999!",
        "0^{-1}",
        r"\sqrt[0]{2}",
        r"1/(\sqrt2^2 - 2)",
        "10^{10^{10}}",
        r"\infty - \infty",
    ],
)
def test_what_has_no_value(text):
    assert value(text) is None


def test_values_that_are_close_but_not_the_same():
    assert not values_agree(value(r"\sqrt2"), Fraction(141421356237, 10**11))
    assert values_agree(value(r"\sqrt2 * \sqrt3"), value(r"\sqrt6"))
    assert not is_equivalent(r"\pi", r"\frac{355}{113}")
    assert not is_equivalent(r"2^{0.5}", "1.4142135623")


def test_variables_and_points():
    assert variables(tree(r"x_1 + \frac{\sin y}{2}")) == {"x_1", "y"}
    assert value("x^2 + y", x=3, y=Fraction(1, 2)) == Fraction(19, 2)
    assert not is_equivalent("x(x-1)(x-2)", "0")  # zero at some whole numbers only
    assert is_equivalent(r"\sqrt{x^2}", "|x|") and not is_equivalent(r"\sqrt{x^2}", "x")


# --- Hostile strings ---


def assert_bounded(budget: Budget) -> None:
    """The last number that was computed may exceed the budget, after which nothing is computed."""
    assert budget.left > -8 * MAX_BITS


def test_hostile_strings_are_symmetric_and_their_work_is_bounded():
    answers = [line for block in BLOCKS for lines in block.values() for line in lines]
    for one, other in bench.hostile_strings(4000, 3, answers):
        budget, reverse = Budget(), Budget()
        assert is_equivalent(one, other, budget) is is_equivalent(other, one, reverse), (one, other)
        assert_bounded(budget)
        assert_bounded(reverse)


# fmt: off
HEAVY = [
    "+".join(f"1/{p}^{{9999}}" for p in (3, 5, 7, 11, 13)), "2499!" * 25, "/".join(["2499!"] * 20),
    r"\pi" * 120, "(x^{999}+1/x^{999})^{9}", "sqrt(" * 20 + "2^{9999}" + ")" * 20,
    r"\sqrt[999]{2^{9999}}+" * 15 + "1", "0." + "123456789" * 50 + "^{20}", "9" * 480 + "!",
    r"\pm 9, " * 70, "ye;" * 170, "2^{2^{2^{2018}}}",
]
# fmt: on


# fmt: off
RARE = [  # one of each kind that the development table does not have
    ("y = 2, x = 1", "x = 1, y = 2", True), ("y = 1, x = 2", "x = 1, y = 2", False),
    (r"3\frac{x}{2}", r"\frac{3x}{2}", True), (r"\begin{vmatrix} 1 \end{vmatrix}", "1", False),
    (r"\sqrt{\pi - \pi}", "0", True), (r"\sqrt{-2}", r"\sqrt{2}", False),
    (r"\sqrt[3]{3^{999}}", "0", False), (r"(-1)^{\pi}", "-1", False),
    ("(-1)^{99999999}", "-1", True), ("(-1)^{99999998}", "1", True),
    ("(1/2)^{99999999}", "0", False),
    ("e^0", "1", True), (r"\exp(0)", "1", True),
    (r"\arccos 1", "0", True), (r"\arcsin 1", r"\pi/2", True), (r"\sin^{-1} 1", r"\pi/2", True),
    (r"\sin_2 1", r"\sin 1", False), (r"\sin 0", "0", True),
    (r"\lfloor \pi \rfloor", "3", True), (r"\lceil e \rceil", "3", True),
    (r"\lfloor \sqrt2^2 \rfloor", "2", False), (r"\sqrt[\pi]{2}", r"\sqrt{2}", False),
    (r"\binom{3}{5}", "0", True), (r"\binom{99999}{50000}", "1", False),
    ("5 cubic feet", "5 ft^3", True), ("x > 2 and x < 3", "(2, 3)", True),
    ("x > 2 and x > 3", "(2, 3)", False), ("x > 2 and y < 3", "(2, 3)", False),
    ("-x < 0", "x < 0", False), ("1 = 1", "2 = 2", False), ("1:2:3", "2:4:6", True),
    ("1:2:3", "1:2:4", False), ("[1, 2]", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", True),
    (r"[0, 1] \cup [1, 2]", "[0, 2]", True), ("x < 2 and x > 3", "(2, 1)", False),
    ("x < 2 and x > 3", "x < 1 and x > 5", False), (r"x < \sqrt8", r"(-\infty, 2\sqrt2)", True),
    (r"\sqrt{10^{12}+1}", "10^6", False), ("e^{-50000}", "0", False), ("1 + e^{-90}", "1", False),
    (r"\sqrt[2,3]{5}", "5", False), (r"\arctan 1 + \arctan 2 + \arctan 3", r"\pi", True),
    ("y = 5, x = 2", "(2, 5)", True), ("y = 5, x = 2", "(5, 2)", False),
]
# fmt: on


@pytest.mark.parametrize("one, other, expected", RARE)
def test_rare_forms(one, other, expected):
    assert is_equivalent(one, other) is is_equivalent(other, one) is expected


def test_numbers_beyond_a_floats_range():
    assert is_equivalent("2^{2000}x < 2^{2000}y", "x < y")
    assert not is_equivalent("2^{2000}x < 2^{2000}y", "x > y")
    assert not is_equivalent("i^{i}+1.7e308:i", "1.7e308")
    assert is_equivalent(r"\{1, 2^{9999}\}", r"\{2^{9999}, 1\}")
    assert not is_equivalent(r"\{1, 2^{9999}\}", r"\{2^{9998}, 1\}")


@pytest.mark.parametrize("text", HEAVY, ids=lambda text: text[:12])
def test_work_is_bounded(text):
    budget = Budget()
    answer = parse_answer(text)
    if answer is not None and answer.value is not None:
        answers_agree(answer, parse_answer("1/7 + x"), budget)
        answers_agree(answer, parse_answer("6"), budget)
    assert_bounded(budget)
    assert not is_equivalent(text, "6")


def test_limits():
    ones = "1" * MAX_CHARS
    assert is_equivalent(ones, ones) and not is_equivalent(ones + "1", ones + "1")
    assert parse_answer("x" + "+x" * 40).value is not None
    assert parse_answer("x" + "+x" * 150).value is None  # more than MAX_TOKENS: a string
    assert is_equivalent("x" + "+x" * 150, "x " + "+ x" * 150)


def test_examples_in_the_docstring():
    for module in (formulas, values, trees, parsing, equivalence, typography, units):
        result = doctest.testmod(module)
        assert result.attempted >= 2 and result.failed == 0
