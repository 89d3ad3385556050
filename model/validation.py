"""Checks of values that come from outside. Each error names the field, the value and its bounds.

Every value of a request is checked here before it reaches a device. On a GPU, an index out
of range is an assertion inside a kernel, after which no call of the process succeeds any more.
"""

import numpy as np

from valle.model.tokens import CODEBOOK_SIZE


def validate_integer(name: str, value: object, low: int, high: int) -> None:
    """Raises ValueError for anything but an integer in `low` to `high`."""
    if type(value) is not int and not isinstance(value, np.integer):
        raise ValueError(f"{name}: {_shown(value)} is not an integer")
    if not low <= value <= high:
        bound = f"2**{high.bit_length()} - 1" if high > 2**30 else high
        raise ValueError(f"{name}: {_shown(value)} is not in {low} to {bound}")


def validate_number(name: str, value: object, low: float, high: float) -> None:
    """Raises ValueError for anything but a number in `low` to `high`; NaN is none."""
    if type(value) not in (int, float) and not isinstance(value, np.floating | np.integer):
        raise ValueError(f"{name}: {_shown(value)} is not a number")
    if not low <= value <= high:  # type: ignore[operator]
        raise ValueError(f"{name}: {_shown(value)} is not in {low:g} to {high:g}")


def validate_ids(name: str, ids: object, count: int | None = None) -> None:
    """Raises ValueError for anything but a sequence of integers, 0 to `count` - 1 where it is
    given."""
    if type(ids) not in (list, tuple):
        raise ValueError(f"{name}: {type(ids).__name__} is not a list of integers")
    for value in ids:  # type: ignore[attr-defined]
        validate_integer(name, value, 0, 2**31 - 1 if count is None else count - 1)


def validate_codes(name: str, codes: object, n_codebooks: int | None = None, ndim: int = 2) -> None:
    """Raises ValueError for anything but an int16 array `[Q, T]`, or `[T]` with `ndim` 1,
    whose values are entries of a codebook."""
    if type(codes) is not np.ndarray:  # a subclass may compute otherwise
        raise ValueError(f"{name}: {type(codes).__name__} is not an array")
    if codes.ndim != ndim:
        raise ValueError(f"{name}: {codes.ndim} dimensions, not {ndim}")
    if codes.dtype != np.int16:
        raise ValueError(f"{name}: {codes.dtype} is not int16")
    if n_codebooks is not None and len(codes) != n_codebooks:
        raise ValueError(f"{name}: {len(codes)} codebooks, not {n_codebooks}")
    if codes.size and not 0 <= codes.min() <= codes.max() < CODEBOOK_SIZE:
        raise ValueError(f"{name}: codes outside 0 to {CODEBOOK_SIZE - 1}")


def validate_wave(name: str, wave: object) -> None:
    """Raises ValueError for anything but an array of finite floats `[samples]`, at least one."""
    if not isinstance(wave, np.ndarray) or wave.ndim != 1:
        raise ValueError(f"{name}: not an array of samples")
    if wave.dtype.kind != "f":
        raise ValueError(f"{name}: {wave.dtype} is not a floating-point type")
    if not len(wave):
        raise ValueError(f"{name}: no samples")
    if not np.isfinite(wave).all():
        raise ValueError(f"{name}: NaN or infinite samples")


def _shown(value: object) -> str:
    """A value as a message shows it; Python refuses to print an integer of 5000 digits."""
    if type(value) is int and abs(value) >= 10**40:
        return "an integer of more than 40 digits"
    return (
        repr(value)[:60]
        if isinstance(value, int | float | str | np.number)
        else type(value).__name__
    )
