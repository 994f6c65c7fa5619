"""The micro study: what its figures are made of, and the interventions of why.py."""

import json
import random
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import evaluate
import grpo
import sft
from data import InputError, Tokenizer
from hub.options import MICRO_BASE
from micro import compact, conversations, med, pretrain, reproduce, study, why, world
from model import Qwen2_5_VL
from sample import Sampler
from tools import distill
from training.optimizer import make_optimizer, optimizer_step


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler(Qwen2_5_VL.from_pretrained(MICRO_BASE), Tokenizer.from_pretrained(MICRO_BASE))


def row(**by_depth: list[float]) -> reproduce.Row:
    """A table's row: A_text=[accuracy at k = 2, 3, ...]."""
    return {
        column.replace("_", " "): {"by_depth": {str(k): v for k, v in enumerate(values, 2)}}
        for column, values in by_depth.items()
    }


def table() -> reproduce.Table:
    others = {
        column.replace(" ", "_"): [1.0, 0.5, 0.5, 0.5, 0.5]
        for column in reproduce.COLUMNS
        if column[0] in "LG"
    }
    base = row(A_text=[1.0, 0.1, 0.1, 0.1, 0.1], A_image=[1.0, 0.0, 0.1, 0.1, 0.1], **others)
    sft = row(A_text=[1.0, 1.0, 1.0, 0.5, 0.3], A_image=[0.9, 1.0, 1.0, 0.4, 0.2], **others)
    final = row(A_text=[1.0, 1.0, 1.0, 1.0, 0.8], A_image=[0.98, 1.0, 1.0, 0.7, 0.5], **others)
    return {"base": base, "SFT": sft, "SFT + GRPO": final}


# The figures


def test_pooled_leaves_out_what_the_base_can_do():
    assert reproduce.pooled(row(x=[1.0, 0.2, 0.4, 0.6, 0.8]), "x") == pytest.approx(0.5)
    assert reproduce.pooled(row(x=[1.0, 0.2, 0.4, 0.6, 0.8]), "x", (5, 6)) == pytest.approx(0.7)


def test_claims():
    figures = reproduce.claims(table())
    assert figures["gain on A image, k > 2"] == pytest.approx(
        70
    )  # over chance at k = 3, where the base is below it
    assert figures["gain on A text, k > 2"] == pytest.approx(85)
    assert figures["gain on L image, k > 2"] == 0
    assert figures["worst change at any depth, A image"] == pytest.approx(-2)
    assert figures["GRPO over SFT on A image, k = 5, 6"] == pytest.approx(30)
    assert figures["A image gain in % of A text gain"] == pytest.approx(100 * 70 / 85)


def test_bounds_are_checked(capsys):
    figures = reproduce.claims(table())
    reproduce.print_claims(figures)
    assert capsys.readouterr().out.count("; holds") == len(reproduce.BOUNDS) == 3
    reproduce.print_claims(figures | {"worst change at any depth, A image": -3.5})
    assert "-3.5   claimed: at least -3; DOES NOT HOLD" in capsys.readouterr().out


def test_summary_shows_every_seed(capsys):
    tables = {name: table() for name in study.BASES}
    for t in tables.values():
        for figures in t.values():
            figures["reading"] = {"by_depth": {"2": 1.0, "3": 1.0}}
    study.print_summary([{"seed": 3, "tables": tables}, {"seed": 4, "tables": tables}])
    out = capsys.readouterr().out
    assert "seeds 3 4" in out and re.search(
        r"gain on A image, k > 2 +70\.0 \+- 0\.0  \(70\.0 70\.0\)", out
    )
    assert out.count("Base whose own training") == 3


def test_control_runs_are_those_of_their_names(tmp_path, monkeypatch):
    """Answer-only, GRPO from the base itself, and SFT for as many steps as both stages took."""
    ran = []
    monkeypatch.setattr(reproduce, "run", lambda script, **options: ran.append((script, options)))
    for folder, steps in (("sft", 7), ("grpo", 5)):
        (tmp_path / folder).mkdir()
        lines = [json.dumps({"step": step + 1}) + "\n" for step in range(steps)]
        (tmp_path / folder / "metrics.jsonl").write_text("".join(lines))
    models = reproduce.train_controls(MICRO_BASE, tmp_path, 3)
    assert (
        list(models) == list(reproduce.CONTROLS)
        and models["SFT + GRPO, image masked"] == tmp_path / "grpo/model"
    )
    (_, answer_only), (script, alone), (_, long) = ran
    assert (
        answer_only["answer_only"]
        and script == "grpo.py"
        and alone["model"] == long["model"] == MICRO_BASE
    )
    assert (
        long["max_steps"] == 12
        and "answer_only" not in long
        and all(options["seed"] == 3 for _, options in ran)
    )


# Single steps, and counterfactual restatements


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_counterfactual_fragments(sampler, monkeypatch, share):
    """The restatement is another question's and not scored; the steps follow it and are scored."""
    monkeypatch.setattr(conversations, "KINDS", {"fragment": 1.0})
    monkeypatch.setattr(conversations, "DOMAIN_SHARES", {"A": 0.5, "L": 0.5})
    tokenizer, rng, others = sampler.tokenizer, random.Random(0), 0
    names = dict(zip("+-><", "plus minus forward back".split()))
    for _ in range(50):
        ids, mask, _ = conversations.make_row(
            rng, tokenizer, conversations.Mix(counterfactual=share)
        )
        prompt, response = tokenizer.decode(ids).split("assistant\n")
        restated, steps = re.fullmatch("<think>(.*?);(.*)\n", response).groups()
        kept = tokenizer.decode([i for i, m in zip(ids, mask) if m])
        found = re.findall(r".;#(\d)([-+<>]\d=.;)", steps)
        assert all(f"#{label}{step[:2]}" in restated for label, step in found) and found
        assert kept == ("" if share else restated) + ";" + "".join(";#" + step for _, step in found)
        spelt = [
            f"{names[sign]} {world.NUMBER_WORDS[int(n)]}"
            for sign, n in re.findall(r"([-+<>])(\d)", restated)
        ]
        others += " ".join(spelt) not in prompt
    assert others > 40 if share else others == 0


def test_knows_step_depends_on_the_restatement_only_by_its_steps(sampler, monkeypatch):
    """Who names the right id everywhere knows the step; one that errs at its end does not."""
    rng = random.Random(1)
    for domain, depth in (("A", 3), ("G", 4)):
        question = world.draw_question(rng, domain, depth)
        for wrong in (False, True):
            seen = {}

            def oracle(ids, **_):
                seen["ids"] = ids
                return torch.zeros(*ids.shape, 1)

            def logits(hidden):
                following = torch.cat([seen["ids"][0, 1:], torch.tensor([0])])
                if wrong:  # all digits and letters behind the restatement's end
                    following[-8:] = 0
                return torch.nn.functional.one_hot(following, 1000).float()

            model = type(
                "Oracle", (), {"__call__": staticmethod(oracle), "logits": staticmethod(logits)}
            )()
            prompt = world.text_prompt(question, rng)
            assert (
                pretrain.knows_step(model, sampler.tokenizer, question, prompt, None, rng)
                is not wrong
            )


# Interventions


@pytest.mark.parametrize("modality", why.MODALITIES)
def test_its_own_restatement_changes_nothing(sampler, modality):
    """Put back in its mouth, the answers are those that the model gives by itself."""
    rng = random.Random(3)
    questions = why.draw_questions(rng, 6)
    prompts = [why.ask(question, modality, sampler.tokenizer, rng) for question in questions]
    texts = why.respond(sampler, prompts)
    assert [re.match("<think>(.*?);", text)[1] for text in texts] == [
        question.restated for question in questions
    ]
    assert why.respond_after(sampler, prompts, questions) == texts


def test_altered_questions_have_other_answers():
    rng = random.Random(0)
    for question in why.draw_questions(rng, 50):
        other = why.alter(question, rng)
        assert other.answer != question.answer and other.depth == question.depth
        assert sum(a != b for a, b in zip(other.form, question.form, strict=True)) == 1
        other = why.draw_other(question, rng)
        assert other.form != question.form and other.depth == question.depth
        assert world.bucket(other.form) in world.TEST_BUCKETS


def test_sources():
    told, asked = world.Question("A", 3, ((0, 4), (1, 2))), world.Question("A", 3, ((0, 4), (1, 1)))
    faithful = "<think>3#1+4#2-2;3;#1+4=7;#2-2=5;</think><answer>5</answer>"
    assert why.sources(faithful, told, asked) == {
        "operations": [(True, False)],
        "start": [],
        "answer": [(True, False)],
    }
    unfaithful = "<think>3#1+4#2-2;3;#1+4=7;#2-1=6;</think><answer>6</answer>"
    assert why.sources(unfaithful, told, asked) == {
        "operations": [(False, True)],
        "start": [],
        "answer": [(False, True)],
    }
    other = world.Question("A", 8, ((0, 4), (1, 2)))
    mixed = "<think>8#1+4#2-2;3;#1+4=7;#2-2=5;</think><answer>5</answer>"
    assert why.sources(mixed, other, asked) == {
        "operations": [(True, False)],
        "start": [(False, True)],
        "answer": [(False, False)],
    }
    assert why.sources("no thought", told, asked) == {
        "operations": [],
        "start": [],
        "answer": [(False, False)],
    }


def test_noise_is_only_noise():
    question = world.draw_question(random.Random(0), "A", 3)
    clean, noisy = (
        world.draw_image(question, random.Random(1), specks=specks) for specks in (0.0, 0.4)
    )
    assert clean[1] == noisy[1] and clean[0].size == noisy[0].size
    changed = sum(a != b for a, b in zip(clean[0].tobytes(), noisy[0].tobytes()))
    assert (
        0.2 < changed / len(clean[0].tobytes()) < 0.4
    )  # a speck may have the colour that was there


def test_why_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(why, "COUNT", 4)
    monkeypatch.setattr(why, "NOISE", (0.02, 0.4))
    for stage in ("sft", "grpo"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "model").symlink_to(MICRO_BASE)
    monkeypatch.setattr(
        sys, "argv", ["why.py", "--run", str(tmp_path), "--out", str(tmp_path / "why.json")]
    )
    threads = torch.get_num_threads()
    why.main()
    torch.set_num_threads(threads)
    found = json.loads((tmp_path / "why.json").read_text())
    assert list(found) == ["base", "SFT", "SFT + GRPO"] and found["base"] == found["SFT"]
    assert (
        all(0 <= value <= 1 for value in found["base"]["image"].values())
        and len(found["base"]["noise"]) == 2
    )
    assert "operations of the thought" in capsys.readouterr().out


# The second domain


def test_the_teacher_learns_from_other_questions_than_it_is_asked(tmp_path):
    med.write_lessons(tmp_path / "a", 0)
    med.write_lessons(tmp_path / "b", 1)
    lessons = [json.loads(line) for line in (tmp_path / "a").read_text().splitlines()]
    asked = [
        json.loads(line)
        for name in ("med", "test_text_graph")
        for line in (reproduce.MICRO_DATA / f"{name}.jsonl").read_text().splitlines()
    ]
    assert (
        len(lessons) == med.TEACHER_COUNT
        and (tmp_path / "a").read_text() != (tmp_path / "b").read_text()
    )
    assert not {r["form"] for r in lessons} & {r["form"] for r in asked} and {
        r["domain"] for r in asked
    } == {"G"}
    assert all(r["response"].endswith(f"<answer>{r['answer']}</answer>") for r in lessons)


def test_med_changes_are_over_all_depths():
    before = {
        column: {"accuracy": value}
        for column, value in zip(med.SETTINGS.values(), (1.0, 0.9, 0.2, 0.3))
    }
    after = {
        column: {"accuracy": value}
        for column, value in zip(med.SETTINGS.values(), (0.99, 0.8, 1.0, 0.6))
    }
    figures = med.claims({med.BEFORE: before, "+ Med SFT": before, med.AFTER: after})
    assert figures == pytest.approx(
        {
            "change on general text": -1,
            "change on general images": -10,
            "change on med text": 80,
            "change on med images": 30,
        }
    )


def test_med_runs_end_to_end(tmp_path, monkeypatch, capfd):
    """The very commands on a few questions; the untrained base stands for the X-Reasoner."""
    small = {
        "sft.py": {"max_steps": 1, "batch_size": 8},
        "distill.py": {"n": 1, "limit": 12},
        "grpo.py": {"max_steps": 1, "questions_per_step": 2},
    }
    mains = {"sft.py": sft.main, "distill.py": distill.main, "grpo.py": grpo.main}

    def run_small(script, **options):
        reproduce.run(script, **options | small[Path(script).name])

    def run_here(words, check):  # in this process: four starts take the longest
        mains[Path(words[1]).name](words[2:])

    def load_four(sampler, images, path, options):
        return evaluate.load_questions(sampler, images, path, replace(options, limit=4))

    monkeypatch.setattr(med, "run", run_small)
    monkeypatch.setattr(reproduce, "subprocess", SimpleNamespace(run=run_here))
    monkeypatch.setattr(reproduce, "load_questions", load_four)
    threads = torch.get_num_threads()
    med.main(["--model", str(MICRO_BASE), "--out", str(tmp_path / "med")])
    torch.set_num_threads(threads)
    printed, table = (
        capfd.readouterr().out,
        json.loads((tmp_path / "med" / "table.json").read_text()),
    )
    assert list(table) == [med.BEFORE, "+ Med SFT", med.AFTER, "the teacher"]
    assert all(list(row) == list(reproduce.COLUMNS) for row in table.values())
    assert re.search(
        "general text +general images +med text +med images\n" + f"{med.BEFORE} +[0-9.]+ ", printed
    )
    assert (
        printed.count("$ python ") == 4
        and printed.count("claimed: at least") == len(med.BOUNDS) == 4
    )
    questions = {
        r["id"]: r
        for r in map(json.loads, (reproduce.MICRO_DATA / "med.jsonl").read_text().splitlines())
    }
    distilled = [
        json.loads(line) for line in (tmp_path / "med" / "distilled.jsonl").read_text().splitlines()
    ]
    assert distilled and all(
        questions[r["id"].rpartition("-")[0]]["answer"] == r["answer"] for r in distilled
    )
    with pytest.raises(InputError, match="none: no such folder"):
        med.main(["--model", str(tmp_path / "none")])


# The compact optimiser


def test_the_summary_compares_the_optimisers_seed_by_seed(tmp_path, capsys):
    reached = {  # of seed 0 and 1, in every cell
        "float32": (0.90, 0.80),
        "compact, in float32": (0.90, 0.80),
        "compact": (0.92, 0.83),
    }
    for seed in (0, 1):
        accuracies = {}
        for name, values in reached.items():
            for stage, folder in compact.STAGES.items():
                cells = {column: {"accuracy": values[seed]} for column in compact.COLUMNS}
                accuracies[f"{stage}, {name}"] = cells
                way = compact.WAYS[name][0]
                metrics = tmp_path / str(seed) / way / folder / "metrics.jsonl"
                metrics.parent.mkdir(parents=True)
                records = [{"step": i, "loss": i + seed, "reward": i} for i in range(1, 201)]
                metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
        (tmp_path / str(seed) / "table.json").write_text(json.dumps(accuracies))
    compact.summary(tmp_path, [0, 1])
    printed = capsys.readouterr().out.splitlines()
    assert "| SFT, float32 | " + " | ".join(["85.0 +- 5.0"] * 5) + " |" in printed
    assert "| SFT + GRPO, compact | " + " | ".join(["87.5 +- 4.5"] * 5) + " |" in printed
    assert "| SFT: compact - float32 | " + " | ".join(["2.5 +- 0.5"] * 5) + " |" in printed
    assert "| compact | 6.0000 +- 0.5000 | 16.0000 +- 0.5000 | 61.0000 +- 0.5000 |" in printed
    assert "| float32 | 10.5000 +- 0.0000 | 40.5000 +- 0.0000 | 180.5000 +- 0.0000 |" in printed


def test_in_float32_the_model_is_shown_what_the_compact_optimiser_holds():
    options = sft.SFTOptions(learning_rate=0.01, seed=3)
    shown, plain = torch.nn.Linear(30, 20), torch.nn.Linear(30, 20)
    plain.load_state_dict(shown.state_dict())
    plain.to(torch.bfloat16)
    beside = compact.InFloat32(shown, options)
    alone = make_optimizer(plain, options)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for a, b in zip(shown.parameters(), plain.parameters()):
            assert torch.equal(a, b.float())
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.to(torch.bfloat16)
        norms = [
            optimizer_step(model, o, 0.01, 1.0) for model, o in ((shown, beside), (plain, alone))
        ]
        assert norms[0] == norms[1] and shown.weight.grad is None
    assert torch.equal(shown.weight, plain.weight.float())
