"""Markdown, HTML and line ends to plain lines."""

import pytest

from valle.model.markup import plain_lines


@pytest.mark.parametrize(
    "text",
    [
        "x < y and z > 3", "if x<y and z>3", "5 * 3 = 15", "snake_case_name", "[Note]: this is it",
        "text[1] and [2]", "#1 is good", "1984. It was cold.", "<speak>hi</speak>", "I <3 you",
        "C:\\x", "a|b", "$5 and $6", "--- a",
    ],
)  # fmt: skip
def test_plain_lines_leaves_what_is_no_markup(text: str) -> None:
    assert plain_lines(text) == [text]


def test_plain_lines_multiplies_by_stars() -> None:
    assert plain_lines("2*3*4 is not *4*") == ["2×3×4 is not 4"]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("- a\n  - b\n    - c", ["a.", "b.", "c."]),
        ("1. a\n2. b?", ["1. a.", "2. b?"]),
        ("> q\n> r", ["q.", "r."]),
        ("a\u2028b\x85c\x0bd", ["a.", "b.", "c.", "d."]),
        ("• milk\n• eggs", ["milk.", "eggs."]),
        ("| a | b |\n|---|:-:|\n| 1 | 2 |", ["a, b.", "1, 2."]),
        ("a<br/>b <p>c</p>", ["a.", "b.", "c."]),
        ("---", []), ("```", []), ("", []),
        ("```sh\nls\n```", ["ls"]),
        ("He said:\n\n“yes”", ["He said:", "“yes”."]),
        ("😀", ["😀"]), ("I 😀 it 👍🏽 1️⃣ 🇩🇪 ok", ["I it 1 ok"]),
        ("&lt;b&gt; &#39;x&#39;", ["<b> 'x'"]),
    ],
)  # fmt: skip
def test_plain_lines_of_markup(text: str, lines: list[str]) -> None:
    assert plain_lines(text) == lines


@pytest.mark.parametrize("mark", [">", "- ", "1. ", "> - ", "  "])
def test_plain_lines_keeps_text_however_deep_it_is(mark: str) -> None:
    deep = "\n".join(mark * depth + f"x{depth}" for depth in range(60))
    text = " ".join(plain_lines(deep))
    assert all(f"x{depth}" in text for depth in range(60))
