"""Units and nouns: what may stand behind a number without changing it. Standard library only.

>>> unit_of("square metres", glued=False), unit_of("m s^{-2}", glued=False)
('m^2', 'm s^-2')
>>> unit_of("eggs", glued=False), unit_of("million", glued=False)
('egg', None)
"""

import re

from answers.formulas import is_product


def _aliases(table: str) -> dict[str, str]:
    """Returns {alias: name} of a table. Its entries, parted by ; or lines, begin with the name."""
    entries = [entry.split() for entry in table.replace("\n", ";").split(";")]
    return {alias: entry[0] for entry in entries for alias in entry}


_UNITS = _aliases("""
    % percent pct; $ ¤ dollar usd buck; ¥ yuan; ₹ rupee; ¢ cent; € euro; £; degree deg °
    radian rad; cup; day; week wk; month; year yr; mph; kph kmph; mps; cc; kWh; T tesla
    mA milliamp milliampere; unit; nm nanometer nanometre; mm millimeter millimetre
    microm micrometer; cm centimeter centimetre; m meter metre; km kilometer kilometre
    in inch inche; yard yd; ft foot feet; mile mi; g gram gm; kg kilogram kilo; mg milligram
    microg microgram mcg; lb pound; oz ounce; l L liter litre; ml mL milliliter millilitre
    th st nd rd; ms millisecond; s second sec; min minute; h hour hr; N newton; J joule
    kJ kilojoule; cal calorie; kcal kilocalorie; W watt; kW kilowatt; mW milliwatt
    MW megawatt; V volt; mV millivolt; A ampere amp; ohm; kohm; Hz hertz; kHz kilohertz
    MHz megahertz; mHz; MPa megapascal; mPa; Pa pascal; kPa kilopascal; atm atmosphere
    K kelvin; mol mole; eV; mmHg; bpm; rpm""")
_NOUN = re.compile(r"[^\W\d_]{3,}(?<!ly)")  # and no adverb
_SHORT = {"mile h^-1": "mph", "km h^-1": "kph", "m s^-1": "mps", "cc": "cm^3"}
# Behind a number stands a plural, or one of these, with adjectives: 7 red balls, not 7 inverse.
_PLURALS = (
    "people men women children feet teeth mice geese fish sheep deer money data matrix".split()
)
# Words that change what a number says, and beginnings of such words: 3 million, not 3, 3 or more.
_WORDS_THAT_CHANGE = set(
    """no nor not neither never zero one two three four five six seven eight nine ten plus minus
    times over mod sqrt log sine cos sin tan more less fewer greater larger smaller than least most
    below above between about almost nearly around maybe perhaps either else other except without
    unless any if when only or but too score gross cannot nan inf yes mil doubt assume suppose let
    guess hypothetical""".split()
)
_STEMS_THAT_CHANGE = tuple(
    """eleven twelve thirt fourte fort fift sixt sevent eighte eighty ninet hundred thousand
    million billion trillion half halves third quarter tenth ninth twelfth dozen lakh crore quadr
    double twice triple squared cubed factorial infinit infty negative divided multipl added raised
    power remainder choose approx possibl probabl incorrect false none undefined unknown impossible
    eighth nine couple trio tens inclus exclu onward increment plusmin percentil round invert
    revers negat reject untrue wrong fail rooted halv unequal""".split()
)
# Behind a noun or a unit these begin a remark: 8 years | old, 3 cups | of water, 6 | is the answer.
_REMARK = re.compile(
    r"(?i) (?:o[fn]|at|to|from|by|with|is|are|was|were|ha[sd]|have|will|would|can|that|which|who"
    r"|as|so|the)\b.+| (?:old|wide|long|tall|deep|high|away|left|total|altogether|each)\b.*"
    r"|(?<=[^\s/*]) in (?!\^).*| in (?:all|total|the|a)\b.*"
)


def changes(text: str) -> bool:
    """Returns whether a text has a word that changes what a number beside it says."""
    text = re.sub(r"\bthe (?:two|three|four|five) ", "", text)  # 9 that meet the two conditions
    if re.search(r"\b(?:square|cube|roots?) of\b|n't\b", text, re.IGNORECASE):
        return True
    words = re.findall("[a-z]+", text.lower())
    return any(word in _WORDS_THAT_CHANGE or word.startswith(_STEMS_THAT_CHANGE) for word in words)


# A factor of a unit: a word or sign, perhaps with a power.
_FACTOR = re.compile(r"[ .*]*([^\W\d_]+|[%¤¥₹¢€£°])(?: ?\^?(-?[1-3]))?")


def unit_of(text: str, glued: bool) -> str | None:
    """Returns one spelling of a unit: "square metres" -> "m^2", "eggs" -> "egg".

    Returns None if the words are not surely a unit, "" for "is the answer". `glued`: no space
    stands before them.
    """
    text = re.sub("^more (?!than|or|and)(?=[a-z]{3})", "", text)  # 7 more apples
    if changes(text):
        return None
    text = re.sub("[{}]", "", _REMARK.sub("", text if glued else " " + text)).rstrip(" .")
    text = re.sub(r"\b(?:square|sq\.?) ([a-z]+)", r"\1^2", text)
    text = re.sub(r"\bcubic ([a-z]+)", r"\1^3", text)
    powers = {}  # of each unit
    counted = True
    sides = re.split(r" ?(?:/|\bper\b|(?<=\w) an? ) ?", text) if text else []
    for sign, side in zip((1, -1), sides):
        factors = list(_FACTOR.finditer(side))
        if not factors or "".join(factor[0] for factor in factors) != side:
            return None
        for word, power in (factor.groups() for factor in factors):
            # A known unit, in the singular; F is only a unit behind "degree".
            lower = word.lower()
            name = _UNITS.get(word) or _UNITS.get(lower) or _UNITS.get(lower.removesuffix("s"))
            if list(powers) == ["degree"] and lower in ("c", "celsius", "f", "fahrenheit"):
                name = lower[0]
            counted = bool(name) or sign < 0
            if name and glued and len(word) == 1 and word.isalpha():
                return None  # 3 m is a length; 3m may be 3 times m.
            if not name:
                # "18 eggs": any noun will do, since 18 is all that was asked for.
                if glued or not _NOUN.fullmatch(word) or len(word) == 3 and is_product(word):
                    return None
                name = (lower if word[1:].islower() else word).removesuffix("s")
                counted |= bool(re.search(r"(?<!\bpair)s$", lower)) or lower in _PLURALS
            powers[name] = sign * int(power or 1)
            glued = False
    if len(sides) > 2 or not counted or "th" in powers and len(powers) > 1:
        return None
    spelling = " ".join(f"{name}^{power}".removesuffix("^1") for name, power in powers.items())
    return _SHORT.get(spelling, spelling)
