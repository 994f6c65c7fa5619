"""Is there an answer that is right too often? A policy would find it, so we look for it first.

    python benchmarks/constant_answers.py [--data FILE ...] [--length 3]

Writes down degenerate, empty and ambiguous answers and everything that short formulas of odd pieces
spell, and asks for each which truths accept it. Truths that are not the same must not accept the
same answer; a bare number may stand for a number with any unit, and so is not looked at.
"""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from answers.equivalence import as_text, is_equivalent  # noqa: E402
from answers.parsing import parse_answer  # noqa: E402
from benchmarks.rewards import answer_blocks  # noqa: E402
from data import read_examples  # noqa: E402
from hub.options import option, parse_options, run_command  # noqa: E402


@dataclass
class ConstantOptions:
    """Is there an answer that is right too often? Asks the tables' truths, and those of files."""

    data: list[str] = option([], "files with questions and answers, whose truths are asked too")
    length: int = option(2, "pieces that an answer may have", low=1)


PIECES = r"""0 1 2 x \infty \pi i - + / : ^ , = < \{ \} ( ) [ ] | ! \pm \cup \sqrt \log \emptyset
    \in \approx % or x ° \times""".split()
ODD = r"""0:0;0:0:0;1:0;0/0;1/0;x:0;\infty:\infty;\infty/\infty;\infty-\infty;0\infty;\log_0 x
    \log_1 1;\log_0 0;\log_{-1} 1;0^0;0^{-1};\infty^0;1^\infty;e^\infty;e^{-\infty};\tan 90^\circ
    \{\};\{\{\}\};\emptyset\cup\emptyset;();[];(,);\{,\};\mathbb{R};(-\infty,\infty);x \in \{\}
    0=0;x=x;0x=0;x-x=0;0<1;x<\infty;0 \le 0;1=1;x:x;0x;x/x;x^0;0x:0x;0x+0y=0;|0|;|x|=|x|;|x|\ge 0
    0:00;00:00;12:00;24:00;1:1;2023-01-01;1/1/2000;0-0;1-1;0\times 0;1\times 1;0x0;AA;HT;ab;ba
    A:A;B:A;AB:BA;x:y;[0,0];(0,0);[x,x];\pm 0;0,0;0 \text{ or } 0;0 \approx 0;x \approx x
    \begin{pmatrix} 0 \end{pmatrix};\begin{pmatrix} x \end{pmatrix};0!;\binom{0}{0};\binom{0}{1}
    \sqrt[0]{0};0.\overline{9};\lfloor\infty\rfloor;nan;NaN;inf;undefined;none;no;yes;true;all
    any number;x;k;n;a;?;...;\ldots;=;-;"""


def constants(length: int) -> list[str]:
    """Returns the odd answers, and all that up to `length` pieces spell."""
    answers = [answer.strip() for line in ODD.splitlines() for answer in line.split(";")]
    for count in range(1, length + 1):
        answers += map(" ".join, itertools.product(PIECES, repeat=count))
    return sorted(set(answers))


def classes(answer: str, truths: list[str]) -> list[str]:
    """Returns truths that accept an answer, no two of them the same."""
    found = []
    for truth in truths:
        if is_equivalent(answer, truth) and not any(is_equivalent(truth, one) for one in found):
            found.append(truth)
    return found


def is_bare_number(answer: str) -> bool:
    """Returns whether an answer is a number without a unit, which fits any unit."""
    parsed = parse_answer(answer)
    return parsed is not None and parsed.value is not None and parsed.value[0] == "num"


def table_truths() -> list[str]:
    """Returns all spellings of our tables."""
    blocks = answer_blocks() + answer_blocks("answers_field.txt")
    return [line for block in blocks for mark in "=!" for line in block[mark]]


def suspects(answers: list[str], truths: list[str]) -> dict[str, list[str]]:
    """Returns the answers that several different truths accept, with these truths."""
    found = {}
    for answer in answers:
        parsed = parse_answer(answer)
        if parsed is None or is_bare_number(answer):
            continue
        accepting = classes(answer, truths)
        if len(accepting) > 1:
            found[answer] = accepting
    return found


def main(argv: list[str]) -> None:
    options = parse_options(ConstantOptions, argv)
    truths = table_truths()
    for file in options.data:
        truths += [as_text(example.answer) for example in read_examples(file)]
    truths = list(dict.fromkeys(truths))
    answers = constants(options.length)
    found = suspects(answers, truths)
    print(f"{len(answers):,} answers, {len(truths):,} truths, {len(found)} accepted by several")
    for answer, accepting in sorted(found.items(), key=lambda item: -len(item[1]))[:100]:
        print(f"{answer!r}: {accepting}")


if __name__ == "__main__":
    run_command(main)
