"""Chunked prefill: text and prompt of a request go into the AR model a chunk per engine step.

Running requests wait for one chunk at most, however long the new text is. Keys and values are
collected in a cache apart from the slots until the prefill is complete.

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
"""Positions of a chunk: enough for a sentence of ten seconds after a prompt of three, with frames
in groups of two."""

PREFILL_BUCKET = 64
"""A compiled model pads chunks to a multiple of this, so that it sees few shapes."""


class ChunkedPrefill:
    """Prefill of one request at a time."""

    def __init__(
        self,
        model: AR,
        rows: int,
        max_positions: int,
        *,
        prefill_chunk: int = PREFILL_CHUNK,
        compiled: bool = False,
    ) -> None:
        """`max_positions` bounds text and prompt. With two `rows` (guidance), text and prompt are
        hidden in the second one."""
        self._model, self._rows, self._chunk_size = model, rows, prefill_chunk
        self._bucket = PREFILL_BUCKET if compiled else 1
        self._prefill_chunk = (
            torch.compile(model.prefill_chunk, dynamic=True) if compiled else model.prefill_chunk
        )
        capacity = max_positions + self._bucket  # room for the padding of the last chunk
        self.cache = KVCache.empty(model.config, rows, capacity, model.head.weight)
        """Keys and values of the request so far."""
        self._x = torch.empty(rows, 0, model.config.width, device=model.head.weight.device)
        self._positions = self._x[:, :, 0]

    @torch.inference_mode()
    def start(self, request: Request) -> None:
        """Embeds a new request and empties the cache."""
        device = self._x.device
        prompt = torch.from_numpy(np.array(request.prompt, np.int64, order="C")).to(device)
        text = torch.tensor(request.phonemes, device=device)
        batch = single_batch(text, prompt, text.new_empty(0), guided=self._rows > 1)
        self._x, self._positions = self._model.embed(batch)
        self.cache.reset()

    @torch.inference_mode()
    def erase(self) -> None:
        """Overwrites what the last request has left."""
        for tensor in (self.cache.keys, self.cache.values, self._x):
            tensor.zero_()
        self.cache.reset()

    @torch.inference_mode()
    def step(self) -> Float[Tensor, "R D"] | None:
        """Prefills a chunk. Returns None, or after the last chunk the hidden state from which the
        first frames are sampled."""
        start, n_positions = self.cache.length, self._x.shape[1]
        assert start < n_positions, "start() comes first"
        count = min(self._chunk_size, n_positions - start)
        # the padding lies behind the real positions, which cannot see it, and is overwritten by the
        # next chunk
        extra = -count % self._bucket
        x = F.pad(self._x[:, start : start + count], (0, 0, 0, extra))
        positions = F.pad(self._positions[:, start : start + count], (0, extra))
        hidden = self._prefill_chunk(x, positions, self.cache)
        self.cache.length = start + count
        return hidden[:, count - 1] if start + count == n_positions else None
