"""The `prepare` section of a recipe."""

from dataclasses import dataclass, field
from typing import Literal

from valle.jobs.ingest.source import Source
from valle.model.codec.loading import CODEC_NAMES
from valle.platform import audio
from valle.platform.recipe import formerly, location
from valle.platform.resources import Placement


@dataclass(frozen=True, kw_only=True)
class PrepareRecipe:
    """Sources, codec, limits and destination of a token dataset."""

    out: str = field(metadata=location())
    """Folder or URI of the token dataset."""

    sources: tuple[Source, ...]
    """Roots of recordings with transcripts."""

    codec: str = field(default="nano", metadata=location(names=CODEC_NAMES))
    """nano, nano2, encodec-24khz, or a path to weights."""

    min_seconds: float = 0.5
    """Shorter recordings are left out."""

    max_seconds: float = 20.0
    """Longer recordings are left out."""

    min_phonemes: int = 2
    """Texts with fewer symbols are left out."""

    max_phonemes: int = 512
    """Texts with more symbols are left out."""

    min_rms_dbfs: float = field(default=-50.0, metadata=formerly("min_loudness"))
    """RMS level in dBFS; quieter recordings are left out. A new limit does not apply to utterances
    that exist."""

    max_clipped: float = audio.MAX_CLIPPED
    """Recordings with a larger share of samples cut off at full scale are left out."""

    on_change: Literal["prepare", "keep"] = "prepare"
    """What happens to an utterance whose text, speaker, language, files (size and time) or limits
    have changed since it was prepared. prepare: it is prepared again, and its old row removed.
    keep: it stays, for a corpus that was copied without its times."""

    utterances_per_shard: int = 512
    """Most recordings per unit of work (shard), rejected ones included."""

    seconds_per_shard: float = 3600.0
    """Most seconds of speech per unit of work, which a worker holds in memory (96 kB a second). A
    unit has at most `seconds_per_shard / max_seconds` recordings."""

    batch_seconds: float | None = None
    """Padded seconds per batch of the codec; default: 10 on a CPU, where larger batches exceed the
    cache (60 is half as fast), 120 on a GPU."""

    storage_retry_seconds: float = 120.0
    """Seconds for which a failed read or write is tried again; then the run stops."""

    workers: int | None = None
    """Limit on codec actors; None: as many as the cluster can hold, nodes that join later included
    (without a GPU: one per core)."""

    placement: Placement = field(default_factory=Placement)
    """CPU or GPU of the codec, and the share per actor. Decoding and phonemization always run on
    CPUs, on nodes with the same labels."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources: at least one is needed")
        if not 0 < self.min_seconds < self.max_seconds:
            raise ValueError("min_seconds: must lie between 0 and max_seconds")
        if self.utterances_per_shard < 1:
            raise ValueError("utterances_per_shard: must be 1 or more")
        if self.seconds_per_shard < self.max_seconds:
            raise ValueError("seconds_per_shard: must be max_seconds or more")

    @property
    def shard_size(self) -> int:
        """Most recordings of a shard."""
        return max(
            1, min(self.utterances_per_shard, int(self.seconds_per_shard / self.max_seconds))
        )
