"""What one answer has come to: counted while it is made, logged and measured when it ends."""

import time
from dataclasses import dataclass

from valle.model.tokens import FRAME_RATE
from valle.serve.web.sentence import AudioChunk


@dataclass
class SpeechStats:
    """What an answer has come to; logged when it ends."""

    characters: int
    start_time: float
    """By the performance counter."""
    frames: int = 0
    hit_limit: bool = False
    time_to_first_audio: float = 0.0
    """Seconds until the first chunk was made."""
    wall_seconds: float = 0.0
    """Until the last chunk was made, or the client had gone."""

    def add(self, chunk: AudioChunk) -> None:
        """Counts a chunk that has just been made."""
        self.wall_seconds = time.perf_counter() - self.start_time
        self.time_to_first_audio = self.time_to_first_audio or self.wall_seconds
        self.frames += chunk.frames
        self.hit_limit |= chunk.hit_limit

    def __str__(self) -> str:
        duration = self.frames / FRAME_RATE
        return (
            f"characters={self.characters} audio_s={duration:.2f} wall_s={self.wall_seconds:.2f} "
            f"time_to_first_audio_s={self.time_to_first_audio:.2f} "
            f"real_time_factor={self.wall_seconds / duration:.2f} hit_limit={self.hit_limit}"
        )
