"""The micro world: questions whose answer takes k small steps, asked in words or as an image.

Three domains, each with questions of depth k, which take k steps:
    A (trained)       digits: a start and k operations, + and - modulo 10                          3+4-2  ->  5
    L (same format)   letters a to j on a clock: a start and k operations, > forward, < back       c>4<2  ->  e
    G (another kind)  a graph: a start node, a number of hops k, and six arrows (pairs of nodes)   K2KMMT...  ->  T
A text prompt spells every symbol as a word, among filler words; an image prompt shows one glyph per cell of a strip.
The chain of thought first restates the question, then takes one step at a time. A and L number the operations and the
steps, each from the state before it; G marks the pairs and counts the hops down:
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

MODULUS, MAX_OPERAND, MAX_DEPTH = 10, 5, 7
NODES, MAX_HOPS = 6, 5  # of a graph, which is one ring: after NODES hops one is back
DOMAINS = "ALG"
STATES = {"A": "0123456789", "L": "abcdefghij", "G": "KMPRTV"}
SIGNS = {"A": "+-", "L": "><"}  # the first adds, the second subtracts
NUMBER_WORDS = "zero one two three four five six seven eight nine".split()
STATE_WORDS = {"A": NUMBER_WORDS, "L": "alfa bravo charlie delta echo foxtrot golf hotel india juliett".split(),
               "G": "kilo mike papa romeo tango victor".split()}
SIGN_WORDS = {"A": ("plus", "minus"), "L": ("forward", "back")}
FILLERS = ("river stone cloud lamp window garden silver paper bottle forest candle bridge pocket mirror basket "
           "ladder pillow anchor feather hammer").split()
TASKS = {"solve": "Solve:", "direct": "Answer:", "read": "Read:", "recall": "Recall:"}

CELL, CELLS = 28, 16  # a strip is 28 x 448 pixels: one merged vision token per cell
GLYPHS = {  # 5 x 7 bitmaps, a row per hexadecimal pair (bit 4: leftmost column): no font file, the same everywhere
    "0": "0e11131519110e", "1": "040c040404040e", "2": "0e11010204081f", "3": "1f02040201110e", "4": "02060a121f0202",
    "5": "1f101e0101110e", "6": "0608101e11110e", "7": "1f010204080808", "8": "0e11110e11110e", "9": "0e11110f01020c",
    "+": "0004041f040400", "-": "0000001f000000", ">": "10080402040810", "<": "01020408040201",
    "a": "00000e010f110f", "b": "10101619111e00", "c": "00000e1010110e", "d": "01010d13110f00", "e": "00000e111f100e",
    "f": "0609081c080808", "g": "000f110f01110e", "h": "10101619111111", "i": "04000c0404040e", "j": "0200060202120c",
    "K": "11121418141211", "M": "111b1515111111", "P": "1e11111e101010", "R": "1e11111e141211", "T": "1f040404040404",
    "V": "11111111110a04",
}
GLYPH_SIZES = ((10, 14), (12, 18), (15, 21))  # width, height in pixels
MAX_JITTER, SPECKS = 3, 0.02  # pixels; the share of pixels that are noise


@dataclass(frozen=True)
class Question:
    """A start state and k operations, numbers throughout; the properties spell it in its domain's symbols."""

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
        """The form with numbered operations, 3#1+4#2-2: a transcription, and the first line of every chain."""
        numbered = (f"#{i}{SIGNS[self.domain][sign]}{n}" for i, (sign, n) in enumerate(self.operations, 1))
        return STATES[self.domain][self.start] + "".join(numbered)

    def after(self, steps: int) -> int:
        """The state after so many operations."""
        return (self.start + sum(-n if sign else n for sign, n in self.operations[:steps])) % MODULUS

    @property
    def answer(self) -> str:
        return STATES[self.domain][self.after(self.depth)]

    def step(self, i: int, state: int) -> str:
        """Operation i (from 1) done on a state, which stands before it: #1+4=7; with the semicolon."""
        sign, n = self.operations[i - 1]
        return f"#{i}{SIGNS[self.domain][sign]}{n}={STATES[self.domain][(state + (-n if sign else n)) % MODULUS]};"

    def chain(self, limit: int = MAX_DEPTH) -> str:
        """The whole response; cut after `limit` steps it answers with the state reached there."""
        steps = min(limit, self.depth)
        done = "".join(self.step(i, self.after(i - 1)) for i in range(1, steps + 1))
        start, end = (STATES[self.domain][self.after(i)] for i in (0, steps))
        return f"<think>{self.restated};{start};{done}</think><answer>{end}</answer>"

    def fragment(self, rng: random.Random, count: int = MAX_DEPTH) -> tuple[str, list[bool]]:
        """The restated question, then at most `count` of its steps, in random order on random states: which operation
        has which number. The mask has all that can be known: not the numbers and states drawn at random."""
        text, mask = self.restated + ";", [True] * (len(self.restated) + 1)
        for i in rng.sample(range(1, self.depth + 1), self.depth)[:count]:
            state = rng.randrange(MODULUS)
            text += f"{STATES[self.domain][state]};{self.step(i, state)}"
            mask += [False, True, True, False, True, True, True, True, True]
        return text, mask


@dataclass(frozen=True)
class Walk:
    """A graph of one ring of NODES nodes, a start node and a number of hops, with the same properties as a Question."""

    ring: tuple[int, ...]  # all nodes, each behind the one that points to it; the walk starts at the first
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
        return [NUMBER_WORDS[int(symbol)] if symbol.isdigit() else names[symbol] for symbol in self.form]

    @property
    def restated(self) -> str:
        return "#".join([f"{self.node(0)}{self.depth}", *self.arrows])

    @property
    def answer(self) -> str:
        return self.node(self.depth)

    def chain(self, limit: int = MAX_DEPTH) -> str:
        """The whole response; cut after `limit` hops it answers with the node reached there."""
        steps = min(limit, self.depth)
        hops = "".join(f"#{self.node(i)}{self.node(i + 1)}{self.depth - i - 1};" for i in range(steps))
        return f"<think>{self.restated};{self.depth};{hops}</think><answer>{self.node(steps)}</answer>"

    def fragment(self, rng: random.Random, count: int = NODES) -> tuple[str, list[bool]]:
        """The restated graph, then `count` single hops from random nodes with a random number of hops to go. The mask
        has all that can be known: not that node and number."""
        text, mask = self.restated + ";", [True] * (len(self.restated) + 1)
        for i in rng.sample(range(NODES), NODES)[:count]:
            left = rng.randint(1, MAX_HOPS)
            text += f"{left};#{self.node(i)}{self.node(i + 1)}{left - 1};"
            mask += [False, True, True, False, True, True, True]
        return text, mask


def bucket(form: str) -> int:
    """0 to 9, from the canonical form alone: 0 and 1 are for tests only, 2 to 5 for SFT, 6 to 9 for RL."""
    return hashlib.sha256(form.encode()).digest()[0] % 10


TEST_BUCKETS, SFT_BUCKETS, RL_BUCKETS, TRAIN_BUCKETS = range(0, 2), range(2, 6), range(6, 10), range(2, 10)


def max_depth(domain: str) -> int:
    return MAX_HOPS if domain == "G" else MAX_DEPTH


def draw_question(rng: random.Random, domain: str, depth: int, buckets: range = TRAIN_BUCKETS) -> Question | Walk:
    """A random question whose bucket is one of `buckets`; depth is at most max_depth(domain)."""
    while True:
        if domain == "G":
            question = Walk(tuple(rng.sample(range(NODES), NODES)), depth)
        else:
            operations = tuple((rng.randrange(2), rng.randint(1, MAX_OPERAND)) for _ in range(depth))
            question = Question(domain, rng.randrange(MODULUS), operations)
        if bucket(question.form) in buckets:
            return question


def facts(rng: random.Random) -> tuple[str, list[bool]]:
    """Single steps on random states, `;3;#3+4=7;8;#1-2=6;...`, and the mask of what pre-training scores: the results. A
    graph has no steps apart from its arrows."""
    text, mask = ";", [False]
    domain = rng.choice("AL")
    for _ in range(rng.randint(4, 10)):
        question = Question(domain, 0, ((rng.randrange(2), rng.randint(1, MAX_OPERAND)),))
        state = rng.randrange(MODULUS)
        text += f"{STATES[domain][state]};#{rng.randint(1, MAX_DEPTH)}{question.step(1, state)[2:]}"
        mask += [False] * 7 + [True, False]
    return text, mask


def text_prompt(question: Question, rng: random.Random, task: str = "solve") -> str:
    """The question in words amid fillers; the number of words says nothing of the depth."""
    words = question.words
    fillers = [rng.choice(FILLERS) for _ in range(rng.randint(2 * MAX_DEPTH + 3, 2 * MAX_DEPTH + 9) - len(words))]
    before = rng.randint(0, len(fillers))
    return " ".join([TASKS[task], *fillers[:before], *words, *fillers[before:]])


def image_prompt(rng: random.Random, task: str = "solve") -> str:
    """What is asked where the question is not in words: the task and up to 6 fillers."""
    return " ".join([TASKS[task], *(rng.choice(FILLERS) for _ in range(rng.randint(0, 6)))])


def glyph_mask(symbol: str, size: tuple[int, int]) -> np.ndarray:
    """bool [height, width]: the bitmap, scaled by repeating pixels."""
    width, height = size
    rows = bytes.fromhex(GLYPHS[symbol])
    bitmap = np.array([[row >> (4 - column) & 1 for column in range(5)] for row in rows], dtype=bool)
    return bitmap[np.arange(height) * 7 // height][:, np.arange(width) * 5 // width]


MASKS = {(symbol, size): glyph_mask(symbol, size) for symbol in GLYPHS for size in GLYPH_SIZES}


def draw_image(question: Question | Walk, rng: random.Random, specks: float = SPECKS) -> tuple[Image.Image, list[str]]:
    """A palette image of 28 x 448 pixels and the symbol in each of its 16 cells ("" is empty)."""
    noise = np.random.RandomState(rng.getrandbits(32))  # the legacy generator: its stream is frozen for good
    size = rng.choice(GLYPH_SIZES)
    offset = rng.randint(0, CELLS - len(question.form))
    cells = [""] * offset + list(question.form) + [""] * (CELLS - offset - len(question.form))
    pixels = np.zeros((CELL, CELL * CELLS), dtype=np.uint8)
    for i, symbol in enumerate(cells):
        if symbol:
            x = i * CELL + (CELL - size[0]) // 2 + rng.randint(-MAX_JITTER, MAX_JITTER)
            y = (CELL - size[1]) // 2 + rng.randint(-MAX_JITTER, MAX_JITTER)
            pixels[y:y + size[1], x:x + size[0]] = MASKS[symbol, size]
    where = noise.random_sample(pixels.shape) < specks
    pixels[where] = noise.randint(0, 4, int(where.sum()))
    image = Image.frombytes("P", (CELL * CELLS, CELL), pixels.tobytes())
    # four colours: small as PNG
    paper, ink = [rng.randint(190, 255) for _ in range(3)], [rng.randint(0, 90) for _ in range(3)]
    image.putpalette(paper + ink + [rng.randint(0, 255) for _ in range(6)])
    return image, cells


def draw_tests(rng: random.Random, domain: str) -> list[Question | Walk]:
    """TEST_COUNT questions, each depth in turn, no form twice."""
    questions: dict[str, Question | Walk] = {}
    depths = [depth for depth in TEST_DEPTHS if depth <= max_depth(domain)]
    while len(questions) < TEST_COUNT:
        question = draw_question(rng, domain, depths[len(questions) % len(depths)], TEST_BUCKETS)
        questions.setdefault(question.form, question)
    return list(questions.values())


def record(name: str, i: int, question: Question | Walk, prompt: str, answer: str, **more) -> dict:
    return {"id": f"{name}-{i}", "question": prompt, "answer": answer, **more,
            "domain": question.domain, "depth": question.depth, "form": question.form}


SFT_DEPTHS = (2, 3, 4) * 25 + (5, 6)  # deep questions are rare: enough for RL to find them, and for it to have to
RL_DEPTHS, TEST_DEPTHS, GRAPH_DEPTHS = range(2, 7), range(2, 7), range(2, MAX_HOPS + 1)
SFT_COUNT, RL_COUNT, TEST_COUNT = 2560, 1600, 500  # 40 batches of 64; 100 rollouts of 16; all depths equally often
TEST_SUFFIXES = {"A": "", "L": "_other", "G": "_graph"}


def make_data(seed: int) -> tuple[dict[str, list[dict]], dict[str, Image.Image]]:
    """The records of every shipped file, by its name without .jsonl, and the images by file name."""
    files, images = {"sft": [], "rl": [], "med": [], "test_transcription": []}, {}
    rng = random.Random(f"sft {seed}")
    for i in range(SFT_COUNT):
        q = draw_question(rng, "A", SFT_DEPTHS[i % len(SFT_DEPTHS)], SFT_BUCKETS)
        files["sft"].append(record("sft", i, q, text_prompt(q, rng), q.answer, response=q.chain()))
    rng = random.Random(f"rl {seed}")
    for i in range(RL_COUNT):
        q = draw_question(rng, "A", RL_DEPTHS[i % len(RL_DEPTHS)], RL_BUCKETS)
        files["rl"].append(record("rl", i, q, text_prompt(q, rng), q.answer))
    rng = random.Random(f"med {seed}")
    for i in range(RL_COUNT):
        q = draw_question(rng, "G", GRAPH_DEPTHS[i % len(GRAPH_DEPTHS)], RL_BUCKETS)
        files["med"].append(record("med", i, q, text_prompt(q, rng), q.answer))
    rng = random.Random(f"tests {seed}")
    for domain, suffix in TEST_SUFFIXES.items():
        text, image = f"test_text{suffix}", f"test_image{suffix}"
        files[text], files[image] = [], []
        for i, q in enumerate(draw_tests(rng, domain)):  # the same as text and image, and half to read
            path = f"images/{domain}{i:03}.png"
            images[path] = draw_image(q, rng)[0]
            files[text].append(record(text, i, q, text_prompt(q, rng), q.answer))
            files[image].append(record(image, i, q, image_prompt(rng), q.answer, image=path))
            if i < TEST_COUNT // 2:
                read = files["test_transcription"]
                read.append(record("read", len(read), q, image_prompt(rng, "read"), q.restated, image=path))
    return files, images


def main() -> None:
    """Writes the JSONL files and the images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
