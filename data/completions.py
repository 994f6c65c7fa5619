"""How to sample, and what comes of it: completions, how they end, the random numbers they take."""

import json
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from data.prompts import Prompt
from data.tokenizer import Tokenizer
from hub.options import option

END_OF_THOUGHT = "</think>"
TAG_GRACE = 8  # tokens behind the think budget in which a half-written </think> may be completed


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. The defaults are the model's own distribution, which RL needs."""

    max_new_tokens: int = option(512, "response length limit", low=1)
    temperature: float = option(1.0, "0 is greedy", low=0.0)
    top_p: float = option(1.0, "nucleus sampling; 1 is off", low=0.0, high=1.0)
    top_k: int = option(0, "sample from the k most likely tokens; 0 is off", low=0)
    n: int = option(1, "completions per prompt", low=1, high=1_000_000)
    seed: int = option(0, "of the random numbers", low=0)
    think_budget: int | None = option(None, "tokens of thought before </think> is forced", low=0)

    def distribution(self) -> dict:
        """Returns what makes the distribution that is sampled from (kernels/sampling.py)."""
        return {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}


@dataclass
class Completion:
    """What was sampled behind a prompt."""

    ids: list[int] = field(default_factory=list)  # with the stop token, if one came
    log_probs: list[float] = field(default_factory=list)  # in nats, of what was sampled from
    forced: list[bool] = field(default_factory=list)  # ids that the think budget wrote
    text: str = ""  # without control tokens
    finish_reason: str = ""  # stop, length, or forced (stopped, behind a forced </think>)

    def add(self, token: int, log_prob: float, forced: bool) -> None:
        """Writes the next token down."""
        self.ids.append(token)
        self.log_probs.append(log_prob)
        self.forced.append(forced)

    def finish_if_ended(self, limit: int, stop_ids: Sequence[int]) -> bool:
        """Sets finish_reason if the last token ends the completion. Returns whether it does."""
        if self.ids[-1] in stop_ids:
            self.finish_reason = "forced" if any(self.forced) else "stop"
        elif len(self.ids) == limit:
            self.finish_reason = "length"
        return self.finish_reason != ""

    def json_fields(self) -> dict:
        """Returns what `sample.py --json` prints of this."""
        return {
            "ids": self.ids,
            "text": self.text,
            "finish_reason": self.finish_reason,
            # A forced id may be outside of top-k or top-p, and JSON has no -Infinity.
            "log_probs": [None if p == float("-inf") else p for p in self.log_probs],
        }


def as_json(prompt: Prompt, completions: list[Completion], seconds: float) -> str:
    """Returns the object of `sample.py --json`."""
    tokens = sum(len(completion.ids) for completion in completions)
    usage = {
        "prompt_tokens": len(prompt.ids),
        "completion_tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }
    fields = [completion.json_fields() for completion in completions]
    return json.dumps({"prompt_ids": prompt.ids, "completions": fields, "usage": usage})


class ThinkBudget:
    """Ends a thought that has used up its tokens (budget forcing: s1, arXiv 2501.19393).

    The tokens of </think> then come in the place of sampled ones. The model did not choose them,
    but goes on behind them.
    """

    def __init__(self, budget: int | None, tokenizer: Tokenizer):
        self.budget, self.tokenizer = budget, tokenizer
        self.settled = budget is None  # the thought has ended, by itself or by force
        self.to_force: list[int] = []

    def forced_token(self, ids: list[int]) -> int | None:
        """Returns the token that must follow these ids; None where the model is free."""
        if not self.settled and len(ids) >= self.budget:
            # Only the text counts: </think> is several tokens, and others beside other neighbours.
            text = self.tokenizer.decode(ids)
            beginnings = tuple(END_OF_THOUGHT[:n] for n in range(1, len(END_OF_THOUGHT)))
            half_written = text.endswith(beginnings) and len(ids) < self.budget + TAG_GRACE
            if END_OF_THOUGHT in text:
                self.settled = True
            elif not half_written:
                self.settled = True
                self.to_force = self.tokenizer.encode(END_OF_THOUGHT)
        return self.to_force.pop(0) if self.to_force else None


@dataclass(eq=False)
class Request:
    """A completion that is to be sampled, or is being sampled."""

    prompt: int  # its number in the call
    sample: int  # its number among the prompt's n
    rng: Random
    budget: ThinkBudget
    completion: Completion = field(default_factory=Completion)


def random_streams(prompts: Sequence[Prompt]) -> list[int]:
    """Returns the number of each prompt's random stream.

    It comes from the prompt's ids and grids, so that what is sampled behind a prompt does not
    depend on the others. Equal prompts are counted, and so get different samples.
    """
    streams, seen = [], Counter()
    for prompt in prompts:
        content = f"{prompt.ids} {prompt.grids}"
        streams.append(zlib.crc32(f"{content} {seen[content]}".encode()))
        seen[content] += 1
    return streams


def random_numbers(seed: int, stream: int, sample: int) -> Random:
    """Returns the source of a completion's random numbers, which are the same in any batch.

    Python promises that a seed gives the same numbers in every version.
    """
    return Random(f"{seed} {stream} {sample}")
