"""How a data file is read, what the model gets to see of it, and what is too long.

    python tools/inspect_data.py medqa.jsonl
    python tools/inspect_data.py openthoughts.jsonl --model Qwen2.5-VL-7B-Instruct --prompt-style train

The file is streamed: of a record nothing is kept but the numbers that are counted here, and the first three are shown.
"""

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import (
    MERGE,
    PATCH,
    Example,
    ImageConfig,
    InputError,
    Tokenizer,
    convert_examples,  # noqa: E402
    format_prompt,
    load_image,
    render_chat,
    smart_resize,
)
from hub.config import Config  # noqa: E402
from hub.options import MICRO_BASE, option, parse_options, run_command  # noqa: E402

SHOWN = 3


@dataclass
class DataOptions:
    """Shows how a data file is read: schema, counts, the first examples as the model sees them, lengths in tokens."""

    file: str = option(
        "", "JSONL, JSON, TSV or Parquet, in any of the schemas of data/schemas.py", positional=True
    )
    model: str = option(str(MICRO_BASE), "model folder: its tokenizer counts, and its image size")
    prompt_style: str = option(
        "direct", "how a question is asked", choices=("direct", "train", "mcq", "math")
    )
    max_length: int = option(4096, "tokens that a sequence may have", low=2)
    limit: int | None = option(None, "only the first so many good records", low=1)


@dataclass
class Encoded:
    """An example as the model gets it."""

    example: Example
    ids: list[int]  # prompt, and response if there is one
    prompt_tokens: int  # how many of them are the prompt's


@dataclass
class Statistics:
    """What is counted of a file. Counters of lengths: tokens -> examples."""

    schemas: Counter[str] = field(default_factory=Counter)
    domains: Counter[str] = field(default_factory=Counter)
    having: Counter[str] = field(
        default_factory=Counter
    )  # examples with images, with options, with a response
    prompts: Counter[int] = field(default_factory=Counter)
    sequences: Counter[int] = field(
        default_factory=Counter
    )  # prompt and response, where there is one
    dropped: int = 0  # the prompt alone fills max_length
    cut: int = 0  # the response does not fit
    lost: int = 0  # tokens of these that are cut off

    def add(self, encoded: Encoded, max_length: int) -> None:
        example, total = encoded.example, len(encoded.ids)
        self.schemas[example.schema] += 1
        self.domains[example.domain or "none"] += 1
        self.having.update(
            name for name in ("images", "options", "response") if getattr(example, name)
        )
        self.prompts[encoded.prompt_tokens] += 1
        if example.response:
            self.sequences[total] += 1
        if encoded.prompt_tokens >= max_length:
            self.dropped += 1
        elif total > max_length:
            self.cut += 1
            self.lost += total - max_length


def encoder(options: DataOptions) -> tuple[Callable[[Example], Encoded], Tokenizer]:
    """A function that encodes an example as training and evaluation would, and the tokenizer that it uses. It complains
    of images that cannot be read, and of questions that do not fit the prompt."""
    tokenizer = Tokenizer.from_pretrained(options.model)
    has_vision = Config.from_pretrained(options.model).vision is not None
    config = ImageConfig.from_pretrained(options.model) if has_vision else None

    def image_tokens(source) -> int:
        if config is None:
            raise InputError("this model has no vision tower: it takes no images")
        image = load_image(source)
        height, width = smart_resize(
            image.height, image.width, min_pixels=config.min_pixels, max_pixels=config.max_pixels
        )
        return height * width // (PATCH * MERGE) ** 2

    def encode(example: Example) -> Encoded:
        try:
            counts = [image_tokens(image) for image in example.images]
        except InputError as error:
            raise InputError(f"question {example.id}: {error}") from None
        text = {"type": "text", "text": format_prompt(example, options.prompt_style)}
        messages = [{"role": "user", "content": [*[{"type": "image"}] * len(counts), text]}]
        if example.response:
            messages.append({"role": "assistant", "content": example.response})
        ids, mask = render_chat(
            messages, tokenizer, image_tokens=counts, add_generation_prompt=not example.response
        )
        return Encoded(example, ids, mask.index(True) if example.response else len(ids))

    return encode, tokenizer


# --- What is printed --------------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """Without what a terminal would obey: escapes stand for it."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def shortened(text: str, limit: int = 700) -> str:
    """Beginning and end of a long text."""
    if len(text) <= limit:
        return text
    head, tail = text[: limit * 2 // 3], text[-limit // 3 :]
    return f"{head}\n[... {len(text) - len(head) - len(tail):,} characters ...]\n{tail}"


def show(encoded: Encoded, tokenizer: Tokenizer, number: int) -> None:
    """An example as the model sees it, control tokens and all."""
    example, prompt = encoded.example, encoded.prompt_tokens
    facts = [f"answer {' or '.join(map(repr, example.truths))}"]
    facts += [f"domain {example.domain}"] if example.domain else []
    facts += [f"{len(example.images)} images"] if example.images else []
    facts += [f"correct to {example.precision} decimals"] if example.precision is not None else []
    print(f"\nexample {number}: {shortened(printable(f'{example.id}; ' + '; '.join(facts)), 300)}")
    for ids in (
        encoded.ids[:prompt],
        encoded.ids[prompt:],
    ):  # apart, so that a long response hides no prompt
        text = re.sub(
            r"(?:<\|image_pad\|>){2,}",
            lambda pads: f"<|image_pad|> x {len(pads[0]) // 13}",
            tokenizer.decode(ids, skip_special=False),
        )
        print(*("    " + line for line in shortened(printable(text)).splitlines()), sep="\n")


def quantile(lengths: Counter[int], share: float) -> int:
    """The smallest length that at least this share of the examples does not exceed."""
    seen, wanted = 0, share * lengths.total()
    for length in sorted(lengths):
        seen += lengths[length]
        if seen >= wanted:
            break
    return length


def histogram(lengths: Counter[int], *, bars: int = 12, width: int = 48) -> Iterable[str]:
    """A line per bin: its first length, its bar, its count. Bins are of equal, round width; the last is open, so that a
    few outliers do not press the rest into one."""
    top = quantile(lengths, 0.99)
    step = next(
        m * 10**e for e in range(20) for m in (1, 2, 5) if top - min(lengths) < m * 10**e * bars
    )
    bins = Counter(
        {low: 0 for low in range(min(lengths) // step * step, top // step * step + 1, step)}
    )
    for length, count in lengths.items():
        bins[min(length, top) // step * step] += count
    for low, count in sorted(bins.items()):
        bar = "#" * -(-width * count // max(bins.values()))
        yield f"    {low:>7,}{'+' if low == max(bins) else ' '} {bar:<{width}} {count:>9,}"


def show_lengths(title: str, lengths: Counter[int]) -> None:
    mean = sum(length * count for length, count in lengths.items()) / lengths.total()
    print(
        f"\ntokens of {title}: least {min(lengths):,}, median {quantile(lengths, 0.5):,}, mean {mean:,.0f}, "
        f"99% up to {quantile(lengths, 0.99):,}, most {max(lengths):,}"
    )
    print(*histogram(lengths), sep="\n")


def listed(counts: Counter[str], most: int = 10) -> str:
    """The most frequent ones, and how many there are besides."""
    parts = [f"{printable(name)[:40]} {count:,}" for name, count in counts.most_common(most)]
    return ", ".join(parts) + (f", and {len(counts) - most:,} more" if len(counts) > most else "")


def show_statistics(found: Statistics, bad: list[str], options: DataOptions) -> None:
    n = found.schemas.total()
    print(f"\nschema: {listed(found.schemas)}")
    print(
        f"records: {n:,} good, {len(bad):,} bad; with images {found.having['images']:,}, with options "
        f"{found.having['options']:,}, with a response {found.having['response']:,}"
    )
    print(f"domains: {listed(found.domains)}")
    for complaint in bad[:SHOWN]:
        print(f"bad: {printable(complaint)}")
    show_lengths(f"the prompt ({options.prompt_style})", found.prompts)
    if found.sequences:
        show_lengths("prompt and response", found.sequences)
    print(
        f"\nat --max-length {options.max_length:,}: {found.dropped:,} of {n:,} dropped, since the prompt fills it; "
        f"{found.cut:,} cut, by {found.lost:,} tokens in all"
    )


def main(argv: list[str]) -> None:
    options = parse_options(DataOptions, argv)
    encode, tokenizer = encoder(options)
    found, bad = Statistics(), []
    examples = islice(convert_examples(options.file, encode, bad), options.limit)
    for number, encoded in enumerate(tqdm(examples, desc="reading", unit=" examples", delay=5), 1):
        found.add(encoded, options.max_length)
        if number <= SHOWN:
            show(encoded, tokenizer, number)
    show_statistics(found, bad, options)


if __name__ == "__main__":
    run_command(main)
