"""Times and dates in words, or in forms that wetext reads."""

import calendar
import re

from valle.model.english_numbers import cardinal


def clock(match: re.Match[str]) -> str:
    """Hour, minutes and half of the day; espeak reads AM as a word."""
    hour, minutes, half = match["hour"], match["minutes"], match["half"].upper()
    words = cardinal(str(int(hour)))
    if minutes and int(minutes):
        words += f" {cardinal(minutes) if minutes[0] != '0' else f'oh {cardinal(minutes[1])}'}"
    # "5 p.m." closes a sentence where none of it follows
    closes = match["dot"] and not match.string[match.end() :].strip(" \"')]")
    return f"{words} {half}-M{'.' if closes else ''}"


def short_date(match: re.Match[str]) -> str:
    """A date with a year of two figures, with four: wetext knows those."""
    low, high = sorted((int(match[1]), int(match[2])))
    if not (0 < low <= 12 and high <= 31):
        return match[0]
    return f"{match[1]}/{match[2]}/{'20' if match[3] < '50' else '19'}{match[3]}"


def duration(match: re.Match[str]) -> str:
    """Hours, minutes and seconds: "1h 30m"."""
    hours, minutes, seconds = match.groups()
    parts = ((hours, "hour"), (minutes, "minute"), (seconds, "second"))
    return " ".join(f"{cardinal(n)} {unit}{'s' * (n != '1')}" for n, unit in parts if n)


def decade(match: re.Match[str]) -> str:
    """ "nineteen nineties", "nineties", "eighteen hundreds"."""
    century, tens = match["century"], match["tens"]
    names = {
        "1": "tens", "2": "twenties", "3": "thirties", "4": "forties", "5": "fifties", "6":
        "sixties", "7": "seventies", "8": "eighties", "9": "nineties",
    }  # fmt: skip
    if not century:
        return names[tens]
    if tens == "0":
        whole = f"{cardinal(century[0])} thousand" if century[1] == "0" else cardinal(century)
        return f"{whole}s" if century[1] == "0" else f"{whole} hundreds"
    return f"{cardinal(century)} {names[tens]}"


def month_of_year(match: re.Match[str]) -> str:
    """ "12/2024" as "December 2024", which wetext reads."""
    return f"{calendar.month_name[int(match[1])]} {match[2]}"
