r"""Formulas in LaTeX and plain maths: from a text to a tree.

Standard library only. Nothing is ever evaluated by Python or a computer algebra system (sympy's
parser calls `eval`, and 9**9**9**9 would run for ever), and every call is short: lengths and
nesting are capped. `tokenise` cuts the text that typography.py has made plain into tokens, `Parser`
turns them into a tree, and values.py gives its value.

>>> tokenise(r"2\pi a_{1}b")
[('num', '2'), ('const', 'pi'), ('var', 'a_1'), ('var', 'b')]
>>> parse_formula(r"\frac{1}{2} + 2x")
('+', ('/', ('num', 1), ('num', 2)), ('*', ('num', 2), ('var', 'x')))
>>> parse_formula("0 < x <= 1")
('chain', (('num', 0), ('var', 'x'), ('num', 1)), ('<', '<='))
"""

import re
from fractions import Fraction

from answers.typography import NUMBERS

MAX_TOKENS = 128  # of one formula
MAX_DEPTH = 24  # of brackets, fractions and powers in one another


class NotMaths(Exception):
    """The text is no formula that we understand: it is compared as a string."""


# --- From a text to tokens ------------------------------------------------------------------------

Token = tuple[str, str]  # its kind (num, var, const, function or sign) and its value

THOUSANDS = r"[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])"
_DECIMAL = rf"(?:(?:{THOUSANDS}|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
_TRIG = ("sin", "cos", "tan", "cot", "sec", "csc")
_FUNCTIONS = ["ln", "log", "lg", "exp", "sqrt", *("arc" + name for name in _TRIG), *_TRIG]
_GREEK = """alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau
    upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell""".split()
_SIGNS = "frac binom cup in approx mathbb emptyset".split()
# Each command that we know, and what kind of token it is.
_KINDS = dict.fromkeys([*_FUNCTIONS, "abs", "floor", "ceil"], "function")
_KINDS |= dict.fromkeys(_GREEK, "var") | dict.fromkeys(_SIGNS, "sign")
_KINDS |= {"pi": "const", "infty": "const"}
_FUNCTION = "|".join([*_FUNCTIONS, "pi"])
# f(0) is no product, and neither are f^{-1}(x), I(0) and the y(t) of y(t) = 2t; n(n + 1) is one.
_CALL = r"[fghFGHPE](?:'+|\^\{-1\})?\s?\([^(),]*\)|[a-zA-Z]\((?:[0-9]+\)|[a-z]\)(?=\s?=))"
# A word that begins with a function's name ends there if at most two letters follow: sinx, lnab.
_TOKEN = re.compile(
    rf"""(?P<num>{_DECIMAL}(?:[eE][-+]?[0-9]{{1,3}}(?![0-9A-Za-z.]))?)
    |(?P<call>(?<![a-zA-Z\\])(?:{_CALL}))
    |(?P<sign>\\[{{}}]|<=|>=|!=|[-+*/^=<>(){{}}\[\],;:!°])|\\(?P<command>[a-zA-Z]+)
    |(?P<word>[A-Za-z](?=sqrt(?![A-Za-z]))
        |(?:{_FUNCTION})(?=[^A-Za-z]|[A-Za-z]{{0,2}}(?![A-Za-z]))|[A-Za-z]+)
    |(?P<suffix>_(?:\{{[^{{}}]*\}}|\\?[A-Za-z0-9])|'+)
    |(?P<space>\s+)|(?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)
_WORDS = {word: ("num", str(number)) for word, number in NUMBERS.items()}
_WORDS |= {"infinity": ("const", "infty")}
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
        return [(_KINDS[word], word)]
    if word.lower() in _WORDS:
        return [_WORDS[word.lower()]]
    is_name = _NAME_OF_LETTERS.fullmatch(word)
    if not is_product(word) and not (is_name and len(word) == 2):
        raise NotMaths
    if is_name:
        return [("var", word)]
    return [("const" if letter == "e" else "var", letter) for letter in word]


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
            depth += (value in ("(", "[", r"\{")) - (value in (")", "]", r"\}"))
            tokens.append((kind, value))
        elif kind == "num":  # (1,234) is a pair
            for part in value.split(",") if depth > 0 else [value.replace(",", "")]:
                tokens += [(kind, part), ("sign", ",")]
            del tokens[-1]
        elif kind == "word":
            tokens += _word(value)
        elif kind == "call":
            tokens.append(("var", value.replace(" ", "")))
        elif kind == "command" and match[kind] in _KINDS:
            tokens.append((_KINDS[match[kind]], match[kind]))
        elif kind == "suffix":
            _suffix(tokens, value)
        elif kind != "space":
            raise NotMaths
    return tokens


# --- From tokens to a tree ------------------------------------------------------------------------

# ("num", 3), ("var", "x"), ("const", "pi"), ("+", left, right), ("call", "sin", x), ("set", items)
Node = tuple
INFINITY = ("const", "infty")
MINUS_INFINITY = ("neg", INFINITY)

_RELATIONS = {"=", "<", ">", "<=", ">=", "!=", "approx", "in"}
# How tightly a sign binds what stands beside it.
_INFIX = dict.fromkeys(_RELATIONS, 1)
_INFIX |= {"cup": 3, ":": 4, "+": 5, "-": 5, "*": 6, "/": 6, "^": 8}
_CLOSING = {"(": ")]", "[": ")]", "{": "}", r"\{": r"\}"}
END = ("end", "")


_MIRRORED = {">": "<", ">=": "<="}


def parse_formula(text: str) -> Node:
    """Returns the tree of a formula. Of a > b it is that of b < a. Raises NotMaths."""
    parser = Parser(tokenise(text))
    tree = parser.expression(0)
    if parser.peek() != END:
        raise NotMaths
    if tree[0] == "chain" and set(tree[2]) <= set(_MIRRORED):
        return "chain", tree[1][::-1], tuple(_MIRRORED[sign] for sign in tree[2][::-1])
    return tree


def _number(text: str) -> Node:
    value = Fraction(text.rstrip("."))
    return "num", int(value) if value.denominator == 1 else value


class Parser:
    """Precedence climbing over the tokens of a formula. Raises NotMaths for anything malformed.

    Pratt, "Top down operator precedence", POPL 1973.
    """

    def __init__(self, tokens: list[Token]):
        self.tokens = [*tokens, END]
        self.place = 0
        self.depth = 0

    def peek(self, ahead: int = 0) -> Token:
        return self.tokens[self.place + ahead]

    def take(self) -> Token:
        token = self.tokens[self.place]
        if token == END:
            raise NotMaths
        self.place += 1
        return token

    def next_is(self, sign: str) -> bool:
        """Takes the sign if it comes next, and returns whether it did."""
        found = self.tokens[self.place] == ("sign", sign)
        self.place += found
        return found

    def expression(self, power: int) -> Node:
        """Returns the tree of all that comes next and binds tighter than `power`."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise NotMaths
        # 1. The first operand.
        left = self.postfix(self.prefix())
        # 2. As long as the next sign binds tighter, it and its right side join what stands left.
        while True:
            kind, value = self.peek()
            if kind == "sign" and value in _INFIX:
                binding = _INFIX[value]
                if binding <= power:
                    break
                self.place += 1
                left = self.infix(left, value, binding)
            elif self.begins_factor() and power < _INFIX["*"]:
                # 2x: a product without a sign.
                left = ("*", left, self.expression(_INFIX["*"]))
            else:
                break
        self.depth -= 1
        return left

    def infix(self, left: Node, sign: str, binding: int) -> Node:
        """Returns what stands left of a sign, the sign, and what follows as one tree."""
        if sign == "^":
            return "^", left, self.script()
        right = self.expression(binding)
        if sign in _RELATIONS:  # a chain a < b <= c is one node: its terms, and its signs
            terms, signs = left[1:] if left[0] == "chain" else ((left,), ())
            return "chain", (*terms, right), (*signs, sign)
        if sign in ("cup", ":"):  # and so is a \cup b \cup c
            name = "union" if sign == "cup" else "ratio"
            terms = left[1] if left[0] == name else (left,)
            return name, (*terms, right)
        return sign, left, right

    def begins_factor(self) -> bool:
        """Returns whether what comes next multiplies what stands before it, without a sign."""
        kind, value = self.peek()
        if kind == "sign":
            return value in (*_CLOSING, "frac", "binom")
        if kind != "num":
            return kind != "end"
        # Of numbers 3!7!, (2)3, \pi 2, x2^3 and x^2 3^2 are products; 2 3, x2 and S3 are not.
        before, after = self.peek(-1), self.peek(1)
        if before[1] in ("!", ")", "}") or before[0] == "const":
            return True
        return after == ("sign", "^") and (before[0] == "var" or self.peek(-2) == ("sign", "^"))

    def prefix(self) -> Node:
        """Returns an operand: a number, a name, a function, or what a sign or a bracket opens."""
        kind, value = self.take()
        if kind == "num":
            return _number(value)
        if kind in ("var", "const"):
            return kind, value
        if kind == "function":
            return self.root() if value == "sqrt" else self.function(value)
        if value in ("-", "+"):
            if self.peek()[1] in ("-", "+"):  # --5
                raise NotMaths
            operand = self.expression(_INFIX["-"])
            return ("neg", operand) if value == "-" else operand
        if value in _CLOSING:
            return self.bracket(value)
        if value == "frac":
            return "/", self.prefix(), self.prefix()
        if value == "binom":
            return "call", "binom", self.prefix(), self.prefix()
        if value == "emptyset":
            return "set", ()
        if value == "mathbb" and self.prefix() == ("var", "R"):
            return "seq", "()", (MINUS_INFINITY, INFINITY)
        raise NotMaths

    def postfix(self, node: Node) -> Node:
        """Returns the node with the factorials and degrees that follow it."""
        while True:
            if self.next_is("!"):
                if self.peek() == ("sign", "!"):  # 5!! = 15 is no factorial of a factorial
                    raise NotMaths
                node = ("call", "factorial", node)
            elif self.next_is("°"):
                node = ("call", "degrees", node)
            else:
                return node

    def script(self) -> Node:
        """Returns an exponent: a group, or a single factor with its sign and its own exponent."""
        if self.next_is("-"):
            return "neg", self.script()
        self.next_is("+")
        base = self.postfix(self.prefix())
        return ("^", base, self.script()) if self.next_is("^") else base

    def function(self, name: str) -> Node:
        r"""Returns a function's call: \sin^2 x, \log_2 8, \tan^{-1} 1.

        A bracket or group is the whole argument, else the factors that follow.
        """
        # 1. Behind the name a power and a base, in either order: \log^2_3, \log_3^2.
        power = self.script() if self.next_is("^") else None
        base = (self.script(),) if self.next_is("_") else ()
        if base and self.next_is("^"):
            power = self.script()
        if base and name != "log":  # \sin_2 x
            raise NotMaths
        # 2. The argument.
        if self.peek() in (("sign", "("), ("sign", "{")):
            argument = self.postfix(self.prefix())
        else:
            argument = self.expression(_INFIX["*"])
            while self.peek()[0] in ("var", "const"):  # \sin 2 x
                argument = ("*", argument, self.expression(_INFIX["*"]))
        # 3. \sin^{-1} x is no 1 / sin x.
        if power == ("neg", ("num", 1)):
            return "call", "arc" + name, argument
        if name == "lg":
            name, base = "log", (("num", 10),)
        elif name == "log" and not base:
            name = "ln"
        call = ("call", name, argument, *base)
        return call if power is None else ("^", call, power)

    def root(self) -> Node:
        r"""Returns \sqrt{2}, \sqrt[3]{2} or \sqrt 12 (TeX would take the 1 only; people do not)."""
        degree = self.bracket("[")[-1] if self.next_is("[") else ()
        if len(degree) > 1:
            raise NotMaths
        argument = _number(self.take()[1]) if self.peek()[0] == "num" else self.prefix()
        return "call", "sqrt", argument, *degree

    def bracket(self, opening: str) -> Node:
        r"""Returns what a bracket holds, behind its opening: (a), (a, b), [a, b), {a}, \{a, b\}.

        An interval may begin with ( and end with ].
        """
        items = []
        while self.peek()[1] not in (")", "]", "}", r"\}"):
            items.append(self.expression(0))
            if not (self.next_is(",") or self.next_is(";")):
                break
        _, closing = self.take()
        if closing not in _CLOSING[opening]:
            raise NotMaths
        if opening == r"\{" or opening == "{" and len(items) > 1:
            return "set", tuple(items)
        if not items:
            raise NotMaths
        brackets = opening + closing
        if brackets == "[]" and all(row[:2] == ("seq", "[]") and len(row[2]) == 1 for row in items):
            return "seq", "", tuple(row[2][0] for row in items)  # a column, in any bracket
        # A single item in round brackets is itself, and so is a matrix in any.
        is_matrix = items[0][:2] == ("seq", "[]") and items[0][2][0][0] == "seq"
        is_itself = brackets in ("()", "{}") or is_matrix or items[0][1] == ""
        return items[0] if len(items) == 1 and is_itself else ("seq", brackets, tuple(items))
