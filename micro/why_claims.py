"""Claims on why it carries over where it does, and why not where it does not.

They ask the models of the other claims (micro/paper_claims.py) further: what goes wrong, what is
known, what a decision follows. The paper has nothing like it. What would refute a claim was written
down before it was measured, or after a look at some seeds, where it says so.
"""

from collections.abc import Callable
from statistics import fmean

from micro.claim_data import pausing_chains, shipped
from micro.claim_parts import (
    FOUR,
    HEADLINE,
    SIX,
    Rows,
    base,
    figure_of,
    percent,
    row,
    sft,
    x_reasoner,
)
from micro.decisions import DECISIONS
from micro.experiments import Place, Probe, Run
from micro.failures import FAILURES
from micro.reproduce import COLUMNS
from micro.verdicts import DEEP, Bound, Claim, Figure, Table

# --- Where it goes wrong --------------------------------------------------------------------------

COUNTED = ("stopped early", "went on")  # the steps are right, but not their number


def failures(seed: int) -> Rows:
    final = x_reasoner(seed)
    return {
        column: {
            name: figure_of(final, shipped(COLUMNS[column]), percent("failures", name))
            for name in FAILURES
        }
        for column in SIX
    }


def miscounted(column: str) -> Callable[[Table], float | None]:
    """Returns what computes the share of failures in which only the number of steps is wrong."""

    def figure(t: Table) -> float | None:
        failed = sum(t[column].values())
        return 100 * sum(t[column][name] for name in COUNTED) / failed if failed else None

    return figure


FAILURES_CLAIM = Claim(
    "failures",
    "not in the paper",
    "Where L and G do not follow A, the steps are right and their number is wrong: what does not "
    "carry over is when to stop.",
    "on L or on G, text or images, less than 75% of the failures are chains of right steps that "
    "stop early or go on (the others misread the question, take a wrong step or a right one that "
    "is not due, or answer something else than the last state of their chain).",
    failures,
    tuple(Bound(f"right steps among the failures, {c}", miscounted(c), 75) for c in SIX[2:]),
    HEADLINE,
    "% of the questions with k > 2 that go wrong in each way, after SFT + RL",
    remark=(
        "On L the bases fail in different mixtures. That of seed 0 mostly loses the order of the "
        "steps; that of seed 1 does as well, and on images it stops early or goes on as often. "
        "Seed 2 takes wrong operations, or gives an answer that is not its chain's last state. "
        "Seed 3 gives such an answer in 28 to 30 of its 51 points, and stops early in 14. Seed 4 "
        "mostly stops early (24 points on text, 54 on images). See `decisions`."
    ),
)

PROBED_LAYER = 2  # the third of four, where A as text and A as images are most alike (seed 0)
OWN, OF_A = "own", "A's"  # the setting whose probe it is


def probed(run: Run, name: str) -> dict[str, Figure]:
    """Returns a row: how a kind of probe ranks in each setting, in %."""
    probe = Probe("micro/stopping.py", run)

    def figure(setting: str) -> Figure:
        return Figure((probe,), lambda place: 100 * probe.read(place)[name][setting][PROBED_LAYER])

    return {setting: figure(setting) for setting in SIX}


def stopping(seed: int) -> Rows:
    first, final = base(seed), x_reasoner(seed)
    return {
        "base: own probe": probed(first, OWN),
        "base: A's probe": probed(first, OF_A),
        "SFT + RL: own probe": probed(final, OWN),
        "SFT + RL: A's probe": probed(final, OF_A),
        "SFT + RL: accuracy": row(final, SIX),
    }


def of_base(kind: str, *settings: str) -> Callable[[Table], float]:
    return lambda t: fmean(t[f"base: {kind} probe"][setting] for setting in settings)


def worst_own(t: Table) -> float:
    return min(t[f"base: {OWN} probe"][setting] for setting in FOUR)


STOPPING = Claim(
    "stopping",
    "not in the paper",
    "Every base knows whether another step follows, in all domains; what differs is the form. L "
    "has it as A does, and follows; G has it in a form of its own, and does not.",
    "in the bases an own probe of A or of L is below 90%; or the probe of A as text is below 85% "
    "on L, or above 65% on G; or G's own is below 95%. (50% is no knowledge. Stated after a "
    "look at seeds 0 and 1.)",
    stopping,
    (
        Bound("base: own probes of A and L, the worst", worst_own, 90),
        Bound("base: G's own probe", of_base(OWN, "G text", "G image"), 95),
        Bound("base: A's probe on L", of_base(OF_A, "L text", "L image"), 85),
        Bound("base: A's probe on G", of_base(OF_A, "G text", "G image"), at_most=65),
    ),
    HEADLINE,
    "take a chain that must go on and one that must end: a linear probe behind the third layer "
    "should score the first higher. In how many % of such pairs it does (50%: it knows nothing; "
    "far below: it knows, with the sign turned); last row: accuracy in %, k > 2",
    (0, 1),
    remark=(
        "A's probe ranks most pairs of G the wrong way round in four bases: what it reads is "
        "there, with its sign turned. In the fifth (seed 4) it does not, and there G is solved "
        "best after training on A (22% of text, 41% of images). But that direction does not say "
        "whether a model goes on: those of seeds 1 and 2, in whose bases it is turned, go on in G "
        "as well (15% of their chains on text stop early), and take wrong hops; only those of "
        "seeds 0 and 3 still stop after two (99%). And seed 4 stops early on L, which A's probe "
        "ranks rightly. Training on A turns the direction round in all. The bounds test what is "
        "known, and not whether it is followed."
    ),
)

# --- Which decisions carry over -------------------------------------------------------------------

# One more, where three of the five had been seen before a bound was stated.
SIX_BASES = (*HEADLINE, 5)

STEP_BY_STEP = ("operation", "result")
NEXT = ("go on", "end", "number")  # the decisions that say which step comes next
# How many decisions there are in a chain of 3 to 6 steps, on average.
IN_A_CHAIN = {
    "go on": 3.5, "end": 1.0, "number": 4.5, "operation": 4.5, "result": 4.5, "answer": 1.0
}  # fmt: skip


def examined(run: Run, part: str, name: str, columns: tuple[str, ...]) -> dict[str, Figure]:
    """Returns a row: what micro/decisions.py finds in a model, in %."""
    probe = Probe("micro/decisions.py", run)

    def figure(column: str) -> Figure:
        def read(place: Place) -> float:
            hits, asked = probe.read(place)[part][name][column]
            return 100 * hits / asked

        return Figure((probe,), read)

    return {column: figure(column) for column in columns}


def decisions(seed: int) -> Rows:
    models = {"base": base(seed), "SFT": sft(base(seed)), "SFT + RL": x_reasoner(seed)}
    rows = {}
    for model, run in models.items():
        # The base ends after two steps: which step comes next is not a question to it.
        for name in (*STEP_BY_STEP, "answer") if model == "base" else DECISIONS:
            rows[f"{model}: {name}"] = examined(run, "decisions", name, FOUR)
    return rows


def worst_step(t: Table) -> float:
    """Returns the least share of operations or results that are right, in any model."""
    models = ("base", "SFT", "SFT + RL")
    return min(
        t[f"{model}: {name}"][column]
        for model in models
        for name in STEP_BY_STEP
        for column in FOUR
    )


def share_of_next(t: Table) -> float | None:
    """Returns how many % of what is wrong after SFT, not on A text, is which step comes next."""
    wrong = {
        name: count * sum(100 - t[f"SFT: {name}"][column] for column in FOUR[1:])
        for name, count in IN_A_CHAIN.items()
    }
    whole = sum(wrong.values())
    return 100 * sum(wrong[name] for name in NEXT) / whole if whole else None


DECISIONS_CLAIM = Claim(
    "decisions",
    "not in the paper",
    "Every base knows each step, in both domains and modalities, and keeps it; what does not carry "
    "over at once is which step comes next.",
    "given a right chain up to there, less than 99% of the operations or of their results are "
    "right, in the base or after a stage, on A or L, text or images; or less than 90% of what is "
    "wrong after SFT, other than on text of A, is whether to go on, or with which number. (Stated "
    "after a look at seeds 0 and 1. The answer is among what can be wrong since seed 3 was seen.)",
    decisions,
    (
        Bound("operations, results: the worst", worst_step, 99),
        Bound("SFT: which step comes next, % of what is wrong", share_of_next, 90),
    ),
    SIX_BASES,
    "% of the decisions that are right, along right chains of 3 to 6 steps",
    (0, 1, 3),
    remark=(
        "It is true of seeds 0, 1 and 5, of which 5 alone is judged (the worst step 99.7% and "
        "more; 96 to 98% of what is wrong is which step comes next), and not of 2, 3 and 4. What "
        "is weak on L there differs, and some of it is there before any training on A. The base "
        "of seed 3 answers a whole chain of L with its last state in 59% on text and 60% on "
        "images (one of A in 98 and 93%), and so do the models that come of it; 1% of their "
        "results on L are wrong. Seed 4 goes on too rarely on L (SFT: 77% on text, 58% on images, "
        "A 100%; after RL 85 and 70%). Seeds 2 and 4 take wrong operations in L (2 and 4%). Seed "
        "5 was added when the claim had been judged on 2 and 4 alone (82.5% of what is wrong: "
        "does not hold)."
    ),
)

TEXTS = ("A text", "L text")
AS_IT_IS = "number, as it is"
OTHER_SIGNS = "number, signs of the other domain"
OTHER_STATES = "number, states of the other domain"
OTHER_PROMPT = "number, prompt of the other domain"
BY_LAST = "last step replaced: one more than its number"
BY_COUNT = "last step replaced: one more than there are"
MOVED_BY_COUNT = "steps moved on: one more than there are"
MOVED_BY_PLACE = "steps moved on: what is due at the place"
BACK_BY_COUNT = "steps moved back: one more than there are"
BACK_BY_PLACE = "steps moved back: what is due at the place"
CLOCK_ROWS = {
    AS_IT_IS: ("swapped", "nothing"),
    OTHER_SIGNS: ("swapped", "signs"),
    OTHER_STATES: ("swapped", "states"),
    OTHER_PROMPT: ("swapped", "prompt"),
    BY_LAST: ("displaced", "replaced: by number"),
    BY_COUNT: ("displaced", "replaced: by count"),
    MOVED_BY_COUNT: ("displaced", "moved on: by count"),
    MOVED_BY_PLACE: ("displaced", "moved on: by place"),
    BACK_BY_COUNT: ("displaced", "moved back: by count"),
    BACK_BY_PLACE: ("displaced", "moved back: by place"),
}
FEW = 1.0  # %, of 900 numbers: fewer wrong ones say nothing of their cause


def clock(seed: int) -> Rows:
    models = {"SFT": sft(base(seed)), "SFT + RL": x_reasoner(seed)}
    return {
        f"{model}: {row_name}": examined(run, part, name, TEXTS)
        for model, run in models.items()
        for row_name, (part, name) in CLOCK_ROWS.items()
    }


def after_both(row_name: str, column: str) -> Callable[[Table], float]:
    return lambda t: t[f"SFT + RL: {row_name}"][column]


def left_with_signs(t: Table) -> float | None:
    """Returns how many % of the wrong numbers on L stay wrong with the signs of A."""
    wrong, left = (100 - after_both(name, "L text")(t) for name in (AS_IT_IS, OTHER_SIGNS))
    return 100 * left / wrong if wrong >= FEW else None


CLOCK = Claim(
    "clock",
    "not in the paper",
    "The number of the next step is not made from the number before it, nor by counting the steps: "
    "it hangs on where the chain stands. Where such numbers are wrong on L, its signs are why.",
    "after both stages, on text of A, the last step of a right chain is replaced by another step "
    "of the question, and more than 5% of the next numbers are one more than that step's; or the "
    "positions of all steps are moved on by the length of one, and more than 10% of the next "
    "numbers are still one more than the steps that there are; or on text of L, where more than "
    "1% of the numbers are wrong, more than half of these stay wrong with A's signs in the place "
    "of L's. (Stated after a look at seeds 0 and 1.)",
    clock,
    (
        Bound("replaced: by the last number", after_both(BY_LAST, "A text"), at_most=5),
        Bound("moved on: by how many there are", after_both(MOVED_BY_COUNT, "A text"), at_most=10),
        Bound("L text: % of wrong numbers left with A's signs", left_with_signs, at_most=50),
    ),
    HEADLINE,
    "% of the numbers of the next step, along right chains, or in such cases",
    (0, 1),
    remark=(
        "In four bases the number does not go on from the last one, and with the steps moved on "
        "it does not say how many there are. That it hangs on the place alone is so in seed 3 "
        "(99.5 and 100%); in seeds 0 and 2 the place explains 52 and 66% when the steps are moved "
        "on, and in seed 1, when they are moved back, 74% still say how many there are. Seed 4 "
        "looks at both: 14% go on from the last number, and a third still say how many there are; "
        "it is also the only one with all numbers right on text of L. The signs are no more than "
        "a part: after SFT alone, where more numbers are wrong, those of A mend less, in seed 2 "
        "nothing. The two rows of an intervention need not add up to 100: the model may give "
        "another number, or none. Moved back, the place says the last number once more."
    ),
)

# --- The form of a step ---------------------------------------------------------------------------

DOTS, DOTTED = 3, "three dots, SFT (280)"


def form(seed: int) -> Rows:
    """Returns the cells after SFT alone: the new form takes longer to learn than the known one."""
    long = {"max_steps": 280, "epochs": 7}
    dotted = sft(base(seed), pausing_chains(DOTS), **long)
    plainly = {
        f"{DOTTED}, asked without: {name}": examined(dotted, "decisions", name, FOUR)
        for name in STEP_BY_STEP
    }
    as_it_is = sft(base(seed), **long)
    return {"as it is, SFT (280)": row(as_it_is), DOTTED: row(dotted), **plainly}


def dotted_l(t: Table) -> float:
    return max(t[DOTTED][column] for column in ("L text", "L image"))


def plain_steps_of_l(t: Table) -> float:
    return min(
        t[f"{DOTTED}, asked without: {name}"][column]
        for name in STEP_BY_STEP
        for column in ("L text", "L image")
    )


FORM = Claim(
    "form",
    "not in the paper",
    "What carries over to another domain is what the base has in that form. If SFT on A changes "
    "the form of a step as well (three dots behind each), images of A follow, but L does not.",
    "with the dots, text of A is below 80% after 280 steps (then nothing is learned that could "
    "carry over), or images of A below 50%; or text or images of L are above 30%; or, given a "
    "right chain without dots, less than 95% of that model's operations or results in L are right "
    "(then it has forgotten them). (Stated after seeds 0 to 2 with 80 steps and RL, which taught "
    "two of the three nothing: log.md.)",
    form,
    (
        Bound("three dots: A text", lambda t: t[DOTTED]["A text"], 80),
        Bound("three dots: A image", lambda t: t[DOTTED]["A image"], 50),
        Bound("three dots: L, the better one", dotted_l, at_most=30),
        Bound("asked without dots: L's steps, the worst", plain_steps_of_l, 95),
    ),
    SIX_BASES,
    f"{DEEP}; asked without: % of the decisions, along right chains without dots",
    (0, 1, 2),
    remark=(
        "With dots no base solves L (at most 12%), and images of A are at half and more. That the "
        "form is the reason is clear in seeds 0, 2 and 5 only, of which 5 alone is judged: asked "
        "without dots, these models still do L's steps in 99.9, 99.8 and 97%. The other three "
        "have lost results of L (62 to 84% are right), and seed 3 hardly solves L in the known "
        "form either (16%). Asked without dots, all but seed 0 have lost results of A as well: "
        "90% are right in seed 2, 89% in seed 4, and 63 to 70% in the others. Seed 5 was added "
        "when the claim had been judged on 3 and 4 alone (undecided, too)."
    ),
)

WHY_CLAIMS = (FAILURES_CLAIM, STOPPING, DECISIONS_CLAIM, CLOCK, FORM)
