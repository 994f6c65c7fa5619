"""Are two answers the same? Our development table, tests/answers.txt, through us and through math-verify.

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

from answers import equivalence  # noqa: E402
from benchmarks.common import ask_peer  # noqa: E402
from hub.options import ROOT, option, parse_options, run_command  # noqa: E402
from training.journal import git_commit  # noqa: E402

ANSWERS = ROOT / "tests" / "answers.txt"


@dataclass
class RewardsOptions:
    """Are two answers the same? Accuracy and speed on the development table, and time on hostile strings."""
    peer: str | None = option(None, "Python of an environment with math-verify")
    hostile: int = option(20_000, "random and hostile strings that are compared", low=1)
    seed: int = option(0, "of these strings", low=0)
    json: bool = option(False, "the last line is one JSON object with everything")


def answer_blocks(path: Path = ANSWERS) -> list[dict[str, list[str]]]:
    """The table's blocks: the spellings by their mark (= ! ~; the file says what these mean)."""
    blocks = []
    for part in path.read_text(encoding="utf-8").split("\n\n"):
        lines = [line for line in part.splitlines() if line and not line.startswith("#")]
        if lines:
            blocks.append({mark: [line[2:] for line in lines if line[0] == mark] for mark in "=!~"})
    return blocks


def labelled_pairs(blocks: list[dict[str, list[str]]]) -> list[tuple[str, str, bool]]:
    """Truth, answer, and whether they are the same: every line of a block against its first."""
    return [(block["="][0], answer, same) for block in blocks
            for answers, same in ((block["="][1:] + block["~"], True), (block["!"], False)) for answer in answers]


PIECES = r"""\frac{ \frac \sqrt \sqrt[ { } ( ) [ ] \{ \} ^ _ ^{ ! | \pm \cup \infty pi \pi e i x y n 1 2 9 10 99
    1e99 999999999 0. 3.14 , ; = < >= + - * / \sin \log \ln \binom \text{cm} cm % ° \circ
    \begin{pmatrix} & \\ \end{pmatrix} or and $ ** sin log_ \lfloor \rfloor ² ½ √ a b k m factorial
    million \overline{3} \mathbb{R} é \boxed{ ≤""".split() + [" "]


def hostile_strings(count: int, seed: int, answers: list[str]) -> list[tuple[str, str]]:
    """Pairs of one that a policy might come up with (noise, pieces of maths at random or over and over, a real answer
    with pieces replaced) and mostly a real answer."""
    g = random.Random(seed)

    def one() -> str:
        kind = g.random()
        if kind < 0.2:
            return "".join(g.choices(string.printable, k=g.randint(0, 60)))
        if kind < 0.5:
            return "".join(g.choices(PIECES, k=g.randint(0, 40)))
        if kind < 0.6:
            return "".join(g.choices(PIECES, k=g.randint(40, 200)))[:512]
        if kind < 0.8:
            return ("".join(g.choices(PIECES, k=g.randint(1, 3))) * 512)[:g.randint(1, 512)]
        text = list(g.choice(answers))
        for _ in range(g.randint(0, 4)):
            text[g.randrange(len(text))] = g.choice(PIECES)
        return "".join(text)
    return [(one(), one() if g.random() < 0.1 else g.choice(answers)) for _ in range(count)]


def score(name: str, verdicts: list[bool], pairs: list[tuple[str, str, bool]], seconds: float) -> dict:
    """Prints, and returns, how often the verdicts are right."""
    false_accepts = sum(verdict and not same for verdict, (_, _, same) in zip(verdicts, pairs))
    right = sum(verdict == same for verdict, (_, _, same) in zip(verdicts, pairs))
    print(f"{name:<24}{right:>6} of {len(pairs)} right   {false_accepts:>4} false accepts   "
          f"{1e6 * seconds / len(pairs):>10,.1f} us a pair", flush=True)
    return {"right": right, "false_accepts": false_accepts, "seconds": seconds}


def time_hostile(o: RewardsOptions, answers: list[str]) -> dict:
    """Processor time of a comparison. What took over 10 ms is asked again, its parsed answers forgotten: now and then
    the machine or Python's garbage collector takes such a time for itself."""
    def seconds(pair: tuple[str, str]) -> float:
        started = time.thread_time()
        equivalence.is_equivalent(*pair)
        return time.thread_time() - started

    pairs = hostile_strings(o.hostile, o.seed, answers)
    gc.collect()
    gc.freeze()  # nobody else has a million pairs for the collector to walk over
    times = list(map(seconds, pairs))
    gc.unfreeze()
    again = []
    for pair in [pair for pair, t in zip(pairs, times) if t > 0.01]:
        equivalence.parse_answer.cache_clear()
        equivalence.parse_truth.cache_clear()
        again.append(seconds(pair))
    times.sort()
    found = {"strings": len(times), "median_us": 1e6 * times[len(times) // 2],
             "p99_us": 1e6 * times[len(times) * 99 // 100], "max_ms": 1e3 * times[-1], "over_10_ms": len(again),
             "of_these_max_ms_again": 1e3 * max(again, default=0.0)}
    print(f"{found['strings']:,} hostile strings: median {found['median_us']:.1f} us, 99% up to "
          f"{found['p99_us']:.0f} us, longest {found['max_ms']:.1f} ms; {len(again)} over 10 ms, which again take up "
          f"to {found['of_these_max_ms_again']:.2f} ms")
    return found


def rewards(o: RewardsOptions) -> dict:
    """Prints and returns both parts."""
    blocks = answer_blocks()
    pairs = labelled_pairs(blocks)
    equivalence.parse_answer.cache_clear()
    equivalence.parse_truth.cache_clear()
    started = time.perf_counter()
    verdicts = [equivalence.is_equivalent(answer, truth) for truth, answer, _ in pairs]
    result = {"pairs": len(pairs), "ours": score("x-reasoner", verdicts, pairs, time.perf_counter() - started)}
    if o.peer:
        peer, = ask_peer(o.peer, "math_verify_pairs.py", [pair[:2] for pair in pairs])
        forms = [score(f"math-verify {peer['version']} {form}", peer[form]["verdicts"], pairs, peer[form]["seconds"])
                 for form in ("plain", "latex")]
        best = max(forms, key=lambda form: form["right"])
        result |= {"math_verify": best | {"version": peer["version"]},
                   "ratio": best["seconds"] / result["ours"]["seconds"]}
        print(f"speed against its better way: {result['ratio']:.0f} x")
    result["hostile"] = time_hostile(o, [line for block in blocks for lines in block.values() for line in lines])
    return result | {"date": str(date.today()), "commit": git_commit(), "machine": platform.platform()}


def main(argv: list[str]) -> None:
    options = parse_options(RewardsOptions, argv)
    result = rewards(options)
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    run_command(main)
