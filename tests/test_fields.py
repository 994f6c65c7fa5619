"""What the fields of records mean: published names and shapes, and what is refused by name."""

import json
from pathlib import Path

import pytest

from data import Example, InputError, read_examples
from data.fields import NAMES

TEXTS = ["red", "blue", "green", "black"]
COLOURS = dict(zip("ABCD", TEXTS))


def written(folder: Path, *records: object, name: str = "d.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def only(folder: Path, record: object) -> Example:
    [example] = read_examples(written(folder, record))
    return example


def complaint(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        list(read_examples(path))
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{path}: ")
    return message


CHOICES = {  # published shapes of options, all of them these four colours, "C" being right
    "MMLU": {"choices": TEXTS, "answer": 2, "subject": "optics"},
    "ARC": {"choices": {"text": TEXTS, "label": ["A", "B", "C", "D"]}, "answerKey": "C"},
    "ARC, numbered": {"choices": {"text": TEXTS, "label": ["1", "2", "3", "4"]}, "answerKey": "3"},
    "an object of its own": {
        "question": None,
        "data": {"Question": "Which?", "Options": COLOURS, "Correct Option": "C"},
    },
    "AQuA": {"options": ["A)red", "B)blue", "C)green", "D)black"], "correct": "C"},
    "AGIEval": {"options": ["(A)red", "(B)blue", "(C)green", "(D)black"], "label": "C"},
    "MathQA": {"options": "a ) red , b ) blue , c ) green , d ) black", "correct": "c"},
    "MMLU-Redux": {"choices": TEXTS, "answer": 2, "correct_answer": None},
    "A-OKVQA": {"choices": TEXTS, "correct_choice_idx": 2},
    "LogiQA": {"options": TEXTS, "correct_option": 2},
    "ReClor": {"answers": TEXTS, "label": 2},
    "HEAD-QA": {
        "answers": [{"aid": i + 1, "atext": text} for i, text in enumerate(TEXTS)],
        "ra": 3,
    },
    "SEED-Bench": {f"choice_{end}": text for end, text in zip("abcd", TEXTS)} | {"answer": "C"},
    "C-Eval": COLOURS | {"answer": "C"},
    "OmniMedVQA": {f"option_{end}": text for end, text in COLOURS.items()} | {"gt_answer": "green"},
    "Belebele": {f"mc_answer{i + 1}": text for i, text in enumerate(TEXTS)}
    | {"correct_answer_num": "3"},
    "Cosmos QA": {f"answer{i}": text for i, text in enumerate(TEXTS)} | {"label": 2},
    "MMLU-ProX": {f"option_{i}": text for i, text in enumerate(TEXTS)}
    | {"option_4": None, "answer": "C", "answer_index": 2},
    "MedXpertQA": {
        "options": [{"letter": letter, "content": text} for letter, text in COLOURS.items()],
        "label": ["C"],
    },
    "in JSON": {"options": json.dumps(COLOURS), "answer": "C"},
    "lines": {"options": "A. red\nB. blue\nC. green\nD. black", "answer": "C. green"},
    "the name of a column": {f"option{end}": text for end, text in COLOURS.items()}
    | {"answer": "optionC"},
    "small letters": {"options": {k.lower(): text for k, text in COLOURS.items()}, "answer": "c"},
    "a text and its index from 1": {"options": TEXTS, "answer": "green", "answer_idx": 3},
    "an index, twice": {"options": TEXTS, "answer": "2", "answer_index": 2},
    "a text and its index": {"options": TEXTS, "answer": "green", "answer_index": 2},
    "other case": {"options": TEXTS, "answer": "Green."},
    "all of it": {"options": COLOURS, "answer": "(C) Green"},
    "wrong ones as well": {"options": TEXTS, "answer": "green", "distractors": TEXTS[:2]},
    "in a box": {"options": TEXTS, "answer": r"\boxed{C}"},
    "TAL-SCQ5K": {
        "answer_option_list": [[{"aoVal": k, "content": f"{v}"}] for k, v in COLOURS.items()],
        "answer_value": "C",
    },
    "TruthfulQA": {"mc1_targets": {"choices": TEXTS, "labels": [0, 0, 1, 0]}},
    "a mark an option": {"options": TEXTS, "correct": [False, False, True, False]},
    "DREAM": {"choice": TEXTS, "answer": "green"},
    "numbered": {"options": dict(zip("1234", TEXTS)), "answer": "3"},
    "named": {"options": {f"choice_{k}": v for k, v in COLOURS.items()}, "answer": "choice_C"},
    "an object an option": {"options": [{k: v} for k, v in COLOURS.items()], "answer": "C"},
    "M3Exam": {"options": ["1. red", "2. blue", "3. green", "4. black"], "answer": "3"},
    "small columns": {k.lower(): v for k, v in COLOURS.items()} | {"answer": "c"},
    "small columns and a text": {k.lower(): v for k, v in COLOURS.items()} | {"answer": "green"},
    "numbered columns": dict(zip("1234", TEXTS)) | {"answer": "3"},
    "one line": {"options": "A. red B. blue C. green D. black", "answer": "C"},
    "CMExam": {"options": "A red\nB blue\nC green\nD black", "answer": "C"},
    "Chinese": {"options": ["A、red", "B、blue", "C、green", "D、black"], "answer": "C"},
    "in another order": {"options": ["C. green", "A. red", "B. blue", "D. black"], "answer": "C"},
    "filled up": {"options": [*TEXTS, None, ""], "answer": "C"},
    "answers and a letter": {"answers": TEXTS, "answer": "C"},
}


@pytest.mark.parametrize("name", CHOICES)
def test_options_in_every_shape(tmp_path, name):
    example = only(tmp_path, {"question": "Which?"} | CHOICES[name])
    assert (example.options, example.answer, example.question) == (COLOURS, "C", "Which?")


def test_wrong_answers_are_options_by_alphabet(tmp_path):
    gpqa = {"Question": "Q", "Correct Answer": "m"}
    gpqa |= {"Incorrect Answer 1": "z", "Incorrect Answer 2": "b"}
    sciq = {"question": "Q", "correct_answer": "m", "distractor1": "b", "distractor2": "z"}
    for record in (gpqa, sciq):
        example = only(tmp_path, record)
        assert (example.options, example.answer) == ({"A": "b", "B": "m", "C": "z"}, "B")


def with_answers(*answers: object, options: list[str] = TEXTS, field: str = "answer") -> list[dict]:
    return [{"question": "Q", "options": options, field: answer} for answer in answers]


def test_the_file_says_what_its_indices_count_from(tmp_path):
    for answers, expected in (
        (("2", "0", "1"), "CAB"),  # a 0: from 0
        (("2", "4", "1"), "BDA"),  # as high as there are options: from 1
        ((2, 1, 4), "BAD"),
        ((2, 1), "CB"),  # a number in JSON counts from 0 where the file does not tell
    ):
        found = read_examples(written(tmp_path, *with_answers(*answers)))
        assert "".join(example.answer for example in found) == expected
    # a text is no number: without a sign of what it counts from it is refused
    assert "can be read as" in complaint(written(tmp_path, *with_answers("2", "1")))
    # MedMCQA's own files count from 1, the hub's from 0
    hub = written(tmp_path, *with_answers(1, 3, 0, field="cop"))
    assert [example.answer for example in read_examples(hub)] == ["B", "D", "A"]
    own = written(tmp_path, *with_answers(1, 3, 4, field="cop"))
    assert [example.answer for example in read_examples(own)] == ["A", "C", "D"]
    assert "'cop' may mean option A or B" in complaint(
        written(tmp_path, *with_answers(1, field="cop"))
    )


def test_what_can_be_read_in_two_ways_is_refused(tmp_path):
    for answer, options in (
        ("2", ["2", "3", "4", "5"]),  # the text of A, or the index of C
        (1, ["1", "2", "3"]),
        ("A", ["B", "A", "C"]),  # a letter, or the text of another option
    ):
        message = complaint(written(tmp_path, *with_answers(answer, options=options)))
        assert "line 1: field 'answer' may mean option" in message
    both = {"question": "Q", "options": TEXTS, "answer": "A", "answer_index": 2}
    assert "'answer' and 'answer_index' name different options" in complaint(
        written(tmp_path, both)
    )
    lost = {"question": "Q", "options": TEXTS, "answer": "red", "answer_letter": "F"}
    assert "'answer_letter' is none of the options: 'F'" in complaint(written(tmp_path, lost))
    assert "several right options" in complaint(written(tmp_path, *with_answers(["A", "C"])))
    lost = {"question": "Q", "B": "x", "C": "y", "answer": "B"}
    assert "field 'B' looks like an option, but A is missing" in complaint(written(tmp_path, lost))
    lost = {"question": "Q", "distractors": ["x", "y"], "answer": "B"}
    assert "'distractors' has the wrong options" in complaint(written(tmp_path, lost))
    for value, options in (
        (["a.png", "b.png"], "has images"),
        ("['a' 'b']", "has only one option"),
    ):
        message = complaint(written(tmp_path, *with_answers("A", options=value)))
        assert options in message
    pictured = [{"label": "A", "text": "x", "image": "a.png"}, {"label": "B", "text": "y"}]
    assert "has images" in complaint(written(tmp_path, *with_answers("A", options=pictured)))
    two = {"question": "Q", "options": TEXTS, "labels": [1, 0, 1, 0]}
    assert "several right options" in complaint(written(tmp_path, two))
    # MMLU-Redux says which of MMLU's answers are wrong.
    redux = {"question": "Q", "choices": TEXTS, "answer": 2, "error_type": "wrong_groundtruth"}
    assert "'error_type' says" in complaint(written(tmp_path, redux))
    # A second field, or numbers that are no index, settle it.
    assert (
        only(tmp_path, with_answers("2", options=["1", "2", "3"])[0] | {"label": "B"}).answer == "B"
    )
    assert only(tmp_path, with_answers("20", options=["10", "20"])[0]).answer == "B"


IMAGES = ["image", "images", "img_name", "imgname", "image_path", "Figure_path", "picture"]
IMAGES += ["file_name", "image_file", "question_image", "img_paths", "imagename", "photo"]


@pytest.mark.parametrize("field", IMAGES)
def test_images_under_every_name(tmp_path, field):
    for value in (
        "a/b.png",
        ["a/b.png"],
        f"file://{tmp_path}/a/b.png",
        {"bytes": None, "path": "a/b.png"},
    ):
        if field == "file_name" and not isinstance(value, str):
            continue
        record = {"question": "Q", "answer": "1", field: value}
        assert only(tmp_path, record).images == [tmp_path / "a/b.png"]


def test_one_image_under_two_names_is_one(tmp_path):
    record = {"question": "Q", "answer": "1", "image": "1.png", "image_path": "/data/images/1.png"}
    assert only(tmp_path, record).images == [tmp_path / "1.png"]
    record |= {"image": "left/1.png", "image_path": "right/1.png"}
    assert only(tmp_path, record).images == [tmp_path / "left/1.png", tmp_path / "right/1.png"]


@pytest.mark.parametrize("field", ["image", "img", "image_bytes", "image_base64", "image_0"])
def test_base64_that_does_not_say_so(tmp_path, field):
    for begin in ("iVBORw0KGgo", "/9j/4AAQSkZJRg", "R0lGODlhAQAB", "UklGRiIAAABXRUJQ"):
        text = begin + "A" * 80
        for value in (text, [text], {"bytes": text, "path": None}):
            record = {"question": "Q", "answer": "1", field: value}
            assert only(tmp_path, record).images == [f"data:image;base64,{text}"]


def test_every_image_is_read_or_refused(tmp_path):
    record = {"question": "Q", "answer": "1"}
    nine = {f"image_{i}": f"{i}.png" for i in range(1, 10)}
    assert len(only(tmp_path, record | nine).images) == 9
    for field in ("second_image", "image_10", "image_after", "raw_picture"):
        message = complaint(written(tmp_path, record | {"image": "a.png", field: "b.png"}))
        assert f"field '{field}' looks like an image" in message
    message = complaint(written(tmp_path, record | {"image": "a.png", "choice_images": ["b.png"]}))
    assert "'choice_images' looks like options" in message
    # What shows the image once more, or the solution, is no part of the question.
    more = {"image_preview": "p.png", "rationale_image": "r.png", "image_link": "x/a.png"}
    assert len(only(tmp_path, record | {"image": "a.png"} | more).images) == 1
    assert only(tmp_path, record | {"rationale_image": "r.png"}).images == []
    beside = {"image": "data:image/png;base64,AA", "diagram": "b.png"}
    assert only(tmp_path, record | beside).images == [beside["image"], tmp_path / "b.png"]
    beside = {"image": "a.png", "image_url": "https://x.org/a.png"}
    assert only(tmp_path, record | beside).images == [tmp_path / "a.png"]
    seed = {"choice_a": "x", "choice_b": "y", "answer": "B", "data_id": "17_4", "question": "Q"}
    assert only(tmp_path, seed).images == [tmp_path / "17_4"]
    assert only(tmp_path, seed | {"image": ["b.png"]}).images == [tmp_path / "b.png"]


def test_images_of_conversations(tmp_path):
    for part, expected in (
        ({"type": "image", "image": "a.png"}, "a.png"),
        ({"type": "image_url", "image_url": {"url": "b.png"}}, "b.png"),
    ):
        asked = {"role": "user", "content": [part, {"type": "text", "text": "Why?"}]}
        for record in (
            {"messages": [asked, {"role": "assistant", "content": "So."}]},
            {"messages": [asked], "answer": "So."},
            {"prompt": [asked], "answer": "So."},
            {"conversations": [asked], "answer": "So."},
            {"prompt": [asked], "reward_model": {"ground_truth": "So."}},
        ):
            example = only(tmp_path, record)
            assert (example.question, example.answer) == ("<image>\nWhy?", "So.")
            assert example.images == [tmp_path / expected]
    lost = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]}
    record = {"messages": [lost, {"role": "assistant", "content": "So."}]}
    assert "the text has <image>, but" in complaint(written(tmp_path, record))
    assert only(tmp_path, record | {"images": ["c.png"]}).images == [tmp_path / "c.png"]
    lost["content"][0] = {"type": "video", "video": "a.mp4"}
    assert "unknown schema" in complaint(written(tmp_path, record))


CONTEXTS = {
    "RACE": ({"article": "Long ago."}, "Long ago.\nWhy?"),
    "SVAMP": ({"Body": "He has 3."}, "He has 3.\nWhy?"),
    "ScienceQA": ({"hint": "Look here."}, "Look here.\nWhy?"),
    "PubMedQA": ({"context": {"contexts": ["One.", "Two."], "labels": ["X"]}}, "One.\nTwo.\nWhy?"),
    "TabMWP": ({"table": "a | 1"}, "a | 1\nWhy?"),
    "an instruction": ({"instruction": "In cm."}, "In cm.\nWhy?"),
    "a unit": ({"unit": "cm"}, "Why? (Unit: cm)"),
    "there already": ({"text": "So: Why?", "prompt": "Answer this. Why?"}, "Why?"),
    "a prompt": ({"prompt": "It rains."}, "It rains.\nWhy?"),
    "a passage that asks itself": ({"passage": "She asks: Why?"}, "She asks: Why?\nWhy?"),
    "MuSR": ({"narrative": "A man is dead."}, "A man is dead.\nWhy?"),
    "a note": ({"Patient Note": "He is 40."}, "He is 40.\nWhy?"),
    "another unit": ({"answer_unit": "kg"}, "Why? (Unit: kg)"),
    "a chapter": ({"unit": 3}, "Why?"),
    "nothing": ({"context": None, "passage": "", "hint": "nan", "case": 7}, "Why?"),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_context_stands_before_the_question(tmp_path, name):
    fields, expected = CONTEXTS[name]
    assert only(tmp_path, {"question": "Why?", "answer": "1"} | fields).question == expected


LOOKS = {  # an unknown field, what it looks like, and an answer that makes it look so
    "options by name": ({"candidate_texts": TEXTS}, "options", "1.5"),
    "letters and texts in one text": ({"selection": "A. red; B. blue"}, "options", "B"),
    "numbers and texts": ({"selection": {"1": "red", "2": "blue"}}, "options", "2"),
    "letters and texts": ({"possibilities": COLOURS}, "options", "C"),
    "texts and a letter": ({"possibilities": TEXTS}, "options", "C"),
    "texts and an index": ({"possibilities": TEXTS}, "options", 2),
    "texts and one of them": ({"possibilities": TEXTS}, "options", "green"),
    "options in metadata": ({"details": {"choices": TEXTS}}, "options", "C"),
    "columns": ({"reply_a": "x", "reply_b": "y"}, "options", "B"),
    "an image by its ending": ({"source": None, "scene": "a/b.jpg"}, "an image", "1"),
    "a video": ({"video": "a.mp4"}, "an image", "1"),
    "an image under any name": ({"source": "img/7.JPG"}, "an image", "1"),
    "images in a list": ({"media": ["x.png", "y.png"]}, "an image", "1"),
    "an image in metadata": ({"metadata": {"picture": "x.jpeg"}}, "an image", "1"),
    "an image by name": ({"ct_scan": "patient 7"}, "an image", "1"),
    "an image's number": ({"image_id": 42}, "an image", "1"),
    "an image by what it is": ({"raw": "data:image/png;base64,AA"}, "an image", "1"),
    "context": ({"reading_passage_en": "A man went home."}, "context", "1"),
    "code": ({"code": "x = 1\nprint(x + 1)"}, "context", "2"),
    "some text": ({"source_text": "A man went home."}, "context", "1"),
    "history": ({"medical_history": "He smokes a lot."}, "context", "1"),
    "a hypothesis": ({"hypothesis": "All men are mortal."}, "context", "yes"),
    "one sentence of two": ({"sentence2": "A cat is there."}, "context", "yes"),
    "a described case": ({"case_description": "A man of 40."}, "context", "1"),
    "another question": ({"query": "Is it true or false?"}, "a part of the question", "1"),
    "what is asked about": (
        {"question_description": "A ball rolls."},
        "a part of the question",
        "1",
    ),
    "a caption without its image": ({"figure_caption": "Sales by year"}, "an image", "1"),
    "base64": ({"raw": "iVBORw0KGgo" + "A" * 80}, "an image", "1"),
    "small letters": ({"b": "x", "possible_reply_a": "x", "possible_reply_b": "y"}, "options", "c"),
    "a description": ({"description": "A shop sells apples."}, "context", "1"),
}


@pytest.mark.parametrize("name", LOOKS)
def test_what_is_unread_but_belongs_to_the_question_is_refused_by_name(tmp_path, name):
    fields, looks, answer = LOOKS[name]
    record = {"question": "Q", "answer": answer} | fields
    message = complaint(written(tmp_path, record))
    field = list(fields)[-1]
    assert f"line 1: field '{field}' looks like {looks}, but is no name that is known" in message
    # Without the field the record is good.
    del record[field]
    assert only(tmp_path, record).question == "Q"


def test_what_only_describes_is_not_refused(tmp_path):
    record = {"question": "Q", "answer": "2", "tags": ["a", "b", "c"], "r_step": "a b c"}
    record |= {
        "num_images": 0,
        "choice_type": "single",
        "passage_id": "p 1",
        "source": "x",
        "solution_text": "a b c d",
        "cot_content": "a b c d",
        "golden_answers": ["2", "two"],
        "numbers": "1 2",
    }
    record |= {"options": "[]"}
    record |= {"r1_solution_1": "x", "r1_solution_2": "y", "finish_reasons": ["stop", "length"]}
    unread = record.keys() - {"question", "answer", "options"}
    assert only(tmp_path, record).meta.keys() == unread


def test_a_picture_that_the_text_points_to_must_be_there(tmp_path):
    record = {"problem": "<image>Find x.", "answer": "3"}
    assert "the text has <image>, but the record has no image" in complaint(
        written(tmp_path, record)
    )
    assert only(tmp_path, record | {"images": ["a.png"]}).images == [tmp_path / "a.png"]
    for value, expected in (
        ({"0": "a.png"}, "bytes or path"),
        ("https://x.org/a.png", "an address"),
    ):
        assert expected in complaint(written(tmp_path, record | {"images": value}))


def test_an_index_without_options_is_refused(tmp_path):
    record = {"question": "Q", "answer": "Iron", "answer_idx": "B"}
    assert "field 'answer_idx' names an option, but there are no" in complaint(
        written(tmp_path, record)
    )


def test_a_number_of_a_class_is_no_answer(tmp_path):
    for fields in (
        {"question": "Is it so?", "label": 1},  # BoolQ in SuperGLUE
        {"question": "Q", "answer": "A. Smith", "label": 0},  # MultiRC: this answer is wrong
        {"question": "Q", "answer": "5", "correct": False},
        {"prompt": "Q", "completion": "R", "label": False},  # KTO
    ):
        message = complaint(written(tmp_path, fields))
        assert f"field '{list(fields)[-1]}' may not be the answer" in message
    assert only(tmp_path, {"query": "Q", "label": ["14"]}).answer == "14"  # ChartQA
    assert only(tmp_path, {"question": "Q", "answer": "5", "correct": True}).answer == "5"


def test_a_gap_in_the_question(tmp_path):
    record = {"Question": "He has N_00 apples and N_01 pears.", "Numbers": "9 4", "Answer": 13.0}
    assert "N_00 in the place of a number" in complaint(written(tmp_path, record))
    del record["Numbers"]
    assert only(tmp_path, record).answer == "13"


@pytest.mark.parametrize("mark", ["<image_2>", "<|image_1|>", "<ImageHere>", "![x](a.png)"])
def test_marks_of_images(tmp_path, mark):
    record = {"question": f"What is in {mark}?", "answer": "1", "options": []}
    assert f"the text has {mark}" in complaint(written(tmp_path, record))
    if mark == "<image_2>":
        # The number in a mark is not the record's, which gives it its id.
        both = {"image_1": "a.png", "image_2": "b.png"}
        assert only(tmp_path, record | both).id == "d-1"
        message = complaint(written(tmp_path, record | {"image_1": "a.png", "image_2": None}))
        assert "field 'image_2' is missing" in message


def test_columns_0_and_1(tmp_path):
    """Open-Reasoner-Zero's pairs as a table has them."""
    rows = [{"0": {"value": t}, "1": {"ground_truth": {"value": t * 2}}} for t in ("a", "b")]
    assert [e.answer for e in read_examples(written(tmp_path, *rows))] == ["aa", "bb"]


def test_big_bench(tmp_path):
    scores = {"red": 0, "blue": 1}
    path = tmp_path / "task.json"
    path.write_text(
        json.dumps({"name": "x", "examples": [{"input": "Q", "target_scores": scores}]})
    )
    [example] = read_examples(path)
    assert (example.options, example.answer) == ({"A": "red", "B": "blue"}, "B")
    broken = {"question": "Q", "mc1_targets": ["x"]}
    assert "'mc1_targets' must be an object" in complaint(written(tmp_path, broken))


def test_a_plain_tsv(tmp_path):
    path = tmp_path / "d.tsv"
    path.write_text("Question\tA\tB\tC\tAnswer\nWhich?\tred\tblue\tnan\tB\n")
    [example] = read_examples(path)
    assert (example.options, example.answer) == ({"A": "red", "B": "blue"}, "B")


SFT = {  # the answer is in the response
    "Dolly": ({"instruction": "Q", "context": "C.", "response": "R."}, "C.\nQ", "R."),
    "Alpaca": ({"instruction": "I", "input": "X", "output": "R.", "text": "I X R."}, "I\nX", "R."),
    "prompt and completion": ({"prompt": "Q", "completion": r"So \boxed{4}."}, "Q", "4"),
    "MetaMathQA": ({"query": "Q", "response": "2+2=4\nThe answer is: 4"}, "Q", "4"),
    "no robots": (
        {
            "prompt": "Q",
            "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "R."}],
        },
        "Q",
        "R.",
    ),
    "OpenThoughts3": (
        {
            "conversations": [
                {"from": "user", "value": "Q"},
                {"from": "assistant", "value": r"<think>t</think> \boxed{4}"},
            ]
        },
        "Q",
        "4",
    ),
}


@pytest.mark.parametrize("name", SFT)
def test_a_response_has_the_answer_where_nothing_else_has(tmp_path, name):
    record, question, answer = SFT[name]
    example = only(tmp_path, record)
    assert (example.question, example.answer) == (question, answer)
    assert example.response and example.response in json.dumps(record).replace(
        "\\\\", "\\"
    ).replace("\\n", "\n")


def test_a_prediction_beside_the_answer_is_no_response(tmp_path):
    example = only(tmp_path, {"question": "Q", "answer": "5", "output": "I say 6."})
    assert (example.answer, example.response) == ("5", None)
    guess = {"question": "Q", "options": TEXTS, "output": "B"}
    assert "'answer' is missing" in complaint(written(tmp_path, guess))


MATHS = {
    "MATH-500": ({"problem": "P", "solution": "S", "answer": "5", "unique_id": "u"}, ["5"]),
    "MATH": ({"problem": "P", "solution": r"so $\boxed{\frac{1}{2}}$."}, [r"\frac{1}{2}"]),
    "AIME": ({"ID": "I-1", "Problem": "P", "Solution": "S", "Answer": 73}, ["73"]),
    "DeepScaleR": ({"problem": "P", "answer": "$2$", "solution": ""}, ["$2$"]),
    "OlympiadBench": ({"question": "P", "final_answer": ["$2,3$"], "solution": ["S"]}, ["$2,3$"]),
    "R1-V": ({"problem": "P", "solution": "<answer> 3 </answer>"}, ["3"]),
    "AMC": ({"problem": "P", "answer": 27.0}, ["27"]),
    "MultiArith": ({"sQuestion": "P", "lSolutions": [5.0], "iIndex": 1}, ["5"]),
    "tags": ({"question": "P", "answer": "<think>S</think><answer>5</answer>"}, ["5"]),
    "two boxes": ({"question": "P", "answer": r"\boxed{1}, \boxed{2}"}, [r"\boxed{1}, \boxed{2}"]),
    "MGSM": ({"question": "P", "answer": "So it is 11.", "answer_number": 11}, ["11"]),
    "BoolQ": ({"question": "P", "answer": True}, ["yes", "true"]),
    "TheoremQA": ({"Question": "P", "Answer": [2, 3], "Picture": None}, ["[2, 3]"]),
    "VQA": ({"question": "P", "multiple_choice_answer": "x", "answers": [{"a": 1}]}, ["x"]),
    "a medical one": (
        {"Open-ended Verifiable Question": "P", "Ground-True Answer": "Iron"},
        ["Iron"],
    ),
    "ORZ's evaluation": (
        {"prompt": [{"from": "user", "value": "P"}], "final_answer": 73, "choices": None},
        ["73"],
    ),
    "NQ": ({"question": "P", "answer": ["x", "y", "x"]}, ["x", "y"]),
    "SQuAD": ({"question": "P", "answers": {"text": ["x"], "answer_start": [1]}}, ["x"]),
    "TriviaQA": ({"question": "P", "answer": {"value": "x", "aliases": ["X"]}}, ["x", "X"]),
    "TRL": ({"prompt": [{"role": "user", "content": "P"}], "solution": "144"}, ["144"]),
    "ViRL": ({"question": "P", "answer": r"\boxed{\frac{1}{2}}"}, [r"\frac{1}{2}"]),
    "RLVR": ({"messages": [{"role": "user", "content": "P"}], "ground_truth": "5"}, ["5"]),
    "PubMedQA": ({"QUESTION": "P", "final_decision": "yes", "LABELS": ["a", "b"]}, ["yes"]),
    "DAPO, processed": (
        {"prompt": "P", "reward_model": {"ground_truth": "34"}, "ability": "MATH"},
        ["34"],
    ),
    "Skywork": (
        {
            "prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "P"}],
            "reward_model": {"ground_truth": '["1/2", "0.5"]', "style": "rule"},
        },
        ["1/2", "0.5"],
    ),
}


@pytest.mark.parametrize("name", MATHS)
def test_questions_without_options(tmp_path, name):
    record, truths = MATHS[name]
    example = only(tmp_path, record)
    assert (example.question, example.truths, example.options) == ("P", truths, None)


def test_verl(tmp_path):
    wrapped = (
        "Solve the following math problem step by step. The last line of your response should be "
        "of the form Answer: $Answer (without quotes) where $Answer is the answer to the problem."
        '\n\nWhat is 1+1?\n\nRemember to put your answer on its own line after "Answer:".'
    )
    record = {
        "data_source": "math_dapo",
        "prompt": [{"content": wrapped, "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": "2", "style": "rule"},
        "extra_info": {"index": "9"},
    }
    example = only(tmp_path, record)
    assert (example.question, example.answer, example.domain) == ("What is 1+1?", "2", "MATH")
    record["prompt"][0]["content"] = "<image>Find x. You FIRST think about it."
    record["extra_info"]["question"] = "<image>Find x."
    record["images"] = [{"bytes": None, "path": "x.png"}]
    example = only(tmp_path, record)
    assert (example.question, example.images) == ("<image>Find x.", [tmp_path / "x.png"])
    assert example.schema == "verl" and "data_source" in example.meta
    record["prompt"] *= 2
    assert "ends with its only user's turn" in complaint(written(tmp_path, record))


def test_sharegpt(tmp_path):
    response = "<think>One more.</think> <answer>2</answer>"
    turns = [{"from": "human", "value": "<image>1+1?"}, {"from": "gpt", "value": response}]
    record = {"id": "7", "image": "a.png", "conversations": turns}
    example = only(tmp_path, record)
    assert (example.question, example.response) == ("<image>1+1?", response)
    assert (example.answer, example.id, example.schema) == ("2", "7", "sharegpt")
    assert example.images == [tmp_path / "a.png"]
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "Why?"}]
    chat.append({"role": "assistant", "content": [{"type": "text", "text": "So."}]})
    example = only(tmp_path, {"messages": chat})
    assert (example.question, example.answer, example.response) == ("Why?", "So.", "So.")
    message = complaint(written(tmp_path, record | {"conversations": turns * 2}))
    assert "field 'conversations' must be a user's and an assistant's turn" in message


def test_a_question_under_another_name_is_not_in_the_image(tmp_path):
    """MMMU-Pro's vision records have no question at all."""
    record = {"image": "a.png", "options": TEXTS, "subject": "Art", "answer": "C"}
    assert only(tmp_path, record).question == "Answer the question in the image."
    assert only(tmp_path, record | {"problem": "Why so?"}).question == "Why so?"


def test_medxpertqa_repeats_no_options(tmp_path):
    record = {
        "id": "MM-1",
        "question": "Which?\nAnswer Choices: (A) red (B) blue (C) green (D) black",
        "options": COLOURS,
        "label": "C",
        "images": ["MM-1-a.jpeg"],
        "medical_task": "Diagnosis",
        "body_system": "Cardiovascular",
    }
    example = only(tmp_path, record)
    assert (example.question, example.options, example.answer) == ("Which?", COLOURS, "C")
    assert (example.domain, example.images) == ("Diagnosis", [tmp_path / "MM-1-a.jpeg"])


def test_an_object_of_records(tmp_path):
    records = {
        "1": {"question": "a", "answer": "b"},
        "x": {"id": 7, "question": "c", "answer": "d"},
    }
    for indent in (None, 1):
        for content in (records, {"info": {"v": 1}, "questions": list(records.values())}):
            path = tmp_path / "d.json"
            path.write_text(json.dumps(content, indent=indent) + "\n\n")
            found = list(read_examples(path))
            assert [(example.question, example.answer) for example in found] == [
                ("a", "b"),
                ("c", "d"),
            ]
            first = "1" if content is records else "d-1"
            assert [example.id for example in found] == [first, "7"]
    path.write_text(json.dumps(records["1"], indent=1))
    assert [example.question for example in read_examples(path)] == ["a"]
    path.write_text(json.dumps({"1": {"question": "a"}}))
    assert "item '1': field 'answer' is missing" in complaint(path)


def test_csv(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text(
        "Figure_path,Question,Answer,Choice A,Choice B,Answer_label\n"
        'a.jpg,"Which, now?", Blue, A:Red, B:Blue ,B\n'
    )
    [example] = read_examples(path)
    assert (example.question, example.options) == ("Which, now?", {"A": "Red", "B": "Blue"})
    assert (example.answer, example.images) == ("B", [tmp_path / "a.jpg"])
    path.write_text("question,answer\na,b,c\n")
    assert "row 1: more cells than the first row" in complaint(path)


def test_gsm8k_for_sft(tmp_path):
    solution = "He has 48/2 = $<<48/2=24>>24.\nSo 24*100 = <<24*100=2400>>2,400.\n#### 2,400"
    example = only(tmp_path, {"question": "Q", "answer": solution})
    assert example.answer == "2400"
    thought = "He has 48/2 = $24.\nSo 24*100 = 2,400."
    assert example.response == f"<think>{thought}</think>\n<answer>2400</answer>"
    assert only(tmp_path, {"question": "Q", "answer": "#### 3"}).response is None


def test_the_table_has_each_name_once_in_a_meaning():
    for meaning, names in NAMES.items():
        assert len(set(names)) == len(names), meaning
    # A name of two meanings is decided by the readers: only these have two.
    shared = {"input", "instruction", "text", "problem", "sentence", "stem", "answers", "prompt"}
    shared |= {"response"}
    every = [name for names in NAMES.values() for name in names]
    assert {name for name in every if every.count(name) > 1} == shared


def test_the_same_names_in_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{i}+1?"}],
            "images": [{"bytes": b"x", "path": None}],
            "reward_model": {"ground_truth": str(i + 1), "style": "rule"},
            "extra_info": {"index": i, "question": None},
            "ability": "math",
        }
        for i in range(3)
    ]
    path = tmp_path / "verl.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = list(read_examples(path))
    assert [(e.question, e.answer) for e in found] == [("0+1?", "1"), ("1+1?", "2"), ("2+1?", "3")]
    assert all(example.images == [b"x"] and example.schema == "verl" for example in found)
    rows = [{"question": "Which?", "choices": TEXTS, "answer": i} for i in (3, 0, 1)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert [example.answer for example in read_examples(path)] == ["D", "A", "B"]
