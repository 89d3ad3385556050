"""A text and a prompt on their way into the AR model, a chunk at a tick.

Who speaks already waits for a chunk at most, however long the text is that is being read. What has
been read is kept apart from the slots, which stay dense, until all of it is there.

Legend: N layers, R rows of a slot, S positions, D width.
"""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from valle.model.ar import AR
from valle.model.layers import KVCache
from valle.model.sequence import single_batch
from valle.serve.engine.request import Request

PREFILL_CHUNK = 256
"""Positions that are read at a tick, at most: all of a sentence of ten seconds after a prompt of
three, where frames come in groups of two."""

PREFILL_BUCKET = 64
"""A compiled model reads a multiple of this many positions: few shapes."""


class ChunkedPrefill:
    """Reads one request at a time."""

    def __init__(
        self,
        model: AR,
        rows: int,
        max_positions: int,
        *,
        prefill_chunk: int = PREFILL_CHUNK,
        compiled: bool = False,
    ) -> None:
        """`max_positions` bounds text and prompt. With two `rows`, the second has them hidden."""
        self._model, self._rows, self._chunk_size = model, rows, prefill_chunk
        self._bucket = PREFILL_BUCKET if compiled else 1
        self._prefill_chunk = (
            torch.compile(model.prefill_chunk, dynamic=True) if compiled else model.prefill_chunk
        )
        room = max_positions + self._bucket  # what the last chunk has too much
        self.cache = KVCache.empty(model.config, rows, room, model.head.weight)
        """What has been read so far."""
        self._x = torch.empty(rows, 0, model.config.width, device=model.head.weight.device)
        self._positions = self._x[:, :, 0]

    @torch.inference_mode()
    def start(self, request: Request) -> None:
        """Opens a request, of which nothing is read yet."""
        device = self._x.device
        prompt = torch.from_numpy(request.prompt.astype(np.int64)).to(device)
        text = torch.tensor(request.phonemes, device=device)
        batch = single_batch(text, prompt, text.new_empty(0), guided=self._rows > 1)
        self._x, self._positions = self._model.embed(batch)
        self.cache.reset()

    @torch.inference_mode()
    def step(self) -> Float[Tensor, "R D"] | None:
        """Reads a chunk; the hidden state of the first group to be said where it was the last."""
        start, n_positions = self.cache.length, self._x.shape[1]
        assert start < n_positions, "start() comes first"
        count = min(self._chunk_size, n_positions - start)
        # what a bucket has too much lies behind what counts, where nothing looks
        extra = -count % self._bucket
        x = F.pad(self._x[:, start : start + count], (0, 0, 0, extra))
        positions = F.pad(self._positions[:, start : start + count], (0, extra))
        hidden = self._prefill_chunk(x, positions, self.cache)
        self.cache.length = start + count
        return hidden[:, count - 1] if start + count == n_positions else None
