r"""From a formula's text to its tokens: numbers, letters, functions, signs. Standard library only.

Of the text typography.py has made plain LaTeX. A word that is none of maths is an error.

>>> tokenise(r"2\pi ab")
[('num', '2'), ('const', 'pi'), ('var', 'a'), ('var', 'b')]
>>> tokenise(r"\dfrac{1}{x}")[:2], is_product("eggs")
([('sign', 'frac'), ('sign', '{')], False)
"""

import re

from answers.typography import NUMBERS

MAX_TOKENS = 128  # of one formula


class NotMaths(Exception):
    """The text is no formula that we understand: it is compared as a string."""


Token = tuple[str, str]  # its kind (num, var, const, function or sign) and its value


def aliases(table: str) -> dict[str, str]:
    """Returns {alias: name} of a table. Its entries, parted by ; or lines, begin with the name."""
    entries = [entry.split() for entry in table.replace("\n", ";").split(";")]
    return {alias: entry[0] for entry in entries for alias in entry}


THOUSANDS = r"[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])"
_DECIMAL = rf"(?:(?:{THOUSANDS}|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
_TRIG = ("sin", "cos", "tan", "cot", "sec", "csc")
_FUNCTIONS = {"sinh", "cosh", "tanh", "ln", "log", "lg", "exp", "sqrt"}
_FUNCTIONS |= {prefix + name for name in _TRIG for prefix in ("", "arc")}
_FUNCTION = "|".join(sorted(_FUNCTIONS | {"pi"}, key=len, reverse=True))
# A word that begins with a function's name ends there if at most two letters follow: sinx, lnab.
_TOKEN = re.compile(
    rf"""(?P<num>{_DECIMAL}(?:[eE][-+]?[0-9]{{1,3}}(?![0-9A-Za-z.]))?)
    |(?P<command>\\(?:(?:begin|end)\{{[a-zA-Z]+\}}(?:\{{[lcr| ]+\}})?|[a-zA-Z]+|.))
    |(?P<word>[A-Za-z](?=sqrt(?![A-Za-z]))
        |(?:{_FUNCTION})(?=[^A-Za-z]|[A-Za-z]{{0,2}}(?![A-Za-z]))|[A-Za-z]+)
    |(?P<sign><=|>=|!=|[-+*/^_=<>(){{}}\[\]|,;:!&°'])|(?P<space>\s+)|(?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)
_COMMANDS = aliases(r"""
    frac dfrac tfrac cfrac nicefrac sfrac; binom dbinom tbinom; over; choose; cup; pm; mp; infty
    mathbb; row \; emptyset varnothing; lfloor; rfloor; lceil; rceil; * times cdot ast; / div
    : colon; \{ {; \} }; | mid vert lvert rvert Vert |; <= le leq leqslant leqq
    >= ge geq geqslant geqq; < lt; > gt; != ne neq; approx simeq doteq; tan tg; cot ctg
    csc cosec""")
GREEK = set(
    """alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau
    upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell""".split()
)
_WORDS = {"infinity": ("const", "infty"), "and": ("sign", ","), "or": ("sign", ",")}
_WORDS |= {word: ("num", str(number)) for word, number in NUMBERS.items()}
ENGLISH = set("no on is it of to in up as at we he so do go us if an am pm by my me be or".split())
# A run of capitals is one name, as are symbols of elements: HTH is not THH, AB no product of A, B.
_NAME_OF_LETTERS = re.compile("[A-Z]{2,}|(?:[A-Z][a-z]?){2,}")


def _word(word: str) -> list[Token]:
    """Returns a run of letters as a function, a number word, or a product of letters.

    Raises NotMaths for all other words.
    """
    if word in _FUNCTIONS or word == "pi":
        return [_command(word)]
    if word.lower() in _WORDS:
        return [_WORDS[word.lower()]]
    if not is_product(word):
        raise NotMaths
    if _NAME_OF_LETTERS.fullmatch(word):
        return [("var", word)]
    return [("const" if letter in "ei" else "var", letter) for letter in word]


def is_product(word: str) -> bool:
    """Returns whether letters are factors: ax (but not "is"), xyz (no vowel), abc (in order)."""
    if len(word) < 3 and word.lower() not in ENGLISH:
        return True
    in_order = all(ord(b) - ord(a) == 1 for a, b in zip(word, word[1:]))
    return len(word) < 6 and (in_order or not re.search("[aeiouAEIOU]", word))


def _command(name: str) -> Token:
    """Returns the token of a LaTeX command, given without its backslash. Raises NotMaths."""
    name = _COMMANDS.get(name, name)
    if name in _FUNCTIONS:
        return "function", name
    if name in ("pi", "infty"):
        return "const", name
    if name in GREEK:
        return "var", name
    if name in _COMMANDS or name.startswith(("begin{", "end{")):
        return "sign", name
    raise NotMaths


def tokenise(text: str) -> list[Token]:
    """Returns the tokens of a text. Raises NotMaths."""
    tokens = []
    depth = 0  # of brackets: in there, commas part numbers
    for match in _TOKEN.finditer(text):
        if len(tokens) > MAX_TOKENS:
            raise NotMaths
        # The group that matched says what it is; spaces are passed over.
        kind, value = match.lastgroup, match[0]
        if kind == "sign":
            depth += (value in "([") - (value in ")]")
            tokens.append((kind, value))
        elif kind == "num":  # (1,234) is a pair
            for part in value.split(",") if depth > 0 else [value.replace(",", "")]:
                tokens += [(kind, part), ("sign", ",")]
            del tokens[-1]
        elif kind == "word":
            tokens += _word(value)
        elif kind == "command":
            tokens.append(_command(value[1:]))
            depth += (value == r"\{") - (value == r"\}")
        elif kind == "other":
            raise NotMaths
    return tokens
