r"""Rejection-sampling distillation: SFT data from a teacher's right answers (X-Reasoner-Med).

    python tools/distill.py --model QwQ-32B --data medqa.jsonl --prompt-style mcq --n 8 \
        --temperature 0.7 --max-new-tokens 8192 --prefill $'<think>\n' --out sft.jsonl

Every question is answered n times. A response is kept if it ended by itself, has thoughts and an
answer, and the answer is right. Of a question's kept responses the first `--max-per-question`
different ones are written, so that easy questions do not outweigh hard ones.

The teacher may be any folder that sample.py loads, Qwen2.5-VL or text-only. QwQ and its like write
their thoughts, `</think>`, and an answer in prose with a \boxed{}; `as_written` brings that to the
paper's form. Qwen's text models were trained with other system prompts than Qwen2.5-VL's default:
--system sets it.

sft.jsonl has our plain schema. Beside it, sft.samples.jsonl keeps every sample with its verdict,
also for --resume.
"""

import re
import sys
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import STYLES, Example, ImageConfig, Question, format_prompt, load_examples, make_prompt
from hub.device import DEVICE_HELP, DTYPE_HELP, DTYPES, memory_phase
from hub.errors import InputError
from hub.options import MICRO_BASE, option, parse_options, run_command
from hub.weights import model_files
from rewards import accuracy_reward, extract_answer
from sample import Completion, Sampler, SamplingParams, load_sampler
from training.journal import json_lines, recorded_options, write_whole
from training.record_file import RecordFile, check_unused, out_file, when_all_are_there

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
OURS = re.compile(r"<think>(.+)</think>\s*<answer>.+</answer>", re.DOTALL)
COLUMNS = ("questions", "solved", "accepted", "wrong", "malformed", "unfinished", "written")


@dataclass(frozen=True)
class DistillOptions(SamplingParams):
    """Write SFT data from a teacher's right answers."""

    model: str = option(str(MICRO_BASE), "the teacher's model folder")
    data: str = option("", "questions to answer")
    out: str = option("", "JSONL file for the right answers")
    prompt_style: str = option("direct", "how a question is asked", choices=STYLES)
    system: str | None = option(None, "system prompt (default: the template's)")
    prefill: str = option("", "what every response begins with; QwQ wants $'<think>\\n'")
    max_per_question: int = option(1, "right answers written per question, at most", low=1)
    limit: int | None = option(None, "only the first so many questions", low=1)
    skip_bad_lines: bool = option(False, "leave bad records out, and say how many")
    max_batch: int = option(256, "sequences sampled at a time", low=1)
    resume: bool = option(False, "go on where --out was interrupted")
    overwrite: bool = option(False, "replace what --out holds")
    device: str = option("auto", DEVICE_HELP)
    dtype: str = option("auto", DTYPE_HELP, choices=DTYPES)


def load_questions(sampler: Sampler, options: DistillOptions) -> list[Question]:
    """Returns the questions that fit the context. Raises InputError for one with an image."""

    def convert(example: Example) -> Question | None:
        if example.images:
            raise InputError(f"question {example.id} has an image: SFT is on text only")
        text = format_prompt(example, options.prompt_style)
        prompt = make_prompt(text, [], sampler.tokenizer, ImageConfig(), system=options.system)
        prompt.ids += sampler.tokenizer.encode(options.prefill)
        return Question(example, prompt) if sampler.fits(prompt) else None

    loaded = load_examples(
        options.data,
        convert,
        skip_bad=options.skip_bad_lines,
        limit=options.limit,
        too_long=f"their prompts do not fit the context of {sampler.context} tokens",
        unique_ids=True,
    )
    return loaded.items


def as_written(response: str) -> str | None:
    r"""Returns a response in the form that SFT teaches; None if it lacks thoughts or an answer.

    That form is `<think>...</think> <answer>...</answer>`, and what has it stays as it is. Else the
    thoughts are what stands before the only `</think>` (a `<think>` before them may be missing:
    QwQ's chat template writes it into the prompt), and the answer is what the reward looks at:

    >>> as_written("So it is 4.\n</think>\n\n**Answer:** \\boxed{4}")
    '<think>\nSo it is 4.\n</think> <answer>4</answer>'
    """
    response = response.strip()
    answer = extract_answer(response)
    if answer is None or any(response.count(tag) > 1 for tag in TAGS):
        return None
    thoughts, end, rest = response.removeprefix("<think>").partition("</think>")
    if not end or not thoughts.strip() or "<think>" in thoughts + rest:
        return None
    if OURS.fullmatch(response):
        return response
    # Behind a line break and before a space, `</think>` has the same ids as a forced exit.
    return f"<think>\n{thoughts.strip()}\n</think> <answer>{answer}</answer>"


def judge(example: Example, number: int, completion: Completion, prefill: str) -> dict:
    """Returns the record of one sample. Its `reason` says why it is not kept; None if it is kept.

    The reasons: unfinished (it was cut at its length, or its thoughts at the think budget),
    malformed, wrong.
    """
    text = prefill + completion.text
    # What SFT will see is judged.
    response = as_written(text) or ""
    reward = accuracy_reward(response, example.truths, example.options, precision=example.precision)
    reason = None
    if completion.finish_reason != "stop":
        reason = "unfinished"
    elif not response:
        reason = "malformed"
    elif reward != 1.0:
        reason = "wrong"
    return {
        "id": example.id,
        "sample": number,
        "domain": example.domain,
        "text": text,
        "extracted": extract_answer(text),
        "answer": example.answer,
        "finish_reason": completion.finish_reason,
        "reason": reason,
    }


def chosen(samples: list[dict], at_most: int) -> list[dict]:
    """Returns the first different ones of a question's samples that are kept."""
    different = {}
    for sample in samples:
        if sample["reason"] is None:
            different.setdefault(as_written(sample["text"]), sample)
    return list(different.values())[:at_most]


def sft_record(example: Example, sample: dict) -> dict:
    """Returns a kept sample in our plain schema.

    Other fields of the question are left out: they could pass for a part of it.
    """
    fields = {
        "id": f"{example.id}-{sample['sample']}",
        "question": example.question,
        "answer": example.answer,
        "options": example.options,
        "response": as_written(sample["text"]),
        "domain": example.domain,
    }
    return {name: value for name, value in fields.items() if value is not None}


def print_accepted(groups: list[list[dict]], max_per_question: int) -> None:
    """Prints for each domain how many questions and samples gave SFT data."""
    rows = defaultdict(Counter)
    for samples in groups:
        counts = Counter(sample["reason"] or "accepted" for sample in samples)
        counts["questions"] = 1
        counts["solved"] = int(counts["accepted"] > 0)
        counts["written"] = len(chosen(samples, max_per_question))
        rows["all"] += counts
        rows[str(samples[0]["domain"])] += counts
    print(f"{'domain':<24}" + "".join(f"{column:>12}" for column in COLUMNS))
    for domain, counts in rows.items():
        print(f"{domain:<24}" + "".join(f"{counts[column]:>12}" for column in COLUMNS))


def main(argv: list[str]) -> None:
    """Samples, judges, and writes what is kept; after Ctrl-C, of the questions that are done."""
    options = parse_options(DistillOptions, argv)
    if not options.data or not options.out:
        raise InputError("--data and --out are needed")
    out = out_file(options.out)
    sampler, _ = load_sampler(
        options.model, options.device, options.dtype, max_batch=options.max_batch
    )
    questions = load_questions(sampler, options)
    # 1. Every sample goes to the journal, question by question, so that --resume finds it there.
    path = out.with_suffix(".samples.jsonl")
    check_unused(out, Path(f"{path}.config.json"), options.overwrite or options.resume)
    inputs = [options.data, *model_files(Path(options.model))]
    recorded = recorded_options(options, sampler.dtype)
    journal = RecordFile(path, recorded, inputs, keys=("id",), size=options.n)
    left = [question for question in questions if (question.example.id,) not in journal.groups]

    def finish(i: int, completions: list[Completion]) -> None:
        example = left[i].example
        journal.append(
            [judge(example, number, c, options.prefill) for number, c in enumerate(completions)]
        )

    # 2. Sample what is not there yet; Ctrl-C ends that.
    interrupted = False
    try:
        with memory_phase("sampling", "a lower --max-batch", "a lower --max-new-tokens"):
            sampler.generate(
                [question.prompt for question in left],
                options,
                progress=True,
                on_completion=when_all_are_there(options.n, finish),
                streams=[zlib.crc32(question.example.id.encode()) for question in left],
            )
    except KeyboardInterrupt:
        interrupted = True
    # 3. Write what is kept of the questions that are done.
    written = []
    done = [question.example for question in questions if (question.example.id,) in journal.groups]
    for example in done:
        samples = chosen(journal.groups[example.id,], options.max_per_question)
        written += [sft_record(example, sample) for sample in samples]
    if done:
        write_whole(out, json_lines(written))
        print_accepted([journal.groups[example.id,] for example in done], options.max_per_question)
    if interrupted:
        raise KeyboardInterrupt
    journal.finish((question.example.id,) for question in questions)


if __name__ == "__main__":
    run_command(main)
