"""Multiple choice: which option does an answer name?"""

import re

from answers.equivalence import is_equivalent, same_text
from answers.formulas import Budget
from answers.typography import plain

_LETTER = re.compile(  # the letter, what sets it off from a text, the text
    r"[(\[]?(?:(?:option|choice) ?:? ?)?[(\[]?([A-P])(?![\w'^])"
    r"( - |[)\]]{0,2} ?[.:;,]?) ?(.*)",
    re.IGNORECASE,
)
_LETTERS_BEHIND = re.compile(
    r"(?:^|[,;/&(]|\b(?:or|and)\b) ?\(?([A-P])(?=[).:,;/&]| (?:or|and)\b| ?$)|\b([A-P])[:)]"
)
_NAMED = re.compile(r"""[(\["']([A-P])[)\]"']|(?:OPTION|CHOICE|ANSWER) ?:? ?([A-P])\b""")
_JOINTS = re.compile(r"[,;/=]|\b(?:or|and|but|not)\b")
_ECHO = re.compile(r"\(?B[:.)]{1,2} ?No", re.IGNORECASE)  # the example in the paper's prompts


def choose(answer: str, options: dict[str, str]) -> str | None:
    """Returns the letter of the one option that an answer names; None if it names none or several.

    The first row that fits decides:

       the answer is                                  with A: 2, B: 3      it names
    1  a letter                                       B                    B
    2  the very text of one option                    3                    B
    3  a letter alone, or with its own text           (b), Option B: 6/2   B
    4  a letter set off from words about nothing else B: it is odd         B
    5  a capital set off from anything else           B: 2, B: A or B      none
    6  equivalent to one option                       x = 3                B
    7  anything else                                  2 or 3, it is odd    none
    """
    text = plain(answer.replace("\n", "; "))
    if text in options:
        return text  # row 1
    exact = [letter for letter, option in options.items() if same_text(answer, option)]
    if len(exact) == 1:
        return exact[0]  # row 2
    budget = Budget()
    match = _LETTER.fullmatch(text)
    letter = match[1].upper() if match else ""
    if letter in options:
        mark, words = match[2].strip(), match[3].strip()
        if not words or is_equivalent(words, options[letter], budget):
            return letter  # row 3
        # A capital may be set off by any mark; "a." or "a," may be a word.
        is_capital = match[1].isupper()
        if mark and (is_capital or mark[0] in ":)]"):
            others = {other: option for other, option in options.items() if other != letter}
            if not _names_any(words, others, budget) and not _ECHO.fullmatch(text):
                return letter  # row 4
        if mark and is_capital:
            return None  # row 5
    equivalent = [key for key, option in options.items() if is_equivalent(answer, option, budget)]
    return equivalent[0] if len(equivalent) == 1 else None  # rows 6 and 7


def _names_any(words: str, options: dict[str, str], budget: Budget) -> bool:
    """Returns whether words name one of these options: by letter, by text, or by text in part."""
    letters = _LETTERS_BEHIND.findall(words) + _NAMED.findall(words.upper())
    if any((one or other) in options for one, other in letters):
        return True
    texts = [words]
    parts = [part for part in _JOINTS.split(words) if part.strip()]
    if len(parts) > 1:  # 12 or 24
        texts += parts
    return any(is_equivalent(text, option, budget) for text in texts for option in options.values())
