"""A text and a prompt on their way into the AR model, a piece at a tick.

Who speaks already waits for a piece at most, however long the text is that is being read. What has
been read is kept apart from the slots, which stay dense, until all of it is there.

Legend: N layers, R rows of a slot, S positions, D width.
"""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from valle.model.ar import AR, single
from valle.model.layers import KVCache
from valle.serve.engine.request import Request

PIECE = 256
"""Positions that are read at a tick, at most: all of a sentence of ten seconds after a prompt of
three, where frames come in groups of two."""

BUCKET = 64
"""A compiled model reads a multiple of this many positions: few shapes."""


class Reader:
    """Reads one request at a time."""

    def __init__(
        self, model: AR, rows: int, positions: int, *, piece: int = PIECE, compiled: bool = False
    ) -> None:
        """`positions` bounds text and prompt. With two `rows`, the second has them hidden."""
        self._model, self._rows, self._piece = model, rows, piece
        self._bucket = BUCKET if compiled else 1
        self._read = torch.compile(model.read, dynamic=True) if compiled else model.read
        room = positions + self._bucket  # what the last piece has too much
        self.kept = KVCache.empty(model.config, rows, room, model.head.weight)
        """What has been read so far."""
        self._x = torch.empty(rows, 0, model.config.width, device=model.head.weight.device)
        self._positions = self._x[:, :, 0]

    @torch.inference_mode()
    def begin(self, request: Request) -> None:
        """Opens a request, of which nothing is read yet."""
        device = self._x.device
        prompt = torch.from_numpy(request.prompt.astype(np.int64)).to(device)
        text = torch.tensor(request.phonemes, device=device)
        batch = single(text, prompt, text.new_empty(0), guided=self._rows > 1)
        self._x, self._positions = self._model.prefix(batch)
        self.kept.reset()

    @torch.inference_mode()
    def go_on(self) -> Float[Tensor, "R D"] | None:
        """Reads a piece; the hidden state of the first group to be said where it was the last."""
        start, whole = self.kept.length, self._x.shape[1]
        assert start < whole, "begin() comes first"
        count = min(self._piece, whole - start)
        # what a bucket has too much lies behind what counts, where nothing looks
        extra = -count % self._bucket
        x = F.pad(self._x[:, start : start + count], (0, 0, 0, extra))
        positions = F.pad(self._positions[:, start : start + count], (0, extra))
        hidden = self._read(x, positions, self.kept)
        self.kept.length = start + count
        return hidden[:, count - 1] if start + count == whole else None
