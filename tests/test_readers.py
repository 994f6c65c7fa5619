"""Readers: every published schema, every kind of file, and what is wrong with them in one line."""
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from readers import Example, InputError, read_examples, report_bad  # noqa: E402


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
    path = written(tmp_path, [
        {"question": "1+1?", "answer": 2},
        {"id": 7, "question": "Q", "answer": "No", "options": {"A": "Yes", "B": "No"}, "image": "img/a.png",
         "response": "R", "domain": "L", "depth": 3, "kind": None},
        {"id": "x", "question": "Q", "answer": "A", "options": None, "image": [uri, "/abs/b.png"], "response": None}])
    assert list(read_examples(path)) == [
        Example("d-1", "1+1?", "2"),
        Example("7", "Q", "B", {"A": "Yes", "B": "No"}, [tmp_path / "img/a.png"], "R", "L", {"depth": 3, "kind": None}),
        Example("x", "Q", "A", None, [uri, Path("/abs/b.png")])]


def thoughts(value: str, **rest) -> dict:
    turns = [{"from": "user", "value": "Why?"}, {"from": "assistant", "value": value}]
    return {"system": "Think.", "conversations": turns, **rest}


RELEASED = ("<|begin_of_thought|>\n\nHm.\n\nYes.\n\n<|end_of_thought|>\n\n"
            "<|begin_of_solution|>\n\n42\n\n<|end_of_solution|>")
ORZ = [{"from": "human", "value": "1+1?"}, {"from": "assistant", "ground_truth": {"value": "2", "pass_at_n": 0.5}}]
GSM8K = {"question": "How many?", "answer": "48/2 = <<48/2=24>>24\nso\n#### 1,224"}
MEDQA = {"question": "Which?", "answer": "Iron", "options": {"A": "Zinc", "B": "Iron"}, "meta_info": "step1",
         "answer_idx": "B"}


@pytest.mark.parametrize("record, expected", [
    (thoughts(RELEASED), Example("d-1", "Why?", "42", meta={"system": "Think."},
                                 response="<think>\nHm.\n\nYes.\n</think> <answer>42</answer>")),
    (ORZ, Example("d-1", "1+1?", "2", meta={"pass_at_n": 0.5})),
    (GSM8K, Example("d-1", "How many?", "1224", meta={"solution": "48/2 = <<48/2=24>>24\nso"})),
    (MEDQA, Example("d-1", "Which?", "B", {"A": "Zinc", "B": "Iron"}, meta={"meta_info": "step1", "answer_idx": "B"})),
], ids=["open_thoughts", "orz", "gsm8k", "medqa"])
def test_published_schemas(tmp_path, record, expected):
    assert list(read_examples(written(tmp_path, [record]))) == [expected]
    two = [expected.id[:-1] + "2", expected.question]
    for content in ([record, record], json.dumps([record, record]), json.dumps([record, record], indent=1),
                    b"\xef\xbb\xbf" + json.dumps(record).encode() + b"\r\n\r\n" + json.dumps(record).encode()):
        first, second = read_examples(written(tmp_path, content))
        assert first == expected and [second.id, second.question] == two


def test_jsonl_is_streamed(tmp_path):
    reader = read_examples(written(tmp_path, '{"question": "a", "answer": "b"}\n{"question":'))
    assert next(reader).question == "a"
    assert "line 2: malformed JSON" in complaint(next, reader)


BAD_FILES = {
    "empty": ("", "no examples in the file"),
    "blank": ("\n \n", "no examples in the file"),
    "empty_array": ("[]", "no examples in the file"),
    "malformed_line": ('{"question": "a", "answer": "b"}\n\n{"question": }',
                       "line 3: malformed JSON (Expecting value, column 14)"),
    "malformed_array": ("[\n{},\n{]\n", "malformed JSON (Expecting"),
    "malformed_orz_line": (json.dumps(ORZ) + "\n[{]\n", "line 2: malformed JSON"),
    "not_utf8": (b'{"question": "\xff", "answer": "b"}', "line 1: malformed JSON ('utf-8'"),
    "deep": ("[" * 200_000, "malformed JSON ("),
    "a_number": ("7", "line 1: a record must be"),
    "array_of_numbers": ("[7]", "item 1: a record must be"),
    "unknown": ([{"a": 1, "b": 2}], "line 1: unknown schema (fields: a, b)"),
    "no_fields": ([{}], "line 1: unknown schema (fields: none)"),
    "no_answer": ([{"question": "a"}], "line 1: field 'answer' is missing"),
    "empty_answer": ([{"question": "a", "answer": ""}], "line 1: field 'answer' is missing or empty"),
    "no_question": ([{"answer": "a"}], "line 1: field 'question' is missing"),
    "question_type": ([{"question": ["a"], "answer": "b"}], "line 1: field 'question' must be text, not ['a']"),
    "answer_type": ([{"question": "a", "answer": True}], "line 1: field 'answer' must be text, not True"),
    "surrogate": ([{"question": "a\ud800", "answer": "b"}], "line 1: field 'question' is not valid Unicode"),
    "options_type": ([{"question": "a", "answer": "b", "options": 7}], "field 'options' must be an object or an array"),
    "option_type": ([{"question": "a", "answer": "A", "options": {"A": {}}}], "field 'options': field 'A' is missing"),
    "answer_no_option": ([{"question": "a", "answer": "C", "options": {"A": "x"}}],
                         "field 'answer' is none of the options"),
    "image_type": ([{"question": "a", "answer": "b", "image": [3]}], "line 1: field 'image' must be a path"),
    "response_type": ([{"question": "a", "answer": "b", "response": {"x": 1}}], "field 'response' must be text"),
    "gsm8k_no_number": ([{"question": "a", "answer": "b ####"}], "line 1: field 'answer' is missing or empty"),
    "medqa_options": ([{"question": "a", "answer_idx": "A"}], "line 1: field 'options' is missing"),
    "option_keys": ([{"question": "q", "answer": "1", "options": {"1": "x", "2": "y"}}],
                    "line 1: field 'options' must have letters from A to P as keys, not 1, 2"),
    "medqa_letter": ([MEDQA | {"answer_idx": "E"}], "line 1: field 'answer' is none of the options"),
    "item": (json.dumps([ORZ, ORZ[:1]]), "item 2: a record must be"),
    "orz_no_truth": ([[ORZ[0], {"from": "assistant"}]], "line 1: field 'ground_truth' is missing"),
    "orz_no_value": ([[ORZ[0], {"ground_truth": {"pass_at_n": 1}}]], "field 'ground_truth': field 'value' is missing"),
    "orz_no_question": ([[{"from": "human"}, ORZ[1]]], "line 1: field 'value' is missing"),
    "one_turn": ([{"conversations": [{"from": "user", "value": "a"}]}], "field 'conversations' must be a user's and"),
    "turn_type": ([{"conversations": ["a", "b"]}], "field 'conversations' must be a user's and"),
    "no_tags": ([thoughts("42")], "field 'conversations': the response is not <|begin_of_thought|>"),
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
    assert "to_json('t.jsonl'" in complaint(lambda: list(read_examples(tmp_path / "t.parquet")))
