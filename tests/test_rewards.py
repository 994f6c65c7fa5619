"""Answer extraction, equivalence and the reward: tables of cases, properties, hostile input."""

import doctest
import random

import pytest

import rewards
from rewards import accuracy_reward, extract_answer, is_equivalent

# --- extract_answer ---

EXTRACT = [
    ("<think>a</think><answer>5</answer>", "5"),
    ("<think>a</think>\n<answer>\n 5 \n</answer>\n", "5"),
    ("<answer>5</answer>", "5"),  # no thinking at all
    (
        "<think>a <answer>1</answer></think> <answer>2</answer>",
        "2",
    ),  # the paper's prompts are echoed in thoughts
    ("<think>a</think><answer>1</answer></think><answer>2</answer>", "2"),  # the LAST </think>
    ("no opening tag</think><answer>3</answer>", "3"),
    ("<answer>1</answer> wait <answer>2</answer>", "2"),
    ("<answer>1</answer> wait <answer>2", "1"),  # the last complete one
    ("<answer>1</answer></answer>", "1"),
    ("<answer><answer>1</answer>", "1"),
    ("<answer>B: No </answer>", "B: No"),
    (r"<answer>\boxed{7}</answer>", "7"),
    (r"<answer>The answer is $\boxed{\frac{1}{2}}$.</answer>", r"\frac{1}{2}"),
    (r"<answer>\boxed{\boxed{7}}</answer>", "7"),
    (r"<answer>1</answer> \boxed{2}", "1"),  # the tags come first
    (r"\boxed{1} and then \boxed{2}", "2"),
    (r"\boxed{1} and \boxed{2}", "1, 2"),
    (r"$\boxed{1}$, $\boxed{2}$ or \boxed{3}.", "1, 2, 3"),
    (r"\boxed{1}\boxed{2}", "1, 2"),
    (r"<answer>x = \boxed{1} and y = \boxed{2}</answer>", "1, 2"),
    (r"<answer>\boxed{1} but \boxed{2}</answer>", None),
    (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
    (r"\fbox{9} units", "9"),
    (r"\boxed {9}", "9"),
    (r"so $\boxed 5$ it is", "5"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
    (r"\boxed{1} then \boxed{2", None),  # unclosed
    (r"\boxed{2\}", None),
    (r"<answer>\boxed{2</answer>", None),
    (r"\boxed{}", None),
    ("<think>48+24</think>72 clips\n#### 72", "72"),
    ("#### -1,234.5\n", "-1,234.5"),
    ("#### $5", "$5"),
    ("#### Step 2: a heading", None),
    ("#### 18\nmore text", "18"),
    ("<think>5 <answer>5</answer>", None),  # never closed
    ("<think>a</think> hm <think> <answer>5</answer>", None),
    ("<think>a</think>", None),
    ("<think>a</think>\nThe answer is 5", None),
    ("<answer></answer>", None),
    ("<answer> \n </answer>", None),
    ("<answer>5", None),
    ("</answer>5<answer>", None),
    ("", None),
    ("<answer>" + "1" * 512 + "</answer>", "1" * 512),
    ("<answer>" + "1" * 513 + "</answer>", None),
    (r"\boxed{" + "1" * 513 + "}", None),
    (None, None),
    (5, None),
    (b"<answer>5</answer>", None),
    (["<answer>5</answer>"], None),
]


@pytest.mark.parametrize("response, expected", EXTRACT)
def test_extract_answer(response, expected):
    assert extract_answer(response) == expected


# --- is_equivalent ---

# fmt: off
EQUAL_NUMBERS = [
    ("5", "5"), ("+5", "5"), ("05", "5"), ("084", "84"), ("3.0", "3"), ("3.", "3"), (".5", "0.5"),
    ("-0", "0"), ("-0.0", "0"), ("1,234", "1234"), ("1,234,567.50", "1234567.5"),
    ("1{,}234", "1234"), (r"1,\!234", "1234"), (r"10\,000", "10000"), ("500,000", "500000"),
    ("−5", "-5"), ("- 5", "-5"), ("(5)", "5"), ("(-5)", "-5"), ("-(-5)", "5"), ("５", "５"),
    ("1/2", "0.5"), ("2/4", "1/2"), ("-1/2", r"-\frac{1}{2}"), (r"\frac{-1}{2}", r"-\frac12"),
    (r"\dfrac{1}{2}", r"\tfrac12"), (r"\frac12", "0.5"), (r"\frac1{2}", "1/2"),
    (r"\cfrac{1}{2}", "½"), (r"\frac{10}{4}", "2.5"), (r"\frac{1.5}{3}", "0.5"),
    (r"\frac{1}{-2}", "-1/2"), ("1/3", r"\frac{2}{6}"), ("4 / 8", ".5"), (r"1\frac12", "3/2"),
    (r"1\frac{1}{2}", "1.5"), ("1 1/2", "1.5"), ("-1 1/2", "-1.5"), (r"-2 \frac{3}{4}", "-2.75"),
    ("1½", "1.5"), ("1e3", "1000"), ("1E3", "1,000"), ("2.5e-2", "0.025"),
    (r"1.2\times 10^3", "1200"), (r"1.2 \cdot 10^{-3}", "0.0012"), ("1.2 x 10^3", "1200"),
    ("1.2×10³", "1200"), ("10^{6}", "1,000,000"), ("10^-2", "0.01"), ("$5$", "5"), ("$$5$$", "5"),
    (r"\(5\)", "5"), (r"\[5\]", "5"), (r"\text{5}", "5"), (r"\mathbf{5}", "5"), ("**5**", "5"),
    ("5.", "5"), (" 5 ", "5"), (r"\left(5\right)", "5"), (r"\displaystyle \frac12", "1/2"),
    ("`5`", "5"), (r"5\ ", "5"), ("x=5", "5"), ("x = 5", "x=5"), (r"$x = \frac{1}{2}$", "0.5"),
    ("a_1 = 5", "5"), ("x_{max} = 5", "5"), ("f(x) = 5", "5"), ("x = -5.", "-5"),
    ("The answer is 5.", "5"), ("Final answer: 5", "5"), ("the final answer is: **5**", "5"),
]
# fmt: on


@pytest.mark.parametrize("one, other", EQUAL_NUMBERS)
def test_equal_numbers(one, other):
    assert is_equivalent(one, other) and is_equivalent(other, one)


# fmt: off
DIFFERENT_NUMBERS = [
    ("5", "-5"), ("5", "5.1"), ("0.333", "1/3"), ("3.14", r"\pi"), ("12", "1 2"),
    ("1234", "(1,234)"), ("1234", "1, 234"), ("12,34", "1234"), ("11/2", r"1\frac12"),
    (r"\frac{1}{2}3", "1/23"), (r"\frac{1}{2}\pi", r"\frac{1}{2\pi}"), ("1/0", "0"), ("1/0", "2/0"),
    ("0/5", "5"), (r"1\frac{3}{2}", "2.5"), ("--5", "5"), ("1e3", "1e4"),
    ("1e999999999", "1e999999998"), ("2^{10}", "2^{1}0"), ("5²", "52"), ("3²", "9x"),
    ("x=5", "y=5"), ("x=5", "x=6"), ("2**3**4", "234"), ("nan", "0"), ("inf", r"\infty"),
    ("1.2.3", "1.23"), ("1/2/3", "1/(2/3)"),
]
# fmt: on


@pytest.mark.parametrize("one, other", DIFFERENT_NUMBERS)
def test_different_numbers(one, other):
    assert not is_equivalent(one, other) and not is_equivalent(other, one)


# fmt: off
UNITS = [
    ("50%", "50", True), ("50%", "0.5", True), (r"50\%", "50 percent", True), ("50%", "1/2", True),
    ("50%", "5000%", False), ("50%", "0.5%", False), ("50%", "5", False), ("50%", "50 cm", False),
    ("12.5 %", "0.125", True), ("50%", "x", False), ("$5", "5", True), (r"\$5", "5", True),
    (r"$\$5$", "5", True), ("$5.00", "5 dollars", True), ("-$5", "-5", True), ("5 $", "5", True),
    ("$1,234.50", "1234.5", True), ("$5", "5 cents", False), ("$5", "€5", False),
    ("$5 million", "5", False), ("50% of them", "50", False), ("5£", "£5", True),
    ("90^\\circ", "90", True), ("90°", r"90^{\circ}", True), ("90 degrees", r"90^\circ", True),
    (r"37^\circ\text{C}", "37 degrees Celsius", True), ("6 seconds", r"6 \text{ seconds}", True),
    ("6", r"6 \text{ seconds}", True), ("6 s", r"6 \text{ seconds}", True),
    ("6 m", r"6 \text{ seconds}", False), (r"15 \text{ cm}^2", r"15 \, \text{cm}^2", True),
    ("15 cm²", "15 square centimeters", True), ("15 cm^3", "15 cm^2", False),
    ("15cm^{2}", "15", True), ("5cm", "5", True), ("5 kg", "5 g", False),
    ("60 miles per hour", "60 mile/hour", True), ("60 km/h", "60", True),
    ("9.8 m/s^2", "9.8", True), ("18 eggs", "18", True), ("72 clips", "72 clips.", True),
    ("3 cups of water", "3", True), ("1/2 cup", "0.5", True), ("10 apples", "10 pears", False),
    (r"5\sqrt{3} \text{ cm}", r"5\sqrt3", True), (r"12\pi \text{ cm}^2", "12π", True),
    ("2 feet", "2 ft", True), ("x = 5 cm", "5", True), ("3m", "3", False), ("3n", "3", False),
    ("32I", "32", False), ("4n^3", "4", False), ("5 ft 2", "5", False), ("9 am", "9", False),
    ("9 am", "9 pm", False), ("3 squared", "3", False), ("3 halves", "3", False),
    ("3 or more", "3", False), ("3 million", "3", False), ("3 four", "3", False),
    (r"3\pi", "3", False),
]
# fmt: on


@pytest.mark.parametrize("one, other, expected", UNITS)
def test_units(one, other, expected):
    assert is_equivalent(one, other) is is_equivalent(other, one) is expected


# fmt: off
STRINGS = [
    ("Yes", "yes", True), ("coronary   sinus", "Coronary sinus", True),
    ("Zenker’s diverticulum", "Zenker's diverticulum", True), ("yes", "no", False),
    ("S3 Gallop", "s3 gallop", True), (r"\text{Yes}", "yes.", True), ("b", "B", True),
    (r"R\sqrt{3}", r"r\sqrt{3}", False), ("2S+12", "2s + 12", False),
    (r"R \sqrt 3", r"R\sqrt{3}", True), (r"\sqrt{3}", "√3", True), ("sqrt(30)", r"\sqrt{30}", True),
    (r"\sqrt[3]{2}", r"\sqrt{2}", False), (r"\frac{2\sqrt{3}}{3}", r"2\sqrt{3}/3", True),
    (r"-\frac{\sqrt{3}}{2}", r"\frac{-\sqrt{3}}{2}", True),
    (r"\dfrac{\sqrt3}2", r"\frac{\sqrt{3}}{2}", True), (r"\frac{21\pi}{8}", r"I = 21\pi/8", True),
    ("1008 pi", r"1008\pi", True), (r"2\cdot\pi", "2π", True), ("2*pi", r"2 \pi", True),
    (r"\frac\pi2", "pi/2", True), (r"\frac{\frac{1}{2}}{3}", "(1/2)/3", True),
    ("2^{n-1}", "2^(n-1)", True), ("2^{1998}", "2^1998", True), ("2**10", "2^{10}", True),
    ("x_{42}", "x_42", True), (r"e^{\frac{1}{2}}", "e^{1/2}", True), (r"e^\frac12", "e^1/2", False),
    (r"1/\frac{2}{3}", "1/2/3", False), ("2^{n-1}", "2^n-1", False),
    (r"\frac{p+1}{2}", "(p+1)/2", True), ("p+1/2", "(p+1)/2", False),
    (r"2021 \times 2022", "2021*2022", True), (r"2021 \cdot 2022", "20212022", False),
    (r"n \geq 3", "n ≥ 3", True), (r"n \le 3", r"n \leqslant 3", True), ("n > 3", "n >= 3", False),
    ("(1,234)", "(1, 234)", True), (r"\left(4, 2\right)", "(4,2)", True),
    ("(4, 2)", "(2, 4)", False), ("(1, 2]", "(1, 2)", False), ("(x+n, y)", "(x + n,y)", True),
    (r"(1, 1, \ldots, 1)", r"(1,1,\dots,1)", True), (r"\{1, 2\}", r"\left\{1,2\right\}", True),
    (r"\binom{15}{7}", r"\dbinom{15}{7}", True), ("1:2", "1 : 2", True),
    ("P(x) = ax + b", "ax+b", True), ("a = b", "b", False), ("a_n = n", "n", True),
    ("x = y = z = 3", "x=y=z=3", True), (r"x \ne 0", "x ≠ 0", True), ("Ab", "aB", True),
]
# fmt: on


@pytest.mark.parametrize("one, other, expected", STRINGS)
def test_strings(one, other, expected):
    assert is_equivalent(one, other) is is_equivalent(other, one) is expected


# fmt: off
HACKS = [
    "3 or 4", "3, 4", "3,4", "3; 4", "3/4", "4 or 3", "3 and 4", "3 (or 4)", "3 4", "3=4", "3|4",
    "{3,4}", "[3,4]", "3..4", "3-4", "~3 or 4", "one of 3, 4", "3\n4", "3 not 4", "either 3", "3?4",
    "between 3 and 4", "3 plus", "x", "3!", "0 or x=3", "3 sqrt", r"3 \pm 1", r"\pm 3", "±3", "",
    " ", ".", "**", "$", "$$", r"\text{}", "()", "The answer is",
]
# fmt: on


@pytest.mark.parametrize(
    "answer, reward",
    [
        (r"\boxed{3} or \boxed{4}", 0.0),
        (r"3 \boxed{4}", 0.0),
        (r"$3$, \boxed{4}", 0.0),
        (r"\boxed{4} \fbox{4}", 0.0),
        (r"\boxed{4}", 1.0),
        (r"\boxed{\boxed{4}}", 1.0),
        (r"The answer is \boxed{4}.", 1.0),
        (r"$x = \boxed{4}$", 1.0),
    ],
)
def test_boxes_inside_an_answer(answer, reward):
    assert accuracy_reward(f"<think>x</think><answer>{answer}</answer>", "4") == reward


@pytest.mark.parametrize("hack", HACKS)
def test_hedged_and_empty_answers_are_wrong(hack):
    assert not is_equivalent(hack, "3") and not is_equivalent("3", hack)
    assert not is_equivalent(hack, "4")
    assert accuracy_reward(f"<think>x</think><answer>{hack}</answer>", "3") == 0.0


@pytest.mark.parametrize(
    "bad",
    ["", " ", "**", ".", "1" * 513, None, [], {}, b"5", object(), 10**5000],
    ids=lambda bad: type(bad).__name__,
)
def test_unusable_answers_equal_nothing_not_even_themselves(bad):
    assert is_equivalent(bad, bad) is False
    assert accuracy_reward(bad, bad) == 0.0
    assert accuracy_reward("<answer>5</answer>", bad) == 0.0
    assert accuracy_reward(bad, "5") == 0.0


@pytest.mark.parametrize(
    "answer", [r"\boxed{4} or 3", r"3 or \boxed{4}", r"-\boxed{4}", r"\boxed{4}^2", r"7-\boxed{4}"]
)
def test_what_stands_beside_a_box_is_part_of_the_answer(answer):
    assert accuracy_reward(f"<answer>{answer}</answer>", "4") == 0.0


@pytest.mark.parametrize(
    "answer",
    [
        r"3 \text{ or } \boxed{4}",
        r"\boxed{4} \lor 3",
        r"\boxed{4} OR 3",
        r"3 \times \boxed{4}",
        r"\neq \boxed{4}",
        r"x > \boxed{4}",
        r"\boxed{4} < x",
        r"\boxed{4}x",
        r"\boxed{4}\,\text{million}",
        r"\boxed{4} is wrong",
        r"not \boxed{4}",
        r"\boxed{4} or \boxed{}",
        r"\boxed{}\boxed{4}",
    ],
)
def test_what_changes_a_box_is_part_of_the_answer(answer):
    assert accuracy_reward(f"<answer>{answer}</answer>", "4") == 0.0


def test_a_unit_behind_a_box_is_part_of_the_answer():
    for unit, right in [("cm", 1.0), (r"\text{ cm}.", 1.0), ("m", 0.0), (r"\text{ kg}", 0.0)]:
        assert accuracy_reward(rf"<answer>$\boxed{{4}}$ {unit}</answer>", "4 cm") == right


@pytest.mark.parametrize(
    "joint", [r" \quad \text{and} \quad ", r"\) and \(", r"\\ ", " as well as "]
)
def test_boxes_that_make_a_list(joint):
    answer = rf"\(\boxed{{3}}{joint}\boxed{{4}}\)"
    assert accuracy_reward(f"<answer>{answer}</answer>", "3, 4") == 1.0
    assert accuracy_reward(f"<answer>{answer}</answer>", "4") == 0.0


@pytest.mark.parametrize(
    "answer",
    [
        r"x = \boxed{4}",
        r"The answer is $\boxed{4}$.",
        r"(\boxed{4})",
        r"\boxed{4} cm",
        r"**\boxed{4}**",
        r"\[\boxed{4}\]",
    ],
)
def test_a_box_amid_words(answer):
    assert accuracy_reward(f"<answer>{answer}</answer>", "4") == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        "A: 12 or 24",
        "A: 12, 24",
        "A: not 12 but 24",
        "A: option B",
        "A: [B]",
        'A: "B"',
        "B. No",
        "(B) No",
    ],
)
def test_a_letter_with_more_than_its_own(answer):
    options = {"A": "12", "B": "24", "C": "36"}
    assert accuracy_reward(f"<answer>{answer}</answer>", "A", options) == 0.0
    assert accuracy_reward(f"<answer>{answer}</answer>", "B", options) == 0.0


@pytest.mark.parametrize(
    "answer", ["-x", r"-\infty", r"-\pi", "-2^2", "-(1+2)", "1e400", "9" * 400, "-y", ""]
)
def test_precision_never_raises(answer):
    for truth in (answer, "3.1"):
        assert accuracy_reward(f"<answer>{answer}</answer>", truth, precision=1) in (0.0, 1.0)
    assert accuracy_reward("<answer>3.14 cm</answer>", "3.1 m", precision=1) == 0.0
    assert accuracy_reward("<answer>-3.14</answer>", "-3.1", precision=1) == 1.0


def test_truths_that_json_holds_as_numbers():
    assert accuracy_reward("<answer>18</answer>", 18) == 1.0
    assert accuracy_reward("<answer>1/2</answer>", 0.5) == 1.0
    assert accuracy_reward("<answer>B</answer>", "A", {"A": 3, "B": 4}) == 0.0
    assert accuracy_reward("<answer>4</answer>", "B", {"A": 3, "B": 4.0}) == 1.0


# --- accuracy_reward with options ---

YES_NO = {"A": "Yes", "B": "No"}
CELLS = {
    "A": "Streptococcus pneumoniae",
    "B": "E. coli",
    "C": "A dog",
    "D": "B-cell lymphoma",
    "E": "vitamin A, C or D",
}
AMOUNTS = {"A": "2", "B": "3", "C": "50%", "D": "4 cm"}
SWAPPED = {"A": "B", "B": "A", "C": "d", "D": "c"}
COLOURS = {"A": "red", "B": "blue", "C": "all of the above", "D": "True", "E": "False"}
GENES = {"A": "CC CC", "B": "CC Cc", "C": "Cc Cc", "D": "Cc cc"}
MANY = {letter: f"text {letter.lower()}" for letter in "ABCDEFGHIJKLMNOP"}

# fmt: off
CHOICES = [  # answer, options, the letter it stands for (None: wrong whatever is true)
    ("B", YES_NO, "B"), ("B: No", YES_NO, "B"), ("B. No", YES_NO, "B"), ("B) No", YES_NO, "B"),
    ("(B) No", YES_NO, "B"), ("(B)", YES_NO, "B"), ("[B]", YES_NO, "B"), ("B.", YES_NO, "B"),
    ("B:", YES_NO, "B"), ("B)", YES_NO, "B"), ("**B**", YES_NO, "B"), ("**B: No**", YES_NO, "B"),
    ("**B.** No", YES_NO, "B"), ("*B*", YES_NO, "B"), (r"\text{B}", YES_NO, "B"),
    (r"\boxed{\text{B}}", YES_NO, "B"), (r"\boxed{B}", YES_NO, "B"), (r"\textbf{(B)}", YES_NO, "B"),
    (r"$\mathrm{B}$", YES_NO, "B"), ("Option B", YES_NO, "B"), ("option B: No", YES_NO, "B"),
    ("(Option B)", YES_NO, "B"), ("Choice B.", YES_NO, "B"), ("The answer is B.", YES_NO, "B"),
    ("The correct option is (B)", YES_NO, "B"), ("Answer: B", YES_NO, "B"), ("B - No", YES_NO, "B"),
    ("B, No", YES_NO, "B"), ("B No", YES_NO, "B"), ("B\nNo", YES_NO, "B"),
    ("B: because it is round", YES_NO, "B"), ("b", YES_NO, "B"), ("(b)", YES_NO, "B"),
    ("b) no", YES_NO, "B"), ("b: it is round", YES_NO, "B"), ("no", YES_NO, "B"),
    ("No.", YES_NO, "B"), (r"\text{no}", YES_NO, "B"), ("A: Yes", YES_NO, "A"), ("A", YES_NO, "A"),
    ("a", YES_NO, "A"), ("B (No)", YES_NO, "B"), ("B: No (B)", YES_NO, "B"),
    ("B: Yes", YES_NO, None), ("b: yes", YES_NO, None), ("A or B", YES_NO, None),
    ("A, B", YES_NO, None), ("A and B", YES_NO, None), ("A/B", YES_NO, None), ("AB", YES_NO, None),
    ("A B", YES_NO, None), ("A: Yes, B: No", YES_NO, None), ("B: No or A: Yes", YES_NO, None),
    ("A: Yes\nB: No", YES_NO, None), ("(A) (B)", YES_NO, None), ("B; A", YES_NO, None),
    ("B. A", YES_NO, None), ("C", YES_NO, None), ("C: No", YES_NO, None),
    ("Yes or No", YES_NO, None), ("A dog", YES_NO, None), ("a yes-man", YES_NO, None),
    ("A+", YES_NO, None), ("A'", YES_NO, None), ("I think B", YES_NO, None), ("Both", YES_NO, None),
    ("none", YES_NO, None), (".", YES_NO, None), ("**", YES_NO, None), ("B12", YES_NO, None),
    ("B^2", YES_NO, None), ("E. coli", CELLS, "B"), ("A dog", CELLS, "C"), ("a dog", CELLS, "C"),
    ("A cat", CELLS, None), ("B-cell lymphoma", CELLS, "D"), ("C. difficile", CELLS, "C"),
    ("D-dimer", CELLS, None), ("streptococcus pneumoniae", CELLS, "A"),
    ("E: vitamin A, C or D", CELLS, "E"), ("B: E. coli", CELLS, "B"),
    ("D. B-cell lymphoma", CELLS, "D"), ("E: vitamins A, C", CELLS, None),
    ("vitamin A, C or D", CELLS, "E"), ("A: E. coli", CELLS, None), ("Streptococcus", CELLS, None),
    ("B\n\nIt grows on agar.", CELLS, "B"), ("B. 3", AMOUNTS, "B"), ("3", AMOUNTS, "B"),
    ("3.0", AMOUNTS, "B"), ("A. 3", AMOUNTS, None), ("B: 2", AMOUNTS, None), ("0.5", AMOUNTS, "C"),
    ("50", AMOUNTS, "C"), ("4", AMOUNTS, "D"), ("4 cm", AMOUNTS, "D"), ("4 m", AMOUNTS, None),
    ("x = 2", AMOUNTS, "A"), ("D: 4", AMOUNTS, "D"), ("2 or 3", AMOUNTS, None),
    ("(B) 6/2", AMOUNTS, "B"), ("A", SWAPPED, "A"), ("B", SWAPPED, "B"), ("A: B", SWAPPED, "A"),
    ("c", SWAPPED, "D"), ("C", SWAPPED, "C"), ("d", SWAPPED, "C"), ("P", MANY, "P"),
    ("(J) text j", MANY, "J"), ("I", MANY, "I"), ("I: text k", MANY, None), ("text p", MANY, "P"),
    ("Q", MANY, None), ("I, too", MANY, "I"),
    # Words that take a letter back, and words that do not.
    ("B is wrong", COLOURS, None), ("B: wrong", COLOURS, None), ("B (incorrect)", COLOURS, None),
    ("B: is not correct", COLOURS, None), ("B, or none", COLOURS, None), ("Not B", COLOURS, None),
    ("B: neither", COLOURS, None), ("B: false", COLOURS, None), ("B - maybe", COLOURS, None),
    ("B: this is false", COLOURS, None), ("B and not A", COLOURS, None), ("B?", COLOURS, None),
    ("I would choose B.", COLOURS, "B"), ("So the answer is (B)", COLOURS, "B"),
    ("Therefore, the correct option is B.", COLOURS, "B"), ("B is correct", COLOURS, "B"),
    ("Option B is the correct answer.", COLOURS, "B"), ("My answer is B", COLOURS, "B"),
    ("B: it is not infectious", COLOURS, "B"), ("B, all others are wrong", COLOURS, "B"),
    ("C: all of the above", COLOURS, "C"), ("E. False", COLOURS, "E"), ("D: true", COLOURS, "D"),
    # Another option's text or letter, or a word that takes the letter back.
    ("B: probably red", COLOURS, None), ("B: the reds", COLOURS, None),
    ("B: rejected", YES_NO, None), ("B: I", YES_NO, None), ("B: no red", COLOURS, None),
    ("3 (B)", AMOUNTS, "B"), ("3, option B", AMOUNTS, "B"), ("3, which is B", AMOUNTS, "B"),
    ("4 (B)", AMOUNTS, None), ("3 (A)", AMOUNTS, None), ("It's B", AMOUNTS, "B"),
    ("B → 3", AMOUNTS, "B"), ("B -- 3", AMOUNTS, "B"), ("B → 2", AMOUNTS, None),
    ("B, not A", YES_NO, "B"), ("B (not A)", YES_NO, "B"), ("B rather than A", YES_NO, "B"),
    ("B, not B", YES_NO, None), ("A or B, not A", YES_NO, None), ("not B, not A", YES_NO, None),
    ("B: No, not Yes", YES_NO, "B"), ("B, not sure", YES_NO, None), ('"No"', YES_NO, "B"),
    ("B. Actually A", YES_NO, None), ("B. Correction: A", YES_NO, None), ("B: Not", YES_NO, None),
    ("B: I think it is A", YES_NO, None), ("B..A", YES_NO, None), ("~B", YES_NO, None),
    ("B: No, it is odd", YES_NO, "B"), ("B: blue, as the sky", COLOURS, "B"),
    ("B. No, since it is odd", YES_NO, "B"), ("A: No, since it is odd", YES_NO, None),
    # Texts that differ in case only.
    ("CC Cc", GENES, "B"), ("Cc cc", GENES, "D"), ("B) CC Cc", GENES, "B"),
    ("A) CC Cc", GENES, None),
    ("cc cc", GENES, None), ("D: Cc cc", GENES, "D"), ("C. Cc Cc", GENES, "C"),
]
# fmt: on


@pytest.mark.parametrize("answer, options, letter", CHOICES)
def test_choices(answer, options, letter):
    for truth in options:
        response = f"<think>A or B</think>\n<answer>{answer}</answer>"
        assert accuracy_reward(response, truth, options) == float(truth == letter), truth
    # There is no option Z.
    assert accuracy_reward(f"<think>B</think><answer>{answer}</answer>", "Z", options) == 0.0


@pytest.mark.parametrize("truth", ["B", "(B)", "B: No", "No", "b"])
def test_truth_may_be_letter_or_text(truth):
    assert accuracy_reward("<answer>B</answer>", truth, YES_NO) == 1.0
    assert accuracy_reward("<answer>A</answer>", truth, YES_NO) == 0.0


def test_ambiguous_or_broken_options():
    # "5 cm" is the exact text of B; "5" is either.
    assert accuracy_reward("<answer>5 cm</answer>", "A", {"A": "5", "B": "5 cm"}) == 0.0
    assert accuracy_reward("<answer>5</answer>", "A", {"A": "5 m", "B": "5 cm"}) == 0.0
    assert accuracy_reward("<answer>same</answer>", "A", {"A": "same", "B": "same"}) == 0.0
    assert accuracy_reward("<answer>A</answer>", "A", {"A": "same", "B": "same"}) == 1.0
    # Lower-case keys, and keys and values that are none.
    assert accuracy_reward("<answer>A</answer>", "a", {"a": "x", "b": "y"}) == 1.0
    broken = {"A": None, 3: [], "Q": "A", "AB": "A"}
    assert accuracy_reward("<answer>A</answer>", "A", broken) == 1.0
    assert accuracy_reward("<answer>**</answer>", "A", {"A": "", "B": "x"}) == 0.0
    assert accuracy_reward("<answer>x</answer>", "A", {"A": "x" * 600, "B": "y"}) == 0.0
    assert accuracy_reward("<answer>A</answer>", "x" * 600, {"A": "x" * 600, "B": "y"}) == 0.0
    for options in ({}, None, [], ["Yes", "No"], "AB", 7):  # no usable options: an open question
        assert accuracy_reward("<answer>5</answer>", "5", options) == 1.0


def test_rewards_are_floats_and_need_the_right_place():
    assert isinstance(accuracy_reward("<answer>1</answer>", "1"), float)
    assert isinstance(accuracy_reward("", "1"), float)
    assert accuracy_reward("<think><answer>5</answer>", "5") == 0.0
    assert accuracy_reward("<think><answer>5</answer></think><answer>6</answer>", "5") == 0.0
    assert accuracy_reward("<think></think>the answer is 5", "5") == 0.0
    assert accuracy_reward(r"<think>a</think> so \boxed{5}", "5") == 1.0
    assert accuracy_reward("<think>a</think>\n#### 5", "5") == 1.0


# --- properties over real ground truths ---

# fmt: off
TRUTHS = [  # Orz-math-57k, GSM8K and MedQA, as published
    "104", "\\frac{2}{3}", "\\frac{2017}{2}", " e ", " (c, d) ", "4046", " (2, 1) ", "n^2", "73.5",
    "\\binom{15}{7}", "\\binom{2015}{5}", " 1:2 ", "a = b", "90^\\circ", "3^n", " R\\sqrt{3} ",
    " \\frac{9}{4} ", " 2^{n-1} ", " (m, n) ", "2S + 12", "084", "101^2", "667^3", " 2^{n+1} ",
    "100\\sqrt{10}", "(x+n, y)", "2 - \\frac{1}{p}", "\\frac{\\pi T^2}{C}", " x_{42} ",
    " a = 2 - \\sqrt{3} ", " P(x) = ax + b ", "\\frac{1}{n}", "x = y = z = 3", "6 \\text{ seconds}",
    "(5, 21, 421)", "I = \\frac{21\\pi}{8}", "1008\\pi", "-1", "a_n = n", "16 + 4\\sqrt{3}",
    "\\frac{p+1}{2}", "e^{1/2}", "2\\sqrt{3}", "500,000", "138600", " n \\geq 3 ",
    "\\frac{2\\sqrt{3}}{3}", "2021 \\times 2022", "15 \\, \\text{cm}^2", "403791300",
    "(1, 1, \\ldots, 1)", "C=\\frac{1}{8}", "32I", " 1 - \\frac{1}{e} ", "(28, -48), (2, 56)",
    "0, 50, 100, 101", "\\dfrac{2}{k + 1}", " P_1(x) = x - 2 ", " O(0, 0) ", "4n^3", "333200",
    "768000", "Staphylococcus aureus", "Insert a ‘straight cath’ into the patient’s bladder",
    "Zenker's diverticulum", "Tetanus, diphtheria, and acellular pertussis booster (Tdap) vaccine",
    "A type 1 error occurs when the null hypothesis is true but is rejected in error.", "S3 gallop",
]
# fmt: on
WRAPPERS = [
    "<think>t</think><answer>{}</answer>",
    "<answer> {} </answer>",
    r"<think>t</think> Thus \boxed{{{}}}.",
    r"<answer>\boxed{{{}}}</answer>",
    r"<answer>${}$</answer>",
    r"<answer>\({}\)</answer>",
    "<answer>The answer is {}.</answer>",
    "<answer>**{}**</answer>",
    "<answer>\n{}\n</answer>",
]


@pytest.mark.parametrize("truth", TRUTHS)
def test_every_truth_equals_itself_however_it_is_wrapped(truth):
    assert is_equivalent(truth, truth)
    for wrapper in WRAPPERS:
        assert accuracy_reward(wrapper.format(truth), truth) == 1.0, wrapper
        assert accuracy_reward(wrapper.format(truth + " or 17"), truth) == 0.0, wrapper


def test_no_two_truths_are_equal():
    for truth in TRUTHS:
        for other in TRUTHS:
            assert is_equivalent(truth, other) is (truth is other), (truth, other)


def test_symmetric_on_the_tables():
    rows = EQUAL_NUMBERS + DIFFERENT_NUMBERS + UNITS + STRINGS
    cases = sorted({text for row in rows for text in row[:2]})
    generator = random.Random(0)
    for _ in range(5000):
        one, other = generator.choice(cases), generator.choice(cases)
        assert is_equivalent(one, other) is is_equivalent(other, one), (one, other)


def test_exactness_against_fractions():
    generator = random.Random(1)
    for _ in range(500):
        top = generator.randint(-(10**6), 10**6)
        bottom = generator.randint(1, 10**6)
        factor = generator.randint(2, 99)
        sign = "-" if top < 0 else ""
        fraction = rf"{sign}\frac{{{abs(top)}}}{{{bottom}}}"
        assert is_equivalent(fraction, f"{top * factor}/{bottom * factor}")
        fraction = rf"\frac{{{top}}}{{{bottom}}}"
        assert not is_equivalent(fraction, f"{top * factor + 1}/{bottom * factor}")
        assert is_equivalent(f"{top:,}", str(top))
        assert is_equivalent(f"{top}.{bottom:06d}0", f"{top}.{bottom:06d}")


# --- hostile input ---

# fmt: off
HOSTILE = [
    "9**9**9", "1e999999999", "10^{10^{10}}", "2^{2^{2^{2^{100}}}}", "1" * 512, "1," * 256,
    "(" * 512, "{" * 512, "\\frac" * 100, "\\frac{" * 80, "\\frac12" * 70, "\\sqrt" * 100,
    "sqrt " * 100, "sqrt" + "\\text{}" * 70, "^" * 512, "^ {" * 170, "*" * 512, "* " * 256,
    "$" * 511, " " * 512, "1 " * 256, "½" * 512, "π" * 512, "√" * 512, "²" * 512, "√½" * 256,
    "A" * 512, "A," * 256, "A or " * 100, "B: " + "A " * 250, "(A" * 256, "5 " + "a" * 510,
    "5 " + "square " * 70, "5 cm" * 128, "." * 512, "1." * 256, "x=" * 256, "x_" * 256, "-" * 512,
    "1/" * 256, "1e" * 256, "\\" * 512, "\\text{" * 80 + "}" * 32, "{}" * 256, "\x00" * 512,
    "\ud800" * 512, "𝟙" * 512, "٣" * 512, "İ" * 512, "_*`" * 170, "__import__('os')",
    "the answer is " * 36, "\\boxed{" * 70, "####" * 128, "<answer>" * 64, "pi" * 256,
    "0" * 255 + "." + "0" * 256, "1e-999", "9" * 500 + "e999", "~" * 512, "^{\\circ" * 70,
]
# fmt: on


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_answers_never_raise(text):
    assert is_equivalent(text, "3") in (True, False)
    assert is_equivalent("3", text) in (True, False)
    assert accuracy_reward(f"<answer>{text}</answer>", text) in (0.0, 1.0)
    assert accuracy_reward(f"<answer>{text}</answer>", "A", MANY) in (0.0, 1.0)
    assert accuracy_reward(text, text, {"A": text, "B": text[::-1]}) in (0.0, 1.0)


# fmt: off
LONG = [
    "<think>", "</think>", "<answer>", "</answer>", "<answer>5</answer>", "\\boxed{", "\\boxed{5}",
]
# fmt: on
LONG += ["{", "#### ", "#### 1\n", "a", "\\", " "]


@pytest.mark.parametrize("unit", LONG)
def test_long_responses(unit):
    """Work in proportion to the square of a response's length would take minutes here."""
    response = unit * (1_000_000 // len(unit))
    for text in (
        response,
        "<think>" + response + "</think><answer>" + response,
        r"\boxed{" + response,
    ):
        answer = extract_answer(text)
        assert answer is None or len(answer) <= 512


def test_fuzz_never_raises():
    generator = random.Random(2)
    pieces = r"""<think> </think> <answer> </answer> \boxed{ } { \frac \sqrt \text{ ^ _ $ % \%
        1 23 , . - / * x = A B: ( ) [ ] é \left \right \pi e 10^ cm #### ° ½ \ √ ² million
        数""".split()
    pieces += [" ", " or ", "\n", "\ud83d", "\x00", "square "]
    for _ in range(4000):
        answer = "".join(generator.choices(pieces, k=generator.randint(0, 30)))
        truth = "".join(generator.choices(pieces, k=generator.randint(0, 30)))
        response = generator.choice([answer, f"<think></think><answer>{answer}</answer>"])
        for options in (None, {"A": truth, "B": answer, "C": "5"}):
            assert accuracy_reward(response, generator.choice([truth, "A"]), options) in (0.0, 1.0)
        assert is_equivalent(answer, truth) is is_equivalent(truth, answer)
        extracted = extract_answer(response)
        assert extracted is None or 0 < len(extracted) <= 512


def test_junk_of_other_types_never_raises():
    junk = [
        None,
        0,
        1.5,
        float("nan"),
        True,
        b"",
        [],
        {},
        (),
        set(),
        object(),
        lambda: 0,
        10**5000,
        "5",
        "<answer>5</answer>",
        {"A": "5"},
        {1: 2},
        {"A": {"A": []}},
        [["A", "5"]],
    ]
    for response in junk:
        for truth in junk:
            assert is_equivalent(response, truth) in (True, False)
            for options in junk:
                assert accuracy_reward(response, truth, options) in (0.0, 1.0)


def test_examples_in_the_docstring():
    result = doctest.testmod(rewards)
    assert result.attempted >= 3 and result.failed == 0
