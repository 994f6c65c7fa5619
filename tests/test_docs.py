"""The documents are true: every code block of the walkthrough prints what stands behind it."""

import contextlib
import io
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
BLOCK = re.compile(r"```python\n(.*?)```\n```text\n(.*?)```", re.DOTALL)


def run_page(text: str) -> list[tuple[str, str]]:
    """Runs a page's blocks one after the other; what each should print, and what it prints."""
    names, found = {"__name__": "page"}, []
    for code, expected in BLOCK.findall(text):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, "walkthrough.md", "exec"), names)
        found.append((expected, out.getvalue()))
    return found


@pytest.mark.parametrize("page", ["walkthrough.md"])
def test_blocks_print_what_the_page_says(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    found = run_page(text)
    assert len(found) == text.count("```python") > 5
    for expected, printed in found:
        assert printed == expected
