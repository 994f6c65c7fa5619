"""A conversation in the terminal.

    python tools/chat.py --model micro/base              # /image FILE, /reset, /quit
"""
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import ImageConfig, InputError, Prompt, chat_prompt, load_image  # noqa: E402
from hub.options import MICRO_BASE, option, parse_options, run_command  # noqa: E402
from sample import Sampler, SamplingParams, load_sampler  # noqa: E402


@dataclass(frozen=True)
class ChatOptions(SamplingParams):
    """Talk to a model."""
    model: str = option(str(MICRO_BASE), "model folder")
    system: str | None = option(None, "system prompt (default: the template's)")
    device: str = option("auto", "auto, cpu or cuda")
    dtype: str = option("auto", "auto is the one on disk", choices=("auto", "float32", "bfloat16"))


def chat(sampler: Sampler, params: SamplingParams, image_config: ImageConfig, system: str | None) -> None:
    """A conversation in the terminal: the answer appears as it is sampled. `/image FILE` puts an image before the next
    message, `/reset` forgets everything, `/quit` or Ctrl-D ends."""
    print("/image FILE adds an image to your next message, /reset starts again, /quit ends.", file=sys.stderr)
    sys.stdin.reconfigure(errors="replace")
    messages, images, pending = [], [], []
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        try:
            command, _, argument = line.partition(" ")
            if command == "/quit":
                return
            elif command == "/reset":
                messages, images, pending = [], [], []
            elif command == "/image" and argument:
                pending.append(load_image(argument.strip()))
            elif command.startswith("/"):
                raise InputError(f"{command} is not a command, or lacks its FILE")
            elif line:
                opening = [{"role": "system", "content": system}] if system is not None else []
                content = [{"type": "image"}] * len(pending) + [{"type": "text", "text": line}]
                turn = {"role": "user", "content": content}
                prompt = chat_prompt([*opening, *messages, turn], images + pending, sampler.tokenizer, image_config)
                messages += [turn, {"role": "assistant", "content": stream(sampler, params, prompt)}]
                images, pending = images + pending, []
        except InputError as error:  # a bad file or a full context: say so, and go on
            print(f"error: {error}", file=sys.stderr)


def stream(sampler: Sampler, params: SamplingParams, prompt: Prompt) -> str:
    """One answer, printed as far as its text is certain (a character may take several tokens)."""
    shown = 0

    def show(_prompt: int, _sample: int, ids: list[int]) -> None:
        nonlocal shown
        text = sampler.tokenizer.decode(ids)
        if not text.endswith("\ufffd"):
            print(text[shown:], end="", flush=True)
            shown = len(text)

    [[completion]] = sampler.generate([prompt], params, on_token=show)
    print(completion.text[shown:], flush=True)
    return completion.text


def main(argv: list[str]) -> None:
    options = parse_options(ChatOptions, argv)
    sampler, images = load_sampler(options.model, options.device, options.dtype)
    chat(sampler, replace(options, n=1), images, options.system)


if __name__ == "__main__":
    run_command(main)
