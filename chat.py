"""The conversation of `python sample.py`, with whatever answers a prompt."""
import sys
from collections.abc import Callable

from data import ImageConfig, InputError, Prompt, Tokenizer, chat_prompt, load_image

Answer = Callable[[Prompt, Callable[[list[int]], None]], list[int]]  # calls back with the ids so far after each token


def chat(answer: Answer, tokenizer: Tokenizer, image_config: ImageConfig, system: str | None) -> None:
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
                prompt = chat_prompt([*opening, *messages, turn], images + pending, tokenizer, image_config)
                messages += [turn, {"role": "assistant", "content": stream(answer, prompt, tokenizer)}]
                images, pending = images + pending, []
        except InputError as error:  # a bad file or a full context: say so, and go on
            print(f"error: {error}", file=sys.stderr)


def stream(answer: Answer, prompt: Prompt, tokenizer: Tokenizer) -> str:
    """One answer, printed as far as its text is certain (a character may take several tokens)."""
    shown = 0

    def show(ids: list[int]) -> None:
        nonlocal shown
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):
            print(text[shown:], end="", flush=True)
            shown = len(text)

    text = tokenizer.decode(answer(prompt, show))
    print(text[shown:], flush=True)
    return text
