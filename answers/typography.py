r"""Typography, folded once at the door: whatever way an answer is set, `plain` writes it in one.

Standard library only. Behind this door an answer is ASCII or LaTeX on one line, without $, \left,
\text{..}, markdown, invisible characters, and without "the answer is" around it.

>>> plain(r"So the answer is **$\dfrac{１}{2}$**."), plain("12\u202f345 µm"), plain("７：３０ p.m.")
('\\frac{1}{2}', '12345 microm', '7:30 pm')
>>> plain(r"9 (apples)"), plain("(B) is correct"), plain(r"x\in（2，3］"), plain(r"2|x| - 1\frac12")
('9 apples', 'B', 'x\\in(2,3]', '2\\abs(x) - (1+1/2)')
"""

import re
import unicodedata
from itertools import accumulate

MAX_CHARS = 512  # longer answers are refused

# --- Unicode becomes ASCII or LaTeX ---------------------------------------------------------------

# The first character of each word stands for the rest of the word; a command ends with a space.
_UNICODE = {
    ord(word[0]): word[1:] + (" " if word[1] == "\\" and word[-1].isalnum() else "")
    for word in r"""
    −- ‐- ‑- ‒- –- —- ―- ×\times ·* ⋅* ∙* •* ÷/ ⁄/ ∕/ ∶: ≤<= ≥>= ⩽<= ⩾>= ≦<= ≧>= ≠!= ′' ‘' ’' “" ”"
    ≡\equiv 「" 」" 【" 】" ˚° ➖- ˗- …... º° 、, 。. √\sqrt ∛\sqrt[3] ∜\sqrt[4]
    ∞\infty ±\pm ∓\mp ∪\cup ∈\in ∅\emptyset ≈\approx ∣| ∠\angle △\triangle
    ℝ\mathbb{R} ℤ\mathbb{Z} ℕ\mathbb{N} Ω\Omega ½\frac12 ⅓\frac13 ⅔\frac23 ¼\frac14 ¾\frac34
    α\alpha β\beta γ\gamma δ\delta ε\epsilon ϵ\epsilon ζ\zeta η\eta θ\theta ϑ\theta ι\iota κ\kappa
    λ\lambda μ\mu ν\nu ξ\xi π\pi ρ\rho σ\sigma τ\tau υ\upsilon φ\phi ϕ\phi χ\chi ψ\psi ω\omega
    Γ\Gamma Δ\Delta Θ\Theta Λ\Lambda Ξ\Xi Π\Pi Σ\Sigma Φ\Phi Ψ\Psi Ω\Omega""".split()
}
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+|[₀₁₂₃₄₅₆₇₈₉]+")
_DIGITS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻₀₁₂₃₄₅₆₇₈₉", "0123456789-0123456789")
_THIN_SPACE = re.compile("(?<=[0-9])[\u00a0\u2007\u2009\u202f](?=[0-9]{3}(?![0-9]))")
_MICRO = re.compile("[µμ](?=(?:m|g|s|[Ll]|mol|A|V|C|F)(?![a-zA-Z]))")


def _raised(match: re.Match) -> str:
    """Returns a run of raised or lowered digits as one exponent or subscript: 10¹² is 10^{12}."""
    sign = "_" if match[0][0] in "₀₁₂₃₄₅₆₇₈₉" else "^"
    return f"{sign}{{{match[0].translate(_DIGITS)}}}"


def _ascii(text: str) -> str:
    """Returns a text with its signs as ASCII or LaTeX, as far as they have such a form.

    Full-width characters become ordinary ones (NFKC), and what is invisible (Cf) goes.
    """
    text = _MICRO.sub("micro", _RAISED.sub(_raised, _THIN_SPACE.sub("", text)))
    text = unicodedata.normalize("NFKC", text.translate(_UNICODE)).translate(_UNICODE)
    return "".join(c for c in text if c.isascii() or unicodedata.category(c) != "Cf")


# --- LaTeX loses what is for the eye only ---------------------------------------------------------

_MACRO = (
    r"\\(?:(?:text|math)(?:bf|it|rm|sf|tt|normal)?|[fm]box|boxed|operatorname|boldsymbol|bm)\s*"
)
_WRAPPED = re.compile(_MACRO + r"\{(.*)\}")
_COMMAND = re.compile(r"\\([a-zA-Z]+)")
_COMMANDS = dict.fromkeys(
    """left right middle big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr
    displaystyle textstyle limits phantom hline angle triangle""".split(),
    "",
)
_COMMANDS |= dict.fromkeys("ldots cdots dots dotsb dotsc dotsi dotsm dotso".split(), "...")
_COMMANDS |= dict.fromkeys("dfrac tfrac cfrac nicefrac sfrac".split(), r"\frac")
_COMMANDS |= dict.fromkeys("lvert rvert vert".split(), "|")
_COMMANDS |= {"var" + name: "\\" + name for name in ("epsilon", "theta", "phi", "rho", "sigma")}
_COMMANDS |= {"lor": " or ", "vee": " or ", "land": " and ", "wedge": " and ", "langle": "("}
_COMMANDS |= {"rangle": ")", "lbrace": r"\{", "rbrace": r"\}", "R": r"\mathbb{R}", "cr": r"\\"}
_COMMANDS |= {"quad": " ", "qquad": " ", "tabularnewline": r"\\", "prime": "'"}
_COMMANDS |= {"lfloor": r"\floor(", "lceil": r"\ceil(", "rfloor": ")", "rceil": ")"}
_COMMANDS |= {"dbinom": r"\binom", "tbinom": r"\binom", "simeq": r"\approx"}
_COMMANDS |= {"varnothing": r"\emptyset", "tg": r"\tan", "ctg": r"\cot", "colon": ":", "div": "/"}
_COMMANDS |= dict.fromkeys(("times", "cdot", "ast"), "*")
_COMMANDS |= {"lt": "<", "gt": ">"} | dict.fromkeys(("ne", "neq"), "!=")
_COMMANDS |= dict.fromkeys(("le", "leq", "leqslant", "leqq"), "<=")
_COMMANDS |= dict.fromkeys(("ge", "geq", "geqslant", "geqq"), ">=")


def _unwrapped(text: str) -> str:
    r"""Returns what the macros around the whole text hold: \boxed{\frac{1}{2}} -> \frac{1}{2}."""
    while match := _WRAPPED.fullmatch(text.strip()):
        depths = accumulate((character == "{") - (character == "}") for character in match[1])
        if min(depths, default=0) < 0:  # \text{a} + \text{b}: its group ends before the text does
            return text
        text = match[1]
    return text


def _environment(match: re.Match) -> str:
    r"""Returns a matrix as [[a, b], [c, d]], and a system of equations as a list."""
    brace, rows = match[1], match[3].strip().removesuffix("\\\\")
    if "&" not in rows and "=" in rows:
        return rows.replace("\\\\", ", ")
    if brace or "matrix" not in match[2] and match[2] != "array" or match[2][0] in "vV":
        return match[0]
    return f"[[{rows}]]".replace("\\\\", "],[").replace("&", ",")


def _repeating(match: re.Match) -> str:
    r"""Returns 0.1\overline{6} as (15/90): the digits with one period, less those without it."""
    whole, fixed, period = match[1] or "0", match[2], match[3] or match[4]
    top = int(whole + fixed + period) - int(whole + fixed)
    bottom = (10 ** len(period) - 1) * 10 ** len(fixed)
    return f"({top}/{bottom})"


def _rules(*rules: tuple) -> list[tuple[re.Pattern, object]]:
    return [(re.compile(pattern), becomes) for pattern, becomes in rules]


_LATEX = _rules(
    # 1{,}234 -> 1234, and 1\,234 -> 1234
    (r"(?<=[0-9])(?: ?\{ ?, ?\}(?:\\!)? ?|,\\! ?|\\[,! ;:]|~)(?=[0-9]{3}(?![0-9]))", ""),
    # \\frac -> \frac: a backslash that was escaped twice; ~5 is about 5
    (r"\\{4}", r"\\\\"),
    (r"(?<!\\)\\\\(?=[a-z]{4}|(?:leq?|geq?|cup|pi|pm|in|end)(?![a-zA-Z]))", r"\\"),
    (r"^~", r"\\sim "),
    # \right. -> nothing, \\[4pt] -> \\, x \not= 2 -> x != 2
    (r"\\(?:left|right)\.", ""),
    (r"\\\\\*?\[-?[0-9.]+ ?[a-z]{2}\]", r"\\\\"),
    (r"\\not ?=", "!="),
    # a\,b -> a b, and \[5\] -> 5
    (r"(?<!\\)\\[,;:! ()\[\]]|~|\\hspace\{[^{}]*\}", " "),
    # 90^{\circ} -> 90°, x^{\prime} -> x', 5^{\text{th}} -> 5th
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))|\^?\\degree(?![a-zA-Z])", "°"),
    (r"\^ ?\{?((?: ?\\prime(?![a-zA-Z]))+) ?\}?", r"\1"),
    (r"\^ ?\{? ?\\(?:text|mathrm) ?\{ ?(st|nd|rd|th) ?\} ?\}?", r"\1"),
    # 5 \mu \text{m} -> 5 microm, 5 \Omega -> 5 ohm, x &= 1 -> x = 1
    (r"(?<=[0-9]) ?\\mu ?\\(?:text|mathrm) ?\{ ?(?=[a-zA-Z])", r" \\text{micro"),
    (r"(?<=[0-9 kM])(?:\\(?:text|mathrm) ?\{)?\\Omega\}?$", "ohm"),
    (r"& ?=", "="),
    # \overline{AB} -> AB, \text{ cm} -> cm, x = 1 \quad y = 2 -> x = 1, y = 2, kg \cdot m -> kg*m
    (r"\\(?:overline|vec) ?\{([A-Z]{2})\}", r"\1"),
    (_MACRO + r"\{([^{}]*)\}", r" \1 "),
    (r"(?<=[0-9})]) ?\\q?quad ?(?=[a-z](?:_\{?[0-9a-z]\}?)? ?=)|\\quad(?=[a-z]_)", ", "),
    (r"(?<=[a-zA-Z]) ?\\cdot ?(?=[a-zA-Z])", "*"),
    # \tfrac -> \frac, \left -> nothing
    (_COMMAND, lambda match: _COMMANDS.get(match[1], match[0])),
    (r"\{,\}", "."),
    (r"\{:\}", ":"),
    # \frac12 -> \frac{1}{2}, {1 \over 2} -> \frac{1}{2}
    (r"(\\frac|\\binom) ?([0-9]) ?([0-9])", r"\1{\2}{\3}"),
    (r"(\\frac|\\binom) ?([0-9])(?=[{\\])", r"\1{\2}"),
    (r"(\\(?:frac|binom)\{[^{}]*\}) ?([0-9])", r"\1{\2}"),
    (r"\{([^{}]*)\\over(?![a-z])([^{}]*)\}", r"\\frac{\1}{\2}"),
    (r"\{([^{}]*)\\choose(?![a-z])([^{}]*)\}", r"\\binom{\1}{\2}"),
    (
        r"(\\\{ ?)?\\begin\{([a-zA-Z]+)\}(?:\{[lcr| ]*\})?((?:(?!\\begin).)*?)\\end\{\2\}",
        _environment,
    ),
    (r"([0-9]*)\.([0-9]*)\\(?:overline|bar|dot)\s*(?:\{([0-9]+)\}|([0-9]))", _repeating),
)

# --- Words and signs of plain text ----------------------------------------------------------------

_SMALL = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
    fifteen sixteen seventeen eighteen nineteen""".split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
NUMBERS = {word: number for number, word in enumerate(_SMALL)}
NUMBERS |= {word: 10 * number for number, word in enumerate(_TENS, 2)}
_LINE = re.compile(r"\s*(?:[a-z] ?= ?)?[^\s=&,]+\s*")  # x = 3
_THOUSANDS = re.compile("[1-9][0-9]{0,2}(?: [0-9]{3})+(?:[.,][0-9]+)?")
_FIRST = _rules(
    # x := 5 -> x = 5, x <> 5 -> x != 5
    (r":=|==", "="),
    (r"=/=|<>", "!="),
    (r"=<", "<="),
    # A pair of dollars encloses a formula; a single one is money.
    (r"\\\$", "¤"),
    (r"^([^$]*)\$(?=[^$]*$)", r"\1¤"),
    (r"\\([%&])", r"\1"),
    (r"\$", " "),
    # **bold** loses its stars, then 2**3 is a power.
    (r"(?<![\w)])\*\*([^*]+)\*\*(?!\w)", r"\1"),
    (r"(?<=[\w)]) ?\*\* ?(?=[\w(-])", "^"),
)
_PREAMBLE = (
    r"(?i)^(?:(?:so|thus|hence|therefore|then|finally|and)\b,? ?)*"
    r"(?:(?:(?:the|my|our) )?(?:(?:final|correct|best|right|only|most likely) )*"
    r"(?:answer|option|choice|solution|diagnosis|value) ?"
    r"(?:is|must be|should be|would be|:|=|(?<=answer)(?= [-0-9(\\])) ?:? ?|it(?:'s| is) "
    r"|I(?:'d| would| will)? (?:choose|pick|select|go with) ){0,2}"
    r"(?:(?:\\approx|approximately|about|=) ?)?"
)


def _mixed(match: re.Match) -> str:
    r"""Returns 3\frac12 and 3 1/2 as (3+1/2); an improper fraction behind a number is no maths."""
    whole, top, bottom = match.groups()
    return f"({whole}+{top}/{bottom})" if int(top) < int(bottom) else f"{whole} {top}/{bottom}"


def _bars(match: re.Match) -> str:
    r"""Returns a text with \abs(x) for |x|, unless bars may be read in two ways: |2|x|-1|."""
    parts = match[0].split("|")
    if len(parts) % 2 == 0 or any(part.strip()[:1].isalnum() for part in parts[2:-1:2]):
        return match[0]
    return "".join(f"\\abs({part})" if i % 2 else part for i, part in enumerate(parts))


_LAST = _rules(
    # 2 x 3 -> 2*3, thirty-five -> thirty+five, 3 million -> 3*10^6
    (r"(?<=[0-9]) ?(?:x| by ) ?(?=[0-9])", "*"),
    (rf"(?i)\b({'|'.join(_TENS)})[- ](?=(?:{'|'.join(_SMALL[1:10])})\b)", r"\1+"),
    (r"(?i)(?<=[0-9]) ?thousand\b", "*10^3"),
    (r"(?i)(?<=[0-9]) ?million\b", "*10^6"),
    (r"(?i)(?<=[0-9]) ?billion\b", "*10^9"),
    # So the final answer is: 5. -> 5, I choose B -> B, and = 5 -> 5
    (r"^[*_` ]+|[*_` \\]+$", ""),
    (_PREAMBLE, ""),
    (r"^[*_` ]+|(?<![.,;*_` ])[.,;*_` ]+(?<!\.\.\.)$", ""),
    # B is correct -> B, x in [0, 1] -> x \in [0, 1], {x | x > 3} -> x > 3
    (r"(?i) is (?:the )?(?:(?:correct|right|best|only|most likely)(?: [a-z]+)?|answer)$", ""),
    (r"^([a-zA-Z]) in (?=[(\[{\\])", r"\1 \\in "),
    (
        r"^\\?\{ ?([a-zA-Z])(?: ?\\in ?[^{}:|]*\{R\})? ?(?:\\mid|\||:) ?([^{}]*\1[^{}]*?)\\?\}$",
        r"\2",
    ),
    # 3\frac12 -> (3+1/2), $5 -> 5 $, 9 (apples) -> 9 apples, "5" -> 5
    (r"(?<![\w.,^/])([0-9]+) ?\\frac\{([0-9]+)\}\{([0-9]+)\}", _mixed),
    (r"(?<![\w.,^/])([0-9]+) ([0-9]+) ?/ ?([0-9]+)(?![0-9.!^])", _mixed),
    (r"([¤€£¥₹]) ?([0-9](?:[0-9.,]*[0-9])?(?:\*10\^[369])?)", r"\2 \1"),
    (r"(?<=[0-9}]) ?\(([a-zA-Z][a-z]{2,}(?: [a-z]+)*|[ck]?m(?:\^[23])?|kg)\)$", r" \1"),
    (r"""^(["'])([^"']+)\1$""", r"\2"),
    (r"^DNE$", "does not exist"),
    # 7PM -> 7 pm, 08:40 am -> 8:40, 11 am -> 11:00
    (r"(?i)(?<=[0-9]) ?([ap])\.? ?m$", lambda match: f" {match[1].lower()}m"),
    (r"^0?([0-9]{1,2}) (?=[ap]m$)", r"\1:00 "),
    (r"^0?([0-9]{1,2}:[0-9]{2})(?: am)?(?=$| pm)", r"\1"),
    # \pmod{7} -> mod 7, 2/3 (about 0.67) -> 2/3 \approx 0.67
    (r" ?\(? ?\\?[pb]?mod ?\{? ?([0-9]+) ?\}?\)?$", r" mod \1"),
    (r" \(?(?:or )?(?:\\approx|approx(?:imately)?|about) ?([0-9]*\.[0-9]+)\)?$", r" \\approx \1"),
    (r"(?i)^(?:[a-z] (?:is|\\in) )?(?:(?:all|any) )?(?:real numbers?|reals)$", r"\\mathbb{R}"),
    # (B) -> B and (-3) -> -3, but not the pair (1,234)
    (r"^\(([^(),]*)\)$", r"\1"),
    (r"^[^|]*\|.+$", _bars),
)


def plain(text: str) -> str:
    r"""Returns one line without spacing, typographic signs, markdown and text macros.

    **\text{B}.** becomes B. A text that is too long becomes "".
    """
    if len(text) > MAX_CHARS:
        return ""
    if not text.isascii():
        text = _ascii(text)
        if len(text) > MAX_CHARS:  # some signs stand for many letters
            return ""
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) > 1 and all(map(_LINE.fullmatch, lines)):
        text = ", ".join(lines)
    for pattern, becomes in _FIRST:
        text = pattern.sub(becomes, text)
    text = " ".join(text.split())
    if "\\" in text or "~" in text or "{" in text:
        text = _unwrapped(text)
        for pattern, becomes in _LATEX:
            text = pattern.sub(becomes, text)
    text = " ".join(text.split())
    if _THOUSANDS.fullmatch(text):  # 12 345,6
        return text.replace(" ", "").replace(",", ".")
    for pattern, becomes in () if text.isdigit() else _LAST:
        text = pattern.sub(becomes, text)
    return text.strip()
