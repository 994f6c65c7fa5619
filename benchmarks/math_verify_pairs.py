"""The peer of benchmarks/rewards.py: math-verify.

Runs in an environment of its own, which needs math-verify only. Reads [[truth, answer], ...] on
stdin and prints one JSON object: the verdicts and the seconds for each of the two ways in which its
README writes answers: as they are, and between dollar signs, as LaTeX. A truth is parsed once.
"""

import json
import logging
import sys
import time
from functools import lru_cache
from importlib.metadata import version

from math_verify import parse, verify


def judge(pairs: list[list[str]], form: str) -> dict:
    """Returns the verdicts on answers that are written in this form, and the seconds they took."""
    parsed = lru_cache(maxsize=None)(parse)
    verdicts = []
    started = time.perf_counter()
    for truth, answer in pairs:
        try:
            same = verify(parsed(form.format(truth)), parsed(form.format(answer)))
            verdicts.append(bool(same))
        except Exception:  # its own time limit among others: not accepted
            verdicts.append(False)
    return {"verdicts": verdicts, "seconds": time.perf_counter() - started}


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    pairs = json.load(sys.stdin)
    result = {"version": version("math-verify")}
    result |= {"plain": judge(pairs, "{}"), "latex": judge(pairs, "${}$")}
    print(json.dumps(result))
