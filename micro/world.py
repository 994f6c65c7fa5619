"""The micro world: questions whose answer takes k small steps, asked in words or as an image.

Three domains, each with questions of depth k, which take k steps:
    A (trained)       digits: a start and k operations, + and - modulo 10             3+4-2  ->  5
    L (same format)   letters a to j on a clock: > is forward, < is back              c>4<2  ->  e
    G (another kind)  a graph: a start node, a number of hops k, and six arrows   K2KMMT...  ->  T
A text prompt spells every symbol as a word, among filler words; an image prompt shows one glyph per
cell of a strip. The chain of thought first restates the question, then takes one step at a time. A
and L number the operations and the steps, each from the state before it; G marks the pairs of nodes
and counts the hops down:
    <think>3#1+4#2-2;3;#1+4=7;#2-2=5;</think><answer>5</answer>
    <think>K2#KM#MT#PK#RV#TR#VP;2;#KM1;#MT0;</think><answer>T</answer>

    python micro/world.py --seed 0 --out micro/data          # writes the shipped data again
"""

import argparse
import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

MODULUS = 10
MAX_OPERAND = 5
MAX_DEPTH = 7  # operations
NODES = 6  # of a graph, which is one ring: after NODES hops one is back
MAX_HOPS = 5
DOMAINS = "ALG"
STATES = {"A": "0123456789", "L": "abcdefghij", "G": "KMPRTV"}
SIGNS = {"A": "+-", "L": "><"}  # the first adds, the second subtracts
NUMBER_WORDS = "zero one two three four five six seven eight nine".split()
STATE_WORDS = {
    "A": NUMBER_WORDS,
    "L": "alfa bravo charlie delta echo foxtrot golf hotel india juliett".split(),
    "G": "kilo mike papa romeo tango victor".split(),
}
SIGN_WORDS = {"A": ("plus", "minus"), "L": ("forward", "back")}
FILLERS = (
    "river stone cloud lamp window garden silver paper bottle forest candle bridge pocket mirror "
    "basket ladder pillow anchor feather hammer"
).split()
TASKS = {"solve": "Solve:", "direct": "Answer:", "read": "Read:", "recall": "Recall:"}

CELL = 28  # pixels: one merged vision token per cell
CELLS = 16  # of a strip, which is 28 x 448 pixels
# Bitmaps of 5 x 7, a row per hexadecimal pair (bit 4 is the leftmost column). So no font file is
# needed, and the images are the same everywhere.
GLYPHS = {
    "0": "0e11131519110e",
    "1": "040c040404040e",
    "2": "0e11010204081f",
    "3": "1f02040201110e",
    "4": "02060a121f0202",
    "5": "1f101e0101110e",
    "6": "0608101e11110e",
    "7": "1f010204080808",
    "8": "0e11110e11110e",
    "9": "0e11110f01020c",
    "+": "0004041f040400",
    "-": "0000001f000000",
    ">": "10080402040810",
    "<": "01020408040201",
    "a": "00000e010f110f",
    "b": "10101619111e00",
    "c": "00000e1010110e",
    "d": "01010d13110f00",
    "e": "00000e111f100e",
    "f": "0609081c080808",
    "g": "000f110f01110e",
    "h": "10101619111111",
    "i": "04000c0404040e",
    "j": "0200060202120c",
    "K": "11121418141211",
    "M": "111b1515111111",
    "P": "1e11111e101010",
    "R": "1e11111e141211",
    "T": "1f040404040404",
    "V": "11111111110a04",
}
GLYPH_SIZES = ((10, 14), (12, 18), (15, 21))  # width, height in pixels
MAX_JITTER = 3  # pixels
SPECKS = 0.02  # the share of pixels that are noise


def apply(operation: tuple[int, int], state: int) -> int:
    """Returns the state after an operation: (0 adds or 1 subtracts, operand)."""
    sign, n = operation
    return (state + (-n if sign else n)) % MODULUS


@dataclass(frozen=True)
class Question:
    """A start state and k operations, as numbers; its properties spell it in symbols."""

    domain: str  # "A" or "L"
    start: int  # 0 to 9
    operations: tuple[tuple[int, int], ...]  # (0 adds or 1 subtracts, operand 1 to 5)

    @property
    def depth(self) -> int:
        return len(self.operations)

    @property
    def form(self) -> str:
        """The canonical form, such as 3+4-2: what the glyphs of an image show."""
        states, signs = STATES[self.domain], SIGNS[self.domain]
        return states[self.start] + "".join(f"{signs[sign]}{n}" for sign, n in self.operations)

    @property
    def words(self) -> list[str]:
        words = [STATE_WORDS[self.domain][self.start]]
        for sign, n in self.operations:
            words += [SIGN_WORDS[self.domain][sign], NUMBER_WORDS[n]]
        return words

    @property
    def restated(self) -> str:
        """The form with numbered operations, 3#1+4#2-2. With it begins every chain of thought."""
        text = STATES[self.domain][self.start]
        for i, (sign, n) in enumerate(self.operations, 1):
            text += f"#{i}{SIGNS[self.domain][sign]}{n}"
        return text

    def after(self, steps: int) -> int:
        """Returns the state after so many operations."""
        state = self.start
        for operation in self.operations[:steps]:
            state = apply(operation, state)
        return state

    @property
    def answer(self) -> str:
        return STATES[self.domain][self.after(self.depth)]

    def step(self, i: int, state: int) -> str:
        """Returns operation i (from 1), done on a state, with its semicolon: `#1+4=7;` on 3."""
        sign, n = self.operations[i - 1]
        result = STATES[self.domain][apply((sign, n), state)]
        return f"#{i}{SIGNS[self.domain][sign]}{n}={result};"

    def chain(self, limit: int = MAX_DEPTH) -> str:
        """Returns the whole response; cut after `limit` steps, it answers with the state there."""
        steps = min(limit, self.depth)
        done = "".join(self.step(i, self.after(i - 1)) for i in range(1, steps + 1))
        start = STATES[self.domain][self.start]
        end = STATES[self.domain][self.after(steps)]
        return f"<think>{self.restated};{start};{done}</think><answer>{end}</answer>"

    def fragment(self, rng: random.Random, count: int = MAX_DEPTH) -> tuple[str, list[bool]]:
        """Returns the restated question with single steps, and the mask of what can be known.

        At most `count` of its steps follow, in random order on random states: they say which
        operation has which number. The numbers and states drawn at random cannot be known.
        """
        text = self.restated + ";"
        mask = [True] * len(text)
        for i in rng.sample(range(1, self.depth + 1), self.depth)[:count]:
            state = rng.randrange(MODULUS)
            text += f"{STATES[self.domain][state]};{self.step(i, state)}"
            mask += [False, True, True, False, True, True, True, True, True]
        return text, mask


@dataclass(frozen=True)
class Walk:
    """A graph of one ring of nodes, a start and a number of hops; the methods are a Question's."""

    # All nodes, each behind the one that points to it; the walk starts at the first.
    ring: tuple[int, ...]
    depth: int  # hops
    domain: str = "G"

    def node(self, i: int) -> str:
        return STATES["G"][self.ring[i % NODES]]

    @property
    def arrows(self) -> list[str]:
        return sorted(self.node(i) + self.node(i + 1) for i in range(NODES))

    @property
    def form(self) -> str:
        return f"{self.node(0)}{self.depth}" + "".join(self.arrows)

    @property
    def words(self) -> list[str]:
        names = dict(zip(STATES["G"], STATE_WORDS["G"]))
        names[str(self.depth)] = NUMBER_WORDS[self.depth]
        return [names[symbol] for symbol in self.form]

    @property
    def restated(self) -> str:
        return "#".join([f"{self.node(0)}{self.depth}", *self.arrows])

    @property
    def answer(self) -> str:
        return self.node(self.depth)

    def chain(self, limit: int = MAX_DEPTH) -> str:
        """Returns the whole response; cut after `limit` hops, it answers with the node there."""
        steps = min(limit, self.depth)
        thought = f"{self.restated};{self.depth};"
        for i in range(steps):
            thought += f"#{self.node(i)}{self.node(i + 1)}{self.depth - i - 1};"
        return f"<think>{thought}</think><answer>{self.node(steps)}</answer>"

    def fragment(self, rng: random.Random, count: int = NODES) -> tuple[str, list[bool]]:
        """Returns the restated graph with single hops, and the mask of what can be known.

        At most `count` hops follow, from random nodes with a random number of hops to go: that node
        and number cannot be known.
        """
        text = self.restated + ";"
        mask = [True] * len(text)
        for i in rng.sample(range(NODES), NODES)[:count]:
            left = rng.randint(1, MAX_HOPS)
            text += f"{left};#{self.node(i)}{self.node(i + 1)}{left - 1};"
            mask += [False, True, True, False, True, True, True]
        return text, mask


def bucket(form: str) -> int:
    """Returns 0 to 9, from the canonical form alone; it says what a question may be used for."""
    return hashlib.sha256(form.encode()).digest()[0] % 10


TEST_BUCKETS = range(0, 2)
SFT_BUCKETS = range(2, 6)
RL_BUCKETS = range(6, 10)
TRAIN_BUCKETS = range(2, 10)


def max_depth(domain: str) -> int:
    return MAX_HOPS if domain == "G" else MAX_DEPTH


def draw_operation(rng: random.Random) -> tuple[int, int]:
    return rng.randrange(2), rng.randint(1, MAX_OPERAND)


def draw_question(
    rng: random.Random, domain: str, depth: int, buckets: range = TRAIN_BUCKETS
) -> Question | Walk:
    """Returns a random question of one of these buckets; depth is at most max_depth(domain)."""
    while True:
        if domain == "G":
            question = Walk(tuple(rng.sample(range(NODES), NODES)), depth)
        else:
            operations = tuple(draw_operation(rng) for _ in range(depth))
            question = Question(domain, rng.randrange(MODULUS), operations)
        if bucket(question.form) in buckets:
            return question


def facts(rng: random.Random) -> tuple[str, list[bool]]:
    """Returns single steps on random states, `;3;#3+4=7;8;#1-2=6;...`, and a mask of their results.

    Pre-training scores the results. A graph has no steps apart from its arrows.
    """
    text = ";"
    mask = [False]
    domain = rng.choice("AL")
    for _ in range(rng.randint(4, 10)):
        question = Question(domain, 0, (draw_operation(rng),))
        state = rng.randrange(MODULUS)
        text += f"{STATES[domain][state]};#{rng.randint(1, MAX_DEPTH)}{question.step(1, state)[2:]}"
        mask += [False] * 7 + [True, False]
    return text, mask


def text_prompt(question: Question, rng: random.Random, task: str = "solve") -> str:
    """Returns the question in words amid fillers; the number of words does not tell the depth."""
    words = question.words
    length = rng.randint(2 * MAX_DEPTH + 3, 2 * MAX_DEPTH + 9)
    fillers = [rng.choice(FILLERS) for _ in range(length - len(words))]
    before = rng.randint(0, len(fillers))
    return " ".join([TASKS[task], *fillers[:before], *words, *fillers[before:]])


def image_prompt(rng: random.Random, task: str = "solve") -> str:
    """Returns what is asked where the question is not in words: the task and up to 6 fillers."""
    return " ".join([TASKS[task], *(rng.choice(FILLERS) for _ in range(rng.randint(0, 6)))])


def glyph_mask(symbol: str, size: tuple[int, int]) -> np.ndarray:
    """Returns a symbol's bitmap, scaled by repeating pixels: bool [height, width]."""
    width, height = size
    rows = bytes.fromhex(GLYPHS[symbol])
    bits = [[row >> (4 - column) & 1 for column in range(5)] for row in rows]
    bitmap = np.array(bits, dtype=bool)
    return bitmap[np.arange(height) * 7 // height][:, np.arange(width) * 5 // width]


MASKS = {(symbol, size): glyph_mask(symbol, size) for symbol in GLYPHS for size in GLYPH_SIZES}


def draw_image(
    question: Question | Walk, rng: random.Random, specks: float = SPECKS
) -> tuple[Image.Image, list[str]]:
    """Returns a palette image of 28 x 448 pixels, and the symbol in each of its 16 cells.

    An empty cell has "". `specks` is the share of pixels that are noise.
    """
    # numpy's legacy generator: its stream is frozen for good.
    noise = np.random.RandomState(rng.getrandbits(32))
    size = rng.choice(GLYPH_SIZES)
    # 1. The symbols stand side by side, somewhere in the strip.
    empty = CELLS - len(question.form)
    offset = rng.randint(0, empty)
    cells = [""] * offset + list(question.form) + [""] * (empty - offset)
    pixels = np.zeros((CELL, CELL * CELLS), dtype=np.uint8)
    for i, symbol in enumerate(cells):
        if symbol:
            x = i * CELL + (CELL - size[0]) // 2 + rng.randint(-MAX_JITTER, MAX_JITTER)
            y = (CELL - size[1]) // 2 + rng.randint(-MAX_JITTER, MAX_JITTER)
            pixels[y : y + size[1], x : x + size[0]] = MASKS[symbol, size]
    # 2. Noise: pixels of any of the four colours.
    where = noise.random_sample(pixels.shape) < specks
    pixels[where] = noise.randint(0, 4, int(where.sum()))
    image = Image.frombytes("P", (CELL * CELLS, CELL), pixels.tobytes())
    # 3. A light paper, a dark ink and two more colours: few, so that the PNG is small.
    paper = [rng.randint(190, 255) for _ in range(3)]
    ink = [rng.randint(0, 90) for _ in range(3)]
    image.putpalette(paper + ink + [rng.randint(0, 255) for _ in range(6)])
    return image, cells


def draw_tests(rng: random.Random, domain: str) -> list[Question | Walk]:
    """Returns TEST_COUNT different questions, of each depth in turn."""
    questions: dict[str, Question | Walk] = {}
    depths = [depth for depth in TEST_DEPTHS if depth <= max_depth(domain)]
    while len(questions) < TEST_COUNT:
        question = draw_question(rng, domain, depths[len(questions) % len(depths)], TEST_BUCKETS)
        questions.setdefault(question.form, question)
    return list(questions.values())


def record(name: str, i: int, question: Question | Walk, prompt: str, answer: str, **more) -> dict:
    """Returns a question in the plain schema of data/schemas.py, with two fields of our own."""
    return {
        "id": f"{name}-{i}",
        "question": prompt,
        "answer": answer,
        **more,
        "domain": question.domain,
        "depth": question.depth,
        "form": question.form,
    }


# Deep questions are rare in SFT: enough for RL to find them, and for it to have to.
SFT_DEPTHS = (2, 3, 4) * 25 + (5, 6)
RL_DEPTHS = range(2, 7)
TEST_DEPTHS = range(2, 7)
GRAPH_DEPTHS = range(2, MAX_HOPS + 1)
SFT_COUNT = 2560  # 40 batches of 64
RL_COUNT = 1600  # 100 rollouts of 16
TEST_COUNT = 500
TEST_SUFFIXES = {"A": "", "L": "_other", "G": "_graph"}


def make_data(seed: int) -> tuple[dict[str, list[dict]], dict[str, Image.Image]]:
    """Returns the records of every shipped file, by its name without .jsonl, and all images."""
    files = {"sft": [], "rl": [], "med": [], "test_transcription": []}
    images = {}
    # 1. Training questions; only those of SFT have a worked response.
    rng = random.Random(f"sft {seed}")
    for i in range(SFT_COUNT):
        q = draw_question(rng, "A", SFT_DEPTHS[i % len(SFT_DEPTHS)], SFT_BUCKETS)
        prompt = text_prompt(q, rng)
        files["sft"].append(record("sft", i, q, prompt, q.answer, response=q.chain()))
    rng = random.Random(f"rl {seed}")
    for i in range(RL_COUNT):
        q = draw_question(rng, "A", RL_DEPTHS[i % len(RL_DEPTHS)], RL_BUCKETS)
        files["rl"].append(record("rl", i, q, text_prompt(q, rng), q.answer))
    rng = random.Random(f"med {seed}")
    for i in range(RL_COUNT):
        q = draw_question(rng, "G", GRAPH_DEPTHS[i % len(GRAPH_DEPTHS)], RL_BUCKETS)
        files["med"].append(record("med", i, q, text_prompt(q, rng), q.answer))
    # 2. Test questions, the same as text and as image; half of the images are also to be read out.
    read = files["test_transcription"]
    rng = random.Random(f"tests {seed}")
    for domain, suffix in TEST_SUFFIXES.items():
        text = f"test_text{suffix}"
        image = f"test_image{suffix}"
        files[text] = []
        files[image] = []
        for i, q in enumerate(draw_tests(rng, domain)):
            path = f"images/{domain}{i:03}.png"
            images[path] = draw_image(q, rng)[0]
            files[text].append(record(text, i, q, text_prompt(q, rng), q.answer))
            files[image].append(record(image, i, q, image_prompt(rng), q.answer, image=path))
            if i < TEST_COUNT // 2:
                prompt = image_prompt(rng, "read")
                read.append(record("read", len(read), q, prompt, q.restated, image=path))
    return files, images


def main() -> None:
    """Writes the JSONL files and the images."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    args = parser.parse_args()
    (args.out / "images").mkdir(parents=True, exist_ok=True)
    files, images = make_data(args.seed)
    for name, image in images.items():
        image.save(args.out / name, optimize=True, bits=2)
    for name, records in files.items():
        path = args.out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
        print(f"{path}: {len(records)} records, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
