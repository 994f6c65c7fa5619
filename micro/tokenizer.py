"""The micro world's tokenizer.json: byte-level like Qwen's, so that any text works.

Its tokens are few and short. Every byte is one, and so is every word of the micro world's prompts
and of the chat template. A chain of thought is made of single characters and of the two tag names;
no token of a question's words ever occurs in one. As in Qwen2.5, `</think>` is three tokens: `</`,
`think`, `>`.
"""

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from micro.world import FILLERS, NUMBER_WORDS, SIGN_WORDS, STATE_WORDS, TASKS

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
TEMPLATE_WORDS = "system user assistant You are a helpful".split()
# A word with its space, a digit, the start of a closing tag, a character.
PATTERN = r" ?\p{L}+|\p{N}|</|[^\s\p{L}\p{N}]|\s"


def make_tokenizer() -> Tokenizer:
    """Returns the tokenizer: bytes, tag names and words are tokens, and nothing is ever merged."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = [
        *STATE_WORDS["L"],
        *STATE_WORDS["G"],
        *NUMBER_WORDS,
        *SIGN_WORDS["A"],
        *SIGN_WORDS["L"],
        *FILLERS,
        *TEMPLATE_WORDS,
        *(task.rstrip(":") for task in TASKS.values()),
    ]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "think", "answer", "</"]
    for word in words:
        if len(word) > 1:  # a single letter is there already
            tokens.append(word)
        tokens.append("Ġ" + word)  # Ġ is the byte-level spelling of a space
    vocab = {token: i for i, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    return core


def write_tokenizer(folder: str | Path) -> None:
    """Writes tokenizer.json into a folder."""
    make_tokenizer().save(str(Path(folder) / "tokenizer.json"))
