r"""Verifiable rewards: is the final answer of a response the true one? Standard library only.

The paper's reward is 1 if the final answer is equivalent to the truth, else 0, with nothing for format. A policy
optimises what this file accepts, so every rule errs on the side of "wrong": exactly one answer, in its place, exact
arithmetic, and nothing is ever evaluated (no eval, no powers: 9**9**9 is a string).

1. `extract_answer`: behind the last </think>, the last <answer>..</answer>, else the last \boxed{..}, else "#### 18".
2. `is_equivalent` compares parsed answers, `Answer(value, unit, name)`: `_plain` removes LaTeX, markdown and Unicode,
   `_number` gives an exact Fraction, `_canonical` a normalised string for all else. New kinds of value go beside these.
3. `accuracy_reward` joins them; for multiple choice it compares the letters found by `_choose`.

>>> extract_answer(r"<think>so \boxed{7}</think> It is <answer>\boxed{\frac{1}{2}}</answer>")
'\\frac{1}{2}'
>>> is_equivalent("$1,234.50", r"1234\frac12 \text{ dollars}"), is_equivalent("(1,234)", "1234")
(True, False)
>>> accuracy_reward("<think>...</think><answer>B: No</answer>", "B", {"A": "Yes", "B": "No"})
1.0

Where reasonable people differ, this is what we chose:
- 50% equals 50 (its unit dropped) and 0.5 (its value), but two percentages must agree with each other.
- A unit, or the name in x = 5, is dropped if one side only has it; if both do, they must be the same (no conversion).
- 1,234 is one number; (1,234) and "1, 234" are two. 1\frac12 is a mixed number, 1\frac32 neither that nor a product.
- Letter case counts in formulas (R is not r), not in words or single letters.
- An option letter beats an option whose text is that letter; a letter with another option's text is wrong.
"""
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

MAX_CHARS = 512  # longer answers are refused, which bounds the cost of everything below
MAX_DEPTH = 12  # nested braces

# ---- 1. Where the answer is ------------------------------------------------------------------------------------------


def extract_answer(response: str) -> str | None:
    """The final answer in a response; None if there is none, thinking or box is not closed, or it is too long."""
    if not isinstance(response, str):
        return None
    text = response[response.rfind("</think>") + len("</think>"):] if "</think>" in response else response
    if "<think>" in text:  # opened and never closed: what follows are thoughts
        return None
    start = text.rfind("<answer>", 0, max(text.rfind("</answer>"), 0))  # the last one that is closed
    if start >= 0:
        text = text[start + len("<answer>"):text.find("</answer>", start)]
    box = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if box >= 0:
        if start >= 0 and _several(text, box):
            return None
        text = _box_content(text[box:])
    elif start < 0:
        line = text[text.rfind("####") + 4:].split("\n", 1)[0].strip() if "####" in text else ""
        text = line if re.match(r"[-+$]*\.?[0-9]", line) else ""  # "#### Step 2" is a heading, not an answer
    text = (text or "").strip()
    return text if 0 < len(text) <= MAX_CHARS else None


def _several(text: str, last: int) -> bool:
    r"""Whether an <answer> with a box (the last one is at `last`) gives two answers: "\boxed{3} or \boxed{4}",
    "3 \boxed{4}"; a box inside a box is one."""
    first = re.search(r"\\(?:boxed|fbox)", text).start()
    nested = first < last and "box" in (_box_content(text[first:]) or "")
    return (first < last and not nested) or _number(_plain(text[:first]).rstrip(",; ")) is not None


def _box_content(text: str) -> str | None:
    r"""What the box at the start of text holds: \boxed{a{b}} -> a{b}; \boxed 5$ -> 5; None if it is never closed."""
    text = re.sub(r"\\(?:boxed|fbox)\s*", "", text[:MAX_CHARS + 16], count=1)
    if not text.startswith("{"):
        return re.split(r"[$\n]", text, maxsplit=1)[0]
    depth = 0
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):  # an escaped \{ is no group
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0 and match[0] == "}":
            return text[1:match.start()]
    return None


# ---- 2. From LaTeX to plain text -------------------------------------------------------------------------------------

_UNICODE = str.maketrans({
    "−": "-", "–": "-", "—": "-", "×": "*", "·": "*", "⋅": "*", "÷": "/", "π": r"\pi ", "√": r"\sqrt", "∞": r"\infty ",
    "°": r"\degree ", "²": "^2", "³": "^3", "½": r"\frac12", "¼": r"\frac14", "¾": r"\frac34", "≤": "<=", "≥": ">=",
    "≠": "!=", "‘": "'", "’": "'", "“": '"', "”": '"'})
_SPELLINGS = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"(?<![\w)])\*\*([^*]+)\*\*(?!\w)", r"\1"), (r"(?<=[\w)]) ?\*\* ?(?=[\w(])", "^"),  # **bold**, then 2**3
    (r"\\[dtc](frac|binom)", r"\\\1"),
    (r"\\(?:left|right|displaystyle)(?![a-zA-Z])\.?", ""),
    (r"(?<=[0-9])\\,(?=[0-9]{3}(?![0-9]))|\\!", ""),  # 10\,000
    (r"\\[,;: ()\[\]]|\\q?quad(?![a-zA-Z])|~", " "),
    (r"\^\s*\{?\s*(?:\\circ|\\degree)(?![a-zA-Z])\s*\}?|\\degree(?![a-zA-Z])", " degree "),
    (r"\\(?:times|cdot|ast)(?![a-zA-Z])", "*"), (r"\\div(?![a-zA-Z])", "/"),
    (r"\\(?:geq?|geqslant)(?![a-zA-Z])", ">="), (r"\\(?:leq?|leqslant)(?![a-zA-Z])", "<="),
    (r"\\neq?(?![a-zA-Z])", "!="), (r"\\(?:l|c)?dots(?![a-zA-Z])", "..."))]
_GROUP = r"(\{[^{}]*\}|\\[a-zA-Z]+|[0-9a-zA-Z])"  # an argument without braces inside: innermost first
_FRAC = re.compile(rf"\\frac\s*{_GROUP}\s*{_GROUP}")
_BRACED = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"\\(?:(?:text|math)(?:bf|it|rm|sf|tt|normal)?|mbox|operatorname|boldsymbol)\s*\{([^{}]*)\}", r" \1 "),
    (r"\\?sqrt\s*(?:(\[[^][{}]*\])\s*)?(?:\{([^{}]*)\}|(\\[a-zA-Z]+|[0-9]+|[a-zA-Z]))", r"sqrt\1(\2\3)"),
    (r"([\^_])\s*\{([^{}]*)\}", r"\1(\2)"), (r"([\^_])\(([-+]?[0-9]+|[a-zA-Z])\)(?![0-9])", r"\1\2"))]
_PREAMBLE = re.compile(r"^(?:the )?(?:final |correct |best )?(?:answer|option|choice) ?(?:is|:|=) ?:? ?", re.IGNORECASE)


def _fraction(match: re.Match) -> str:
    r"""\frac{a}{b} as a/b, with brackets only where a reader of a/b needs them, so that both spellings meet."""
    top, bottom = (part.strip("{}").strip() for part in match.groups())
    before, after = match.string[:match.start()].rstrip()[-1:], match.string[match.end():match.end() + 2]
    if re.search(r"[-+/,<>=]", top[1:] if before in "=(," else top):  # a leading minus may stand free
        top = f"({top})"
    if not re.fullmatch(r"[0-9]+|\\?[a-zA-Z]|\\[a-zA-Z]+", bottom) or re.match(r"\.?[0-9]", after):
        bottom = f"({bottom})"
    if before and before in "^_/":
        return f"({top}/{bottom})"
    return f" {top}/{bottom}" if before.isdigit() else f"{top}/{bottom}"  # 1\frac12 -> 1 1/2, not 11/2


def _plain(text: str) -> str:
    r"""Text without LaTeX, markdown and typographic spelling, on one line: \dfrac12 -> 1/2, **\text{B}** -> B."""
    text = " ".join(text.translate(_UNICODE).split()).replace("\\$", "¤").replace("\\%", "%").replace("{,}", ",")
    if len(text) > 2 * MAX_CHARS:  # hundreds of ½: no answer, and slow
        return ""
    text = text.replace("$", "¤" if text.count("$") == 1 else " ")  # a single $ is money, pairs enclose formulas
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    for _ in range(MAX_DEPTH):
        before = text
        for pattern, replacement in _BRACED:
            text = pattern.sub(replacement, text)
        text = _FRAC.sub(_fraction, text)
        if text == before:
            break
    text = " ".join(re.sub(r"\\([a-zA-Z]+|[{}&#_])", r"\1", text).split()).strip("*_`\\ ")
    text = _PREAMBLE.sub("", text).strip("*_` ").rstrip(". ")
    single = re.fullmatch(r"\(([^(),]*)\)", text)  # (B), (-3), but not the pair (1,234)
    return single[1].strip() if single else text


# ---- 3. From plain text to a value -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """A parsed answer: an exact number or a normalised string, its unit ("" if none), and its name (x in x = 5)."""
    value: Fraction | str
    unit: str = ""
    name: str = ""


_DECIMAL = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
_TERM = rf"(?:{_DECIMAL}|\([-+]?[0-9]+(?:\.[0-9]+)?\))"
_NUMBER = re.compile(rf"([-+]?) ?(?:([0-9]+) (?=[0-9]+ ?/))?({_TERM})(?:[eE]([-+]?[0-9]{{1,3}}))?(?: ?/ ?({_TERM}))?")
_TEN_TO_THE = re.compile(rf"([-+]?) ?()(?:({_DECIMAL}) ?[*x] ?)?10 ?\^ ?([-+]?[0-9]{{1,3}})()")  # 1.2*10^3, same groups
_UNITS = {alias: line.split()[0] for line in """% percent; $ ¤ dollar usd; ¢ cent; € euro; £; degree deg; radian rad;
    mm millimeter millimetre; cm centimeter centimetre; m meter metre; km kilometer kilometre; inch in inche; yard yd;
    ft foot feet; mile mi; g gram; kg kilogram; mg milligram; lb pound; oz ounce; l liter litre;
    ml milliliter millilitre; cup; s second sec; min minute; h hour hr; day; week; month; year yr; mph; unit; men; of;
    / per""".split(";")
    for alias in line.split()}
_NOT_UNITS = tuple("""zero three four five seven eight nine eleven twelve thirt twent fift sixt hundred thousand million
    billion trillion half halves third quarter tenth squared cubed factorial plus minus times over more less than modulo
    root maybe perhaps either else about remainder choose sqrt infty approx except""".split())
_FUNCTIONS = re.compile(r"sqrt|pi|infty|sin|cos|tan|log|binom")


def _number(text: str) -> Fraction | None:
    """The number that the whole text spells (decimal, ratio, mixed, power of ten with up to 3 digits), else None."""
    match = _NUMBER.fullmatch(text) or _TEN_TO_THE.fullmatch(text)
    if not match:
        return None
    sign, whole, top, exponent, bottom = match.groups()
    value, divisor = (Fraction(part.strip("()").replace(",", "")) if part else Fraction(1) for part in (top, bottom))
    if divisor == 0 or (whole and not 0 <= value < divisor):  # 5 3/2 is neither 6 1/2 for sure nor 15/2
        return None
    value = int(whole or 0) + value / divisor * Fraction(10) ** int(exponent or 0)
    return -value if sign == "-" else value


def _unit(text: str, glued: bool) -> str:
    """One spelling for a unit ("square metres" -> "m^2", "eggs" -> "egg"), "" where the words are not surely one."""
    unit, power = [], ""
    for word in re.findall(r"[^\W\d_]+|\^?[23]|\S", text.lower()):
        name = _UNITS.get(word) or _UNITS.get(word.removesuffix("s"))
        if unit == ["degree"] and word in ("c", "celsius", "f", "fahrenheit"):
            name = word[0]
        if word in ("square", "sq", "cubic"):
            power = "^3" if word == "cubic" else "^2"
        elif name and not (glued and len(word) == 1 and word.isalpha()):  # 3m may be 3 times m, 3 m is a length
            unit.append(name + power)
            power, glued = "", False
        elif word.lstrip("^") in ("2", "3") and unit:
            unit.append("^" + word.lstrip("^"))
        elif len(word) > 3 and word.isalpha() and not glued and not word.startswith(_NOT_UNITS):
            unit.append(word.removesuffix("s"))  # "18 eggs": any noun, since 18 is all that was asked for
        else:
            return ""
    return "".join(unit)


def _is_words(text: str) -> bool:
    return bool(re.search(r"[^\W\d_]{3}", _FUNCTIONS.sub(" ", text))) or not re.search(r"[-0-9^_=+*/<>(:!]", text)


def _canonical(text: str) -> str:
    """The string that stands for an answer that is no number: only spaces and stars between two digits matter."""
    text = re.sub(r"(?<![0-9]) | (?![0-9])", "", re.sub(r" ?\* ?", "*", text))
    text = re.sub(r"(?<![0-9])\*|\*(?![0-9])", "", text)
    return text.casefold() if _is_words(text) else text


@lru_cache(maxsize=4096)
def _parse(text: str) -> Answer | None:
    """The answer that a text gives, None if it is empty or over 512 characters."""
    text, name = _plain(text) if len(text) <= MAX_CHARS else "", ""
    if not text:
        return None
    match = re.fullmatch(r"([a-zA-Z](?:_\(?\w+\)?)?(?:\([a-zA-Z]\))?) ?= ?([^=]+)", text)
    if match and not (len(match[1]) == 1 and re.fullmatch("[a-zA-Z]", match[2])):  # a = b is a relation
        name, text = match.groups()
    if (value := _number(text)) is not None:
        return Answer(value, "", name)
    text = re.sub(r"^([-+]?) ?([¤€£]) ?(.+)", r"\1\3 \2", text)  # -$5 -> -5 $
    if match := re.fullmatch(r"(.*(?:[0-9)]|pi))( ?)([^\W\d_][^0-9()]{0,40}(?:(?<! )[23])?|[%¤¢€£])", text):
        body, space, words = match.groups()
        unit, value = _unit(words, glued=not space), _number(body)
        if unit and not re.search("[^-+*/^(),.0-9 ]", _FUNCTIONS.sub("", body)):  # 5 cm, 5\sqrt{3} cm, not S3 gallop
            return Answer(_canonical(body) if value is None else value, unit, name)
    return Answer(_canonical(text), "", name)


def _as_text(value) -> str:
    """Numbers of a JSON file as text; "" for anything that is neither text nor a number."""
    if isinstance(value, int) and value.bit_length() > 4 * MAX_CHARS:
        return ""
    return str(value) if isinstance(value, (str, int, float)) else ""


def is_equivalent(predicted: str, truth: str) -> bool:
    """Whether two answers agree: exactly for numbers, as normalised strings for all else. Symmetric; never raises."""
    one, other = _parse(_as_text(predicted)), _parse(_as_text(truth))
    if one is None or other is None:
        return False
    if (one.unit and other.unit and one.unit != other.unit) or (one.name and other.name and one.name != other.name):
        return False
    if one.value == other.value:
        return True
    if one.unit == other.unit or "%" not in (one.unit, other.unit) or str in map(type, (one.value, other.value)):
        return False
    return one.value == other.value * 100 if one.unit == "%" else one.value * 100 == other.value


# ---- 4. Multiple choice, and the reward ------------------------------------------------------------------------------

_LETTER = re.compile(  # the letter, what sets it off from a text, the text
    r"[(\[]?(?:(?:option|choice) ?:? ?)?[(\[]?([A-P])(?![\w'^])( - |[)\]]{0,2} ?[.:;,]?) ?(.*)", re.IGNORECASE)
_FURTHER = re.compile(r"(?:^|[,;/&(]|\b(?:or|and)\b) ?\(?([A-P])(?=[).:,;/&]| (?:or|and)\b| ?$)|\b([A-P])[:)]")


def _choose(answer: str, options: dict[str, str]) -> str | None:
    """The one option that an answer names, by letter, by letter and text, or by text; None if none or several."""
    text = _plain(answer.replace("\n", "; "))
    if text in options:
        return text
    exact = [letter for letter, option in options.items() if _parse(answer) == _parse(option) is not None]
    if len(exact) == 1:
        return exact[0]
    match = _LETTER.fullmatch(text)
    if match and match[1].upper() in options:
        letter, delimiter, rest = match[1].upper(), match[2].strip(), match[3].strip()
        same = [other for other, option in options.items() if is_equivalent(rest, option)]
        if letter in same or not rest:
            return letter
        further = {a or b for a, b in _FURTHER.findall(rest)} & set(options) - {letter}
        if delimiter and not same and not further and (match[1].isupper() or delimiter[0] in ":)]"):
            return letter
        if delimiter and match[1].isupper():
            return None  # a letter with another option's text, or several letters
    equivalent = [letter for letter, option in options.items() if is_equivalent(answer, option)]
    return equivalent[0] if len(equivalent) == 1 else None


def accuracy_reward(response: str, truth: str, options: dict[str, str] | None = None) -> float:
    """1.0 if the response's final answer is right, else 0.0; never raises.

    options: {"A": text, ...}, letters up to P; truth is then a letter or an option's text. Without: `is_equivalent`.
    """
    answer, truth = extract_answer(response), _as_text(truth)
    if answer is None:
        return 0.0
    if not options or not isinstance(options, dict):
        return float(is_equivalent(answer, truth))
    options = {key.upper(): _as_text(text) for key, text in options.items() if re.fullmatch("[A-Pa-p]", _as_text(key))}
    chosen = _choose(answer, options)
    return float(chosen is not None and len(truth) <= MAX_CHARS and chosen == _choose(truth, options))
