"""The stages of `prepare`: Arrow tables in and out, one table for each shard, without Ray.

A stage raises RowFaultError for a fault of a row, which becomes a reject. All other errors end the
run: StorageError, and errors of this program.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from valle.jobs.ingest.crashes import RowFaultError, attempt
from valle.jobs.ingest.lines import decode_text
from valle.jobs.ingest.output import write_rejects
from valle.jobs.ingest.recipe import PrepareRecipe
from valle.jobs.ingest.source import Reject
from valle.model.codec.loading import load_codec
from valle.model.languages import espeak_voice
from valle.model.text import phoneme_ids
from valle.model.tokens import SAMPLE_RATE
from valle.platform import audio, dataset, resources, settings, storage
from valle.platform.decoder_pool import DecoderPool
from valle.platform.retries import Retrier, StorageError, is_forbidden_file

Row = dict[str, Any]

MAX_TEXT_BYTES = 1_000_000
"""Largest transcript that is read."""
CHARACTERS_PER_PHONEME = 20
"""Longer texts than this times `max_phonemes` are not phonemized."""
MAX_BYTES_PER_SECOND = 192_000 * 8 * 4
"""The most a recording needs: 192 kHz, 8 channels, 4 bytes."""
MAX_HEADER_BYTES = 16_000_000
"""The most that pictures and tags add."""

TEXT_ERRORS = (ValueError, LookupError, ArithmeticError, TypeError, AttributeError,
               AssertionError, NotImplementedError, RecursionError)  # fmt: skip
"""What libraries raise for a text or language that they cannot convert. A converter that is broken
fails at a known sentence before, which ends the run."""

_COLUMNS = {
    "id": pa.string(), "speaker": pa.string(), "language": pa.string(), "audio": pa.string(),
    "text": pa.string(), "text_uri": pa.string(), "stamp": pa.string(), "shard": pa.string(),
    "run": pa.string(), "reason": pa.string(), "retries": pa.int32(),
    "phonemes": pa.list_(pa.int16()), "wave": pa.large_binary(),
}  # fmt: skip


def schema(drop: Sequence[str] = ()) -> pa.Schema:
    """The columns of a shard between two stages."""
    return pa.schema([(name, kind) for name, kind in _COLUMNS.items() if name not in drop])


def map_rows(
    rows: pa.Table,
    function: Callable[[Row], Row],
    recipe: PrepareRecipe,
    retrier: Retrier,
    stage: str,
    drop: Sequence[str] = (),
) -> pa.Table:
    """Merges `function(row)` into each row without a `reason`. The message of a RowFaultError
    becomes the row's `reason`."""
    mapped = []
    items = rows.to_pylist()
    with attempt(recipe.out, stage, items[0]["shard"], items[0]["run"], retrier) as present:
        for row in items:
            before = retrier.retries
            if row["reason"] is None:
                try:
                    present.enter(row["id"])
                    row |= function(row)
                except RowFaultError as error:
                    row["reason"] = str(error)
            row["retries"] += retrier.retries - before
            mapped.append({key: value for key, value in row.items() if key not in drop})
    return pa.Table.from_pylist(mapped, schema=schema(drop))


def read_input(retrier: Retrier, uri: str, what: str, max_bytes: int) -> bytes:
    """The content of a row's file. Raises RowFaultError for a fault of the file, and
    StorageError."""
    try:
        return retrier.call(storage.read_bytes, uri, max_bytes=max_bytes)
    except FileNotFoundError as error:
        raise RowFaultError(f"no {what}: {uri} does not exist") from error
    except ValueError as error:  # too large, or no URI
        raise RowFaultError(f"{what} cannot be read: {error}") from error
    except StorageError as error:
        # The file's own mode, where its folder may be read, is a fault of the file.
        if error.__cause__ is not None and is_forbidden_file(uri, error.__cause__):
            raise RowFaultError(f"{what} cannot be read: no permission for {uri}") from error
        raise
    except OSError as error:  # a folder, a name too long, a link in a circle
        raise RowFaultError(f"{what} cannot be read: {error}") from error


class Phonemize:
    """Reads the transcript of each row and converts it to phoneme ids."""

    def __init__(self, recipe: PrepareRecipe) -> None:
        self._recipe = recipe
        self._retrier = Retrier(recipe.storage_retry_seconds)
        phoneme_ids("hello", "en-us")  # a broken installation is no row's fault

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Adds `text` and `phonemes`; `language` becomes the name of espeak's voice."""
        return map_rows(
            rows, self._phonemize, self._recipe, self._retrier, "phonemize", drop=["wave"]
        )

    def _phonemize(self, row: Row) -> Row:
        recipe = self._recipe
        text = row["text"]
        if text is None:
            data = read_input(self._retrier, row["text_uri"], "transcript", MAX_TEXT_BYTES)
            try:
                text = decode_text(data)
            except UnicodeDecodeError as error:
                raise RowFaultError(f"text is not UTF-8: {error}") from error
        text = text.strip()
        if not text:
            raise RowFaultError("empty text")
        if len(text) > (limit := CHARACTERS_PER_PHONEME * recipe.max_phonemes):
            raise RowFaultError(f"text too long: {len(text)} characters, limit {limit}")
        try:
            ids = phoneme_ids(text, row["language"])
            voice = espeak_voice(row["language"])
            if not phonemes_fit(len(ids), recipe):
                raise RowFaultError(
                    f"phoneme count out of range: {len(ids)}, "
                    f"limits {recipe.min_phonemes} and {recipe.max_phonemes}"
                )
        except RowFaultError:
            raise
        except TEXT_ERRORS as error:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise RowFaultError(f"text cannot be phonemized: {kind}{error}") from error
        return {"text": text, "phonemes": ids, "language": voice}


def phonemes_fit(count: int, recipe: PrepareRecipe) -> bool:
    """True if a text of so many phonemes is within the limits."""
    return recipe.min_phonemes <= count <= recipe.max_phonemes


class DecodeAudio:
    """Reads the wave (24 kHz mono) of each row; checks duration and level."""

    def __init__(self, recipe: PrepareRecipe) -> None:
        self._recipe = recipe
        self._retrier = Retrier(recipe.storage_retry_seconds)
        self._max_bytes = int(recipe.max_seconds * MAX_BYTES_PER_SECOND) + MAX_HEADER_BYTES

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Adds `wave` (bytes of float32 samples)."""
        with DecoderPool() as decoders:  # a crash rejects the recording
            decode = partial(self._decode, decode=decoders.decode)
            return map_rows(rows, decode, self._recipe, self._retrier, "decode")

    def _decode(self, row: Row, decode: audio.Decode) -> Row:
        recipe = self._recipe
        data = read_input(self._retrier, row["audio"], "recording", self._max_bytes)
        try:
            wave = audio.read(
                data,
                max_seconds=recipe.max_seconds,
                max_clipped=recipe.max_clipped,
                decode=decode,
            )
        except audio.AudioError as error:
            raise RowFaultError(str(error)) from error
        seconds = len(wave) / SAMPLE_RATE
        if seconds < recipe.min_seconds:
            raise RowFaultError(f"too short: {seconds:.2f} s, limit {recipe.min_seconds:g} s")
        if (level := audio.rms_dbfs(wave)) < recipe.min_rms_dbfs:
            raise RowFaultError(f"too quiet: {level:.0f} dB, limit {recipe.min_rms_dbfs:g} dB")
        return {"wave": wave.tobytes()}


class EncodeShard:
    """Encodes the waves of a shard in batches of similar duration, and writes the shard."""

    def __init__(self, recipe: PrepareRecipe) -> None:
        import torch

        device = resources.device()
        if device == "cpu":
            torch.set_num_threads(1)  # one actor per core
        self._codec = load_codec(recipe.codec, device=device, cache=settings.read().cache)
        self._recipe = recipe
        self._retrier = Retrier(recipe.storage_retry_seconds)
        self._batch_seconds = recipe.batch_seconds or (10.0 if device == "cpu" else 120.0)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Returns one row: the shard's counts, rejects and times as JSON in `result`."""
        started = time.perf_counter()
        before = self._retrier.retries
        items = rows.to_pylist()
        name, run = items[0]["shard"], items[0]["run"]
        with attempt(self._recipe.out, "encode", name, run, self._retrier) as present:
            if present.is_careful:
                encoded = []
                for row in items:
                    if row["reason"] is None:
                        try:
                            present.enter(row["id"])
                            encoded += self._encode([row])
                        except RowFaultError as error:
                            row["reason"] = str(error)
            else:
                encoded = self._encode([row for row in items if row["reason"] is None])
            rejects = [
                Reject(id=row["id"], source=row["audio"], reason=row["reason"])
                for row in items
                if row["reason"] is not None
            ]
            # The shard is written last: its ids mark these inputs as done for the next run.
            self._retrier.call(write_rejects, self._recipe.out, name, rejects)
            shard = None
            if encoded:
                table = dataset.to_table(encoded)
                shard = asdict(
                    self._retrier.call(dataset.write_shard, self._recipe.out, name, table)
                )
        waves = [row["wave"] for row in items if row["reason"] is None]
        retries = sum(row["retries"] for row in items) + self._retrier.retries - before
        result = {
            "name": name,
            "inputs": len(items),
            "rejects": [asdict(r) for r in rejects],
            "shard": shard,
            "ids": [row["id"] for row in encoded],
            "retries": retries,
            "speech_seconds": sum(map(len, waves)) / 4 / SAMPLE_RATE,
            "codec_seconds": time.perf_counter() - started,
        }
        return pa.table({"result": [json.dumps(result)]})

    def _encode(self, rows: Sequence[Row]) -> list[Row]:
        """Rows of the dataset's schema."""
        waves = [np.frombuffer(row["wave"], np.float32) for row in rows]
        codes = self._codec.encode(waves, self._batch_seconds)
        return [
            {key: row[key] for key in ("id", "speaker", "language", "text", "phonemes", "stamp")}
            | {"codes": code, "frames": code.shape[1], "source": row["audio"]}
            for row, code in zip(rows, codes, strict=True)
        ]
