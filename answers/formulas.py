r"""Formulas in LaTeX and plain maths: from a text to a tree.

Standard library only. Nothing is ever evaluated by Python or a computer algebra system (sympy's
parser calls `eval`, and 9**9**9**9 would run for ever), and every call is short: lengths and
nesting are capped. tokens.py cuts the text into tokens, `Parser` turns them into a tree, and
values.py gives its value.

>>> parse_formula(r"\frac{1}{2} + 2x")
('+', ('/', ('num', 1), ('num', 2)), ('*', ('num', 2), ('var', 'x')))
>>> parse_formula("0 < x <= 1")
('chain', (('num', 0), ('var', 'x'), ('num', 1)), ('<', '<='))
"""

from fractions import Fraction

from answers.tokens import NotMaths, Token, tokenise

MAX_DEPTH = 24  # of brackets, fractions and powers in one another

# ("num", 3), ("var", "x"), ("const", "pi"), ("+", left, right), ("call", "sin", x), ("set", items)
Node = tuple

_RELATIONS = {"=", "<", ">", "<=", ">=", "!=", "approx"}
# How tightly a sign binds what stands beside it.
_INFIX = dict.fromkeys(_RELATIONS, 1)
_INFIX |= {"over": 2, "choose": 2, "cup": 3, ":": 4, "+": 5, "-": 5, "pm": 5, "mp": 5}
_INFIX |= {"*": 6, "/": 6, "^": 8}
_GROUPED = ("num", "call", "neg", "+", "-", "*", "/", "^")  # and no letter: [x] may be a floor
_CLOSING = {"lfloor": "rfloor", "lceil": "rceil", "|": "|"}
_OPENS_FACTOR = ("(", "[", "{", r"\{", "frac", "binom", "lfloor", "lceil")
_MATRICES = {"array"} | {p + name for p in ("", *"pbB") for name in ("matrix", "smallmatrix")}
END = ("end", "")


def parse_formula(text: str) -> Node:
    """Returns the tree of a formula. Raises NotMaths."""
    return Parser(tokenise(text)).parse()


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
        self.in_bars = False

    def parse(self) -> Node:
        """Returns the tree of all tokens."""
        tree = self.expression(0)
        if self.peek() != END:
            raise NotMaths
        return tree

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
        if sign == "choose":
            return "call", "binom", left, right
        return "/" if sign == "over" else sign, left, right

    def begins_factor(self) -> bool:
        """Returns whether what comes next multiplies what stands before it, without a sign."""
        kind, value = self.peek()
        if value == "|":  # 2|x|
            return not self.in_bars
        if kind == "sign":
            return value in _OPENS_FACTOR
        if self.peek(-1) == ("sign", "|") and ("sign", "|") in self.tokens[self.place :]:
            raise NotMaths  # |2|x|-1| may be read in two ways
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
            return self.mixed(_number(value))
        if kind in ("var", "const"):
            return self.name(kind, value)
        if kind == "function":
            return self.function(value)
        if value in ("-", "+"):
            if self.peek()[1] in ("-", "+"):  # --5
                raise NotMaths
            operand = self.expression(_INFIX["-"])
            return ("neg", operand) if value == "-" else operand
        if value in ("pm", "mp"):
            return value, ("num", 0), self.expression(_INFIX["-"])
        if value in ("(", "[", "{", r"\{"):
            return self.bracket(value)
        if value in _CLOSING:
            outside = self.in_bars
            self.in_bars = value == "|"
            inside = self.expression(0)
            self.in_bars = outside
            if not self.next_is(_CLOSING[value]):
                raise NotMaths
            return "call", "abs" if value == "|" else value, inside
        if value == "frac":
            return "/", self.argument(), self.argument()
        if value == "binom":
            return "call", "binom", self.argument(), self.argument()
        if value.startswith("begin{"):
            return self.matrix(value.split("{")[1].rstrip("}"))
        if value == "emptyset":
            return "set", ()
        if value == "mathbb" and self.argument() == ("var", "R"):
            return "seq", "()", (("neg", ("const", "infty")), ("const", "infty"))
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

    def mixed(self, whole: Node) -> Node:
        r"""Returns 3\frac12 and 3 1/2 as sums, any other number as it is.

        An improper fraction behind a number is nothing that we understand.
        """
        start = self.place
        # 1. What follows the number: a fraction in either way of writing, or something else.
        kinds = [kind for kind, _ in self.tokens[start : start + 3]]
        if self.next_is("frac"):
            fraction = self.argument(), self.argument()
        elif kinds == ["num", "sign", "num"] and self.peek(1)[1] == "/":
            self.place += 3
            fraction = _number(self.tokens[start][1]), _number(self.tokens[start + 2][1])
        else:
            return whole
        if not all(part[0] == "num" and type(part[1]) is int for part in (whole, *fraction)):
            self.place = start  # 3\frac{x}{2} is a product
            return whole
        # 2. 3\frac12 is 7/2.
        top, bottom = fraction[0][1], fraction[1][1]
        if not 0 <= top < bottom:
            raise NotMaths
        return "num", whole[1] + Fraction(top, bottom)

    def name(self, kind: str, name: str) -> Node:
        """Returns a letter with its subscript and primes: x, x_1, x_{max}, f'."""
        start = self.place
        # f(0) is no product, and neither is I(0); n(n + 1) is one.
        inside = self.tokens[start : start + 3]
        if [value for _, value in inside[::2]] == ["(", ")"]:
            self.place += 3 * (inside[1][0] == "num" or name in "fghFGHP")
        if self.next_is("_") and self.take() == ("sign", "{"):
            while self.take() != ("sign", "}"):
                pass
        while self.next_is("'"):
            pass
        suffix = [value for _, value in self.tokens[start : self.place] if value not in "{}"]
        return ("var", name + "".join(suffix)) if suffix else (kind, name)

    def script(self) -> Node:
        """Returns an exponent: a group, or a single factor with its sign and its own exponent."""
        if self.next_is("-"):
            return "neg", self.script()
        self.next_is("+")
        base = self.postfix(self.prefix())
        return ("^", base, self.script()) if self.next_is("^") else base

    def argument(self) -> Node:
        r"""Returns what TeX takes for an argument: a group, or a single sign; so \frac12 is 1/2."""
        kind, value = self.peek()
        if kind != "num":
            return self.prefix()
        if len(value) == 1:
            self.place += 1
        elif value.isdigit():
            self.tokens[self.place] = (kind, value[1:])
        else:
            raise NotMaths
        return _number(value[0])

    def function(self, name: str) -> Node:
        r"""Returns a function's call: \sin^2 x, \log_2 8, \sqrt[3]{2}.

        A bracket or group is the whole argument, else the factors that follow.
        """
        if name == "sqrt":
            return self.root()
        # 1. Behind the name a power and a base, in either order: \log^2_3, \log_3^2.
        power = None
        base = None
        for _ in range(2):
            if power is None and self.next_is("^"):
                power = self.script()
            elif base is None and self.next_is("_"):
                base = self.script()
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
            name, base = "log", ("num", 10)
        call = ("call", name, argument) if base is None else ("call", name, argument, base)
        return call if power is None else ("^", call, power)

    def root(self) -> Node:
        r"""Returns \sqrt{2}, \sqrt[3]{2} or \sqrt 12 (TeX would take the 1 only; people do not)."""
        degree = self.bracket("[") if self.next_is("[") else None
        if degree and degree[0] == "seq":  # [n]
            degree = degree[2][0]
        kind, value = self.peek()
        if kind == "num":
            self.place += 1
            argument = _number(value)
        else:
            argument = self.prefix()
        return ("call", "root", argument, degree) if degree else ("call", "sqrt", argument)

    def bracket(self, opening: str) -> Node:
        r"""Returns what a bracket holds, behind its opening: (a), (a, b), [a, b), {a}, \{a, b\}."""
        # 1. The items.
        before = self.tokens[self.place - 2] if self.place > 1 else END
        outside = self.in_bars
        self.in_bars = False
        items = []
        while self.peek()[1] not in (")", "]", "}", r"\}"):
            items.append(self.expression(0))
            if not (self.next_is(",") or self.next_is(";")):
                break
        # 2. A brace is closed by its like; an interval may begin with ( and end with ].
        _, closing = self.take()
        self.in_bars = outside
        if closing not in {"{": ("}",), r"\{": (r"\}",)}.get(opening, (")", "]")):
            raise NotMaths
        # 3. Other brackets group as well: 2[x + 1], and 2\{x + 1\} beside a factor or a power.
        if len(items) == 1 and items[0][0] in _GROUPED and opening + closing in ("[]", r"\{\}"):
            beside = before[0] in ("num", "var", "const") or before[1] in (")", "]", "}", "*", "/")
            if (
                beside
                or opening == "["
                or self.peek()[1] in ("^", "*", "/")
                or self.begins_factor()
            ):
                return items[0]
        # 4. A set, a group or something in brackets, or else a tuple or an interval.
        if opening == r"\{" or opening == "{" and len(items) > 1:
            return "set", tuple(items)
        if len(items) == 1 and (opening + closing in ("()", "{}") or items[0][0] == "matrix"):
            return items[0]
        if not items:
            raise NotMaths
        if all(item[:2] == ("seq", "[]") for item in items) and opening + closing == "[]":
            return "matrix", tuple(item[2] for item in items)  # [[1, 2], [3, 4]]
        return "seq", opening + closing, tuple(items)

    def matrix(self, name: str) -> Node:
        r"""Returns \begin{pmatrix} a & b \\ c & d \end{pmatrix}, behind its \begin{..}.

        Its rows must be of equal length.
        """
        rows = [[]]
        end = f"end{{{name}}}"
        while not self.next_is(end):
            rows[-1].append(self.expression(0))
            if self.next_is("row"):
                rows.append([])
            elif not self.next_is("&") and self.peek() != ("sign", end):
                raise NotMaths
        # Behind the last \\ an empty row was begun.
        rows = [tuple(row) for row in rows if row]
        if name not in _MATRICES or len(set(map(len, rows))) != 1:
            raise NotMaths
        return "matrix", tuple(rows)
