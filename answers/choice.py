"""Multiple choice: which option does an answer name?"""

import re
from functools import lru_cache

from answers.equivalence import is_equivalent
from answers.typography import plain
from answers.values import Budget

_LETTER = re.compile(  # the letter, what sets it off from a text, the text
    r"(?i)[(\[]?(?:(?:option|choice) ?:? ?)?[(\[]?([A-P])(?![\w'^])"
    r"( -+>? | ?→|[)\]]{0,2} ?[.:;,]?) ?(.*)"
)
_LETTER_LAST = re.compile(r"(.+?),? (?:\(|option |which is )(?:option )?([A-P])\)?")
_NOT_ANOTHER = re.compile(r"(.+?)(?:, not|,? rather than|,? instead of| \(not) \(?(.+?)\)*")
# Other letters among words: A, (a), option a; but not the article of "A dog".
_OTHER_LETTERS = re.compile(
    r"""\b([A-P])\b(?! (?!or\b|and\b|is\b)[a-z])"""
    r"""|(?i:[(\["']([A-P])[)\]"']|(?:option|choice|answer) ?:? ?([A-P])\b)"""
)
_JOINTS = re.compile(r"[,;/=]|\b(?:or|and|but|not)\b")
# Words that take the letter back: B: wrong, B is not it, B or none. "B: No" echoes the prompts.
_TAKEN_BACK = re.compile(
    r"(?i)^(?:no\b|[A-Z]$|(?:is )?not\b(?! enough)|(?:(?:it|this|that) is )?(?:wrong|false|untrue)"
    r"|never|neither\b(?! nor)|none|impossible|(?:it is )?(?:rejected|discarded|unlikely))"
    r"|\b(?:not|n't|never) (?:the |an? )?(?:correct|right|true|answer|best|it\b|this\b|chosen)"
    r"|\bincorrect|(?<!others |..rest )\b(?:is|are|was|be|looks|seems) (?:wrong|false|excl|elimin)"
    r"|\b(?:all|both|none|any|either|neither) (?:of|are|is)\b|\b(?:maybe|perhaps|probably)\b"
    r"|\b(?:or|and|but) (?:none|not|neither|both|all|any)"
)


def choose(answer: str, options: dict[str, str]) -> str | None:
    """Returns the letter of the one option that an answer names; None if it names none or several.

    The first row that fits decides:

       the answer is                                  with A: 2, B: 3      it names
    1  a letter                                       B                    B
    2  the very text of one option                    3                    B
    3  a letter alone, or with its own text           (b), B: 6/2, 3 (B)   B
       (texts count with their case, unless none is the same)
    4  a letter set off from words about nothing else B: it is odd         B
    5  a capital set off from anything else           B: 2, B: A or B      none
    6  equivalent to one option                       x = 3                B
    7  anything else                                  2 or 3, it is odd    none
    """
    text = plain(answer.replace("\n", "; "))
    if text in options:
        return text  # row 1
    exact = _same_texts(answer, options)
    if len(exact) == 1:
        return exact[0]  # row 2
    budget = Budget()
    match = _NOT_ANOTHER.fullmatch(text)  # B, not A
    others = (_same_texts(match[2], options) or [match[2]]) if match else []
    if match and others[0] in options:
        chosen = choose(match[1], options)
        return None if chosen in others else chosen
    match = _LETTER_LAST.fullmatch(text)
    if match and match[2] in options and is_equivalent(match[1], options[match[2]], budget):
        return match[2]  # row 3
    match = _LETTER.fullmatch(text)
    letter = match[1].upper() if match else ""
    if letter in options:
        mark, words = match[2].strip(), match[3].strip()
        same = _same_texts(words, options) or [letter]
        if not words or letter in same and is_equivalent(words, options[letter], budget):
            return letter  # row 3
        # A capital may be set off by any mark; "a." or "a," may be a word.
        is_capital = match[1].isupper()
        if mark and (is_capital or mark[0] in ":)]"):
            others = {other: option for other, option in options.items() if other != letter}
            own = options[letter]
            said = re.sub(rf"^{re.escape(own)}(?!\w)", "", words, flags=re.IGNORECASE)
            if not (_TAKEN_BACK.search(said) or _names_any(words, others, budget)):
                return letter  # row 4
        if mark and is_capital:
            return None  # row 5
    equivalent = [key for key, option in options.items() if is_equivalent(answer, option, budget)]
    return equivalent[0] if len(equivalent) == 1 else None  # rows 6 and 7


@lru_cache(maxsize=4096)
def _spelling(text: str) -> str:
    return "".join(plain(text).split())


def _same_texts(text: str, options: dict[str, str]) -> list[str]:
    """Returns the letters of the options with this text; if there are any, with its very case."""
    spelling = _spelling(text)
    if not spelling:
        return []
    cased = [key for key, option in options.items() if _spelling(option) == spelling]
    folded = spelling.casefold()
    return cased or [key for key in options if _spelling(options[key]).casefold() == folded]


def _names_any(words: str, options: dict[str, str], budget: Budget) -> bool:
    """Returns whether words name one of these options: by letter, by text, or by text in part."""
    if any(
        letter.upper() in options for found in _OTHER_LETTERS.findall(words) for letter in found
    ):
        return True
    said = words.casefold()
    if any(len(text) > 2 and text.casefold() in said for text in options.values()):
        return True
    texts = {words, *filter(str.strip, _JOINTS.split(words))}  # 12 or 24
    return any(is_equivalent(text, option, budget) for text in texts for option in options.values())
