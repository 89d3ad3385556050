"""Markup to plain lines: Markdown, HTML entities and tags, line ends and emoji.

Chat programs send Markdown, which markdown-it parses. What only resembles markup stays as it is:
`5 * 3`, `snake_case`, `x < y`.
"""

import re
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token

_LINE_END = re.compile(r"\r\n?|[\n\v\f\x1c-\x1e\x85\u2028\u2029]")
_TAG = re.compile(
    r"</?(?:a|abbr|b|big|blockquote|body|br|center|code|dd|del|details|div|dl|dt|em|font|h[1-6]|hr|"
    r"html|i|img|ins|kbd|li|mark|ol|p|pre|q|s|samp|small|span|strike|strong|sub|summary|sup|think|"
    r"table|tbody|td|th|thead|tr|tt|u|ul|var)(?:\s[^<>]{0,500})?/?>",
    re.IGNORECASE,
)
"""Tags of HTML that chat programs and web pages send; SSML and `x<y` are not among them."""
_COMMENT = re.compile(r"<!--(?:(?!-->).){0,4000}-->", re.DOTALL)
_BREAKING_TAG = re.compile(
    r"</?(?:think|blockquote|br|dd|div|dt|h[1-6]|hr|li|ol|p|pre|table|td|th|tr|ul)\b", re.IGNORECASE
)
_BULLET = re.compile(r"^[ \t]*[•◦▪‣⁃●○■□–—][ \t]+")
_TASK = re.compile(r"^\[[ xX]\]\s+")
_DEEP = re.compile(r"^(?:[ \t]*+(?:[>*+-]|\d{1,9}[.)](?=[ \t]))){9,}+", re.MULTILINE)
"""Marks of quotes and lists, too many within each other: the parser would leave out the text."""
_INDENT = re.compile(r"^[ \t]{16,}", re.MULTILINE)
_PRODUCT = re.compile(r"(?<=\d)\*(?=\w)|(?<=\w)\*(?=\d)|(?<=\b\w)\*(?=\w\b)")
"""A star that multiplies, which Markdown would take for emphasis: `2*3*4`."""
_UNDERLINE = re.compile(r"^[ \t]*={3,}[ \t]*$", re.MULTILINE)
"""The line below a heading."""
_SHRUG = re.compile(r"¯\\*_*\(ツ\)_*/¯")
_CLOSED = re.compile(r"[.?!…:;,。！？।؟]['\")\]”’»]*$")
_EMOJI = r"[\p{Extended_Pictographic}--[©®™‼⁉\u2190-\u21ff\u2122\u2139\u3030\u303d]]"


@lru_cache(maxsize=1)
def _parser() -> "MarkdownIt":
    from markdown_it import MarkdownIt

    # Without: `[Note]: text`, which defines a link and would be silent; indented code; blocks of
    # HTML, whose text is spoken.
    rules = ["reference", "code", "html_block", "lheading"]
    parser = MarkdownIt("commonmark", {"html": False, "maxNesting": 40})
    return parser.enable(["table", "strikethrough"]).disable(rules)


def plain_lines(text: str) -> list[str]:
    """The lines of a text without markup, blank ones left out.

    Of several lines, each ends with a punctuation mark: a line end is at least a pause.
    """
    text = _LINE_END.sub("\n", text)
    text = re.sub(r"(?<=\d)\*\*(?=\d)", "^", text)  # a power
    text = _COMMENT.sub(" ", _SHRUG.sub(" ", _UNDERLINE.sub("", text)))
    text = _TAG.sub(lambda match: "\n" if _BREAKING_TAG.match(match[0]) else "", text)
    text = "\n".join(_BULLET.sub("- ", line) for line in text.split("\n"))
    text = _PRODUCT.sub("×", _INDENT.sub(" " * 16, _DEEP.sub("- ", _without_emoji(text))))
    lines: list[str] = []
    for token in _parser().parse(text):
        _add_token(token, lines)
    lines = [" ".join(line.split()) for part in lines for line in part.split("\n")]
    lines = [line for line in lines if line]
    if len(lines) < 2:
        return lines
    return [line if _CLOSED.search(line) else f"{line}." for line in lines]


def _add_token(token: "Token", lines: list[str]) -> None:
    """Appends what a block of Markdown says to `lines`."""
    if token.type == "inline":
        line = _TASK.sub("", _inline(token))
        if lines and lines[-1].endswith("\0"):  # a list's number, or the cells of a row so far
            lines[-1] = f"{lines[-1][:-1]}{line}"
        else:
            lines.append(line)
    elif token.type in ("fence", "code_block"):
        lines.append(token.content)
    elif token.type == "list_item_open" and token.markup in (".", ")") and token.info:
        lines.append(f"{token.info}. \0")
    elif token.type in ("td_close", "th_close"):
        lines[-1] = f"{lines[-1]}, \0"
    elif token.type == "tr_close":
        lines[-1] = lines[-1].removesuffix("\0").rstrip(", ")


def _inline(token: "Token") -> str:
    """The text of a paragraph, heading or cell; of a link and an image, its words."""
    parts = []
    for child in token.children or []:
        if child.type in ("softbreak", "hardbreak"):
            parts.append("\n")
        elif child.type == "image":
            parts.append(_inline(child))
        elif child.type in ("text", "code_inline", "html_inline", "text_special"):
            parts.append(child.content)
    return "".join(parts)


def _without_emoji(text: str) -> str:
    """The text without emoji; as it is if nothing else is in it, since espeak knows their names."""
    import regex

    if text.isascii():
        return text
    # skin tones, joiners, keycaps and flags go with them
    extra = r"[\p{Emoji_Modifier}\u200d\ufe0f\u20e3\U000e0020-\U000e007f]"
    pattern = rf"(?:{_EMOJI}|[\U0001f1e6-\U0001f1ff]){extra}*|[\ufe0f\u20e3]"
    plain: str = regex.sub(f"(?V1){pattern}", " ", text)
    return plain if any(character.isalnum() for character in plain) else text
