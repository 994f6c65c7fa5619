"""How long SFT's data take before the model is loaded: read, tokenised, kept, found again.

    python benchmarks/tokenizing.py --model Qwen2.5-VL-3B-Instruct --data gsm8k/train.jsonl

The text is made from the file's worked responses: a record's thought is some of them, one after the
other, with other numbers, as long as those of OpenThoughts are. Each way is timed twice, in turns,
and the shorter time counts. Seconds of processor time say more than those of the clock where the
machine has other work; on an idle one of N cores the clock shows up to N times less.
"""

import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sft  # noqa: E402
from data import Tokenizer, encode_example, make_row, read_examples  # noqa: E402
from hub.errors import InputError  # noqa: E402
from hub.options import MICRO_BASE, MICRO_DATA, option, parse_options, run_command  # noqa: E402
from training.journal import git_commit, make_config  # noqa: E402
from training.rows import RowFile  # noqa: E402


@dataclass
class TokenizingOptions:
    """Time the reading and tokenising of SFT's data, one by one and in blocks."""

    model: str = option(str(MICRO_BASE), "model folder; its tokenizer is all that counts")
    data: str = option(str(MICRO_DATA / "sft.jsonl"), "questions with worked responses")
    megabytes: float = option(10.0, "of text that is made of them", low=0.01)
    solutions: int = option(25, "worked responses in a record, at the median", low=1)
    max_length: int = option(4096, "longer sequences are cut to so many tokens", low=2)
    json: bool = option(False, "the last line is one JSON object")


def write_text(options: TokenizingOptions, path: Path) -> int:
    """Writes records as JSON lines. Returns how many."""
    examples = [example for example in read_examples(options.data) if example.response]
    if not examples:
        raise InputError(f"{options.data}: no worked responses in the file")
    chance = random.Random(0)

    def with_other_numbers(text: str) -> str:
        return re.sub(r"\d+", lambda match: str(chance.randrange(10 ** len(match[0]))), text)

    count = 0
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < options.megabytes * 1e6:
            example = chance.choice(examples)
            length = max(1, round(options.solutions * chance.lognormvariate(0, 0.7)))
            parts = [f"{e.question}\n{e.response}" for e in chance.choices(examples, k=length)]
            thought = re.sub("</?(think|answer)>", "", "\n\n".join(parts))
            record = {
                "question": with_other_numbers(example.question),
                "answer": example.answer,
                "response": f"<think>\n{with_other_numbers(thought)}\n</think> <answer>7</answer>",
            }
            file.write(json.dumps(record) + "\n")
            count += 1
    return count


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Returns the seconds that a call takes, by the clock and of all processors' time."""
    clock, processor = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - clock, time.process_time() - processor


def measure(options: TokenizingOptions, folder: Path) -> dict:
    """Returns the seconds of each part, and what they are about."""
    path = folder / "text.jsonl"
    records = write_text(options, path)
    tokenizer = Tokenizer.from_pretrained(options.model)
    sft_options = sft.SFTOptions(
        model=options.model, data=str(path), max_length=options.max_length, device="cpu"
    )
    # What RowFile asks of a run; a real one would want the model's weights.
    config = make_config(asdict(sft_options), [path])
    run = SimpleNamespace(folder=folder, config=config)
    rows = []

    def one_by_one() -> None:
        for example in read_examples(path):
            pair = encode_example(example, tokenizer, style="direct", max_length=options.max_length)
            make_row(*pair, example.id)

    def in_blocks() -> None:
        rows[:] = sft.load_rows(sft_options, tokenizer)

    def keep() -> None:
        file = RowFile(run, sft.ROW_OPTIONS)
        file.path.unlink(missing_ok=True)
        file.rows(lambda: rows)
        file.keep()

    def find() -> None:
        RowFile(run, sft.ROW_OPTIONS).rows(lambda: [])

    ways = {
        "read": lambda: all(read_examples(path)),
        "one by one": one_by_one,
        "in blocks": in_blocks,
        "keep": keep,
        "find": find,
    }
    times = [{name: seconds(way) for name, way in ways.items()} for _ in range(2)]
    best = {name: [min(pair) for pair in zip(*(t[name] for t in times))] for name in ways}
    tokens = sum(len(row.ids) for row in rows)
    size = path.stat().st_size
    return {"bytes": size, "records": records, "tokens": tokens, "seconds": best}


def main(argv: list[str]) -> None:
    """Times each way, and prints a line for each."""
    options = parse_options(TokenizingOptions, argv)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, Path(folder))
    megabytes = result["bytes"] / 1e6
    print(f"{megabytes:.1f} MB, {result['records']:,} records, {result['tokens']:,} tokens kept")
    print(f"{'':<12}{'seconds':>9}{'processor':>11}{'a GB, min':>11}{'processor':>11}")
    for name, (clock, processor) in result["seconds"].items():
        per_gb = [1000 / megabytes * value / 60 for value in (clock, processor)]
        print(f"{name:<12}{clock:>9.2f}{processor:>11.2f}{per_gb[0]:>11.1f}{per_gb[1]:>11.1f}")
    if options.json:
        result |= {"commit": git_commit(), "date": date.today().isoformat()}
        print(json.dumps(result))


if __name__ == "__main__":
    run_command(main)
