"""Readers: every published schema, every kind of file, and what is wrong with them in one line."""

import base64
import copy
import io
import json
import random
import sys
from pathlib import Path

import pytest
from PIL import Image

from data import Example, InputError, load_examples, load_image, read_examples
from data.schemas import SCHEMAS as PUBLISHED


def complaint(call, *args, **options) -> str:
    with pytest.raises(InputError) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def written(folder: Path, content: str | bytes | list, name: str = "d.jsonl") -> Path:
    if isinstance(content, list):
        content = "".join(json.dumps(record) + "\n" for record in content)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name


def test_plain_schema(tmp_path):
    uri = "data:image/png;base64,AAAA"
    path = written(
        tmp_path,
        [
            {"question": "1+1?", "answer": 2},
            {
                "id": 7,
                "question": "Q",
                "answer": "No",
                "options": {"A": "Yes", "B": "No"},
                "image": "img/a.png",
                "response": "R",
                "domain": "L",
                "depth": 3,
                "kind": None,
            },
            {
                "id": "x",
                "question": "Q",
                "answer": "A",
                "options": None,
                "image": [uri, "/abs/b.png"],
                "response": None,
            },
        ],
    )
    assert list(read_examples(path)) == [
        Example("d-1", "1+1?", "2"),
        Example(
            "7",
            "Q",
            "B",
            {"A": "Yes", "B": "No"},
            [tmp_path / "img/a.png"],
            "R",
            "L",
            {"depth": 3, "kind": None},
        ),
        Example("x", "Q", "A", None, [uri, Path("/abs/b.png")]),
    ]


def thoughts(value: str, **rest) -> dict:
    turns = [{"from": "user", "value": "Why?"}, {"from": "assistant", "value": value}]
    return {"system": "Think.", "conversations": turns, **rest}


RELEASED = (
    "<|begin_of_thought|>\n\nHm.\n\nYes.\n\n<|end_of_thought|>\n\n"
    "<|begin_of_solution|>\n\n42\n\n<|end_of_solution|>"
)
ORZ = [
    {"from": "human", "value": "1+1?"},
    {"from": "assistant", "ground_truth": {"value": "2", "pass_at_n": 0.5}},
]
GSM8K = {"question": "How many?", "answer": "48/2 = <<48/2=24>>24\nso\n#### 1,224"}
MEDQA = {
    "question": "Which?",
    "answer": "Iron",
    "options": {"A": "Zinc", "B": "Iron"},
    "meta_info": "step1",
    "answer_idx": "B",
}


METADATA = {
    "problem": "Sort.",
    "deepseek_reasoning": "\nEasy.\n",
    "deepseek_solution": "```python\nsorted(x)\n```",
    "ground_truth_solution": None,
    "domain": "code",
    "source": "apps",
    "test_cases": "{}",
    "starter_code": "def f(x):",
}
MEDQA_LIST = MEDQA | {"options": [{"key": "A", "value": "Zinc"}, {"key": "B", "value": "Iron"}]}
MEDQA_HF = {
    "id": "train-3",
    "sent1": "Which?",
    "sent2": "",
    "ending0": "a",
    "ending1": "b",
    "ending2": "c",
    "ending3": "d",
    "label": 2,
}
MMLU_PRO = {
    "question_id": 70,
    "question": "Who?",
    "options": ["w", "x", "y", "z", "N/A", "N/A"],
    "answer": "D",
    "answer_index": 3,
    "cot_content": "",
    "category": "law",
    "src": "ori",
}
MMMU = {
    "id": "validation_Art_Theory_1",
    "question": "<image 1> or <image 2>?",
    "options": "['<image 1>', \"it's 2\"]",
    "explanation": "",
    "image_1": "1.png",
    "image_2": {"bytes": None, "path": "2.png"},
    "image_3": None,
    "img_type": "['Painting']",
    "answer": "B",
    "topic_difficulty": "Easy",
    "question_type": "multiple-choice",
    "subfield": "Art",
}
MMMU_OPEN = {
    "id": "validation_Economics_3",
    "question": "How much? <image 1>",
    "options": "[]",
    "image_1": "1.png",
    "answer": "['$6', 'six']",
    "question_type": "open",
    "subfield": "Micro",
}
MMMU_PRO = {
    "id": "test_History_256",
    "question": "<image 1>?",
    "options": "['a', 'b', 'c', 'd', 'e', 'f', 'g', 'h', 'i', '$\\\\frac{1}{2}$']",
    "image_1": "1.png",
    "answer": "J",
    "subject": "History",
}
MMMU_VISION = {
    "id": "test_Music_9",
    "options": "['a', 'b']",
    "image": "v.png",
    "answer": "A",
    "subject": "Music",
}
MATHVISTA = {
    "pid": "8",
    "question": "How wide?",
    "image": "images/8.jpg",
    "decoded_image": None,
    "choices": None,
    "unit": "cm",
    "precision": 1.0,
    "answer": "2.4",
    "question_type": "free_form",
    "answer_type": "float",
    "metadata": {"task": "geometry problem solving", "grade": "high school"},
    "query": "Hint: ...",
}
MATHVISTA_CHOICE = MATHVISTA | {
    "choices": ["B", "A"],
    "unit": None,
    "precision": float("nan"),
    "answer": "A",
    "question_type": "multi_choice",
    "answer_type": "text",
}
MATHVISION = {
    "id": "21",
    "question": "Which cannot?\n<image1>\n<image2>",
    "options": ["A", "B", "C"],
    "answer": "C",
    "solution": None,
    "level": 1,
    "subject": "counting",
    "image": "images/21.jpg",
}
PLAIN = {
    "id": "p",
    "question": "Who?",
    "answer": "1.50",
    "image": ["a.png", "data:image/png;base64,AA"],
    "domain": "d",
    "response": "r",
    "accepted": ["1.5", 1.6],
    "precision": 1,
}

SCHEMAS = {  # record, what it is read as; images relative to the file's folder
    "openthoughts": (
        thoughts(RELEASED),
        Example(
            "d-1",
            "Why?",
            "42",
            meta={"system": "Think."},
            response=("<think>\nHm.\n\nYes.\n</think> <answer>42</answer>"),
        ),
    ),
    "openthoughts-metadata": (
        METADATA,
        Example(
            "d-1",
            "Sort.\ndef f(x):",
            METADATA["deepseek_solution"],
            domain="code",
            response="<think>\nEasy.\n</think> <answer>```python\nsorted(x)\n```</answer>",
            meta={
                key: METADATA[key]
                for key in ("deepseek_solution", "ground_truth_solution", "source", "test_cases")
            },
        ),
    ),
    "orz": (ORZ, Example("d-1", "1+1?", "2", meta={"pass_at_n": 0.5})),
    "gsm8k": (
        GSM8K,
        Example(
            "d-1",
            "How many?",
            "1224",
            response="<think>48/2 = 24\nso</think>\n<answer>1224</answer>",
            meta={"solution": "48/2 = <<48/2=24>>24\nso"},
        ),
    ),
    "medqa": (
        MEDQA,
        Example(
            "d-1",
            "Which?",
            "B",
            {"A": "Zinc", "B": "Iron"},
            meta={"meta_info": "step1", "answer_idx": "B"},
        ),
    ),
    "medqa list": (
        MEDQA_LIST,
        Example(
            "d-1",
            "Which?",
            "B",
            {"A": "Zinc", "B": "Iron"},
            meta={"meta_info": "step1", "answer_idx": "B"},
        ),
    ),
    "medqa-hf": (
        MEDQA_HF,
        Example("train-3", "Which?", "C", {"A": "a", "B": "b", "C": "c", "D": "d"}),
    ),
    "mmlu-pro": (
        MMLU_PRO,
        Example(
            "70",
            "Who?",
            "D",
            {"A": "w", "B": "x", "C": "y", "D": "z"},
            domain="law",
            meta={
                key: MMLU_PRO[key]
                for key in ("question_id", "answer_index", "cot_content", "category", "src")
            },
        ),
    ),
    "mmmu": (
        MMMU,
        Example(
            MMMU["id"],
            MMMU["question"],
            "B",
            {"A": "<image 1>", "B": "it's 2"},
            ["1.png", "2.png"],
            domain="Art_Theory",
            meta={
                k: MMMU[k]
                for k in (
                    "explanation",
                    "img_type",
                    "topic_difficulty",
                    "question_type",
                    "subfield",
                )
            },
        ),
    ),
    "mmmu open": (
        MMMU_OPEN,
        Example(
            MMMU_OPEN["id"],
            MMMU_OPEN["question"],
            "$6",
            None,
            ["1.png"],
            domain="Economics",
            meta={"question_type": "open", "subfield": "Micro"},
            accepted=["six"],
        ),
    ),
    "mmmu-pro": (
        MMMU_PRO,
        Example(
            "test_History_256",
            "<image 1>?",
            "J",
            dict(zip("ABCDEFGHIJ", [*"abcdefghi", r"$\frac{1}{2}$"])),
            ["1.png"],
            domain="History",
            meta={"subject": "History"},
        ),
    ),
    "mmmu-pro-vision": (
        MMMU_VISION,
        Example(
            "test_Music_9",
            "Answer the question in the image.",
            "A",
            {"A": "a", "B": "b"},
            ["v.png"],
            domain="Music",
            meta={"subject": "Music"},
        ),
    ),
    "mathvista": (
        MATHVISTA,
        Example(
            "8",
            "How wide? (Unit: cm)",
            "2.4",
            None,
            ["images/8.jpg"],
            domain="geometry problem solving",
            precision=1,
            meta={
                key: MATHVISTA[key]
                for key in ("pid", "question_type", "answer_type", "metadata", "query")
            },
        ),
    ),
    "mathvista choice": (
        MATHVISTA_CHOICE,
        Example(
            "8",
            "How wide?",
            "B",
            {"A": "B", "B": "A"},
            ["images/8.jpg"],
            domain="geometry problem solving",
            meta={
                key: MATHVISTA_CHOICE[key]
                for key in ("pid", "question_type", "answer_type", "metadata", "query")
            },
        ),
    ),
    "mathvision": (
        MATHVISION,
        Example(
            "21",
            MATHVISION["question"],
            "C",
            {"A": "A", "B": "B", "C": "C"},
            ["images/21.jpg"],
            domain="counting",
            meta={"solution": None, "level": 1, "subject": "counting"},
        ),
    ),
    "mathvision open": (
        MATHVISION | {"options": [], "answer": "[0,1]"},
        Example(
            "21",
            MATHVISION["question"],
            "[0,1]",
            None,
            ["images/21.jpg"],
            domain="counting",
            meta={"solution": None, "level": 1, "subject": "counting"},
        ),
    ),
    "plain": (
        PLAIN,
        Example(
            "p",
            "Who?",
            "1.50",
            None,
            ["a.png", PLAIN["image"][1]],
            "r",
            "d",
            accepted=["1.5", "1.6"],
            precision=1,
        ),
    ),
    "plain list": (
        {"question": "Q", "answer": "no", "options": ["yes", "no"]},
        Example("d-1", "Q", "B", {"A": "yes", "B": "no"}),
    ),
}


def in_folder(example: Example, folder: Path) -> Example:
    """The example with its images where the file lies."""
    example = copy.copy(example)
    example.images = [
        image if image.startswith("data:") else folder / image for image in example.images
    ]
    return example


UNLISTED = ("plain", "gsm8k")  # known by more than a set of fields, or by none


def schema_of(name: str) -> str:
    """Returns the schema of a record above: two sets have no more than our plain one."""
    name = name.split()[0]
    return "plain" if name in ("medqa", "mathvision") else name


@pytest.mark.parametrize("name", SCHEMAS)
def test_published_schemas(tmp_path, name):
    record, expected = SCHEMAS[name]
    [found] = read_examples(written(tmp_path, json.dumps([record])))
    assert found == in_folder(expected, tmp_path) and found.schema == schema_of(name)
    assert found.truths == [expected.answer, *expected.accepted]
    json.dumps(found.meta)
    line = json.dumps(record)
    arrays = [
        json.dumps([record, record]),
        json.dumps([record, record], indent=1),
        "\n " + json.dumps([record, record]) + "\n\n",
        b"\xef\xbb\xbf" + json.dumps([record, record]).encode(),
    ]
    lines = [
        [record, record],
        "\n" + line + "\n" + line,
        b"\xef\xbb\xbf" + line.encode() + b"\r\n\r\n" + line.encode(),
    ]
    for content in arrays if name == "orz" else [*arrays, *lines]:
        first, second = read_examples(written(tmp_path, content))
        assert first == found and second.question == first.question
        assert second.id == ("d-2" if expected.id == "d-1" else expected.id)


def test_no_schema_hides_another():
    """Every published record meets its own schema first; those before it name fields it lacks."""
    for name, (record, _) in SCHEMAS.items():
        if isinstance(record, dict):
            names = [
                schema.name
                for schema in PUBLISHED
                if schema.known_by <= record.keys() and not schema.lacks & record.keys()
            ]
            assert names[:1] == [schema_of(name)] or not names and schema_of(name) in UNLISTED


def test_several_right_answers_are_texts_only(tmp_path):
    for text, accepted in (
        ("['a', 'b']", ["a", "b"]),
        ("[1, 2]", ["[1, 2]"]),
        ("['a'", ["['a'"]),
        ("[]", ["[]"]),
        ("[a, b]", ["[a, b]"]),
    ):
        [example] = read_examples(written(tmp_path, [MMMU_OPEN | {"answer": text}]))
        assert example.truths == accepted
    [example] = read_examples(written(tmp_path, [{"question": "Q", "answer": "['a', 'b']"}]))
    assert example.truths == ["['a', 'b']"]  # in the plain schema an answer is what it says


def picture(colour: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (30, 30), (colour, 0, 0)).save(file, "PNG")
    return file.getvalue()


def colours(example: Example) -> list[int]:
    return [load_image(image).getpixel((0, 0))[0] for image in example.images]


def in_base64(colour: int) -> str:
    return base64.b64encode(picture(colour)).decode()


def tsv(folder: Path, *rows: dict) -> Path:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([str(row.get(key, "")) for key in columns] for row in rows)]
    quoted = [
        ['"' + cell.replace('"', '""') + '"' if set(cell) & set('"\t\n') else cell for cell in row]
        for row in cells
    ]
    text = "".join("\t".join(row) + "\n" for row in quoted)
    return written(folder, text.encode("utf-8", "surrogatepass"), "d.tsv")


def test_opencompass_tsv(tmp_path):
    several = str([in_base64(10), in_base64(20)])
    path = tsv(
        tmp_path,
        {
            "index": 1,
            "question": 'Say "x"\nor\ty <image 1>',
            "A": "yes",
            "B": "no",
            "answer": "B",
            "category": "Art",
            "image": in_base64(7),
            "split": "dev",
        },
        {
            "index": 2,
            "question": "Again?",
            "A": "yes",
            "B": "no",
            "answer": "A",
            "category": "Art",
            "image": "1",
        },
        {"index": 3, "question": "Ahead?", "answer": "['6', 'six']", "image": "4"},
        {
            "index": 4,
            "question": "Both?",
            "hint": "Look.",
            "choices": "['A', 'B']",
            "answer": "B",
            "image": several,
        },
        {
            "index": 5,
            "question": "Query",
            "choices": "['x', 'A']",
            "answer": "A",
            "answer_option": "B",
            "task": "t",
            "precision": "2.0",
            "image": in_base64(9),
        },
        {"index": 6, "question": "No image", "answer": "7", "image_path": "['a.png', 'b, c.png']"},
    )
    first, again, ahead, both, query, paths = read_examples(path)
    assert [first.question, first.answer, first.options] == [
        'Say "x"\nor\ty <image 1>',
        "B",
        {"A": "yes", "B": "no"},
    ]
    assert (first.id, first.domain, first.schema, first.meta["split"]) == (
        "1",
        "Art",
        "opencompass",
        "dev",
    )
    assert [colours(e) for e in (first, again, ahead, both, query)] == [
        [7],
        [7],
        [10, 20],
        [10, 20],
        [9],
    ]
    assert ahead.truths == ["6", "six"] and ahead.options is None
    assert (
        both.question == "Look.\nBoth?"
        and both.options == {"A": "A", "B": "B"}
        and both.answer == "B"
    )
    assert (query.answer, query.precision, query.domain) == ("B", 2, "t")
    assert paths.images == [tmp_path / "a.png", tmp_path / "b, c.png"]
    [single] = read_examples(
        tsv(tmp_path, {"index": 1, "question": "Q", "answer": "7", "image_path": "a, b.png"})
    )
    assert single.images == [tmp_path / "a, b.png"]


@pytest.mark.parametrize(
    "content, expected",
    [
        ("", "no examples in the file"),
        ("index\tquestion\tanswer\n", "no examples in the file"),
        ("index\tquestion\tanswer\n1\tQ\n", "row 1: field 'answer' is missing"),
        ("index\tquestion\tanswer\n1\tQ\t2\t3\n", "row 1: more cells than the first row"),
        (
            "index\tquestion\tA\tB\tanswer\n1\tQ\tx\ty\tC\n",
            "row 1: field 'answer' is none of the options: 'C'",
        ),
        (b"index\tquestion\tanswer\n1\t\xff\t2\n", "malformed TSV ('utf-8'"),
    ],
)
def test_bad_tsv(tmp_path, content, expected):
    path = written(tmp_path, content, "d.tsv")
    message = complaint(lambda: list(read_examples(path)))
    assert message.startswith(f"{path}: ") and expected in message


def parquet(folder: Path, records: list[dict]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist(records)
    parquet.write_table(table, folder / "d.parquet", row_group_size=50)
    return folder / "d.parquet"


@pytest.mark.parametrize("name", [name for name in SCHEMAS if name != "orz"])
def test_parquet_has_the_same_schemas(tmp_path, name):
    record, expected = SCHEMAS[name]
    record = {
        key: value for key, value in record.items() if value != {}
    }  # which Parquet cannot hold
    if name == "plain":
        record, expected = record | {"accepted": ["1.5"]}, copy.copy(expected)
        expected.accepted = ["1.5"]
    first, *others = read_examples(parquet(tmp_path, [record] * 130))
    assert (
        first == in_folder(expected, tmp_path)
        and first.schema == schema_of(name)
        and len(others) == 129
    )


def test_parquet_images_and_odd_types(tmp_path):
    import datetime

    rows = [
        MMMU
        | {
            "image_1": {"bytes": picture(3), "path": "1.png"},
            "image_2": {"bytes": picture(4), "path": None},
            "when": datetime.datetime(2025, 1, 1),
            "raw": b"x",
            "nested": [{"bytes": b"y"}],
            "kept": [1.5],
        }
    ]
    [example] = read_examples(parquet(tmp_path, rows))
    assert colours(example) == [3, 4] and example.meta["kept"] == [1.5]
    assert not {"when", "raw", "nested"} & example.meta.keys() and json.dumps(example.meta)
    row = MATHVISTA | {"decoded_image": {"bytes": picture(5), "path": "8.jpg"}}
    [example] = read_examples(parquet(tmp_path, [row]))
    assert colours(example) == [5]
    path = parquet(
        tmp_path, [{"question": "Q", "answer": "1"}] * 3 + [{"question": "Q", "answer": None}]
    )
    assert f"{path}: row 4: field 'answer' is missing" in complaint(
        lambda: list(read_examples(path))
    )


def test_damaged_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    for content in (b"", b"PAR1", b"hello" * 99):
        path = written(tmp_path, content, "d.parquet")
        assert complaint(lambda: list(read_examples(path))).startswith(
            f"{path}: not a readable Parquet file ("
        )
    assert "nowhere.parquet: " in complaint(
        lambda: list(read_examples(tmp_path / "nowhere.parquet"))
    )


def test_parquet_without_pyarrow_says_how_to_convert(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    message = complaint(lambda: list(read_examples(tmp_path / "t.parquet")))
    assert "needs pyarrow (pip install pyarrow)" in message
    assert (
        "pandas.read_parquet('t.parquet').to_json('t.jsonl', orient='records', lines=True)"
        in message
    )


def test_bad_records_can_be_left_out(tmp_path):
    good = {"question": "a", "answer": "b"}
    lines = [
        json.dumps(good),
        "{",
        json.dumps({"question": "x"}),
        json.dumps(good),
        "7",
        '"x',
        "{}",
    ]
    path, bad = written(tmp_path, "\n".join(lines)), []
    assert [example.id for example in read_examples(path, bad)] == ["d-1", "d-4"]
    assert len(bad) == 5 and all(line.startswith(f"{path}: line ") for line in bad)
    assert [line.split(": ")[1] for line in bad] == [f"line {i}" for i in (2, 3, 5, 6, 7)]
    for content in ("", "[1,"):  # what is wrong with a file as a whole
        complaint(lambda: list(read_examples(written(tmp_path, content), [])))
    complaint(lambda: list(read_examples(tmp_path / "nowhere.jsonl", [])))


def test_jsonl_is_streamed(tmp_path):
    reader = read_examples(written(tmp_path, '{"question": "a", "answer": "b"}\n{"question":'))
    assert next(reader).question == "a"
    assert "line 2: malformed JSON" in complaint(next, reader)


BAD_FILES = {
    "empty": ("", "no examples in the file"),
    "blank": ("\n \n", "no examples in the file"),
    "empty_array": ("[]", "no examples in the file"),
    "malformed_line": (
        '{"question": "a", "answer": "b"}\n\n{"question": }',
        "line 3: malformed JSON (Expecting value, column 14)",
    ),
    "malformed_array": ("[\n{},\n{]\n", "malformed JSON (Expecting"),
    "not_utf8": (b'{"question": "\xff", "answer": "b"}', "line 1: malformed JSON ('utf-8'"),
    "a_number": ("7", "line 1: a record must be"),
    "array_of_numbers": ("[7]", "item 1: a record must be"),
    "unknown": ([{"a": 1, "b": 2}], "line 1: unknown schema (fields: a, b)"),
    "no_answer": ([{"question": "a"}], "line 1: field 'answer' is missing"),
    "empty_answer": (
        [{"question": "a", "answer": ""}],
        "line 1: field 'answer' is missing or empty",
    ),
    "blank_answer": (
        [{"question": "a", "answer": " \n"}],
        "line 1: field 'answer' is missing or empty",
    ),
    "no_question": ([{"answer": "a"}], "line 1: field 'question' is missing"),
    "question_type": (
        [{"question": ["a"], "answer": "b"}],
        "line 1: field 'question' must be text, not ['a']",
    ),
    "answer_type": (
        [{"question": "a", "answer": [["x"]]}],
        "line 1: field 'answer' must be text, not ['x']",
    ),
    "options_type": (
        [{"question": "a", "answer": "b", "options": 7}],
        "field 'options' must be an object or a list of texts, not 7",
    ),
    "option_type": (
        [{"question": "a", "answer": "A", "options": {"A": {}}}],
        "field 'options': field 'A' is missing",
    ),
    "answer_no_option": (
        [{"question": "a", "answer": "C", "options": {"A": "x", "B": "y"}}],
        "field 'answer' is none of the options",
    ),
    "image_type": (
        [{"question": "a", "answer": "b", "image": [3]}],
        "line 1: field 'image' must be a path",
    ),
    "response_type": (
        [{"question": "a", "answer": "b", "response": {"x": 1}}],
        "field 'response' must be text",
    ),
    "gsm8k_no_number": (
        [{"question": "a", "answer": "b ####"}],
        "line 1: field 'answer' is missing or empty",
    ),
    "medqa_options": ([{"question": "a", "answer_idx": "A"}], "line 1: field 'answer' is missing"),
    "option_keys": (
        [{"question": "q", "answer": "1", "options": {"1": "x", "3": "y"}}],
        "line 1: field 'options' must be named by letters from A to P, not 1, 3",
    ),
    "medqa_letter": (
        [MEDQA | {"answer_idx": "E"}],
        "line 1: field 'answer_idx' is none of the options: 'E'",
    ),
    "option_no_key": (
        [MEDQA | {"options": [{"value": "x"}, "y"]}],
        "field 'options': field 'value' is missing",
    ),
    "many_options": (
        [{"question": "q", "answer": "A", "options": ["x"] * 17}],
        "must have letters from A to P, not 17 options",
    ),
    "options_no_list": (
        [MMMU | {"options": "A or B"}],
        "field 'options' must be an object or a list of texts, not 'A or B'",
    ),
    "options_code": ([MMMU | {"options": "[__import__('os')]"}], "must be an object or a list"),
    "many_digits": (
        '{"question": "a", "answer": ' + "9" * 5000 + "}",
        "line 1: malformed JSON (Exceeds the limit",
    ),
    "mmmu_image": (
        [MMMU | {"image_2": None}],
        "field 'image_2' is missing, but the text has <image 2>",
    ),
    "mathvista_choice": (
        [MATHVISTA_CHOICE | {"answer": "C"}],
        "field 'answer' is none of the options: 'C'",
    ),
    "precision": (
        [MATHVISTA | {"precision": 1.5}],
        "field 'precision' must be a small whole number, not '1.5'",
    ),
    "label": ([MEDQA_HF | {"label": 4}], "field 'label' must be 0, 1, 2 or 3, not '4'"),
    "nan": ([{"question": "a", "answer": float("nan")}], "field 'answer' is missing or empty"),
    "own_tag": (
        [thoughts(RELEASED.replace("Hm", "</think>"))],
        "the response has a tag of its own: </think>",
    ),
    "own_tag_2": (
        [METADATA | {"deepseek_solution": "<answer>2</answer>"}],
        "a tag of its own: <answer>",
    ),
    "empty_thought": (
        [METADATA | {"deepseek_reasoning": " \n"}],
        "field 'deepseek_reasoning' is missing or empty",
    ),
    "item": (json.dumps([ORZ, ORZ[:1]]), "item 2: a record must be"),
    "orz_no_truth": (
        json.dumps([[ORZ[0], {"from": "assistant"}]]),
        "item 1: field 'ground_truth' is missing",
    ),
    "orz_no_value": (
        json.dumps([[ORZ[0], {"ground_truth": {"pass_at_n": 1}}]]),
        "field 'ground_truth': field 'value' is missing",
    ),
    "orz_no_question": (
        json.dumps([[{"from": "human"}, ORZ[1]]]),
        "item 1: field 'value' is missing",
    ),
    "one_turn": (
        [{"conversations": [{"from": "user", "value": "a"}]}],
        "field 'conversations' must be a user's and",
    ),
    "tags_in_disorder": (
        [thoughts("<|end_of_thought|>".join(RELEASED.split("<|begin_of_thought|>")))],
        "each tag once",
    ),
    "text_between": (
        [thoughts(RELEASED.replace("<|begin_of_solution|>", "so <|begin_of_solution|>"))],
        "each tag once",
    ),
    "text_before": ([thoughts("Well." + RELEASED)], "each tag once"),
    "turn_type": ([{"conversations": ["a", "b"]}], "field 'conversations' must be a user's and"),
    "no_tags": (
        [thoughts("42")],
        "field 'conversations': the response is not <|begin_of_thought|>",
    ),
    "tag_twice": ([thoughts(RELEASED.replace("Hm", "<|end_of_thought|>"))], "each tag once"),
    "cut_off": ([thoughts(RELEASED[:-20])], "each tag once"),
    "no_solution": ([thoughts(RELEASED.replace("42", ""))], "the thought or the solution is empty"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_data_files(tmp_path, name):
    content, expected = BAD_FILES[name]
    path = written(tmp_path, content)
    message = complaint(lambda: list(read_examples(path)))
    assert message.startswith(f"{path}: ") and expected in message


def test_unreadable_data_files(tmp_path):
    assert "No such file" in complaint(lambda: list(read_examples(tmp_path / "none.jsonl")))
    assert "Is a directory" in complaint(lambda: list(read_examples(tmp_path)))


def odd_numbers(example: Example) -> int | None:
    """Even answers are bad, and those over 6 too long."""
    number = int(example.answer)
    if number % 2 == 0:
        raise InputError(f"{example.id}: even")
    return number if number < 6 else None


def numbers(folder: Path, *answers: int | None) -> Path:
    return written(folder, [{"question": "q", "answer": answer} for answer in answers])


def test_load_examples(tmp_path, capsys):
    path = numbers(tmp_path, 1, 3, 7, 5)
    assert load_examples(path, odd_numbers, too_long="over 6") == ([1, 3, 5], 1, 0)
    assert capsys.readouterr() == ("", f"{path}: 1 of 4 examples dropped: over 6\n")
    assert load_examples(path, odd_numbers, limit=2) == ([1, 3], 0, 0)
    assert load_examples(path, odd_numbers, limit=9).items == [1, 3, 5]
    assert load_examples(path, lambda example: example).items == list(read_examples(path))


def test_the_limit_counts_what_is_dropped_and_stops_before_bad_records(tmp_path):
    path = numbers(tmp_path, 1, 7, 2)
    assert load_examples(path, odd_numbers, limit=2) == ([1], 1, 0)
    assert "line 3" in complaint(load_examples, path, odd_numbers, limit=3)
    assert load_examples(path, odd_numbers, limit=3, skip_bad=True) == ([1], 1, 1)


def test_bad_records_of_a_loaded_file(tmp_path, capsys):
    """What convert complains of is a bad record, just as what the reader complains of."""
    path = numbers(tmp_path, 1, 2, 3, None, 4)
    assert complaint(load_examples, path, odd_numbers) == f"{path}: line 2: d-2: even"
    assert load_examples(path, odd_numbers, skip_bad=True) == ([1, 3], 0, 3)
    shown = [
        f"{path}: 3 bad records left out",
        f"  {path}: line 2: d-2: even",
        f"  {path}: line 4: field 'answer' is missing or empty",
        f"  {path}: line 5: d-5: even",
    ]
    assert capsys.readouterr() == ("", "\n".join(shown) + "\n")
    path = numbers(tmp_path, 1, 2, 2, 2, 2)
    assert load_examples(path, odd_numbers, skip_bad=True).bad == 4
    first, *shown, rest = capsys.readouterr().err.splitlines()
    assert first == f"{path}: 4 bad records left out" and len(shown) == 3 and rest == "  ..."


def test_a_file_of_which_nothing_is_left(tmp_path, capsys):
    path = numbers(tmp_path, 4, 2)
    expected = f"{path}: none of the records is good; {path}: line 1: d-1: even"
    assert complaint(load_examples, path, odd_numbers, skip_bad=True) == expected
    path = numbers(tmp_path, 7, 9, 4)
    message = complaint(load_examples, path, odd_numbers, skip_bad=True, too_long="over 6")
    assert message == f"{path}: no example is left: over 6"
    assert "no examples in the file" in complaint(load_examples, written(tmp_path, ""), odd_numbers)
    assert capsys.readouterr() == ("", "")


def test_a_repeated_id_is_named(tmp_path):
    records = [{"id": i, "question": "?", "answer": "1"} for i in "abcb"]
    path = written(tmp_path, records)
    assert len(load_examples(path, odd_numbers).items) == 4
    message = complaint(load_examples, path, odd_numbers, unique_ids=True, skip_bad=True)
    assert message == f"{path}: line 4: field 'id' is not unique: 'b' comes again"
    assert len(load_examples(path, odd_numbers, unique_ids=True, limit=3).items) == 3


# Whatever a file holds, the answer is examples or an InputError that names the file


ODD = [
    None,
    True,
    -1,
    3,
    2.5,
    float("nan"),
    "",
    " ",
    "A",
    "x\0",
    "[",
    "['a'",
    "[1, 'b']",
    "<image 7>",
    "####",
    0.1,
    1e22,
    "data:",
    "nan",
    "a" * 5000,
    [],
    [None],
    [[]],
    ["A", 1],
    [{}],
    {},
    {"A": None},
    {"from": "user"},
    {"value": 1},
    {"bytes": "x"},
    {"bytes": None, "path": None},
    {"key": "A", "value": "x"},
]


def mutated(value: object, chance: random.Random) -> object:
    """A copy with one or two things wrong with it, anywhere in it."""
    if isinstance(value, (dict, list)) and value and chance.random() < 0.85:
        value = copy.copy(value)
        key = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
        kind = chance.random()
        if kind < 0.15:
            del value[key]
        elif kind < 0.25 and isinstance(value, dict):
            value[chance.choice(["question", "options", "image_1", "choices", "x", "level"])] = (
                value.pop(key)
            )
        elif kind < 0.3 and isinstance(value, list):
            value.append(copy.copy(value[key]))
        else:
            value[key] = mutated(value[key], chance)
        return value if chance.random() < 0.7 else mutated(value, chance)
    if isinstance(value, str) and value and chance.random() < 0.4:
        place = chance.randrange(len(value))
        odd = chance.choice(["", "\0", "\n", "'", '"', "[", "<|end_of_thought|>"])
        return value[:place] + odd + value[place + 1 :]
    return chance.choice(ODD)


def check_reading(path: Path) -> bool:
    """Whether the file was read; if not, one line must say why, and name file and place."""
    try:
        for example in read_examples(path):
            assert type(example.question) is str and example.question
            assert example.answer in (example.options or [example.answer])
            assert all(
                type(text) is str
                for text in (*example.truths, *(example.options or {}).values(), example.id)
            )
            assert json.dumps(example.meta) and (
                example.precision is None or type(example.precision) is int
            )
            "".join([example.question, example.response or "", *example.truths]).encode()
        return True
    except InputError as error:
        message = str(error)
        assert (
            message.startswith(f"{path}: ")
            and "\n" not in message
            and len(message) < len(str(path)) + 400
        )
        assert any(
            word in message
            for word in ("line ", "item ", "row ", "malformed", "no examples", "not a readable")
        )
        return False


@pytest.mark.parametrize("name", SCHEMAS)
def test_mutated_records(tmp_path, name):
    chance, record, read = random.Random(name), SCHEMAS[name][0], 0
    for _ in range(150):
        read += check_reading(written(tmp_path, json.dumps([mutated(record, chance)])))
    assert 0 < read < 150


def test_mutated_tsv(tmp_path):
    chance, read = random.Random(0), 0
    row = {
        "index": 1,
        "question": "Q <image 1>",
        "A": "yes",
        "B": "no",
        "answer": "B",
        "category": "Art",
        "hint": "h",
        "image": in_base64(7),
        "choices": "['A', 'B']",
        "precision": "1.0",
        "answer_option": "A",
    }
    for _ in range(150):
        others = (mutated(row, chance), mutated(row, chance))
        rows = [
            {str(key): value for key, value in other.items()}
            for other in others
            if isinstance(other, dict)
        ]
        raw = bytearray(tsv(tmp_path, *(rows or [{}])).read_bytes())
        for _ in range(chance.randrange(3)):
            raw[chance.randrange(len(raw))] = chance.choice(b'\x00\t\n"\xff1')
        read += check_reading(written(tmp_path, bytes(raw), "d.tsv"))
    assert 0 < read < 150


def test_damaged_bytes(tmp_path):
    chance, read = random.Random(1), 0
    whole = "".join(json.dumps(record) + "\n" for record, _ in SCHEMAS.values()).encode()
    for _ in range(150):
        raw = bytearray(
            whole[: chance.randrange(1, len(whole))] if chance.random() < 0.3 else whole
        )
        for _ in range(chance.randrange(1, 9)):
            raw[chance.randrange(len(raw))] = chance.choice(b'\x00\xff"{}[]\\,:\n1eE\xf0')
        read += check_reading(written(tmp_path, bytes(raw)))
        list(
            read_examples(written(tmp_path, bytes(raw) + b"\n" + json.dumps(GSM8K).encode()), [])
        )  # one is good
    assert 0 < read < 150


def test_a_record_that_is_ambiguous_does_not_say_what_indices_count_from(tmp_path):
    """Its index is also the text of an option: read from 1 it is good, from 0 it is not."""
    records = [
        {"question": "Capital?", "choices": ["Rome", "Paris", "Bonn", "Oslo"], "answer": 1},
        {"question": "Heaviest?", "choices": ["ant", "cat", "whale", "dog"], "answer": 2},
        {"question": "Least?", "choices": ["1", "2", "3", "4"], "answer": 1},
        {"question": "Italy?", "choices": ["Rome", "Paris", "Bonn", "Oslo"], "answer": 0},
    ]
    path = written(tmp_path, records)
    examples = load_examples(path, lambda example: example, limit=2).items
    assert [example.options[example.answer] for example in examples] == ["Paris", "whale"]


@pytest.mark.parametrize("name, sep", [("q.tsv", "\t"), ("q.csv", ",")])
def test_a_stray_quotation_mark_swallows_no_rows(tmp_path, name, sep):
    rows = ["question,answer", '"Unclosed?,4', "1+1?,2", '"Another?,6', "2+2?,4"]
    path = written(tmp_path, "\n".join(rows).replace(",", sep) + "\n", name)
    message = complaint(lambda: list(read_examples(path)))
    assert "malformed" in message and "line" in message and str(path) in message
    whole = written(tmp_path, f'question{sep}answer\n"Is ""1{sep}2"" odd?"{sep}4\n', name)
    assert [example.question for example in read_examples(whole)] == [f'Is "1{sep}2" odd?']


def test_a_table_with_images_needs_no_index(tmp_path):
    rows = f"id,question,answer,image\na,What?,4,{in_base64(10)}\nb,1+1?,2,\n"
    one, two = read_examples(written(tmp_path, rows, "q.csv"))
    assert colours(one) == [10] and two.images == []


def test_half_a_surrogate_pair_in_an_id_is_a_bad_record(tmp_path):
    path = written(tmp_path, r'{"id": "\ud83d", "question": "1+1?", "answer": "2"}' + "\n")
    assert "not valid Unicode" in complaint(lambda: list(read_examples(path)))
