"""Batches of items of similar length."""

from collections.abc import Iterator, Sequence


def batch_by_length(sizes: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Indices of the non-empty items, sorted by size, in batches whose padded size (the largest
    item times their number) is at most `limit`. An item above `limit` gets its own batch."""
    batch: list[int] = []
    for index in sorted((i for i, n in enumerate(sizes) if n), key=lambda i: sizes[i]):
        if batch and sizes[index] * (len(batch) + 1) > limit:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
