import hashlib
import warnings

import pytest

from valle.model import text


@pytest.mark.parametrize(
    ("written", "language", "ipa"),
    [
        ("Hello, world!", "en-us", "həlˈoʊ, wˈɜːld!"),
        ("Hello, world!", "EN", "həlˈoʊ, wˈɜːld!"),
        ("Bonjour", "fr-FR", "bɔ̃ʒˈuʁ"),
        ("Buenos días", "es", "bwˈenos ðˈias"),
        ("Guten Tag", "de", "ɡˈuːtən tˈɑːk"),
        ("At 1:00am", "en-us", "æt wˈʌn ˈeɪˈɛm"),
        ("AT&T and R&D", "en-us", "ˈeɪtˈiː ænd tˈiː ænd ˈɑːɹ ænd dˈiː"),
    ],
)
def test_phonemize_keeps_stress_word_boundaries_and_punctuation(
    written: str, language: str, ipa: str
) -> None:
    assert text.phonemize([written], language) == [ipa]


def test_phonemize_with_empty_lines_keeps_the_order() -> None:
    alone = text.phonemize(["one"])
    assert text.phonemize(["", "one", "  "]) == ["", *alone, ""]


def test_encode_knows_all_symbols_of_espeak() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for language, line in [
            ("en-us", "The quick brown fox jumps; measure, joy, thing, this: (naïve) café?"),
            ("fr-fr", "Un bon vin blanc, œuvre, garçon, Noël; agneau!"),
            ("es", "¿Qué tal, señor? ¡El pingüino llovía!"),
            ("de", "Schöne Grüße, ich möchte Bücher, Äpfel und Pfützen."),
            ("it", "Gli gnocchi, sci, zaino"), ("ru", "Здравствуйте, щука, ещё"),
            ("ja", "こんにちは"), ("eu", "zazpi etxe"), ("ky", "саламатсызбы"), ("da", "rødgrød"),
        ]:  # fmt: skip
            ipa = text.phonemize([line], language)[0]
            assert text.decode(text.encode(ipa)) == ipa


def test_encode_of_unknown_symbols_warns_and_gives_unk() -> None:
    with pytest.warns(UserWarning, match=r"'☃' \(U\+2603\)"):
        ids = text.encode("a☃b")
    assert ids[1] == text.UNK
    assert text.decode(ids) == "a\ufffdb"


def test_phonemize_of_unknown_language_names_the_field() -> None:
    with pytest.raises(ValueError, match="language: espeak has no voice named 'xx-yy'"):
        text.phonemize(["hello"], "xx-yy")


@pytest.mark.parametrize(("line", "language"), [("你好", "zh"), ("xin chào", "vi"), ("สวัสดี", "th")])
def test_phoneme_ids_refuses_tones(line: str, language: str) -> None:
    """The inventory has none; as `<unk>` they would all be one."""
    with pytest.raises(ValueError, match="language: .* has tones"):
        text.phoneme_ids(line, language)


def test_inventory_is_stable() -> None:
    """Ids are in datasets and checkpoints: symbols may be appended, never moved."""
    symbols = "".join(text.INVENTORY[:156]).encode()
    assert hashlib.sha256(symbols).hexdigest()[:16] == "ac625bd32c708482"
    assert len(set(text.INVENTORY)) == len(text.INVENTORY)


def test_read_phn_of_the_reference_system() -> None:
    content = "h ə lˈ oʊ ,  w ˈɜː l d"
    assert text.read_phn(content) == "həlˈoʊ, wˈɜːld"
    assert text.UNK not in text.encode(text.read_phn(content))
