"""A conversation in the terminal.

python tools/chat.py --model micro/base     # then: /image FILE, /reset, /quit, or a message
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import ImageConfig, InputError, Prompt, chat_prompt, load_image
from hub.device import DEVICE_HELP, DTYPE_HELP, DTYPES, memory_phase
from hub.options import MICRO_BASE, option, parse_options, run_command
from sample import Sampler, SamplingParams, load_sampler


@dataclass(frozen=True)
class ChatOptions(SamplingParams):
    """Talk to a model."""

    model: str = option(str(MICRO_BASE), "model folder")
    system: str | None = option(None, "system prompt (default: the template's)")
    device: str = option("auto", DEVICE_HELP)
    dtype: str = option("auto", DTYPE_HELP, choices=DTYPES)


def chat(
    sampler: Sampler, params: SamplingParams, image_config: ImageConfig, system: str | None
) -> None:
    """Reads messages from stdin and answers them, until /quit or the end."""
    print("/image FILE adds an image to your next message, /reset, /quit", file=sys.stderr)
    sys.stdin.reconfigure(errors="replace")
    opening = [] if system is None else [{"role": "system", "content": system}]
    messages, images, pending = list(opening), [], []  # pending: images of the next message
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        command, _, argument = line.partition(" ")
        try:
            if command == "/quit":
                return
            elif command == "/reset":
                messages, images, pending = list(opening), [], []
            elif command == "/image" and argument:
                pending.append(load_image(argument.strip()))
            elif command.startswith("/"):
                raise InputError(f"{command} is not a command, or lacks its FILE")
            elif line:
                content = [{"type": "image"}] * len(pending) + [{"type": "text", "text": line}]
                turn = {"role": "user", "content": content}
                shown = images + pending
                prompt = chat_prompt([*messages, turn], shown, sampler.tokenizer, image_config)
                with memory_phase("the answer", "/reset", "a lower --max-new-tokens"):
                    answer = stream(sampler, params, prompt)
                # Only what was answered is remembered.
                messages += [turn, {"role": "assistant", "content": answer}]
                images, pending = shown, []
        except InputError as error:  # a bad file or a full context: say so, and go on
            print(f"error: {error}", file=sys.stderr)
            if pending and line and not command.startswith("/"):
                # The images may be what was wrong; without them the next message has a chance.
                print("the images of this message are dropped", file=sys.stderr)
                pending = []


def stream(sampler: Sampler, params: SamplingParams, prompt: Prompt) -> str:
    """Prints an answer as it is sampled, and returns it."""
    shown = 0

    def show(_prompt: int, _sample: int, ids: list[int]) -> None:
        nonlocal shown
        text = sampler.tokenizer.decode(ids)
        # A character may take several tokens; until it is whole, it is shown as U+FFFD.
        if not text.endswith("\ufffd"):
            print(text[shown:], end="", flush=True)
            shown = len(text)

    [[completion]] = sampler.generate([prompt], params, on_token=show)
    print(completion.text[shown:], flush=True)
    return completion.text


def main(argv: list[str]) -> None:
    options = parse_options(ChatOptions, argv)
    if options.n != 1:
        raise InputError(f"--n {options.n}: a conversation goes on from one answer")
    sampler, image_config = load_sampler(options.model, options.device, options.dtype)
    chat(sampler, options, image_config, options.system)


if __name__ == "__main__":
    run_command(main)
