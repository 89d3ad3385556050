"""Sentence lists of a corpus: the project's own files, and WordNet's examples.

WordNet illustrates its words with 30,000 short phrases of modern English. They contain about 28,000
different words, far more than a list written by hand. They are read from Debian's package
`wordnet-base` (Princeton's permissive licence) and are not part of the repository.
"""

import random
import re
from pathlib import Path

from valle.platform.recipe import RecipeError

FOLDER = Path(__file__).parent / "sentences"
WORDNET = Path("/usr/share/wordnet")


def load_sentences(name: str) -> list[str]:
    """Sentences of the list `name`: a file in `jobs/speakers/sentences`, or `wordnet`.

    Raises RecipeError for an unknown name, or when WordNet is not installed.
    """
    if name == "wordnet":
        return wordnet(WORDNET)
    path = FOLDER / f"{name}.txt"
    if not path.is_file():
        names = ", ".join([*sorted(p.stem for p in FOLDER.glob("*.txt")), "wordnet"])
        raise RecipeError(f"sentences: no list {name!r}; known: {names}")
    return path.read_text().splitlines()


def wordnet(folder: Path) -> list[str]:
    """WordNet's examples as sentences of 4 to 24 words, in a fixed order.

    Of every three examples, two are joined to one line when it has no more than 24 words. Raises
    RecipeError when `folder` has no WordNet data.
    """
    files = sorted(folder.glob("data.*"))
    if not files:
        raise RecipeError(f"sentences: wordnet is not in {folder}; apt-get install wordnet-base")
    glosses = [line for path in files for line in path.read_text("latin1").splitlines()]
    sentences = {
        _sentence(example)
        for gloss in glosses
        if not gloss.startswith(" ")  # the licence, at the top of each file
        for example in re.findall(r'"([^"]+)"', gloss)
        if re.fullmatch(r"[A-Za-z][A-Za-z' ,;:!?.-]+", example.strip())
    }
    short = sorted(s for s in sentences if 4 <= len(s.split()) <= 20)
    random.Random("wordnet").shuffle(short)
    lines = []
    while len(short) >= 3:
        lines.append(short.pop())
        first, second = short.pop(), short.pop()
        joined = f"{first} {second}"
        lines += [joined] if len(joined.split()) <= 24 else [first, second]
    return lines


def _sentence(example: str) -> str:
    text = " ".join(example.split()).rstrip(" .,;:-")
    return text[:1].upper() + text[1:] + ("" if text.endswith(("!", "?")) else ".")
