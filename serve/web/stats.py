"""What one answer has come to: counted while it is made, logged and measured when it ends."""

import time
from dataclasses import dataclass

from valle.model.tokens import FRAME_RATE
from valle.serve.web.sentence import Piece


@dataclass
class Speech:
    """What an answer has come to; logged when it ends."""

    characters: int
    started: float
    """By the performance counter."""
    frames: int = 0
    hit_limit: bool = False
    time_to_first_audio: float = 0.0
    """Seconds until the first piece was made."""
    seconds: float = 0.0
    """Until the last piece was made, or the client had gone."""

    def add(self, piece: Piece) -> None:
        """Counts a piece that has just been made."""
        self.seconds = time.perf_counter() - self.started
        self.time_to_first_audio = self.time_to_first_audio or self.seconds
        self.frames += piece.frames
        self.hit_limit |= piece.hit_limit

    def __str__(self) -> str:
        duration = self.frames / FRAME_RATE
        return (
            f"characters={self.characters} audio_s={duration:.2f} wall_s={self.seconds:.2f} "
            f"first_audio_s={self.time_to_first_audio:.2f} "
            f"real_time_factor={self.seconds / duration:.2f} hit_limit={self.hit_limit}"
        )
