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
INFINITY = ("const", "infty")
MINUS_INFINITY = ("neg", INFINITY)

_RELATIONS = {"=", "<", ">", "<=", ">=", "!=", "approx", "in"}
# How tightly a sign binds what stands beside it.
_INFIX = dict.fromkeys(_RELATIONS, 1)
_INFIX |= {"over": 2, "choose": 2, "cup": 3, ":": 4, "+": 5, "-": 5, "*": 6, "/": 6, "^": 8}
_CLOSING = {"(": ")]", "[": ")]", "{": "}", r"\{": r"\}"}
END = ("end", "")


def parse_formula(text: str) -> Node:
    """Returns the tree of a formula. Raises NotMaths."""
    parser = Parser(tokenise(text))
    tree = parser.expression(0)
    if parser.peek() != END:
        raise NotMaths
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
        if sign == "choose":
            return "call", "binom", left, right
        return "/" if sign == "over" else sign, left, right

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
            return "/", self.argument(), self.argument()
        if value == "binom":
            return "call", "binom", self.argument(), self.argument()
        if value == "emptyset":
            return "set", ()
        if value == "mathbb" and self.argument() == ("var", "R"):
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
        call = ("call", name, argument, *base)
        return call if power is None else ("^", call, power)

    def root(self) -> Node:
        r"""Returns \sqrt{2}, \sqrt[3]{2} or \sqrt 12 (TeX would take the 1 only; people do not)."""
        degree = self.bracket("[")[-1] if self.next_is("[") else ()
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
        # A single item in round brackets is itself, and so is a matrix in any.
        if len(items) == 1 and (opening + closing in ("()", "{}") or items[0][:2] == ("seq", "[]")):
            if opening == "[" and items[0][2][0][0] != "seq":
                return "seq", "[]", tuple(items)
            return items[0]
        return "seq", opening + closing, tuple(items)
