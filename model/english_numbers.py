"""Numbers in English words, for digits, years and amounts, which wetext reads otherwise."""

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_MAX_CARDINAL = 15
"""Digits up to which a number is read as one; a longer one is an identifier."""


def digits(text: str) -> str:
    """The digits of `text` one by one; other characters are left out."""
    return " ".join(_DIGITS[int(character)] for character in text if character in "0123456789")


def cardinal(number: str) -> str:
    """Words of a number in figures, with decimals after a point: "1234.50" and "1,234.50"."""
    from num2words import num2words

    whole, _, part = number.replace(",", "").partition(".")
    whole = whole or "0"
    if len(whole) > _MAX_CARDINAL:
        words = digits(whole)
    else:
        words = str(num2words(int(whole), lang="en")).replace(",", "")
    return f"{words} point {digits(part)}" if part else words


def year(number: str) -> str:
    """Words of a year of four figures: "nineteen oh five", "two thousand five", "eighteen
    hundred"."""
    century, rest = number[:2], number[2:]
    if number[1:3] == "00":
        return cardinal(number)
    if rest == "00":
        return f"{cardinal(century)} hundred"
    tail = f"oh {cardinal(rest[1])}" if rest[0] == "0" else cardinal(rest)
    return f"{cardinal(century)} {tail}"


def letters(text: str) -> str:
    """Letters that espeak reads one by one: "U-S". Between spaces, it takes A for the article."""
    return "-".join(character.upper() for character in text if character.isalpha())
