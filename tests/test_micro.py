"""The micro world: right answers, no leakage, the same bits from a seed, tokenizer, base."""

import json
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from data import ImageConfig, Tokenizer, load_image, preprocess_image, read_examples, render_chat
from hub.config import Config
from micro import conversations, pretrain, world
from micro.folder import make_config
from micro.tokenizer import write_tokenizer
from model import Qwen2_5_VL
from rewards import accuracy_reward

MICRO = Path(__file__).resolve().parents[1] / "micro"
DATA, BASE = MICRO / "data", MICRO / "base"
TESTS = [
    f"test_{modality}{suffix}"
    for suffix in ("", "_other", "_graph")
    for modality in ("text", "image")
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.from_pretrained(folder)


def records(name: str) -> list[dict]:
    return [
        json.loads(line)
        for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def solve(form: str) -> str:
    """An evaluation that shares nothing with world.py: 3+4-2 -> 5, c>4<2 -> e."""
    state, operations = form[0], re.findall(r"([-+<>])(\d)", form[1:])
    value = int(state) if state.isdigit() else ord(state) - ord("a")
    for sign, operand in operations:
        value += int(operand) if sign in "+>" else -int(operand)
    return str(value % 10) if state.isdigit() else chr(ord("a") + value % 10)


def walk(form: str) -> str:
    """The same for a graph: K2KMMT... -> T."""
    arrows = dict(re.findall("(.)(.)", form[2:]))
    node = form[0]
    for _ in range(int(form[1])):
        node = arrows[node]
    return node


def form_of(prompt: str) -> str:
    """The question that a text prompt spells, read with a table of its own."""
    digits = dict(zip("zero one two three four five six seven eight nine".split(), "0123456789"))
    letters = dict(
        zip("alfa bravo charlie delta echo foxtrot golf hotel india juliett".split(), "abcdefghij")
    )
    signs = {"plus": "+", "minus": "-", "forward": ">", "back": "<"}
    nodes = {word: word[0].upper() for word in "kilo mike papa romeo tango victor".split()}
    table = digits | letters | signs | nodes
    return "".join(table[word] for word in prompt.split() if word in table)


def questions(count: int) -> list[world.Question]:
    rng = random.Random(1)
    return [world.draw_question(rng, "AL"[i % 2], 1 + i % world.MAX_DEPTH) for i in range(count)]


def walks(count: int) -> list[world.Walk]:
    rng = random.Random(1)
    return [world.draw_question(rng, "G", 1 + i % world.MAX_HOPS) for i in range(count)]


# The generator


def test_answers_by_an_independent_evaluation():
    for question in questions(200):
        assert question.answer == solve(question.form)


def test_canonical_chain():
    question = world.Question("A", 3, ((0, 4), (1, 2)))
    assert question.form == "3+4-2" and question.depth == 2
    assert question.chain() == "<think>3#1+4#2-2;3;#1+4=7;#2-2=5;</think><answer>5</answer>"
    assert question.chain(1) == "<think>3#1+4#2-2;3;#1+4=7;</think><answer>7</answer>"
    letters = world.Question("L", 2, ((0, 4), (1, 2)))
    assert letters.chain() == "<think>c#1>4#2<2;c;#1>4=g;#2<2=e;</think><answer>e</answer>"


def test_every_step_of_a_chain_is_right():
    for question in questions(100):
        match = re.fullmatch(r"<think>(.*?);(.);(.*)</think><answer>.</answer>", question.chain())
        restated, state, steps = match.groups()
        assert re.sub(r"#\d", "", restated) == question.form
        assert state == question.form[0] and len(steps) == 7 * question.depth
        for i, (label, operation, after) in enumerate(
            re.findall(r"#(\d)([-+<>]\d)=(.);", steps), 1
        ):
            assert label == str(i) and after == solve(state + operation)
            assert f"#{i}{operation}" in restated
            state = after
        assert (
            state == question.answer and accuracy_reward(question.chain(), question.answer) == 1.0
        )


def test_a_text_prompt_spells_its_question_and_hides_its_depth():
    rng = random.Random(0)
    lengths = {depth: set() for depth in (2, 7)}
    for _ in range(300):
        for depth in lengths:
            question = world.draw_question(rng, rng.choice("ALG"), depth)
            prompt = world.text_prompt(question, rng)
            assert form_of(prompt) == question.form
            lengths[depth].add(len(prompt.split()))
    assert lengths[2] == lengths[7]


def test_walks():
    """A ring of six nodes; the chain restates it and follows its arrows, each from the last end."""
    for question in walks(100):
        assert question.answer == walk(question.form) and len(question.form) == 14
        assert question.form[2::2] == "KMPRTV" and sorted(question.form[3::2]) == list("KMPRTV")
        assert walk(question.form[0] + "6" + question.form[2:]) == question.form[0]
        thought = re.fullmatch(r"<think>(.*)</think><answer>(.)</answer>", question.chain())
        restated, count, hops = thought[1].split(";", 2)
        assert restated == question.restated and restated.replace("#", "") == question.form
        node, left = question.form[:2]
        assert count == left and len(hops) == 5 * int(left)
        for source, target, rest in re.findall("#(.)(.)(.);", hops):
            assert (
                source == node and source + target in question.arrows and int(rest) == int(left) - 1
            )
            node, left = target, rest
        assert node == thought[2] == question.answer and left == "0"
    cut = world.Walk((1, 0, 2, 5, 4, 3), 4).chain(2)
    assert cut == "<think>M4#KP#MK#PV#RM#TR#VT;4;#MK3;#KP2;</think><answer>P</answer>"


def test_fragments_of_walks():
    rng = random.Random(0)
    for question in walks(50):
        text, mask = question.fragment(rng)
        assert len(text) == len(mask) and text.startswith(question.restated + ";")
        hops = re.findall(r"(\d);#(.)(.)(\d);", text)
        assert sorted(source + target for _, source, target, _ in hops) == sorted(question.arrows)
        assert all(int(after) == int(before) - 1 for before, _, _, after in hops)
        known = "".join(";#" + target + after + ";" for _, _, target, after in hops)
        assert "".join(c for c, m in zip(text, mask) if m) == question.restated + ";" + known
        assert question.fragment(rng, count=1)[0].count(";") == 3


def test_fragments_and_facts():
    rng = random.Random(0)
    for question in questions(50):
        text, mask = question.fragment(rng)
        assert len(text) == len(mask) and text.startswith(question.restated + ";")
        steps = re.findall(r"(.);#(\d)([-+<>]\d)=(.);", text.split(";", 1)[1])
        assert sorted(int(step[1]) for step in steps) == list(range(1, question.depth + 1))
        assert all(after == solve(before + operation) for before, _, operation, after in steps)
        known = "".join(f";#{operation}={after};" for _, _, operation, after in steps)
        assert "".join(c for c, m in zip(text, mask) if m) == question.restated + ";" + known
        assert question.fragment(rng, count=1)[0].count("=") == 1
        text, mask = world.facts(rng)
        results = [
            solve(before + operation)
            for before, operation in re.findall(r"(.);#\d([-+<>]\d)=", text)
        ]
        assert [c for c, m in zip(text, mask) if m] == results


# Images


def test_image_is_one_strip_and_names_its_cells():
    rng = random.Random(0)
    for question in questions(20) + walks(5):
        image, cells = world.draw_image(question, rng)
        assert (
            image.size == (448, 28)
            and len(cells) == world.CELLS
            and "".join(cells) == question.form
        )
        patches, grid = preprocess_image(load_image(image))
        assert grid == (1, 2, 32) and patches.shape == (64, 1176)


def test_training_images_equal_the_shipped_files_way(tmp_path):
    """What pre-training feeds (a palette image in memory) is bit for bit what a saved PNG gives."""
    rng = random.Random(2)
    for question in questions(5):
        image, _ = world.draw_image(question, rng)
        image.save(tmp_path / "x.png", optimize=True, bits=2)
        config = ImageConfig(3136, 802816)
        assert torch.equal(
            preprocess_image(image)[0], preprocess_image(load_image(tmp_path / "x.png"), config)[0]
        )


def test_glyphs_differ():
    for size in world.GLYPH_SIZES:
        assert (
            len({world.glyph_mask(symbol, size).tobytes() for symbol in world.GLYPHS})
            == len(world.GLYPHS)
            == 30
        )


# The shipped data


def test_the_same_bits_from_the_same_seed():
    files, images = world.make_data(0)
    assert set(files) == {path.stem for path in DATA.glob("*.jsonl")}
    for name in files:
        assert files[name] == records(name), name
    assert len(images) == len(list((DATA / "images").iterdir()))
    for name, image in images.items():
        with Image.open(DATA / name) as shipped:
            assert shipped.convert("RGB").tobytes() == image.convert("RGB").tobytes(), name


def test_another_seed_gives_other_questions():
    other = world.make_data(1)[0]["test_text"]
    assert {record["form"] for record in other} != {
        record["form"] for record in records("test_text")
    }


@pytest.mark.parametrize(
    "name", ["sft", "rl", "med", "test_text", "test_text_other", "test_text_graph"]
)
def test_text_files(name):
    for record, example in zip(records(name), read_examples(DATA / f"{name}.jsonl"), strict=True):
        form, graph = record["form"], "graph" in name or name == "med"
        assert (
            form_of(record["question"]) == form
            and (walk if graph else solve)(form) == record["answer"]
        )
        assert (
            record["depth"] == (int(form[1]) if graph else len(form) // 2) == example.meta["depth"]
        )
        assert (
            record["domain"] == ("G" if graph else "L" if "other" in name else "A")
            and "image" not in record
        )
        assert ("response" in record) == (name == "sft")
        if name == "sft":
            assert accuracy_reward(record["response"], record["answer"]) == 1.0


def test_image_files():
    for name in ("test_image", "test_image_other", "test_image_graph"):
        text = records(name.replace("image", "text"))
        for record, twin in zip(records(name), text, strict=True):  # the same questions
            assert record["form"] == twin["form"] and record["answer"] == twin["answer"]
            assert form_of(record["question"]) == "" and record["question"].startswith("Solve:")
    for record in records("test_transcription"):
        numbers = "#" if record["domain"] == "G" else r"#\d"
        assert re.sub(numbers, "", record["answer"]) == record["form"] and record[
            "question"
        ].startswith("Read:")


def test_sizes_and_depths():
    for name in TESTS:
        depths = [record["depth"] for record in records(name)]
        deepest = 5 if "graph" in name else 6
        assert len(depths) >= 500 and all(
            depths.count(depth) >= 100 for depth in range(2, deepest + 1)
        )
        assert len({record["form"] for record in records(name)}) == len(depths)
    assert (
        sum(path.stat().st_size for path in MICRO.rglob("*") if "__pycache__" not in str(path))
        < 8e6 + 2.5e6
    )


def test_no_test_question_in_training():
    tests = {record["form"] for name in (*TESTS, "test_transcription") for record in records(name)}
    assert all(world.bucket(form) in world.TEST_BUCKETS for form in tests)
    for name in ("sft", "rl", "med"):
        forms = {record["form"] for record in records(name)}
        assert not forms & tests and not any(
            world.bucket(form) in world.TEST_BUCKETS for form in forms
        )
    assert not {r["form"] for r in records("sft")} & {r["form"] for r in records("rl")}


def test_no_test_question_in_pretraining(tokenizer):
    rng, forms = random.Random(0), set()
    for _ in range(300):
        ids, _, _ = conversations.make_row(rng, tokenizer, conversations.Mix(0.5, (0.1, 0.1)))
        text = tokenizer.decode(ids)
        restated = re.search(
            r"(?:<think>|<answer>)(.#1[^;<]*(?:<\d[^;<]*)*|[A-Z]\d#[^;<]*)(?:;|</)", text
        )
        spelt = form_of(text.split("user\n")[1].split("assistant\n")[0])
        forms |= {spelt, re.sub(r"#\d|#", "", restated[1]) if restated else ""}
    forms -= {""}
    assert len(forms) > 100
    assert not [form for form in forms if world.bucket(form) in world.TEST_BUCKETS]


# The tokenizer


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "a b  c\n\t\r\n",
        "e\u0301\u00e9 漢字 🙂🏽",
        "\x00\x7f",
        "</think><answer>5</answer>",
        "Solve: river ten",
        "<|im_end|> <|image_pad|>",
        "ĠĊ ﬁ 𝔘",
        "".join(map(chr, range(0x2000, 0x2100))),
    ],
)
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_round_trip_of_random_unicode(tokenizer):
    rng = random.Random(0)
    for _ in range(200):
        codes = [
            rng.randrange(rng.choice([0x80, 0x800, 0xD800, 0x110000]))
            for _ in range(rng.randrange(30))
        ]
        text = "".join(chr(c) for c in codes if not 0xD800 <= c < 0xE000)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_chain_is_single_characters_and_tags(tokenizer):
    for question in questions(50) + walks(20):
        tokens = [tokenizer.decode([i]) for i in tokenizer.encode(question.chain())]
        inner = question.chain()[len("<think>") :].split("</think>")[0]
        closing = ["</", "think", ">", "<", "answer", ">", question.answer, "</", "answer", ">"]
        assert tokens == ["<", "think", ">", *inner, *closing]


def test_words_and_chains_share_no_token(tokenizer):
    rng = random.Random(0)
    words, chains = set(), set()
    for question in questions(300) + walks(100):
        words |= {
            *tokenizer.encode(world.text_prompt(question, rng)),
            *tokenizer.encode(world.image_prompt(rng)),
        }
        chains |= set(tokenizer.encode(question.chain()))
    assert not words & chains
    prompt = world.text_prompt(questions(7)[6], rng)
    assert (
        len(tokenizer.encode(prompt)) == len(prompt.split()) + 1
    )  # one token a word, and the task's colon


def test_the_template_is_few_tokens(tokenizer):
    messages = [
        {"role": "user", "content": "Solve: river"},
        {"role": "assistant", "content": "<answer>5</answer>"},
    ]
    ids, mask = render_chat(messages, tokenizer)
    assert len(ids) == 31 and sum(mask) == 8


# The base


def test_config(tokenizer):
    raw = make_config(tokenizer)
    with torch.device("meta"):
        model = Qwen2_5_VL(Config.from_dict(raw))
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 3e6
    assert (
        raw["vocab_size"] % 64 == 0 and raw["vocab_size"] >= tokenizer.vocab_size + 64
    )  # padding rows, as in Qwen
    assert raw["model_type"] == "qwen2_5_vl" and raw["vision_config"]["window_size"] == 112


def test_loss_is_on_what_can_be_known(tokenizer):
    rng = random.Random(3)
    for _ in range(100):
        ids, mask, patches = conversations.make_row(rng, tokenizer, conversations.Mix(0.5))
        assert (
            len(ids) == len(mask)
            and any(mask)
            and (patches is not None) == (tokenizer.image_pad in ids)
        )
        assert not any(mask[: ids.index(tokenizer.encode("assistant")[0], 12)])  # the prompt
        text = tokenizer.decode(ids)
        kept = tokenizer.decode([i for i, m in zip(ids, mask) if m], skip_special=False)
        assert (
            "Recall:" in text
            and re.fullmatch(r"[0-9a-j]+", kept)
            or "Recall:" not in text
            and len(kept) > 1
        )


def test_pretraining_runs_end_to_end(tmp_path, monkeypatch, capsys):
    for name, value in {
        "ALIGN_STEPS": 2,
        "TEXT_STEPS": 1,
        "MIXED_STEPS": 1,
        "FINAL_STEPS": 1,
        "BATCH": 12,
        "ALIGN_IMAGES": 2,
        "PROBES": 2,
    }.items():
        monkeypatch.setattr(pretrain, name, value)
    monkeypatch.setattr(pretrain, "PROBE_DEPTHS", range(2, 3))
    for folder in ("a", "b"):
        arguments = [
            "pretrain.py",
            "--seed",
            "3",
            "--out",
            str(tmp_path / folder),
            "--processes",
            "1",
        ]
        monkeypatch.setattr(sys, "argv", arguments)
        pretrain.main()
        assert (
            folder == "b"
            or "transcription   single steps            k=2" in capsys.readouterr().out
        )
        monkeypatch.setattr(pretrain, "report", lambda *_: {"nothing": {"measured": 0.0}})
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert set(files) == {path.name for path in BASE.iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    Qwen2_5_VL.from_pretrained(tmp_path / "a")


def test_several_bases_share_all_but_the_final_stage(tmp_path, monkeypatch):
    """A base does not depend on which others are built beside it."""
    for name, value in {
        "ALIGN_STEPS": 2,
        "TEXT_STEPS": 1,
        "MIXED_STEPS": 1,
        "FINAL_STEPS": 2,
        "BATCH": 12,
        "ALIGN_IMAGES": 2,
    }.items():
        monkeypatch.setattr(pretrain, name, value)
    monkeypatch.setattr(pretrain, "COMPLETE_SHARES", {"none": (0.0, 0.0), "both": (1.0, 1.0)})
    monkeypatch.setattr(pretrain, "report", lambda *_: {"nothing": {"measured": 0.0}})
    for folder, chains in (("several", ["none", "both"]), ("one", ["both"])):
        arguments = ["--chains", *chains, "--out", str(tmp_path / folder), "--processes", "1"]
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *arguments])
        pretrain.main()
    folders = ("several/none", "several/both", "one")
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in folders]
    assert weights[1] == weights[2] != weights[0]


def test_shipped_base(tokenizer, tmp_path):
    """It loads, is what the scripts write, and reads an image."""
    model = Qwen2_5_VL.from_pretrained(BASE)
    write_tokenizer(tmp_path)
    assert (BASE / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    assert json.loads((BASE / "config.json").read_text()) == make_config(tokenizer)
    assert ImageConfig.from_pretrained(BASE) == ImageConfig(3136, 802816)
    assert (BASE / "model.safetensors").stat().st_size < 8e6
    examples = list(read_examples(DATA / "test_transcription.jsonl"))[::30]
    assert {example.domain for example in examples} == set("ALG")
    read = pretrain.answer(
        model, tokenizer, [(e.question, load_image(e.images[0])) for e in examples]
    )
    assert sum(
        text == f"<answer>{e.answer}</answer>" for text, e in zip(read, examples)
    ) >= 0.9 * len(examples)
