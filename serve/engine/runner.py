"""Batched decoding with the AR model: weights, key-value cache and sampling on one device.

An engine step calls `sample`, which draws the next group of frames of every request, then
`decode_step`, which feeds these groups to the model. A new request passes through `prefill`, and
`insert` copies its keys and values to a slot; `release` frees a slot and keeps the slots dense.

With guidance a slot has two adjacent rows, the request as it is and the request without text and
prompt, so that the rows of a step stay one dense block.

Legend: N layers, R rows in use, H heads, S positions of a row, K head width, B requests in slots,
G frames of a group.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from valle.model.ar import AR, suppress_eos
from valle.model.layers import KVCache
from valle.model.sampling import Sampling, SamplingTensors, draw_uniforms, guide, sample_rows
from valle.model.tokens import CODEBOOK_SIZE
from valle.model.validation import validate_codes
from valle.serve.engine.prefill import PREFILL_CHUNK, ChunkedPrefill
from valle.serve.engine.request import Request
from valle.serve.engine.slots import Move

MAX_REPETITION_WINDOW = 64
"""Upper bound of `Sampling.repetition_window`, in frames."""

COMPILE_MODE = "reduce-overhead"
"""Mode of `torch.compile`: CUDA graphs where there is CUDA."""

DECODE_BUCKET = 128
"""A compiled step sees a multiple of this many positions: few shapes, each captured once."""


@dataclass
class SlotCache:
    """Keys and values of all rows, each row with a length of its own: a `model.layers.Cache`."""

    keys: Float[Tensor, "N rows H S K"]
    values: Float[Tensor, "N rows H S K"]
    lengths: Int[Tensor, " rows"]
    mask: Bool[Tensor, "R 1 1 _"] | None = None
    """Positions that each row sees in this step, the new one included."""
    write_index: tuple[Tensor, slice, Tensor] | None = None
    """Where `append` writes: rows `[R]`, all heads, each row's next position `[R]`."""

    causal = False  # one position per row at a time

    def prepare_step(self, rows: int, bucket: int = 1) -> None:
        """Prepares a step of the first `rows` rows; the number of positions is rounded up to a
        multiple of `bucket`."""
        lengths = self.lengths[:rows]
        longest = -(-(int(lengths.max()) + 1) // bucket) * bucket
        steps = torch.arange(min(longest, self.keys.shape[3]), device=lengths.device)
        self.mask = (steps <= lengths[:, None])[:, None, None]
        self.write_index = torch.arange(rows, device=lengths.device), slice(None), lengths.clone()

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Stores one position `[R, H, 1, K]` per row; returns keys and values of all positions so
        far, and their mask."""
        assert self.mask is not None and self.write_index is not None, "prepare_step() comes first"
        count, longest = self.mask.shape[0], self.mask.shape[3]
        self.keys[layer][self.write_index] = key[:, :, 0]
        self.values[layer][self.write_index] = value[:, :, 0]
        block = (layer, slice(count), slice(None), slice(longest))
        return self.keys[block], self.values[block], self.mask

    def advance(self, n_positions: int) -> None:
        """Adds the new position to the length of each row."""
        assert self.mask is not None, "prepare_step() comes first"
        self.lengths[: self.mask.shape[0]] += n_positions


class Runner:
    """An AR model with the state of its slots on the device."""

    def __init__(
        self,
        model: AR,
        *,
        slots: int,
        max_positions: int,
        guided: bool = False,
        compiled: bool = False,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> None:
        """`max_positions` bounds text, prompt and speech of a request together, `prefill_chunk` the
        positions of a prefill step.

        `guided`: slots have two rows, as requests with a `guidance_scale` need.

        `compiled`: a step goes through `torch.compile`, on a GPU without CUDA graphs (none is
        captured yet). The number of requests is then rounded up to a power of two, for few shapes.
        """
        config, like = model.config, model.head.weight
        self.model = model
        self.max_positions = max_positions
        self._device = like.device
        self._slots, self._compiled = slots, compiled
        self._rows_per_slot = 2 if guided else 1
        self._step = (
            torch.compile(model.step, mode=COMPILE_MODE, dynamic=True) if compiled else model.step
        )
        rows = slots * self._rows_per_slot
        cache = KVCache.empty(config, rows, max_positions, like)
        # masked values are multiplied by zero, but zero times NaN is NaN: no uninitialised memory
        keys, values = cache.keys.zero_(), cache.values.zero_()
        self._cache = SlotCache(keys, values, self._zeros(rows))
        self.prefill = ChunkedPrefill(
            model,
            self._rows_per_slot,
            max_positions,
            prefill_chunk=prefill_chunk,
            compiled=compiled,
        )
        self._hidden = like.new_zeros(rows, config.width)
        self._recent = self._zeros(slots, MAX_REPETITION_WINDOW) - 1
        self._frames = self._zeros(slots)
        self._seeds = self._zeros(slots)
        self._sampling: list[Sampling] = []
        self._sampling_tensors = SamplingTensors.from_rows([], self._device)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.long, device=self._device)

    @property
    def batch_size(self) -> int:
        """Slots in use."""
        return len(self._sampling)

    def validate(self, request: Request) -> None:
        """Raises ValueError, naming the field, for a request that cannot run here."""
        request.validate()
        config = self.model.config
        needed = self.model.capacity(
            len(request.phonemes), request.prompt.shape[1], int(request.max_frames)
        )
        if needed > self.max_positions:
            raise ValueError(
                f"max_frames: text, prompt and {request.max_frames} frames need {needed} "
                f"positions, a slot holds {self.max_positions}"
            )
        if max(request.phonemes) >= config.n_phonemes:
            raise ValueError(
                f"phonemes: ids must be 0 to {config.n_phonemes - 1}, the model's inventory"
            )
        validate_codes("prompt", request.prompt, config.n_codebooks)
        if request.sampling.guided and self._rows_per_slot == 1:
            raise ValueError("guidance_scale: must be 1, this engine runs without guidance")
        if request.sampling.repetition_window > MAX_REPETITION_WINDOW:
            raise ValueError(f"repetition_window: at most {MAX_REPETITION_WINDOW} frames")

    @torch.inference_mode()
    def insert(self, request: Request, slot: int, hidden: Float[Tensor, "R D"]) -> None:
        """Copies the prefilled keys and values to a slot; `hidden` is the last hidden state."""
        assert slot == self.batch_size, "slots are filled in order"
        rows, prompt_cache = self._slot_rows(slot), self.prefill.cache
        self._cache.keys[:, rows, :, : prompt_cache.length] = prompt_cache.keys[
            :, :, :, : prompt_cache.length
        ]
        self._cache.values[:, rows, :, : prompt_cache.length] = prompt_cache.values[
            :, :, :, : prompt_cache.length
        ]
        self._cache.lengths[rows] = prompt_cache.length
        self._hidden[rows] = hidden
        self._recent[slot] = -1
        self._frames[slot] = 0
        self._seeds[slot] = request.seed
        self._sampling.append(request.sampling)
        self._sampling_tensors = SamplingTensors.from_rows(self._sampling, self._device)

    def _slot_rows(self, slot: int) -> slice:
        """Rows of a slot."""
        return slice(slot * self._rows_per_slot, (slot + 1) * self._rows_per_slot)

    @torch.inference_mode()
    def sample(self) -> NDArray[np.int64]:
        """Draws the next group of frames `[B, G]` of every request. Codes after an EOS have no
        meaning."""
        batch_size, group_size = self.batch_size, self.model.config.group_size
        recent = self._recent[:batch_size]
        for index in range(group_size):
            previous = recent[:, MAX_REPETITION_WINDOW - index :].clamp(0, CODEBOOK_SIZE - 1)
            logits = self._logits(previous)
            logits = suppress_eos(logits, recent[:, -1] < 0)
            uniforms = draw_uniforms(self._seeds[:batch_size], self._frames[:batch_size] + index)
            tokens = sample_rows(logits, self._sampling_tensors, uniforms, recent)
            recent = torch.cat([recent[:, 1:], tokens[:, None]], dim=1)
        self._recent[:batch_size] = recent
        return recent[:, MAX_REPETITION_WINDOW - group_size :].cpu().numpy()

    def _logits(self, previous: Int[Tensor, "B g"]) -> Float[Tensor, "B 1025"]:
        """Logits of each request's next frame; `previous` are the frames of its group so far."""
        per_slot = self._rows_per_slot
        hidden = self._hidden[: self.batch_size * per_slot, None]
        previous = previous.repeat_interleave(per_slot, dim=0)
        logits = self.model.logits(hidden, previous[:, :, None])[:, 0]
        if per_slot == 1:
            return logits
        return guide(logits[::2], logits[1::2], self._sampling_tensors.guidance_scale[:, None])

    @torch.inference_mode()
    def decode_step(self) -> None:
        """Runs the AR model once for all slots, on the groups that `sample` drew. Leaves the hidden
        states from which the next `sample` draws."""
        padded_size, group_size = self.batch_size, self.model.config.group_size
        per_slot = self._rows_per_slot
        if self._compiled:
            padded_size = min(1 << (padded_size - 1).bit_length(), self._slots)
            # padding rows: any valid codes and lengths will do
            self._cache.lengths[self.batch_size * per_slot : padded_size * per_slot] = 0
            self._recent[self.batch_size : padded_size] = 0
        self._cache.prepare_step(padded_size * per_slot, DECODE_BUCKET if self._compiled else 1)
        codes = self._recent[:padded_size, MAX_REPETITION_WINDOW - group_size :].repeat_interleave(
            per_slot, dim=0
        )
        positions = self._frames[:padded_size].repeat_interleave(per_slot)
        self._hidden[: padded_size * per_slot] = self._step(codes, positions, self._cache)
        self._frames[:padded_size] += group_size

    def release(self, slot: int, move: Move | None) -> None:
        """Frees a slot; `move` copies the last slot to it."""
        sampling = self._sampling.pop()
        if move is not None:
            assert move == Move(self.batch_size, slot), "only the last slot moves"
            self._sampling[slot] = sampling
            source, target = self._slot_rows(move.source), self._slot_rows(slot)
            length = int(self._cache.lengths[source][0])
            for store in (self._cache.keys, self._cache.values):
                store[:, target, :, :length] = store[:, source, :, :length]
            for rows in (self._cache.lengths, self._hidden):
                rows[target] = rows[source]
            for row in (self._recent, self._frames, self._seeds):
                row[slot] = row[move.source]
        self._sampling_tensors = SamplingTensors.from_rows(self._sampling, self._device)

    @torch.inference_mode()
    def erase_free(self, *, prefill: bool) -> None:
        """Overwrites what ended requests have left in the free slots and, with `prefill`, in the
        prefill's own cache."""
        free = slice(self._slot_rows(self.batch_size).start, None)
        for store in (self._cache.keys, self._cache.values):
            store[:, free].zero_()
        self._hidden[free] = 0
        self._recent[self.batch_size :] = -1
        if prefill:
            self.prefill.erase()
