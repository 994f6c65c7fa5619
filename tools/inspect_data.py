"""How a data file is read, what the model gets to see of it, and what is too long.

python tools/inspect_data.py medqa.jsonl
python tools/inspect_data.py openthoughts.jsonl --model Qwen2.5-VL-7B-Instruct --prompt-style train
"""

import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import Example, ImageConfig, Tokenizer, load_examples  # noqa: E402
from data.prompts import STYLES, format_prompt, make_prompt  # noqa: E402
from hub.config import Config  # noqa: E402
from hub.errors import InputError  # noqa: E402
from hub.options import MICRO_BASE, option, parse_options, run_command  # noqa: E402

SHOWN = 3  # examples


@dataclass
class DataOptions:
    """Shows how a data file is read: schema, the first examples as the model sees them, lengths."""

    file: str = option("", "JSONL, JSON, TSV or Parquet, see data/schemas.py", positional=True)
    model: str = option(str(MICRO_BASE), "model folder: its tokenizer counts, and its image size")
    prompt_style: str = option("direct", "how a question is asked", choices=STYLES)
    max_length: int = option(4096, "tokens that a sequence may have", low=2)
    limit: int | None = option(None, "only the first so many good records", low=1)


def show(example: Example, texts: list[str], number: int) -> None:
    """Prints an example as the model sees it, control tokens and all; long texts are shortened."""
    truths = " or ".join(map(repr, example.truths))
    print(f"\nexample {number}: {example.id}; domain {example.domain}; answer {truths[:200]}")
    for text in filter(None, texts):
        pads = re.compile(r"(?:<\|image_pad\|>){2,}")
        text = pads.sub(lambda run: f"<|image_pad|> x {run[0].count('image_pad')}", text)
        if len(text) > 700:
            text = f"{text[:450]}\n[... {len(text) - 700:,} characters ...]\n{text[-250:]}"
        print("    " + text.strip().replace("\n", "\n    "))


def show_reading(example: Example) -> None:
    """Prints which fields of a record were read as what, and which were not read."""
    print(f"recognised as: {example.schema}")
    for meaning, fields in example.sources.items():
        print(f"    {meaning:<10} from {', '.join(fields)}")
    read = {field for fields in example.sources.values() for field in fields}
    unread = [field for field in example.meta if field not in read]
    print(f"    not read: {', '.join(unread) or 'nothing'}")


def show_counts(title: str, counts: Counter[str]) -> None:
    """Prints the most frequent of some values."""
    print(f"{title}: " + ", ".join(f"{name} {count:,}" for name, count in counts.most_common(10)))


def show_lengths(title: str, lengths: list[int]) -> None:
    """Prints the median, the 99% quantile and the longest of some lengths in tokens."""
    ordered = sorted(lengths)
    median = ordered[len(ordered) // 2]
    nearly_all = ordered[len(ordered) * 99 // 100]
    print(f"{title}: median {median:,}, 99% up to {nearly_all:,}, longest {ordered[-1]:,}")


def main(argv: list[str]) -> None:
    """Reads the file once, counting, and prints what was found."""
    options = parse_options(DataOptions, argv)
    images = None
    config = Config.from_pretrained(options.model)
    tokenizer = Tokenizer.from_pretrained(options.model)
    if config.vision is not None:
        images = ImageConfig.from_pretrained(options.model)
    schemas, domains, parts = Counter(), Counter(), Counter()

    def look(example: Example) -> tuple[int, int]:
        """Counts and, of the first few, shows. Returns the tokens of prompt and response."""
        if example.images and images is None:
            raise InputError("this model has no vision tower: it takes no images")
        question = format_prompt(example, options.prompt_style)
        prompt = make_prompt(question, example.images, tokenizer, images).ids
        response = []
        if example.response:
            newline = tokenizer.encode("\n")
            response = [*tokenizer.encode(example.response), tokenizer.im_end, *newline]
        if example.schema not in schemas:
            show_reading(example)
        if schemas.total() < SHOWN:
            texts = [tokenizer.decode(ids, skip_special=False) for ids in (prompt, response)]
            show(example, texts, schemas.total() + 1)
        schemas[example.schema] += 1
        domains[example.domain or "none"] += 1
        parts.update(part for part in ("images", "options", "response") if getattr(example, part))
        return len(prompt), len(response)

    lengths, _, bad = load_examples(options.file, look, skip_bad=True, limit=options.limit)
    print(f"\nrecords: {len(lengths):,} good, {bad:,} bad")
    show_counts("schema", schemas)
    show_counts("domains", domains)
    if parts:
        show_counts("records with", parts)
    show_lengths("tokens of the prompt", [prompt for prompt, _ in lengths])
    if parts["response"]:
        worked = [prompt + response for prompt, response in lengths if response]
        show_lengths("tokens of prompt and response", worked)
    longest = options.max_length
    dropped = sum(prompt >= longest for prompt, _ in lengths)
    cut = sum(prompt < longest < prompt + response for prompt, response in lengths)
    print(
        f"at --max-length {longest:,}: {dropped:,} of {len(lengths):,} dropped, since the prompt "
        f"fills it; {cut:,} cut"
    )


if __name__ == "__main__":
    run_command(main)
