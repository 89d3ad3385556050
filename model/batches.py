"""What goes through a network together."""

from collections.abc import Iterator, Sequence


def batch_by_length(sizes: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Indices of non-empty items, sorted by size, cut where padded sizes would exceed `limit`.

    A larger item gets a batch of its own.
    """
    group: list[int] = []
    for index in sorted((i for i, n in enumerate(sizes) if n), key=lambda i: sizes[i]):
        if group and sizes[index] * (len(group) + 1) > limit:
            yield group
            group = []
        group.append(index)
    if group:
        yield group
