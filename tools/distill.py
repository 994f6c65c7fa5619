r"""Rejection-sampling distillation: SFT data from a teacher's right answers (paper: X-Reasoner-Med's first stage).

    python tools/distill.py --model QwQ-32B --data medqa.jsonl --prompt-style mcq --n 8 --temperature 0.7 \
        --max-new-tokens 8192 --prefill $'<think>\n' --out sft.jsonl

Every question is answered n times. A response is kept if it ended by itself, has thoughts and an answer, and the answer
is right; of a question's kept responses the first `--max-per-question` different ones are written, so that easy
questions do not outweigh hard ones. Questions are text: SFT sees no image.

The teacher may be any folder that sample.py loads, Qwen2.5-VL or text-only. QwQ and its like write their thoughts,
`</think>`, and an answer in prose with a \boxed{}; `as_written` brings that to the paper's form. Qwen's text models
were trained with other system prompts than Qwen2.5-VL's default: --system sets it.

sft.jsonl has our plain schema. Beside it, sft.samples.jsonl keeps every sample with its verdict, also for --resume.
"""
import re
import sys
import zlib
from collections import defaultdict
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import (Example, ImageConfig, InputError, Prompt, convert_examples, format_prompt, make_prompt,  # noqa: E402
                  repeated_id, report_bad)
from hub.options import MICRO_BASE, option, parse_options, run_command  # noqa: E402
from hub.weights import weight_files  # noqa: E402
from rewards import accuracy_reward, extract_answer  # noqa: E402
from sample import Completion, Sampler, SamplingParams, load_sampler  # noqa: E402
from training.journal import RecordFile, check_unused, json_lines, when_all_are_there, write_whole  # noqa: E402


@dataclass(frozen=True)
class DistillOptions(SamplingParams):
    """SFT data from a teacher's right answers."""
    model: str = option(str(MICRO_BASE), "the teacher's model folder")
    system: str | None = option(None, "system prompt (default: the template's)")
    max_batch: int = option(256, "sequences sampled at a time", low=1)
    device: str = option("auto", "auto, cpu or cuda")
    dtype: str = option("auto", "auto is the one on disk", choices=("auto", "float32", "bfloat16"))
    data: str = option("", "questions to answer")
    out: str = option("", "JSONL file for the right answers")
    max_per_question: int = option(1, "right answers written per question, at most", low=1)
    prompt_style: str = option("direct", "how a question is asked", choices=("mcq", "math", "train", "direct"))
    prefill: str = option("", "what every response to a question begins with; QwQ wants $'<think>\\n'")
    limit: int | None = option(None, "only the first so many questions", low=1)
    skip_bad_lines: bool = option(False, "leave bad records out, and say how many")
    resume: bool = option(False, "go on where --out was interrupted")
    overwrite: bool = option(False, "replace what --out holds")


OURS = re.compile(r"<think>(.+)</think>\s*<answer>.+</answer>", re.DOTALL)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def as_written(response: str) -> str | None:
    r"""A response in the form that SFT teaches, `<think>...</think> <answer>...</answer>`; None where it has no
    thoughts or no answer.

    What has that form stays as it is. Else the thoughts are what stands before the only `</think>` (a `<think>` before
    them may be missing: QwQ's chat template writes it into the prompt), and the answer is what the reward looks at:

    >>> as_written("So it is 4.\n</think>\n\n**Answer:** \\boxed{4}")
    '<think>\nSo it is 4.\n</think> <answer>4</answer>'
    """
    response, answer = response.strip(), extract_answer(response)
    if answer is None or any(response.count(tag) > 1 for tag in TAGS):
        return None
    thought, end, rest = response.removeprefix("<think>").partition("</think>")
    if not end or not thought.strip() or "<think>" in thought + rest:
        return None
    if OURS.fullmatch(response):
        return response
    # The line break and the space keep `</think>` the very ids that a forced exit appends (as in data.py).
    return f"<think>\n{thought.strip()}\n</think> <answer>{answer}</answer>"


def judge(example: Example, number: int, completion: Completion, prefill: str) -> dict:
    """The record of one sample. `reason` says why it is not kept: unfinished (cut at its length, or its thoughts at the
    think budget), malformed, wrong; None if it is."""
    response = as_written(prefill + completion.text)
    reason = None
    if completion.finish_reason != "stop":
        reason = "unfinished"
    elif response is None:
        reason = "malformed"
    elif accuracy_reward(response, example.truths, example.options, precision=example.precision) != 1.0:
        reason = "wrong"
    return {"id": example.id, "sample": number, "domain": example.domain, "text": prefill + completion.text,
            "extracted": extract_answer(prefill + completion.text), "answer": example.answer,
            "finish_reason": completion.finish_reason, "reason": reason}


def chosen(samples: list[dict], at_most: int) -> list[dict]:
    """Of a question's samples the first different ones that are kept."""
    different = {as_written(sample["text"]): sample for sample in reversed(samples) if sample["reason"] is None}
    return sorted(different.values(), key=lambda sample: sample["sample"])[:at_most]


def sft_record(example: Example, sample: dict) -> dict:
    """A kept sample in our plain schema. Other fields of the question are kept in `meta`: beside the others they could
    pass for those of a published schema."""
    fields = {"id": f"{example.id}-{sample['sample']}", "question": example.question, "answer": example.answer,
              "options": example.options, "response": as_written(sample["text"]), "domain": example.domain,
              "meta": example.meta}
    return {name: value for name, value in fields.items() if value not in (None, {})}


def print_accepted(examples: list[Example], groups: dict[tuple, list[dict]], options: DistillOptions) -> None:
    """One line per domain: how many samples and questions gave SFT data."""
    domains = defaultdict(list)
    for example in examples:
        if (example.id,) in groups:
            domains[str(example.domain)].append(groups[example.id,])
    rows = {**dict(sorted(domains.items())), "all": [group for part in domains.values() for group in part]}
    print(f"{'domain':<24}{'questions':>10}{'solved':>9}{'accepted':>10}{'wrong':>8}{'malformed':>11}{'unfinished':>12}"
          f"{'written':>9}")
    for name, part in rows.items() if len(domains) > 1 else list(rows.items())[-1:]:
        samples = [sample for group in part for sample in group]
        share = {reason: 100 * fmean(sample["reason"] == reason for sample in samples)
                 for reason in (None, "wrong", "malformed", "unfinished")}
        solved = 100 * fmean(any(sample["reason"] is None for sample in group) for group in part)
        written = sum(len(chosen(group, options.max_per_question)) for group in part)
        print(f"{name:<24}{len(part):>10}{solved:>8.1f}%{share[None]:>9.1f}%{share['wrong']:>7.1f}%"
              f"{share['malformed']:>10.1f}%{share['unfinished']:>11.1f}%{written:>9}")


def check_options(options: DistillOptions) -> None:
    """Raises InputError for options that do not go together."""
    if not options.data or not options.out:
        raise InputError("--data and --out are needed")


def load_questions(sampler: Sampler, options: DistillOptions) -> tuple[list[Example], list[Prompt]]:
    """Questions and prompts; those that do not fit the context are dropped and counted."""
    def ask(example: Example) -> tuple[Example, Prompt]:
        if example.images:
            raise InputError(f"question {example.id} has an image: SFT is on text only")
        prompt = make_prompt(format_prompt(example, options.prompt_style), [], sampler.tokenizer, ImageConfig(),
                             system=options.system)
        prompt.ids += sampler.tokenizer.encode(options.prefill)
        return example, prompt

    bad = [] if options.skip_bad_lines else None
    asked = list(islice(convert_examples(options.data, ask, bad), options.limit))
    report_bad(options.data, bad)
    if len({example.id for example, _ in asked}) < len(asked):
        raise InputError(f"{options.data}: {repeated_id([example for example, _ in asked])}")
    fitting = [(example, prompt) for example, prompt in asked if sampler.fits(prompt)]
    if not fitting:
        raise InputError(f"{options.data}: no question fits the context of {sampler.context} tokens")
    if len(fitting) < len(asked):
        print(f"{len(asked) - len(fitting)} of {len(asked)} questions dropped: they do not fit the context of "
              f"{sampler.context} tokens")
    return [example for example, _ in fitting], [prompt for _, prompt in fitting]


def distill(sampler: Sampler, options: DistillOptions) -> None:
    """Samples, judges, and writes what is kept; after Ctrl-C of the questions that are done."""
    if not Path(options.out).name:
        raise InputError(f"--out {options.out!r} is no file name")
    if Path(options.out).resolve() == Path(options.data).resolve():
        raise InputError(f"--out {options.out} is the question file")
    examples, prompts = load_questions(sampler, options)
    out, samples_path = Path(options.out), Path(options.out).with_suffix(".samples.jsonl")
    check_unused(out, Path(f"{samples_path}.config.json"), options.overwrite or options.resume)
    samples = RecordFile(samples_path, asdict(options), [options.data, *weight_files(Path(options.model))],
                         keys=("id",), size=options.n)
    left = [i for i, example in enumerate(examples) if (example.id,) not in samples.groups]

    def keep(i: int, group: list[Completion]) -> None:
        example = examples[left[i]]
        samples.append([judge(example, number, c, options.prefill) for number, c in enumerate(group)])

    interrupted = False
    try:
        sampler.generate([prompts[i] for i in left], options, progress=True,
                         on_completion=when_all_are_there(options.n, keep),
                         streams=[(zlib.crc32(examples[i].id.encode()), 0) for i in left])
    except KeyboardInterrupt:
        interrupted = True
    done = [example for example in examples if (example.id,) in samples.groups]
    if done:
        write_whole(out, json_lines(
            sft_record(example, sample) for example in done
            for sample in chosen(samples.groups[example.id,], options.max_per_question)))
        print_accepted(done, samples.groups, options)
    if interrupted:
        raise KeyboardInterrupt
    samples.finish([(example.id,) for example in examples])


def main(argv: list[str]) -> None:
    options = parse_options(DistillOptions, argv)
    check_options(options)
    sampler, _ = load_sampler(options.model, options.device, options.dtype, max_batch=options.max_batch)
    distill(sampler, options)


if __name__ == "__main__":
    run_command(main)
