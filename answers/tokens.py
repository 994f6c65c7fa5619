r"""From a formula's text to its tokens: numbers, names, functions, signs. Standard library only.

Of the text that typography.py has made plain. A word that is none of maths is an error.

>>> tokenise(r"2\pi ab")
[('num', '2'), ('const', 'pi'), ('var', 'a'), ('var', 'b')]
>>> tokenise(r"\frac{f(2)}{x_{1}}")[2:6:3], is_product("eggs")
([('var', 'f(2)'), ('var', 'x_1')], False)
"""

import re

from answers.typography import NUMBERS

MAX_TOKENS = 128  # of one formula


class NotMaths(Exception):
    """The text is no formula that we understand: it is compared as a string."""


Token = tuple[str, str]  # its kind (num, var, const, function or sign) and its value

THOUSANDS = r"[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])"
_DECIMAL = rf"(?:(?:{THOUSANDS}|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
_TRIG = ("sin", "cos", "tan", "cot", "sec", "csc")
_FUNCTIONS = {"ln", "log", "lg", "exp", "sqrt", "abs", "floor", "ceil"}
_FUNCTIONS |= {prefix + name for name in _TRIG for prefix in ("", "arc")}
_FUNCTION = "|".join(sorted(_FUNCTIONS | {"pi"}, key=len, reverse=True))
# f(0) is no product, and neither are f^{-1}(x), I(0) and the y(t) of y(t) = 2t; n(n + 1) is one.
_CALL = r"[fghFGHPE](?:'+|\^\{-1\})?\s?\([^(),]*\)|[a-zA-Z]\((?:[0-9]+\)|[a-z]\)(?=\s?=))"
# A word that begins with a function's name ends there if at most two letters follow: sinx, lnab.
_TOKEN = re.compile(
    rf"""(?P<num>{_DECIMAL}(?:[eE][-+]?[0-9]{{1,3}}(?![0-9A-Za-z.]))?)
    |(?P<call>(?<![a-zA-Z\\])(?:{_CALL}))
    |(?P<command>\\(?:[a-zA-Z]+|.))
    |(?P<word>[A-Za-z](?=sqrt(?![A-Za-z]))
        |(?:{_FUNCTION})(?=[^A-Za-z]|[A-Za-z]{{0,2}}(?![A-Za-z]))|[A-Za-z]+)
    |(?P<suffix>_(?:\{{[^{{}}]*\}}|\\?[A-Za-z0-9])|'+)
    |(?P<sign><=|>=|!=|[-+*/^=<>(){{}}\[\],;:!°])|(?P<space>\s+)|(?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)
# The commands that are signs, each by the name that formulas.py has for it.
_SIGNS = {name: name for name in "frac binom over choose cup in approx mathbb emptyset".split()}
_SIGNS |= {"times": "*", "cdot": "*", "ast": "*", "div": "/", "colon": ":", "{": r"\{", "}": r"\}"}
_SIGNS |= {"le": "<=", "leq": "<=", "leqslant": "<=", "leqq": "<=", "lt": "<", "gt": ">"}
_SIGNS |= {"ge": ">=", "geq": ">=", "geqslant": ">=", "geqq": ">=", "ne": "!=", "neq": "!="}
_SIGNS |= {"simeq": "approx", "varnothing": "emptyset"}
_NAMES = {"tg": "tan", "ctg": "cot", "cosec": "csc"}
GREEK = set(
    """alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau
    upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell""".split()
)
_WORDS = {word: ("num", str(number)) for word, number in NUMBERS.items()}
_WORDS |= {"infinity": ("const", "infty"), "and": ("sign", ","), "or": ("sign", ",")}
ENGLISH = set("no on is it of to in up as at we he so do go us if an am pm by my me be or".split())
# A run of capitals is one name, as are symbols of elements: HTH is not THH, AB no product of A, B.
_NAME_OF_LETTERS = re.compile("[A-Z]{2,}|(?:[A-Z][a-z]?){2,}")


def is_product(word: str) -> bool:
    """Returns whether letters are factors: ax (but not "is"), xyz (no vowel), abc (in order)."""
    if len(word) < 3 and word.lower() not in ENGLISH:
        return True
    in_order = all(ord(b) - ord(a) == 1 for a, b in zip(word, word[1:]))
    return len(word) < 6 and (in_order or not re.search("[aeiouAEIOU]", word))


def _word(word: str) -> list[Token]:
    """Returns a run of letters as a function, a number word, or a product. Raises NotMaths."""
    if word in _FUNCTIONS or word == "pi":
        return [_command(word)]
    if word.lower() in _WORDS:
        return [_WORDS[word.lower()]]
    is_name = _NAME_OF_LETTERS.fullmatch(word)
    if not is_product(word) and not (is_name and len(word) == 2):
        raise NotMaths
    if is_name:
        return [("var", word)]
    return [("const" if letter == "e" else "var", letter) for letter in word]


def _command(name: str) -> Token:
    """Returns the token of a LaTeX command, given without its backslash. Raises NotMaths."""
    name = _NAMES.get(name, name)
    if name in _FUNCTIONS:
        return "function", name
    if name in ("pi", "infty"):
        return "const", name
    if name in GREEK:
        return "var", name
    if name in _SIGNS:
        return "sign", _SIGNS[name]
    raise NotMaths


def _suffix(tokens: list[Token], suffix: str) -> None:
    r"""Adds a subscript or primes to the name before it: x_1, x_{max}, f'. A base is an operand."""
    inside = re.sub("[_{} ]", "", suffix)
    kind, value = tokens[-1] if tokens else ("", "")
    if kind == "function":  # \log_2 8
        tokens += [("sign", "_"), ("sign", "{"), *tokenise(inside), ("sign", "}")]
    elif kind in ("var", "const"):
        tokens[-1] = ("var", value + suffix[0].strip("'") + inside)
    else:
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
        elif kind == "call":
            tokens.append(("var", value.replace(" ", "")))
        elif kind == "command":
            tokens.append(_command(value[1:]))
            depth += (value == r"\{") - (value == r"\}")
        elif kind == "suffix":
            _suffix(tokens, value)
        elif kind == "other":
            raise NotMaths
    return tokens
