"""Statistics of one response, logged and exported when it ends."""

import time
from dataclasses import dataclass

from valle.model.tokens import FRAME_RATE
from valle.serve.web.sentence import AudioChunk


@dataclass
class SpeechStats:
    """Counts and times of a response so far."""

    characters: int
    start_time: float
    """By `time.perf_counter`."""
    sender: str = ""
    """Key, request and voice, for the log."""
    n_frames: int = 0
    hit_limit: bool = False
    """A length limit ended one of the sentences."""
    time_to_first_audio: float = 0.0
    """Seconds from the start to the first chunk."""
    wall_seconds: float = 0.0
    """Seconds from the start to the last chunk so far."""

    def add(self, chunk: AudioChunk) -> None:
        """Counts a chunk that is ready now."""
        self.wall_seconds = time.perf_counter() - self.start_time
        self.time_to_first_audio = self.time_to_first_audio or self.wall_seconds
        self.n_frames += chunk.n_frames
        self.hit_limit |= chunk.hit_limit

    def __str__(self) -> str:
        duration = self.n_frames / FRAME_RATE
        return (
            f"{self.sender} characters={self.characters} audio_s={duration:.2f} "
            f"wall_s={self.wall_seconds:.2f} "
            f"time_to_first_audio_s={self.time_to_first_audio:.2f} "
            f"real_time_factor={self.wall_seconds / duration:.2f} hit_limit={self.hit_limit}"
        )
