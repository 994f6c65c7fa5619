"""The peer of `bench.py rewards`: math-verify. Runs in an environment of its own, which needs math-verify only; reads
[[truth, answer], ...] on stdin and prints one JSON object: by way of writing an answer its verdicts and its seconds.

Both ways of its README: the answer as it is, and between dollar signs, as LaTeX. A truth is parsed once."""
import json
import logging
import sys
import time
from functools import lru_cache
from importlib.metadata import version

from math_verify import parse, verify


def judge(pairs: list[list[str]], form: str) -> dict:
    parsed, verdicts, started = lru_cache(maxsize=None)(parse), [], time.perf_counter()
    for truth, answer in pairs:
        try:
            verdicts.append(bool(verify(parsed(form.format(truth)), parsed(form.format(answer)))))
        except Exception:  # its own time limit among others: not accepted
            verdicts.append(False)
    return {"verdicts": verdicts, "seconds": time.perf_counter() - started}


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    pairs = json.load(sys.stdin)
    print(json.dumps({"version": version("math-verify"), "plain": judge(pairs, "{}"), "latex": judge(pairs, "${}$")}))
