r"""Formulas in LaTeX and plain maths: from a text to a tree, and from a tree to a value. Standard library only.

Nothing is ever evaluated by Python or a computer algebra system (sympy's parser calls `eval`, and 9**9**9**9 would run
for ever), and every call is short: lengths, nesting, numbers and the work done are capped. Four steps, top to bottom:

1. `plain` drops what is typography only: spaces, $, \left, \text{..}, markdown.
2. `tokenise` cuts the rest into numbers, letters, commands and signs. A word that is none of maths is an error.
3. `Parser` turns tokens into a tree, by precedence climbing (Pratt, "Top down operator precedence", POPL 1973).
4. `Evaluator` gives a tree's value: exact (int, Fraction) as long as it can, else a float with a bound on its error.

>>> tree = Parser(tokenise(plain(r"$\frac{1}{2} + 2x$"))).parse()
>>> tree
('+', ('/', ('num', 1), ('num', 2)), ('*', ('num', 2), ('var', 'x')))
>>> Evaluator({"x": Fraction(3, 4)}, [MAX_WORK])(tree)
Fraction(2, 1)
"""
import cmath
import math
import re
import zlib
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

MAX_CHARS = 512   # longer answers are refused
MAX_TOKENS = 128  # of one formula
MAX_DEPTH = 24    # of brackets, fractions and powers in one another
MAX_BITS = 2**15  # of an exact number: 2019^{2020} has 22,178
MAX_WORK = 2**19  # bits of all exact numbers that one comparison may compute, and 64 for every node it visits

Node = tuple  # ("num", 3), ("var", "x"), ("const", "pi"), ("+", left, right), ("call", "sin", argument), ("set", items)


class NotMaths(Exception):
    """The text is no formula that we understand: it is compared as a string."""


class NoValue(Exception):
    """The tree has no value there: out of its domain, of unknown kind, or too large."""


# --- Typography -------------------------------------------------------------------------------------------------------

_UNICODE = str.maketrans({
    "−": "-", "–": "-", "—": "-", "×": "*", "·": "*", "⋅": "*", "∙": "*", "÷": "/", "⁄": "/", "∕": "/", "∶": ":",
    "π": r"\pi ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "√": r"\sqrt ", "∞": r"\infty ", "±": r"\pm ",
    "∪": r"\cup ", "∈": r"\in ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "≤": "<=", "≥": ">=", "⩽": "<=", "⩾": ">=",
    "≠": "!=", "≈": r"\approx ", "′": "'", "‘": "'", "’": "'", "“": '"', "”": '"', "½": r"\frac12 ", "⅓": r"\frac13 ",
    "⅔": r"\frac23 ", "¼": r"\frac14 ", "¾": r"\frac34 ", "…": "...", "º": "°"})
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+|[₀₁₂₃₄₅₆₇₈₉]+")  # a run is one exponent or subscript: 10¹² is 10^{12}
_DIGITS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻₀₁₂₃₄₅₆₇₈₉", "0123456789-0123456789")


def _raised(match: re.Match) -> str:
    digits = match[0].translate(_DIGITS)
    return ("_" if match[0][0] in "₀₁₂₃₄₅₆₇₈₉" else "^") + (digits if len(digits) == 1 else f"{{{digits}}}")


_BOLD = re.compile(r"(?<![\w)])\*\*([^*]+)\*\*(?!\w)")
_MACRO = r"\\(?:(?:text|math)(?:bf|it|rm|sf|tt|normal)?|[fm]box|boxed|operatorname|boldsymbol|bm)\s*"
_WRAPPED = re.compile(_MACRO + r"\{(.*)\}")
_LATEX = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"(?<=[0-9])(?:\{,\}|,\\! ?|\\[,! ])(?=[0-9]{3}(?![0-9]))", ""),  # 1{,}234
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|phantom)(?![a-zA-Z])\.?", ""),
    (r"(?<!\\)\\[,;:! ()\[\]]|\\q?quad(?![a-zA-Z])|~|\\hspace\{[^{}]*\}", " "),
    (r"\^\s*(?:\{\s*)?\\(?:circ|degree)(?![a-zA-Z])(?:\s*\})?|\\degree(?![a-zA-Z])", "°"),
    (r"\^ ?\{? ?\\(?:text|mathrm) ?\{ ?(st|nd|rd|th) ?\} ?\}?", r"\1"), (_MACRO + r"\{([^{}]*)\}", r" \1 "),
    (r",? ?\(?[a-z] ?\\in ?\\mathbb ?\{?[ZN]\}?\)?[ .]*$", ""),  # with k any whole number: it goes without saying
    (r"\\(?:lor|vee)(?![a-zA-Z])", " or "), (r"\\(?:land|wedge)(?![a-zA-Z])", " and "),
    (r"\\(?:[lc]dots|dots[bcimo]?)(?![a-zA-Z])", "..."), (r"\\langle(?![a-zA-Z])", "("),
    (r"\\rangle(?![a-zA-Z])", ")"), (r"\\([lr])brace(?![a-zA-Z])", lambda m: {"l": "\\{", "r": "\\}"}[m[1]]))]
_PREAMBLE = re.compile(r"^(?:(?:the )?(?:final |correct |best )?(?:answer|option|choice) ?(?:is|:|=) ?:? ?"
                       r"|(?:\\approx|=) ?)", re.IGNORECASE)
_NUMBERS = {word: n for n, word in enumerate("""zero one two three four five six seven eight nine ten eleven twelve
    thirteen fourteen fifteen sixteen seventeen eighteen nineteen""".split())}
_TENS = {word: 10 * n for n, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
_NUMBERS |= _TENS
_WORD = re.compile("[a-zA-Z]{4}")
_COMPOUND = re.compile(rf"\b({'|'.join(_TENS)})[- ]({'|'.join([*_NUMBERS][1:10])})\b", re.IGNORECASE)  # twenty-five
_ZEROS = {"thousand": 3, "million": 6, "billion": 9}
_LARGE = re.compile(rf"(?<=[0-9]) ?({'|'.join(_ZEROS)})\b", re.IGNORECASE)
_BUILDER = re.compile(r"\\?\{ ?([a-zA-Z])(?: ?\\in ?\\mathbb ?\{?R\}?)? ?(?:\\mid|\\vert|\||:) ?([^{}]*\1[^{}]*?)"
                      r"\\?\}")  # {x | x > 3}
_TIMES = re.compile(r"(?<=[0-9]) ?x ?(?=[0-9])")
_SINGLE = re.compile(r"\(([^(),]*)\)")
_REPEATING = re.compile(r"([0-9]*)\.([0-9]*)\\(?:overline|bar|dot)\s*(?:\{([0-9]+)\}|([0-9]))")


def _repeating(match: re.Match) -> str:
    r"""0.1\overline{6} as (15/90): the digits with one period, less those without it."""
    whole, fixed, period = match[1] or "0", match[2], match[3] or match[4]
    return f"({int(whole + fixed + period) - int(whole + fixed)}/{(10**len(period) - 1) * 10**len(fixed)})"


def _unwrapped(text: str) -> str:
    r"""What the macro around the whole text holds, however nested: \boxed{\frac{1}{2}} -> \frac{1}{2}."""
    while match := _WRAPPED.fullmatch(text.strip()):
        depths = accumulate((c == "{") - (c == "}") for c in match[1])
        if min(depths, default=0) < 0:  # \text{a} + \text{b}
            break
        text = match[1]
    return text


def plain(text: str) -> str:
    r"""One line without spacing, typographic signs, markdown and text macros: **\text{B}.** -> B. "" if too long."""
    if len(text) > MAX_CHARS:
        return ""
    if not text.isascii():
        text = _RAISED.sub(_raised, text.translate(_UNICODE))
        if len(text) > MAX_CHARS:  # some signs stand for many letters
            return ""
    text = " ".join(text.split())
    if "\\" in text:
        text = text.replace("\\$", "¤").replace("\\%", "%").replace("\\&", "&")
    if "$" in text:
        money = text.count("$") == 1  # pairs enclose formulas
        text = " ".join(text.replace("$", "¤" if money else " ").split())
    if "**" in text:
        text = re.sub(r"(?<=[\w)]) ?\*\* ?(?=[\w(-])", "^", _BOLD.sub(r"\1", text))  # **bold**, then 2**3
    if "\\" in text or "~" in text or "{,}" in text or "{:}" in text:
        text = _unwrapped(text)
        for pattern, replacement in _LATEX:
            text = pattern.sub(replacement, text)
        text = _REPEATING.sub(_repeating, text.replace("{,}", ".").replace("{:}", ":"))
        text = " ".join(text.split())
    text = _TIMES.sub("*", text)
    if _WORD.search(text):
        text = _COMPOUND.sub(lambda match: str(_NUMBERS[match[1].lower()] + _NUMBERS[match[2].lower()]), text)
        text = _LARGE.sub(lambda match: f"*10^{_ZEROS[match[1].lower()]}", text)
    text = _PREAMBLE.sub("", text.strip("*_` ").rstrip("\\ ")).strip("*_` ")
    text = text if text.endswith("...") else text.rstrip(".,; ")
    if single := _SINGLE.fullmatch(text) or _BUILDER.fullmatch(text):  # (B), (-3), but not the pair (1,234)
        text = single[single.lastindex].strip()                        # {x | x > 3}
    return text


# --- Tokens -----------------------------------------------------------------------------------------------------------

THOUSANDS = r"[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])"
_DECIMAL = rf"(?:(?:{THOUSANDS}|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
_TRIG = ("sin", "cos", "tan", "cot", "sec", "csc")
_FUNCTIONS = {*_TRIG, *("arc" + f for f in _TRIG), *(f + "h" for f in _TRIG[:3]), "ln", "log", "lg", "exp", "sqrt"}
_FUNCTION = "(?:arc)?(?:" + "|".join(_TRIG) + ")h?|ln|log|lg|exp|sqrt|pi"
_TOKEN = re.compile(rf"""(?P<num>{_DECIMAL}(?:[eE][-+]?[0-9]{{1,3}}(?![0-9A-Za-z.]))?)
    |(?P<command>\\(?:(?:begin|end)\{{[a-zA-Z]+\}}(?:\{{[lcr| ]+\}})?|[a-zA-Z]+|.))
    |(?P<word>[A-Za-z](?=sqrt(?![A-Za-z]))|(?:{_FUNCTION})(?=[^A-Za-z]|[A-Za-z]{{0,2}}(?![A-Za-z]))|[A-Za-z]+)
    |(?P<sign><=|>=|!=|==|[-+*/^_=<>(){{}}\[\]|,;:!&°'])|(?P<space>\s+)|(?P<other>.)""", re.VERBOSE | re.DOTALL)
_COMMANDS = {alias: line.split()[0] for line in r"""
    frac dfrac tfrac cfrac nicefrac sfrac; binom dbinom tbinom; over; choose; cup; pm; mp; infty; mathbb; row \
    emptyset varnothing; lfloor; rfloor; lceil; rceil; * times cdot ast; / div; : colon; \{ {; \} }
    | mid vert lvert rvert Vert |; <= le leq leqslant; >= ge geq geqslant; < lt; > gt; != ne neq; = approx simeq
    tan tg; cot ctg; csc cosec""".replace("\n", ";").split(";") for alias in line.split()}  # spellings of one thing
_GREEK = set("""alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi
    psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell""".split())
_WORDS = {"infinity": ("sign", "infty"), "and": ("sign", ","), "or": ("sign", ","),
          **{word: ("num", str(n)) for word, n in _NUMBERS.items()}}
_ENGLISH = set("no on is it of to in up as at by we he so do go us if an am pm mr dr".split())  # not products


def _word(word: str) -> list[tuple[str, str]]:
    """A run of letters: a function, a number word, or a product of letters. NotMaths for all other words."""
    if word in _FUNCTIONS or word == "pi":
        return [("function" if word in _FUNCTIONS else "const", word)]
    if word.lower() in _WORDS:
        return [_WORDS[word.lower()]]
    product = len(word) < 3 and word.lower() not in _ENGLISH or (
        len(word) < 6 and (not re.search("[aeiouAEIOU]", word)  # xyz, and abc: letters in the order of the alphabet
                           or all(ord(b) - ord(a) == 1 for a, b in zip(word, word[1:]))))
    if not product:
        raise NotMaths
    return [("const" if letter in "ei" else "var", letter) for letter in word]


def _command(name: str) -> tuple[str, str]:
    name = _COMMANDS.get(name, name)
    if name in _FUNCTIONS:
        return "function", name
    if name in ("pi", "infty"):
        return "const", name
    if name in _GREEK:
        return "var", name
    if name not in _COMMANDS.values() and not name.startswith(("begin{", "end{")):
        raise NotMaths
    return "sign", name


def tokenise(text: str) -> list[tuple[str, str]]:
    """(kind, value) of each token; kinds are num, var, const, function and sign. Raises NotMaths."""
    tokens, depth = [], 0
    for match in _TOKEN.finditer(text):
        if len(tokens) > MAX_TOKENS:
            raise NotMaths
        kind, value = match.lastgroup, match[0]
        if kind == "sign":
            depth += (value in "([") - (value in ")]")
            tokens.append((kind, "=" if value == "==" else value))
        elif kind == "num":
            parts = value.split(",") if depth > 0 else [value.replace(",", "")]  # (1,234) is a pair
            tokens += [token for part in parts for token in (("sign", ","), ("num", part))][1:]
        elif kind == "word":
            tokens += _word(value)
        elif kind == "command":
            tokens.append(_command(value[1:]))
            depth += (value == r"\{") - (value == r"\}")
        elif kind == "other":
            raise NotMaths
    return tokens


# --- From tokens to a tree --------------------------------------------------------------------------------------------

_RELATIONS = {"=", "<", ">", "<=", ">=", "!="}
_INFIX = {**dict.fromkeys(_RELATIONS, 1), "over": 2, "choose": 2, "cup": 3, ":": 4, "+": 5, "-": 5, "pm": 5, "mp": 5,
          "*": 6, "/": 6, "^": 8}
_CLOSING = {"lfloor": "rfloor", "lceil": "rceil", "|": "|"}
_MATRICES = ("matrix", "pmatrix", "bmatrix", "Bmatrix", "smallmatrix", "array")
END = ("end", "")


def _number(text: str) -> Node:
    value = Fraction(text.rstrip(".") if text.endswith(".") else text)
    return "num", int(value) if value.denominator == 1 else value


class Parser:
    """Precedence climbing over the tokens of one formula. Raises NotMaths for anything malformed."""

    def __init__(self, tokens: list[tuple[str, str]]):
        self.tokens, self.place, self.depth = [*tokens, END], 0, 0

    def parse(self) -> Node:
        tree = self.expression(0)
        if self.peek() != END:
            raise NotMaths
        return tree

    def peek(self, ahead: int = 0) -> tuple[str, str]:
        return self.tokens[self.place + ahead]

    def take(self) -> tuple[str, str]:
        token = self.tokens[self.place]
        if token == END:
            raise NotMaths
        self.place += 1
        return token

    def skip_to(self, sign: str) -> None:
        while self.take() != ("sign", sign):
            pass

    def next_is(self, sign: str) -> bool:
        """Takes the sign if it comes next."""
        found = self.tokens[self.place] == ("sign", sign)
        self.place += found
        return found

    def expect(self, sign: str) -> None:
        if not self.next_is(sign):
            raise NotMaths

    def expression(self, power: int) -> Node:
        """All that binds tighter than `power`."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise NotMaths
        left = self.postfix(self.prefix())
        while True:
            kind, value = self.peek()
            if kind == "sign" and value in _INFIX:
                binding = _INFIX[value]
                if binding <= power:
                    break
                self.place += 1
                left = self.infix(left, value, binding)
            elif self.begins_factor() and power < 6:
                left = ("*", left, self.expression(6))
            else:
                break
        self.depth -= 1
        return left

    def infix(self, left: Node, sign: str, binding: int) -> Node:
        """What stands left of a sign, the sign, and what follows."""
        if sign == "^":
            return "^", left, self.script()
        right = self.expression(binding)
        if sign in _RELATIONS:  # a chain a < b <= c is one node: its terms, and its signs
            terms, signs = left[1:] if left[0] == "chain" else ((left,), ())
            return "chain", (*terms, right), (*signs, sign)
        if sign in ("cup", ":"):
            name = {"cup": "union", ":": "ratio"}[sign]
            return name, (*(left[1] if left[0] == name else (left,)), right)
        if sign == "choose":
            return "call", "binom", left, right
        return "/" if sign == "over" else sign, left, right

    def begins_factor(self) -> bool:
        """Whether what comes next multiplies what stands before it, without a sign."""
        kind, value = self.peek()
        if kind == "num":  # 2 3, x2 and S3 are no products, 3!7! and \\pi 2 are
            before, after = self.tokens[self.place - 1], self.tokens[self.place + 1]
            return before[1] in ("!", ")", "}") or before[0] == "const" or after == ("sign", "^") and (
                before[0] == "var" or self.tokens[self.place - 2] == ("sign", "^"))
        return kind in ("var", "const", "function") or kind == "sign" and value in ("(", "{", "frac", "binom", "lfloor",
                                                                                  "lceil", "infty")

    def prefix(self) -> Node:
        """What an operand begins with: a number, a name, a function, a sign, a bracket."""
        kind, value = self.take()
        if kind == "num":
            return self.mixed(_number(value))
        if kind == "var" or kind == "const":
            return self.name(kind, value)
        if kind == "function":
            return self.function(value)
        if value in ("-", "+"):
            if self.peek()[1] in ("-", "+"):  # --5
                raise NotMaths
            operand = self.expression(5)
            return ("neg", operand) if value == "-" else operand
        if value in ("pm", "mp"):
            return value, ("num", 0), self.expression(5)
        if value in ("(", "[", "{", r"\{"):
            return self.bracket(value)
        if value in _CLOSING:
            inside = self.expression(0)
            self.expect(_CLOSING[value])
            return "call", {"|": "abs"}.get(value, value), inside
        if value == "frac":
            return "/", self.argument(), self.argument()
        if value == "binom":
            return "call", "binom", self.argument(), self.argument()
        if value.startswith("begin{"):
            return self.matrix(value.split("{")[1].rstrip("}"))
        if value == "emptyset":
            return "set", ()
        if value == "infty":
            return "const", value
        if value == "mathbb" and self.argument() == ("var", "R"):
            return "seq", "()", (("neg", ("const", "infty")), ("const", "infty"))
        raise NotMaths

    def postfix(self, node: Node) -> Node:
        while True:
            if self.next_is("!"):
                if self.peek() == ("sign", "!"):  # 5!! = 15 is no factorial of a factorial
                    raise NotMaths
                node = ("call", "factorial", node)
            elif self.next_is("°"):
                node = ("call", "degrees", node)
            else:
                return node

    def mixed(self, whole: Node) -> Node:
        r"""3\frac12 and 3 1/2 are sums. An improper fraction behind a number is nothing that we understand."""
        start = self.place
        if self.next_is("frac"):
            fraction = self.argument(), self.argument()
        elif [kind for kind, _ in self.tokens[start:start + 3]] == ["num", "sign", "num"] and self.peek(1)[1] == "/":
            self.place += 3
            fraction = _number(self.tokens[start][1]), _number(self.tokens[start + 2][1])
        else:
            return whole
        if not all(part[0] == "num" and type(part[1]) is int for part in (whole, *fraction)):
            self.place = start
            return whole
        top, bottom = fraction[0][1], fraction[1][1]
        if not 0 <= top < bottom:
            raise NotMaths
        return "num", whole[1] + Fraction(top, bottom)

    def name(self, kind: str, name: str) -> Node:
        """A letter with its subscript and primes: x, x_1, x_{max}, f'."""
        start = self.place
        if self.next_is("_"):
            if self.take() == ("sign", "{"):
                self.skip_to("}")
        while self.next_is("'"):
            pass
        suffix = "".join(value for _, value in self.tokens[start:self.place] if value not in "{}")
        return ("var", name + suffix) if suffix else (kind, name)

    def script(self) -> Node:
        """An exponent: a group, or a single factor with its sign and its own exponent."""
        if self.next_is("-"):
            return "neg", self.script()
        self.next_is("+")
        base = self.postfix(self.prefix())
        return ("^", base, self.script()) if self.next_is("^") else base

    def argument(self) -> Node:
        r"""What TeX takes for an argument: a group, or a single sign; so \frac12 is 1/2."""
        kind, value = self.peek()
        if kind == "num" and len(value) > 1:
            if not value.isdigit():
                raise NotMaths
            self.tokens[self.place] = (kind, value[1:])
            return _number(value[0])
        if kind == "num":
            self.place += 1
            return _number(value)
        return self.prefix()

    def function(self, name: str) -> Node:
        r"""\sin^2 x, \log_2 8, \sqrt[3]{2}: a bracket or group is the whole argument, else the factors that follow."""
        power, base = None, None
        if name == "sqrt":
            base = self.bracket("[") if self.next_is("[") else None
            kind, value = self.peek()
            if kind == "num":  # \sqrt 12: TeX would take the 1 only, people do not mean that
                self.place += 1
                argument = _number(value)
            else:
                argument = self.prefix()
            return ("call", "root", argument, base[2][0]) if base else ("call", "sqrt", argument)
        for _ in range(2):
            if power is None and self.next_is("^"):
                power = self.script()
            elif base is None and self.next_is("_"):
                base = self.script()
        bracketed = self.peek() in (("sign", "("), ("sign", "{"))
        argument = self.postfix(self.prefix()) if bracketed else self.expression(6)
        while not bracketed and self.begins_factor() and self.peek()[0] in ("var", "const"):
            argument = ("*", argument, self.expression(6))
        if power == ("neg", ("num", 1)):
            return "call", "arc" + name, argument
        call = ("call", name, argument) if base is None else ("call", name, argument, base)
        return call if power is None else ("^", call, power)

    def bracket(self, opening: str) -> Node:
        """(a), (a, b), [a, b), {a}, \\{a, b\\}."""
        items = []
        while self.peek()[1] not in (")", "]", "}", r"\}"):
            items.append(self.expression(0))
            if not (self.next_is(",") or self.next_is(";")):
                break
        _, closing = self.take()
        if closing not in {"{": ("}",), r"\{": (r"\}",)}.get(opening, (")", "]")):
            raise NotMaths
        if opening == r"\{" or opening == "{" and len(items) > 1:
            return "set", tuple(items)
        if len(items) == 1 and (opening + closing in ("()", "{}") or items[0][0] == "matrix"):
            return items[0]
        if not items:
            raise NotMaths
        return "seq", opening + closing, tuple(items)

    def matrix(self, name: str) -> Node:
        r"""\begin{pmatrix} a & b \\ c & d \end{pmatrix}, behind its \begin{..}. Rows of equal length."""
        rows, end = [[]], f"end{{{name}}}"
        while not self.next_is(end):
            rows[-1].append(self.expression(0))
            if self.next_is("row"):
                rows.append([])
            elif not self.next_is("&") and self.peek() != ("sign", end):
                raise NotMaths
        rows = [tuple(row) for row in rows if row]
        if name not in _MATRICES or len(set(map(len, rows))) != 1:
            raise NotMaths
        return "matrix", tuple(rows)


# --- From a tree to a value -------------------------------------------------------------------------------------------

EPSILON = 2.3e-16  # a float's relative rounding error


@dataclass(frozen=True)
class Approx:
    """A float or complex number that is within `error` of the true value."""
    value: float | complex
    error: float


Value = int | Fraction | Approx


def approximate(value: Value) -> Approx:
    if isinstance(value, Approx):
        return value
    number = float(value)
    return Approx(number, abs(number) * EPSILON)


def _checked(value: float | complex, error: float) -> Approx:
    """NoValue where nothing is left but rounding errors: tan(pi/2)."""
    if abs(value) == math.inf:
        return Approx(value, 0.0)
    error += abs(value) * EPSILON
    if value != value or error != error or 1e-6 < error > 1e-6 * abs(value):
        raise NoValue
    return Approx(value, error)


def values_agree(a: Value, b: Value) -> bool:
    if not (isinstance(a, Approx) or isinstance(b, Approx)):
        return a == b
    try:
        a, b = approximate(a), approximate(b)
    except OverflowError:  # an exact number beyond a float's range
        return False
    return a.value == b.value or abs(a.value - b.value) <= 8 * (a.error + b.error)


def _real_root(base: Value, degree: int, real: bool) -> Value:
    """The degree-th root: exact where it is rational; of a negative number the real one, or else the principal one."""
    if degree < 1 or degree > 1000:
        raise NoValue
    if not isinstance(base, Approx):
        if base < 0 and degree % 2:
            root = _real_root(-base, degree, real)
            return Approx(-root.value, root.error) if isinstance(root, Approx) else -root
        top, bottom = (_integer_root(abs(n), degree) for n in Fraction(base).as_integer_ratio())
        if base >= 0 and top is not None and bottom is not None:
            return Fraction(top, bottom) if bottom > 1 else top
    number = approximate(base)
    if number.value == 0:
        return Approx(0.0, number.error ** (1 / degree))
    if isinstance(number.value, float) and number.value < 0:
        if real:
            raise NoValue
        number = Approx(complex(number.value), number.error)
    root = number.value ** (1 / degree)
    return _checked(root, abs(root) * number.error / abs(number.value))


def _integer_root(n: int, degree: int) -> int | None:
    """The exact root, if there is one."""
    if degree == 2:
        root = math.isqrt(n)
    elif n.bit_length() > 900:
        return None
    else:
        root = round(n ** (1 / degree))
    return root if root.bit_length() * degree < MAX_BITS and root**degree == n else None


_MATH = {  # name -> (real function, complex function)
    "sin": (math.sin, cmath.sin), "cos": (math.cos, cmath.cos), "tan": (math.tan, cmath.tan),
    "cot": (lambda x: 1 / math.tan(x), lambda x: 1 / cmath.tan(x)),
    "sec": (lambda x: 1 / math.cos(x), lambda x: 1 / cmath.cos(x)),
    "csc": (lambda x: 1 / math.sin(x), lambda x: 1 / cmath.sin(x)),
    "arcsin": (math.asin, cmath.asin), "arccos": (math.acos, cmath.acos), "arctan": (math.atan, cmath.atan),
    "arccot": (lambda x: math.pi / 2 - math.atan(x), None), "arcsec": (lambda x: math.acos(1 / x), None),
    "arccsc": (lambda x: math.asin(1 / x), None),
    "sinh": (math.sinh, cmath.sinh), "cosh": (math.cosh, cmath.cosh), "tanh": (math.tanh, cmath.tanh),
    "exp": (math.exp, cmath.exp), "ln": (math.log, cmath.log)}
_CONSTANTS = {"pi": Approx(math.pi, 2e-16), "e": Approx(math.e, 2e-16), "i": Approx(1j, 0.0),
              "infty": Approx(math.inf, 0.0)}


class Evaluator:
    """Values of trees at one point: {variable: number}. `budget` is what is left of a comparison's work, in a list."""

    def __init__(self, point: dict[str, Value], budget: list[int], log_base: int = 0):
        self.point, self.budget, self.log_base, self.real = point, budget, log_base, bool(point)

    def __call__(self, node: Node) -> Value:
        """Raises NoValue."""
        kind = node[0]
        if kind == "num":
            value = node[1]
        elif kind == "var":
            value = self.point[node[1]]
        elif kind == "const":
            return _CONSTANTS[node[1]]
        elif kind == "neg":
            value = self.product(-1, self(node[1]))
        elif kind in _ARITHMETIC:
            value = _ARITHMETIC[kind](self, self(node[1]), self(node[2]))
        elif kind == "call":
            value = self.call(node[1], [self(argument) for argument in node[2:]])
        elif kind == "ratio" and len(node[1]) == 2:
            value = self.quotient(self(node[1][0]), self(node[1][1]))
        else:
            raise NoValue
        self.spend(value)
        return value

    def spend(self, value: Value) -> None:
        if isinstance(value, Approx):
            bits = 0
        else:
            bits = value.numerator.bit_length() + value.denominator.bit_length()
        self.budget[0] -= 64 + bits
        if bits > 2 * MAX_BITS or self.budget[0] < 0:
            raise NoValue

    def sum(self, a: Value, b: Value) -> Value:
        if not (isinstance(a, Approx) or isinstance(b, Approx)):
            return a + b
        a, b = approximate(a), approximate(b)
        return _checked(a.value + b.value, a.error + b.error)

    def difference(self, a: Value, b: Value) -> Value:
        return self.sum(a, self.product(-1, b))

    def product(self, a: Value, b: Value) -> Value:
        if not (isinstance(a, Approx) or isinstance(b, Approx)):
            return a * b
        a, b = approximate(a), approximate(b)
        if math.inf in (abs(a.value), abs(b.value)):
            return _checked(a.value * b.value, 0.0)
        return _checked(a.value * b.value, abs(a.value) * b.error + abs(b.value) * a.error + a.error * b.error)

    def quotient(self, a: Value, b: Value) -> Value:
        if not (isinstance(a, Approx) or isinstance(b, Approx)):
            if b == 0:
                raise NoValue
            value = Fraction(a) / b
            return value.numerator if value.denominator == 1 else value
        a, b = approximate(a), approximate(b)
        if abs(b.value) <= 8 * b.error or abs(b.value) == math.inf:
            raise NoValue
        value = a.value / b.value
        return _checked(value, (a.error + abs(value) * b.error) / (abs(b.value) - b.error))

    def power(self, base: Value, exponent: Value) -> Value:
        """Exact for whole exponents, and for rational ones where the root is; else by exp and ln."""
        if isinstance(exponent, Approx):
            if isinstance(exponent.value, complex):
                return self.smooth("exp", self.product(exponent, self.smooth("ln", base)))
            number = approximate(base)
            if isinstance(number.value, complex) or number.value <= number.error:
                raise NoValue
            return self.smooth("exp", self.product(exponent, self.smooth("ln", number)))
        if exponent.denominator > 1:
            top, bottom = exponent.as_integer_ratio()
            return self.power(_real_root(base, bottom, self.real), top)
        exponent = int(exponent)
        if exponent < 0:
            return self.quotient(1, self.power(base, -exponent))
        if isinstance(base, Approx):
            if exponent > 10**6 or abs(base.value) == math.inf:
                raise NoValue
            value = base.value**exponent
            return _checked(value, exponent * abs(base.value) ** max(0, exponent - 1) * base.error)
        if exponent * max(base.numerator.bit_length(), base.denominator.bit_length()) > MAX_BITS:
            if base in (0, 1) or base == -1:
                return base if exponent % 2 else base * base
            raise NoValue
        return base**exponent

    def smooth(self, name: str, argument: Value) -> Value:
        """A function from the table; its error by moving the argument by the argument's own."""
        x, complex_function = approximate(argument), _MATH[name][1]
        if name == "ln" and x.value == 0 or name == "exp" and argument == 0:
            return {"ln": _checked, "exp": lambda *_: 1}[name](math.nan, 0.0)
        function = complex_function if isinstance(x.value, complex) else _MATH[name][0]
        if name == "ln" and not isinstance(x.value, complex) and x.value < 0 and not self.real:
            function = complex_function
        if function is None:
            raise NoValue
        value = function(x.value)
        try:
            moved = abs(function(x.value + x.error) - value)
        except ValueError:  # the border of the domain: arcsin(1)
            moved = abs(function(x.value - x.error) - value)
        return _checked(value, moved + 2 * EPSILON * abs(value))

    def call(self, name: str, arguments: list[Value]) -> Value:
        """A function's value, exact where it is rational for sure: ln 1, sin 0, sqrt 4."""
        x = arguments[0]
        if name in ("sqrt", "root"):
            degree = 2 if name == "sqrt" else arguments[1]
            if isinstance(degree, Approx) or degree.denominator > 1:
                raise NoValue
            return _real_root(x, int(degree), self.real)
        if name in ("log", "lg"):
            base = arguments[1] if len(arguments) > 1 else 10 if name == "lg" else self.log_base
            return self.quotient(self.smooth("ln", x), self.smooth("ln", base)) if base else self.smooth("ln", x)
        if name == "degrees":
            return self.quotient(self.product(x, _CONSTANTS["pi"]), 180)
        if name in ("arcsinh", "arccosh", "arctanh") or len(arguments) > 1 and name != "binom":
            raise NoValue
        if name in _MATH:
            if name == "ln" and x == 1 or name in ("sin", "tan", "arcsin", "arctan", "sinh", "tanh") and x == 0:
                return 0
            return self.smooth(name, x)
        if name == "abs":
            return Approx(abs(x.value), x.error) if isinstance(x, Approx) else abs(x)
        return self.whole(name, arguments)

    def whole(self, name: str, arguments: list[Value]) -> int:
        """Functions to and on whole numbers."""
        if any(isinstance(x, Approx) for x in arguments):
            x = arguments[0].value if isinstance(arguments[0], Approx) else 0
            if name in ("lfloor", "lceil") and isinstance(x, float) and abs(x) < 1e12 and abs(x - round(x)) > 1e-9:
                return math.floor(x) if name == "lfloor" else math.ceil(x)
            raise NoValue
        if name in ("lfloor", "lceil"):
            return math.floor(arguments[0]) if name == "lfloor" else math.ceil(arguments[0])
        if any(x.denominator > 1 or x < 0 for x in arguments):
            raise NoValue
        if name == "factorial" and arguments[0] <= 2500:
            return math.factorial(int(arguments[0]))
        if name == "binom":
            n, k = map(int, arguments)
            k = min(k, n - k) if k <= n else 0
            if k * n.bit_length() <= MAX_BITS:
                return math.comb(n, int(arguments[1])) if arguments[1] <= n else 0
        raise NoValue


_ARITHMETIC = {"+": Evaluator.sum, "-": Evaluator.difference, "*": Evaluator.product, "/": Evaluator.quotient,
               "^": Evaluator.power}


def value_or_none(evaluator: Evaluator, node: Node) -> Value | None:
    try:
        return evaluator(node)
    except (NoValue, ArithmeticError, ValueError, RecursionError):  # overflow, division by zero; a domain's border
        return None


def children(node: Node) -> list[Node]:
    """The trees right below; items of a list, or rows of a matrix, are a tuple of trees."""
    return [child for child in node if isinstance(child, tuple) and child]


def variables(node: Node) -> frozenset[str]:
    if node[0] == "var":
        return frozenset((node[1],))
    return frozenset().union(*map(variables, children(node)))


ROUNDS = 16


def random_point(names: frozenset[str], turn: int) -> dict[str, Value]:
    """Numbers for the variables, the same in every process: small whole ones, for exponents and factorials (at first in
    the order of the alphabet: k of n; at last in the reverse order), rational ones of both signs, and some between 0 and
    1 (for arcsin)."""
    point = {}
    for rank, name in enumerate(sorted(names)):
        random = zlib.crc32(f"{turn} {name}".encode())
        if turn < 3:
            point[name] = 2 + 3 * rank + random % (3 + turn)
        elif turn < 5:
            point[name] = 2 + random % 11
        elif turn < 8:
            point[name] = Fraction(random % 60_000 - (30_000 if turn > 5 else -1), 101)
        elif turn < 13:
            point[name] = Fraction(1 + random % 996, 997)
        else:  # n of m
            point[name] = 2 + 3 * (len(names) - rank) + random % 4
    return point
