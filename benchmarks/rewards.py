"""Are two answers the same? Our development table, tests/answers.txt, through us and math-verify.

    python benchmarks/rewards.py --peer PEER/bin/python

Set up the peer with `python -m venv PEER && PEER/bin/pip install math-verify[antlr4_13_2]`.
"""

import gc
import json
import platform
import random
import string
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from answers.equivalence import is_equivalent  # noqa: E402
from answers.parsing import parse_answer, parse_truth  # noqa: E402
from benchmarks.common import ask_peer  # noqa: E402
from hub.options import ROOT, option, parse_options, run_command  # noqa: E402
from training.journal import git_commit  # noqa: E402

Block = dict[str, list[str]]  # the spellings by their mark: = ! ~ > (see the tables)
LabelledPair = tuple[str, str, bool]  # truth, answer, are they the same


@dataclass
class RewardsOptions:
    """Are two answers the same? Accuracy and speed on our table and on hostile strings."""

    peer: str | None = option(None, "Python of an environment with math-verify")
    hostile: int = option(20_000, "random and hostile strings that are compared", low=1)
    json: bool = option(False, "the last line is one JSON object with everything")


def answer_blocks(name: str = "answers.txt") -> list[Block]:
    """Returns a table's blocks."""
    blocks = []
    table = ROOT / "tests" / name
    for part in table.read_text(encoding="utf-8").split("\n\n"):
        lines = [line for line in part.splitlines() if line and not line.startswith("#")]
        if lines:
            blocks.append(
                {mark: [line[2:] for line in lines if line[0] == mark] for mark in "=!~>"}
            )
    return blocks


def labelled_pairs(blocks: list[Block]) -> list[LabelledPair]:
    """Returns every line of each block with the block's first line."""
    pairs = []
    for block in blocks:
        truth, *spellings = block["="]
        pairs += [(truth, answer, True) for answer in spellings + block["~"] + block[">"]]
        pairs += [(truth, answer, False) for answer in block["!"]]
    return pairs


def score(name: str, verdicts: list[bool], pairs: list[LabelledPair], seconds: float) -> dict:
    """Prints and returns how many verdicts are right."""
    labels = [same for _, _, same in pairs]
    right = sum(verdict == same for verdict, same in zip(verdicts, labels))
    false_accepts = sum(verdict and not same for verdict, same in zip(verdicts, labels))
    print(
        f"{name:<24}{right:>6} of {len(pairs)} right   {false_accepts:>4} false accepts   "
        f"{1e6 * seconds / len(pairs):>10,.1f} us a pair",
        flush=True,
    )
    return {"right": right, "false_accepts": false_accepts, "seconds": seconds}


PIECES = (
    r"""\frac{ \frac \sqrt \sqrt[ { } ( ) [ ] \{ \} ^ _ ^{ ! | \pm \cup \infty pi \pi e i x y n
    1 2 9 10 99 1e99 999999999 0. 3.14 , ; = < >= + - * / \sin \log \ln \binom \text{cm} cm % °
    \circ \begin{pmatrix} & \\ \end{pmatrix} or and $ ** sin log_ \lfloor \rfloor ² ½ √ a b k m
    factorial million \overline{3} \mathbb{R} é \boxed{ ≤""".split()
    + [" "]
)


def hostile_string(g: random.Random, answers: list[str]) -> str:
    """Returns something that a policy might come up with: noise, or maths gone wrong."""
    kind = g.random()
    if kind < 0.2:
        return "".join(g.choices(string.printable, k=g.randint(0, 60)))
    # Pieces of maths: few, many, or the same over and over.
    if kind < 0.5:
        return "".join(g.choices(PIECES, k=g.randint(0, 40)))
    if kind < 0.6:
        return "".join(g.choices(PIECES, k=g.randint(40, 200)))[:512]
    if kind < 0.8:
        return ("".join(g.choices(PIECES, k=g.randint(1, 3))) * 512)[: g.randint(1, 512)]
    # A real answer, up to four characters of it replaced.
    text = list(g.choice(answers))
    for _ in range(g.randint(0, 4)):
        text[g.randrange(len(text))] = g.choice(PIECES)
    return "".join(text)


def hostile_strings(count: int, seed: int, answers: list[str]) -> list[tuple[str, str]]:
    """Returns pairs of a hostile string and mostly a real answer."""
    g = random.Random(seed)
    pairs = []
    for _ in range(count):
        one = hostile_string(g, answers)
        other = hostile_string(g, answers) if g.random() < 0.1 else g.choice(answers)
        pairs.append((one, other))
    return pairs


def seconds_of(pair: tuple[str, str]) -> float:
    """Returns the processor time of a comparison."""
    started = time.thread_time()
    is_equivalent(*pair)
    return time.thread_time() - started


def time_hostile(count: int, answers: list[str]) -> dict:
    """Prints and returns how long comparisons with hostile strings take."""
    pairs = hostile_strings(count, 0, answers)
    # Nobody else has a million pairs for the garbage collector to walk over.
    gc.collect()
    gc.freeze()
    times = [seconds_of(pair) for pair in pairs]
    gc.unfreeze()
    # The machine may have taken the time for itself, so what took over 10 ms is asked again.
    again = []
    for pair, seconds in zip(pairs, times):
        if seconds > 0.01:
            parse_answer.cache_clear()
            parse_truth.cache_clear()
            again.append(seconds_of(pair))
    times.sort()
    found = {
        "strings": len(times),
        "median_us": 1e6 * times[len(times) // 2],
        "p99_us": 1e6 * times[len(times) * 99 // 100],
        "max_ms": 1e3 * times[-1],
        "over_10_ms": len(again),
        "of_these_max_ms_again": 1e3 * max(again, default=0.0),
    }
    print(
        f"{found['strings']:,} hostile strings: median {found['median_us']:.1f} us, "
        f"99% up to {found['p99_us']:.0f} us, longest {found['max_ms']:.1f} ms; "
        f"{len(again)} over 10 ms, which again take up to {found['of_these_max_ms_again']:.2f} ms"
    )
    return found


def compare_with_peer(python: str, pairs: list[LabelledPair], our_seconds: float) -> dict:
    """Prints math-verify's results for both ways of writing an answer; returns the better one."""
    (peer,) = ask_peer(python, "math_verify_pairs.py", [pair[:2] for pair in pairs])
    forms = []
    for form in ("plain", "latex"):
        name = f"math-verify {peer['version']} {form}"
        forms.append(score(name, peer[form]["verdicts"], pairs, peer[form]["seconds"]))
    best = max(forms, key=lambda form: form["right"])
    ratio = best["seconds"] / our_seconds
    print(f"speed against its better way: {ratio:.0f} x")
    return {"math_verify": best | {"version": peer["version"]}, "ratio": ratio}


def main(argv: list[str]) -> None:
    """Judges both tables and the hostile strings, and prints what came out."""
    options = parse_options(RewardsOptions, argv)
    blocks = answer_blocks()
    pairs = labelled_pairs(blocks)
    started = time.perf_counter()
    verdicts = [is_equivalent(answer, truth) for truth, answer, _ in pairs]
    seconds = time.perf_counter() - started
    result = {"pairs": len(pairs), "ours": score("x-reasoner", verdicts, pairs, seconds)}
    # What models write around an answer, beside the spellings of answers themselves.
    field = labelled_pairs(answer_blocks("answers_field.txt"))
    started = time.perf_counter()
    verdicts = [is_equivalent(answer, truth) for truth, answer, _ in field]
    seconds_of_field = time.perf_counter() - started
    result["field"] = score("the same, in the field", verdicts, field, seconds_of_field)
    if options.peer:
        result |= compare_with_peer(options.peer, pairs, seconds)
    answers = [line for block in blocks for lines in block.values() for line in lines]
    result["hostile"] = time_hostile(options.hostile, answers)
    result |= {"date": str(date.today()), "commit": git_commit(), "machine": platform.platform()}
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    run_command(main)
