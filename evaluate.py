"""Evaluation by the paper's protocols (paper: section 4, appendix B).

    python evaluate.py --model runs/grpo/model                                   # the four micro test sets, greedy
    python evaluate.py --model DIR --data medqa.jsonl --prompt-style mcq --think-budget 3584 --max-new-tokens 4096
    python evaluate.py --model DIR --data gsm8k.jsonl --prompt-style math --runs 5 --temperature 0.3 --out gsm8k.jsonl
    python evaluate.py ... --out gsm8k.jsonl --resume                            # the same again, after an interruption
    python evaluate.py --model DIR --data mmmu.tsv --mask-images --runs 3 --temperature 0.3 --out A.masked.jsonl
    python evaluate.py --text-solvable A.masked.jsonl B.masked.jsonl [--on A.jsonl B.jsonl]      # table 6, two models

Greedy decoding gives the headline figures. With several runs at a temperature: avg@k (the accuracy), maj@k (is the
answer given most often right? Of equally frequent ones the one that came first counts) and pass@k (right at least
once). An answer that cannot be parsed is wrong. Questions whose prompt does not fit the context are not asked: no
prompt is cut; they are counted as `dropped` and are in no other figure, and nor are records that --skip-bad-lines left
out (`bad`).

The sampler applies no repetition penalty; the hub's generation_config asks for 1.05, which published Qwen figures may
have used.
"""
import json
import sys
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean, stdev

from data import (Example, ImageConfig, InputError, Prompt, format_prompt, load_image, make_prompt, read_examples,
                  repeated_id, report_bad)
from hub.options import MICRO_BASE, MICRO_DATA, option, parse_options, run_command
from hub.weights import weight_files
from training.journal import RecordFile, json_lines, when_all_are_there, write_whole
from rewards import accuracy_reward, extract_answer, is_equivalent
from sample import Completion, Sampler, SamplingParams, load_sampler

MICRO_TESTS = ("test_text", "test_image", "test_text_other", "test_image_other")
IMAGE_BYTES = 4 << 30  # of preprocessed images that wait at a time: those of a whole benchmark would not fit


@dataclass
class EvaluateOptions:
    """Accuracy of a model on files of questions with answers."""
    model: str = option(str(MICRO_BASE), "model folder")
    data: list[str] = option([str(MICRO_DATA / f"{name}.jsonl") for name in MICRO_TESTS], "question files")
    prompt_style: str = option("direct", "how a question is asked", choices=("mcq", "math", "train", "direct"))
    runs: int = option(1, "responses per question (k)", low=1, high=1_000_000)
    temperature: float = option(0.0, "0 is greedy", low=0.0)
    max_new_tokens: int = option(256, "response length limit", low=1)
    think_budget: int | None = option(None, "tokens after which </think> is appended if it has not come", low=0)
    limit: int | None = option(None, "only the first so many questions of each file", low=1)
    skip_bad_lines: bool = option(False, "leave bad records out, and say how many")
    mask_images: bool = option(False, "ask image questions without their images (paper: table 6)")
    max_batch: int = option(256, "sequences sampled at a time", low=1)
    seed: int = option(0, "of the random streams", low=0)
    out: str | None = option(None, "JSONL file for every prompt, response, extracted answer and verdict")
    resume: bool = option(False, "go on where --out was interrupted")
    overwrite: bool = option(False, "replace what --out holds")
    text_solvable: list[str] = option([], "two models' --out files with masked images: what is solved without them?")
    on: list[str] = option([], "with --text-solvable, the same two models' --out files with images")
    json: bool = option(False, "print one JSON object per file")
    device: str = option("auto", "auto, cpu or cuda")
    dtype: str = option("auto", "auto is the one on disk", choices=("auto", "float32", "bfloat16"))


# --- Asking -----------------------------------------------------------------------------------------------------------

def example_prompt(sampler: Sampler, images: ImageConfig, example: Example, options: EvaluateOptions) -> Prompt:
    """The question with its images in the chosen prompt."""
    pictures = [] if options.mask_images else [load_image(image) for image in example.images]
    return make_prompt(format_prompt(example, options.prompt_style), pictures, sampler.tokenizer, images)


def portions(sampler: Sampler, images: ImageConfig, examples: list[Example],
             options: EvaluateOptions) -> Iterator[tuple[list[Example], list[Prompt]]]:
    """Questions with their prompts, as many at a time as their images' memory allows."""
    part, prompts, size = [], [], 0
    for example in examples:
        prompt = example_prompt(sampler, images, example, options)
        part.append(example)
        prompts.append(prompt)
        size += 0 if prompt.patches is None else prompt.patches.nbytes
        if size >= IMAGE_BYTES:
            yield part, prompts
            part, prompts, size = [], [], 0
    if part:
        yield part, prompts


def evaluate(sampler: Sampler, images: ImageConfig, examples: list[Example], options: EvaluateOptions, *,
             known: dict[str, list[dict]] | None = None,
             on_answer: Callable[[list[dict]], None] | None = None) -> list[dict]:
    """One record per question and run, in order. Questions whose records are `known`, by id, are not asked; of the
    others `on_answer` gets the records as soon as all runs are there. A question's samples are a function of its id and
    the seed, so they do not depend on which others are asked (on a GPU as far as rounding does not depend on the
    batch)."""
    answered = dict(known or {})
    params = SamplingParams(options.max_new_tokens, options.temperature, n=options.runs, seed=options.seed,
                            think_budget=options.think_budget)
    for part, prompts in portions(sampler, images, [e for e in examples if e.id not in answered], options):
        def finish(i: int, group: list[Completion]) -> None:
            answered[part[i].id] = records(part[i], group, options)
            if on_answer is not None:
                on_answer(answered[part[i].id])

        sampler.generate(prompts, params, progress=True, on_completion=when_all_are_there(options.runs, finish),
                         streams=[(zlib.crc32(example.id.encode()), 0) for example in part])
    return [record for example in examples for record in answered[example.id]]


def records(example: Example, group: list[Completion], options: EvaluateOptions) -> list[dict]:
    """What was asked, answered, extracted, and the verdict, for each run."""
    return [{"id": example.id, "run": run, "domain": example.domain, "meta": example.meta,
             "masked": options.mask_images and bool(example.images), "response": completion.text,
             "prompt": format_prompt(example, options.prompt_style), "extracted": extract_answer(completion.text),
             "vote": vote(completion.text, example), "answer": example.answer,
             "correct": is_right(completion.text, example),
             "finish_reason": completion.finish_reason, "forced": any(completion.forced), "tokens": len(completion.ids),
             "words": len(completion.text.split())}
            for run, completion in enumerate(group)]


# --- Figures ----------------------------------------------------------------------------------------------------------

def is_right(response: str, example: Example) -> bool:
    """Does a response give one of the question's right answers?"""
    return accuracy_reward(response, example.truths, example.options, precision=example.precision) == 1.0


def vote(response: str, example: Example) -> str | None:
    """What a response counts for in a majority: the option it names ("B: No" is a vote for B), else its answer."""
    if not example.options:
        return extract_answer(response)
    return next((letter for letter in example.options if accuracy_reward(response, letter, example.options)), None)


def majority(records: list[dict]) -> bool:
    """Is the answer that most of a question's runs gave right? Equivalent answers vote together, unparsed ones not at
    all, and of equally many the answer that came first wins."""
    voters = [r for r in records if r["vote"] is not None]
    votes = [sum(r["correct"] == other["correct"] and (r["correct"] or is_equivalent(r["vote"], other["vote"]))
                 for other in voters) for r in voters]
    return bool(voters) and voters[votes.index(max(votes))]["correct"]


def standard_error(values: list[float]) -> float:
    """Of the mean of values from independent questions."""
    return stdev(values) / len(values)**0.5 if len(values) > 1 else 0.0


def accuracy(questions: list[list[dict]]) -> dict:
    """Of questions, each with the records of its runs: n, and each measure with the standard error of its mean over
    questions (for the accuracy that of each question's mean over its runs)."""
    runs, correct = len(questions[0]), [[record["correct"] for record in group] for group in questions]
    measures = {"accuracy": list(map(fmean, correct))}
    if runs > 1:
        measures |= {f"avg@{runs}": measures["accuracy"], f"maj@{runs}": [float(majority(q)) for q in questions],
                     f"pass@{runs}": [float(any(c)) for c in correct]}
    figures = {"n": len(questions)}
    for name, values in measures.items():
        figures |= {name: fmean(values), "stderr" if name == "accuracy" else f"{name}_stderr": standard_error(values)}
    return figures


def summarise(records: list[dict]) -> dict:
    """The figures of one file."""
    questions: dict[str, list[dict]] = defaultdict(list)
    for record in records:
        questions[record["id"]].append(record)
    domains: dict[str, list[list[dict]]] = defaultdict(list)
    for group in questions.values():
        domains[str(group[0]["domain"])].append(group)
    return {**accuracy(list(questions.values())), "unparsed": fmean(r["extracted"] is None for r in records),
            "mean_words": fmean(r["words"] for r in records), "mean_tokens": fmean(r["tokens"] for r in records),
            "forced": fmean(r["forced"] for r in records),
            "by_domain": {domain: accuracy(groups) for domain, groups in sorted(domains.items())}}


def print_table(results: dict[str, dict]) -> None:
    """One line per file, in percent, and below it one per domain if there are several."""
    measures = [key for key in next(iter(results.values())) if key == "accuracy" or "@" in key and "_" not in key]

    def line(name: str, s: dict) -> str:
        cells = (f"{100 * s[m]:.1f} +- {100 * s['stderr' if m == 'accuracy' else f'{m}_stderr']:.1f}" for m in measures)
        return f"{name:<28}{s['n']:>6}" + "".join(f"{cell:>14}" for cell in cells)

    print(f"{'file':<28}{'n':>6}" + "".join(f"{m:>14}" for m in measures)
          + f"{'unparsed':>10}{'forced':>8}{'words':>8}{'tokens':>8}{'dropped':>9}")
    for path, s in results.items():
        print(line(Path(path).stem, s) + f"{100 * s['unparsed']:>10.1f}{100 * s['forced']:>8.1f}{s['mean_words']:>8.1f}"
              f"{s['mean_tokens']:>8.1f}{s['dropped']:>9}")
        for domain, figures in s["by_domain"].items() if len(s["by_domain"]) > 1 else ():
            print(line(f"  {domain}", figures))


# --- Is the image needed? (paper: table 6) ---------------------------------------------------------------------------

Answers = dict[tuple[str, str], list[dict]]  # a question, by its file's name and its id -> the records of its runs


def read_answers(path: str) -> dict[bool, Answers]:
    """What an --out file holds of questions whose images were masked (True), and of the others (False)."""
    answers, number = {True: defaultdict(list), False: defaultdict(list)}, 0
    try:
        for number, line in enumerate(Path(path).read_text().splitlines(), 1):
            record = json.loads(line)
            answers[bool(record["masked"])][Path(record["file"]).name, record["id"]].append(
                {"correct": bool(record["correct"]), "vote": record["vote"]})
    except (ValueError, TypeError, KeyError, RecursionError):
        raise InputError(f"{path}: line {number or 1}: not a record of evaluate.py --out") from None
    return answers


def check_masked(path: str, answers: Answers) -> None:
    """Raises InputError unless every image question was asked several times with its image masked."""
    runs = {len(group) for group in answers.values()}
    if not runs:
        raise InputError(f"{path}: no question was asked with its image masked: make it with --mask-images --runs 3 "
                         "--temperature 0.3")
    if len(runs) > 1:
        raise InputError(f"{path}: not every question has {max(runs)} runs: finish it with --resume")
    if runs == {1}:
        raise InputError(f"{path}: each question was asked once: make it with --runs 3 --temperature 0.3")


def compare_without_images(options: EvaluateOptions) -> None:
    """The ablation: questions that one of two models solves every time without the image are text-solvable. Says how
    many they are; --out gets the names of the rest. With the answers to the shown images, from --on or, where they are
    there, from the same two files, compares the models on the rest."""
    if len(options.text_solvable) != 2 or len(options.on) not in (0, 2):
        raise InputError("--text-solvable takes two files, and so does --on")
    if options.out and Path(options.out).resolve() in [Path(p).resolve() for p in options.text_solvable + options.on]:
        raise InputError(f"--out {options.out} is one of the files that are compared")
    if options.out and Path(options.out).exists() and not options.overwrite:
        raise InputError(f"{options.out} is there: use --overwrite, or another --out")
    answers = [read_answers(path) for path in options.text_solvable]
    masked = [found[True] for found in answers]
    for path, found in zip(options.text_solvable, masked):
        check_masked(path, found)
    different = sorted(masked[0].keys() ^ masked[1].keys())
    if different:
        raise InputError(f"{' and '.join(options.text_solvable)} are not of the same questions: only one has "
                         f"{different[0][1]} of {different[0][0]}")
    solved = [{q for q, group in found.items() if all(r["correct"] for r in group)} for found in masked]
    by_either = solved[0] | solved[1]
    rest = [q for q in masked[0] if q not in by_either]
    found = {"n": len(masked[0]), "runs": [len(next(iter(part.values()))) for part in masked],
             "masked": [accuracy(list(part.values())) for part in masked], "solved": list(map(len, solved)),
             "solved_by_either": len(by_either), "remaining": len(rest), "all": [], "rest": []}
    with_both = all(part[True].keys() <= part[False].keys() for part in answers)
    shown_paths = options.on or (options.text_solvable if with_both else [])
    if shown_paths:
        shown = [read_answers(path)[False] for path in shown_paths]
        found["all"] = compare_models(shown_paths, shown, masked[0])
        found["rest"] = compare_models(shown_paths, shown, rest) if rest else []
    if options.out:
        write_whole(Path(options.out), json_lines({"file": name, "id": i} for name, i in rest))
    if options.json:
        print(json.dumps(found | {"text_solvable": [{"file": name, "id": i} for name, i in sorted(by_either)]}))
    else:
        print_ablation(options.text_solvable, shown_paths, found)


def compare_models(paths: list[str], shown: list[Answers], questions: Iterable[tuple]) -> list[dict]:
    """Figures of the first model, of the second, and of the difference, whose standard error takes into account that
    both were asked the same."""
    for path, found in zip(paths, shown):
        lacking = [q for q in questions if q not in found]
        if lacking:
            raise InputError(f"{path}: {lacking[0][1]} of {lacking[0][0]} was not asked with its image")
    first, second = ([fmean(r["correct"] for r in found[q]) for q in questions] for found in shown)
    gains = [after - before for before, after in zip(first, second)]
    return [*(accuracy([found[q] for q in questions]) for found in shown),
            {"n": len(gains), "accuracy": fmean(gains), "stderr": standard_error(gains)}]


def print_ablation(masked_paths: list[str], shown_paths: list[str], found: dict) -> None:
    """How many questions are text-solvable, and the models on the others."""
    def percent(part: dict) -> str:
        return f"{100 * part['accuracy']:>10.1f} +- {100 * part['stderr']:.1f}"

    print(f"{found['n']} image questions, asked without their images:\n\n{'':<44}{'accuracy':>16}{'always right':>16}")
    for path, runs, part, solved in zip(masked_paths, found["runs"], found["masked"], found["solved"]):
        print(f"{path:<44}{percent(part):>16}{f'{solved} ({runs} of {runs})':>16}")
    print(f"always right by one of the two, or both: {found['solved_by_either']}; that leaves {found['remaining']}")
    if shown_paths:
        print(f"\nwith their images, in %{'':<21}{'all':>16}{'the rest':>16}")
        for i, name in enumerate([*shown_paths, "difference"]):
            print(f"{name:<44}" + "".join(f"{percent(part[i]):>16}" for part in (found["all"], found["rest"]) if part))


# --- The command ------------------------------------------------------------------------------------------------------

def load_examples(path: str, limit: int | None, bad: list[str] | None = None) -> list[Example]:
    """The file's questions, each with a name of its own. Complaints go to `bad` if it is given."""
    examples = list(islice(read_examples(path, bad), limit))
    if len({example.id for example in examples}) < len(examples):
        raise InputError(f"{path}: {repeated_id(examples)}")
    return examples


def check_options(options: EvaluateOptions) -> None:
    """Raises InputError for options that do not go together."""
    if options.on:
        raise InputError("--on goes with --text-solvable")
    if options.runs > 1 and options.temperature == 0:
        raise InputError("--runs above 1 needs a --temperature above 0: greedy runs are all the same")
    if len(set(options.data)) < len(options.data):
        raise InputError("--data names a file twice")
    if options.out and Path(options.out).resolve() in [Path(path).resolve() for path in options.data]:
        raise InputError(f"--out {options.out} is one of the question files")
    if options.resume and not options.out:
        raise InputError("--resume needs the --out to go on with")


def fitting(sampler: Sampler, images: ImageConfig, path: str, examples: list[Example], options: EvaluateOptions,
            bad: list[str] | None = None) -> tuple[list[Example], int]:
    """The questions whose prompts fit the context, and the number of those that do not. Whatever else is wrong with a
    question is said here, or goes to `bad` if it is given."""
    kept, dropped = [], 0
    for example in examples:
        try:
            prompt = example_prompt(sampler, images, example, options)
            if sampler.fits(prompt):
                sampler.check(prompt, "prompt")
                kept.append(example)
            else:
                dropped += 1
        except InputError as error:
            complaint = f"{example.where}: question {example.id}: {error}"
            if bad is None:
                raise InputError(complaint) from None
            bad.append(complaint)
    if not kept:
        raise InputError(f"{path}: no question fits the context of {sampler.context} tokens" if dropped else bad[-1])
    if dropped:
        print(f"{path}: {dropped} of {len(examples)} questions dropped: they do not fit the context of "
              f"{sampler.context} tokens", file=sys.stderr)
    return kept, dropped


def main(argv: list[str]) -> None:
    """Checks everything that can be checked, then evaluates file by file; after Ctrl-C what was answered counts."""
    options = parse_options(EvaluateOptions, argv)
    if options.text_solvable:
        compare_without_images(options)
        return
    check_options(options)
    bad: dict[str, list[str] | None] = {path: [] if options.skip_bad_lines else None for path in options.data}
    files = {path: load_examples(path, options.limit, bad[path]) for path in options.data}
    sampler, images = load_sampler(options.model, options.device, options.dtype, max_batch=options.max_batch)
    asked = {path: fitting(sampler, images, path, files[path], options, bad[path]) for path in files}
    for path in files:
        report_bad(path, bad[path])
    file = RecordFile(options.out, asdict(options), [*options.data, *weight_files(Path(options.model))],
                      keys=("file", "id"), size=options.runs)
    results, interrupted = {}, False
    for path, (examples, dropped) in asked.items():
        known = {example.id: file.groups[path, example.id] for example in examples if (path, example.id) in file.groups}
        try:
            evaluate(sampler, images, examples, options, known=known,
                     on_answer=lambda group: file.append([{"file": path, **record} for record in group]))
        except KeyboardInterrupt:
            interrupted = True
        answered = [r for example in examples for r in file.groups.get((path, example.id), [])]
        if answered:
            results[path] = {**summarise(answered), "dropped": dropped, "bad": len(bad[path] or [])}
            if options.json:
                print(json.dumps({"file": path, **results[path]}), flush=True)
        if interrupted:
            break
    if results and not options.json:
        print_table(results)
    if interrupted:
        raise KeyboardInterrupt
    file.finish([(path, example.id) for path, (examples, _) in asked.items() for example in examples])


if __name__ == "__main__":
    run_command(main)
