r"""Verifiable rewards: is the final answer of a response the true one? Standard library only.

The paper's reward is 1 if the final answer is equivalent to the truth, else 0, with nothing for
format. It is all that RL learns from, and a policy optimises what this file accepts, not what it
means: an answer that hedges, hides a second one, or echoes the prompt would be found sooner or
later. So every rule errs on the side of "wrong": one answer, in its place, in bounded time:

1. `extract_answer`: behind the last </think>, the last <answer>..</answer>, else the last
   \boxed{..}, else "#### 18".
2. `is_equivalent` (answers/equivalence.py) compares it with the truth: numbers exactly, expressions
   at random points. For multiple choice `choose` (answers/choice.py) finds the letter meant.
3. `accuracy_reward` joins them.

>>> extract_answer(r"<think>so \boxed{7}</think> It is <answer>\boxed{\frac{1}{2}}</answer>")
'\\frac{1}{2}'
>>> is_equivalent("$1,234.50", r"1234\frac12 \text{ dollars}"), is_equivalent("3 or 4", "3")
(True, False)
>>> accuracy_reward("<think>...</think><answer>B: No</answer>", "B", {"A": "Yes", "B": "No"})
1.0
"""

import re
from collections.abc import Sequence

from answers.boxes import boxed_answer
from answers.choice import choose
from answers.equivalence import as_text, is_equivalent, rounds_to
from answers.typography import MAX_CHARS

__all__ = ["accuracy_reward", "extract_answer", "is_equivalent"]

# --- 1. Where the answer is -----------------------------------------------------------------------


def extract_answer(response: str) -> str | None:
    """Returns the final answer in a response.

    Returns None if there is none, if the thinking or the box is not closed, if something else than
    the box is in the <answer>, or if it has more than MAX_CHARS characters.
    """
    if not isinstance(response, str):
        return None
    # 1. What stands behind the thoughts.
    text = response.rpartition("</think>")[2]
    if "<think>" in text:  # opened and never closed: what follows are thoughts
        return None
    # 2. The last <answer> that is closed; without one, the whole text.
    _, tag, inside = text.rpartition("</answer>")[0].rpartition("<answer>")
    if tag:
        text = inside.partition("</answer>")[0]
    # 3. The last box in it, or boxes that are a list; else what the tags hold, or GSM8K's "####".
    if "\\boxed" in text or "\\fbox" in text:
        text = boxed_answer(text, strict=bool(tag)) or ""
    elif not tag:
        text = text.rpartition("####")[2].partition("\n")[0].strip() if "####" in text else ""
        if not re.match(r"[-+$]*\.?[0-9]", text):  # "#### Step 2" is a heading, not an answer
            return None
    text = text.strip()
    return text if 0 < len(text) <= MAX_CHARS else None


# --- 2. Is it the true one? -----------------------------------------------------------------------


def accuracy_reward(
    response: str,
    truth: str | Sequence[str],
    options: dict[str, str] | None = None,
    *,
    precision: int | None = None,
) -> float:
    """Returns 1.0 if the response's final answer is right, else 0.0. Never raises.

    truth: of several, any one will do. With options it is a letter or an option's text.
    options: {"A": text, ...}, letters up to P. Without them, `is_equivalent` decides.
    precision: decimals that an answer is rounded to (MathVista).
    """
    answer = extract_answer(response)
    if answer is None:
        return 0.0
    truths = truth if isinstance(truth, (list, tuple)) else [truth]
    return float(any(_is_right(answer, as_text(one), options, precision) for one in truths))


def _is_right(
    answer: str, truth: str, options: dict[str, str] | None, precision: int | None
) -> bool:
    if not options or not isinstance(options, dict):
        if is_equivalent(answer, truth):
            return True
        return precision is not None and rounds_to(answer, truth, precision)
    texts = {
        key.upper(): as_text(option)
        for key, option in options.items()
        if re.fullmatch("[A-Pa-p]", as_text(key))
    }
    chosen = choose(answer, texts)
    return chosen is not None and len(truth) <= MAX_CHARS and chosen == choose(truth, texts)
