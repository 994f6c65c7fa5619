"""X-Reasoner-Med on the micro world: both stages again, on text of another domain (section 5).

    python micro/med.py [--seed 0] [--model runs/reproduce/grpo/model]       # or: make med SEED=0

The paper goes on from X-Reasoner on MedQA: SFT on chains that QwQ-32B wrote, of which those with a
right answer were kept, then GRPO on the same questions. Here the general domain is A, on which
`make reproduce` trained, and the medical one is G, a domain of another kind: hops in a graph. Its
questions, micro/data/med.jsonl, have answers but no chains.

The teacher is a model of our own, as big as the student: the micro base after a few steps of SFT on
chains of G that world.py writes out, of other questions than those of med.jsonl and of the tests.
It is not always right, so its answers are sampled and judged as QwQ's were.

Runs the very commands that a user would (they are printed), evaluates before and after greedily on
text and images of all three domains, prints the tables and what they say of the claims, and writes
the figures to table.json.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hub.errors import InputError
from hub.options import MICRO_BASE, MICRO_DATA, run_command
from micro.reproduce import Table, measure, percent, print_claims, print_table, run, write_table
from micro.world import GRAPH_DEPTHS, SFT_BUCKETS, draw_question, record, text_prompt

TEACHER_COUNT, TEACHER_STEPS = 1280, 20  # worked questions that the teacher sees, one time each
BEFORE, AFTER = "X-Reasoner", "+ Med SFT + Med GRPO"
SETTINGS = {
    "general text": "A text",
    "general images": "A image",
    "med text": "G text",
    "med images": "G image",
}
BOUNDS = {  # what is claimed, in percentage points: changes of at least so much
    "change on med text": 40,
    "change on med images": 40,
    "change on general text": -3,
    "change on general images": -3,
}


def write_lessons(path: Path, seed: int) -> None:
    """Writes worked questions for the teacher, all depths equally often."""
    rng = random.Random(f"teacher {seed}")
    with path.open("w") as file:
        for i in range(TEACHER_COUNT):
            q = draw_question(rng, "G", GRAPH_DEPTHS[i % len(GRAPH_DEPTHS)], SFT_BUCKETS)
            prompt = text_prompt(q, rng)
            lesson = record("teacher", i, q, prompt, q.answer, response=q.chain())
            file.write(json.dumps(lesson) + "\n")


def train(model: Path, out: Path, seed: int) -> dict[str, Path]:
    """Trains the teacher, distils, and runs the two stages.

    Returns the model folders by their names in the table, in its order.
    """
    out.mkdir(parents=True, exist_ok=True)
    questions = MICRO_DATA / "med.jsonl"
    # 1. The teacher learns from worked questions.
    write_lessons(out / "teacher.jsonl", seed)
    run(
        "sft.py",
        model=MICRO_BASE,
        data=out / "teacher.jsonl",
        out=out / "teacher",
        max_steps=TEACHER_STEPS,
        seed=seed,
        overwrite=True,
    )
    # 2. It answers the questions without chains; what is right becomes SFT data.
    run(
        "tools/distill.py",
        model=out / "teacher/model",
        data=questions,
        n=4,
        temperature=1,
        max_new_tokens=160,
        seed=seed,
        out=out / "distilled.jsonl",
        overwrite=True,
    )
    # 3. The student's two stages.
    run(
        "sft.py",
        model=model,
        data=out / "distilled.jsonl",
        out=out / "sft",
        max_steps=20,
        learning_rate=1e-4,
        seed=seed,
        overwrite=True,
    )
    run(
        "grpo.py",
        model=out / "sft/model",
        data=questions,
        out=out / "grpo",
        max_steps=50,
        seed=seed,
        overwrite=True,
    )
    return {
        BEFORE: model,
        "+ Med SFT": out / "sft/model",
        AFTER: out / "grpo/model",
        "the teacher": out / "teacher/model",
    }


def claims(table: Table) -> dict[str, float]:
    """Returns by how many percentage points each setting has changed, over all depths."""
    changes = {}
    for setting, column in SETTINGS.items():
        before = table[BEFORE][column]["accuracy"]
        after = table[AFTER][column]["accuracy"]
        changes[f"change on {setting}"] = 100 * (after - before)
    return changes


def print_settings(table: Table) -> None:
    """Prints the four settings alone: general and medical, text and images."""
    print(f"\n{'':<26}" + "".join(f"{setting:>20}" for setting in SETTINGS))
    for name, row in table.items():
        cells = [percent(row[column]) for column in SETTINGS.values()]
        print(f"{name:<26}" + "".join(f"{cell:>20}" for cell in cells))
    print("accuracy in % +- standard error; greedy decoding; general is A, med is G")
    print("\nall domains, and by depth:")


def main(argv: list[str]) -> None:
    """Trains, evaluates and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--model", type=Path, default=Path("runs/reproduce/grpo/model"), help="the X-Reasoner"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/med"))
    arguments = parser.parse_args(argv)
    if not arguments.model.is_dir():
        raise InputError(f"{arguments.model}: no such folder; `make reproduce` makes it")
    started = time.perf_counter()
    models = train(arguments.model, arguments.out, arguments.seed)
    table = {name: measure(folder) for name, folder in models.items()}
    print_settings(table)
    print_table(table)
    print_claims(claims(table), BOUNDS)
    write_table(table, arguments.out, started, arguments.seed)


if __name__ == "__main__":
    run_command(main)
