"""All inputs of a run: the items of its sources, and the rejects of their listing."""

from collections.abc import Sequence
from dataclasses import replace

from valle.jobs.ingest.layouts import list_items
from valle.jobs.ingest.manifest import stamp
from valle.jobs.ingest.source import Reject, Source, SourceItem
from valle.platform import storage
from valle.platform.recipe import RecipeError
from valle.platform.retries import Retrier, StorageError, is_refusal


def list_sources(
    sources: Sequence[Source], retrier: Retrier
) -> tuple[list[SourceItem], list[Reject]]:
    """Items and rejects of all sources. The second item with the same id becomes a reject.

    Raises RecipeError when two roots of the same name hold the same paths.
    """
    items: dict[str, tuple[int, SourceItem]] = {}
    rejects: list[Reject] = []
    for number, source in enumerate(sources):
        for entry in list_items(source, retrier):
            if isinstance(entry, Reject):
                rejects.append(entry)
                continue
            first_number, first = items.setdefault(entry.id, (number, entry))
            if first is entry:
                continue
            if first_number != number and not (first.has_own_id or entry.has_own_id):
                raise RecipeError(
                    f"sources: {entry.origin} and {first.origin} have the same id {entry.id!r}; "
                    "rename one of the roots, or name ids in a manifest"
                )
            rejects.append(Reject(id=entry.id, source=entry.origin, reason=_repeated(entry, first)))
    return [item for _, item in items.values()], rejects


def _repeated(entry: SourceItem, first: SourceItem) -> str:
    advice = "" if entry.has_own_id else "; lines of one recording need ids of their own"
    return f"repeated id: {entry.id!r} of {entry.origin} is that of {first.origin}{advice}"


def add_stamps(items: Sequence[SourceItem], retrier: Retrier) -> list[SourceItem]:
    """The items with sizes and times of their files, where the layout has not listed them: one
    listing for each folder that a manifest names. Raises StorageError."""
    stamps = _Stamps(retrier)
    return [item if item.stamp else replace(item, stamp=stamps(item.audio)) for item in items]


class _Stamps:
    """Sizes and times of recordings, from one listing of each folder."""

    def __init__(self, retrier: Retrier) -> None:
        self._retrier = retrier
        self._folders: dict[str, dict[str, str]] = {}

    def __call__(self, uri: str) -> str:
        folder, _, name = uri.rpartition("/")
        if folder not in self._folders:
            self._folders[folder] = self._list(folder)
        return self._folders[folder].get(name, "")

    def _list(self, folder: str) -> dict[str, str]:
        try:
            entries = self._retrier.call(storage.list_entries, folder, recursive=False)
        except StorageError as error:
            if not is_refusal(error):
                raise
            return {}  # the right to read files may come without the right to list them
        except OSError:  # no folder, or a name that none can have: the reader of the file says so
            return {}
        return {entry.path: stamp(entry) for entry in entries}
