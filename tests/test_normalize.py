"""Written text to spoken text: a table of inputs with their right values, and the languages."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from valle.model import english
from valle.model.english_rules import RULES
from valle.model.normalize import normalize

TABLE = Path(__file__).parent / "text_table.tsv"


def rows() -> Iterator[tuple[str, list[str]]]:
    """Each input of the table with the readings that are right."""
    for line in TABLE.read_text().splitlines():
        if line and not line.startswith("#"):
            _, written, spoken = line.split("\t")
            written = written.replace("\\n", "\n").replace("\\r", "\r")
            yield written, [fold(reading) for reading in spoken.split(" | ")]


def fold(spoken: str) -> str:
    """Without what cannot be heard: case, commas, hyphens, and "and" within a number."""
    spoken = spoken.casefold().replace("-", " ").replace(",", "").replace("...", "…")
    spoken = re.sub(r"\b(hundred|thousand) and\b", r"\1", spoken)
    return re.sub(r" (?=[.?!;])", "", " ".join(spoken.split()))


def test_table_is_large() -> None:
    assert len(list(rows())) >= 290


@pytest.mark.parametrize(("written", "readings"), list(rows()))
def test_normalize_reads_the_table(written: str, readings: list[str]) -> None:
    assert fold(normalize(written)) in readings


@pytest.mark.parametrize(
    ("written", "language", "expected"),
    [
        ("M. Dupont a 21 ans.", "fr", "monsieur Dupont a 21 ans."),
        ("Il fait 5 m. de long.", "fr-FR", "Il fait 5 m. de long."),
        ("Thé, café, etc.", "fr", "Thé, café, et cetera."),
        ("La Sra. Gómez tiene 25 años", "es", "La señora Gómez tiene 25 años"),
        ("Das kostet 3,5 €, z.B. heute", "de-DE", "Das kostet 3,5 €, zum Beispiel heute"),
        ("Sieh Nr. 5, Dr. Maier & Co", "de", "Sieh Nummer 5, Doktor Maier und Co"),
        ("Это стоит 5 £ и #1 **да**", "ru", "Это стоит 5 £ и 1 да"),
        ("C'est 10%. Tom & Jo (5 %)", "fr", "C'est 10 pour cent. Tom et Jo (5 pour cent)"),
        ("Дом № 5", "ru", "Дом № 5"),
        ("Le № 5", "fr", "Le numéro 5"),
        ("Il fait -5, de 1-3 à (−2)", "fr", "Il fait moins 5, de 1-3 à (moins 2)"),
        ("Hace -3,5 grados", "es-MX", "Hace menos 3,5 grados"),
        ("Сейчас -5", "ru", "Сейчас минус 5"),
        ("Es sind −5 Grad", "de", "Es sind -5 Grad"),
        ("Nas -5", "ga", "Nas −5"),
        ("“Hi”  —\u00a0she’s ﬁne…", "en-us", '"Hi" — she\'s fine…'),
        ("Tiếng Việt, naïve", "en-us", "Tieng Viet, naïve"),
    ],
)
def test_normalize_in_other_languages(written: str, language: str, expected: str) -> None:
    """Digits stay: espeak reads them."""
    assert normalize(written, language) == expected


def test_normalize_when_wetext_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The text stays, and the failure is logged once."""

    class Failing:
        def normalize(self, text: str) -> str:
            raise AssertionError(text)

    english._report.cache_clear()
    monkeypatch.setattr(english, "_normalizer", Failing)
    assert normalize("I have 3 cats. And 4 dogs.") == "I have 3 cats. And 4 dogs."
    assert len(caplog.records) == 1
    monkeypatch.setattr(Failing, "normalize", lambda self, text: "")
    assert normalize("I have 3 cats.") == "I have 3 cats."


def test_normalize_when_a_rule_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The other rules and wetext still run, and the failure is logged."""

    def fail(match: re.Match[str]) -> str:
        raise KeyError(match[0])

    english._report.cache_clear()
    monkeypatch.setattr(english, "RULES", [(re.compile("cats"), fail), *RULES])
    assert normalize("I have 3 cats for $5.") == "I have three cats for five dollars."
    assert len(caplog.records) == 1
