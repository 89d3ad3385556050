"""The AR model at work on many streams at once; with its reader, all of the engine that touches a
device.

A tick is `sample`, which draws the next group of frames of every stream, and `advance`, which
feeds those groups to the model. A request is read by the `reader` before `seat` gives it a slot;
`release` keeps slots dense.

With guidance a slot has two rows, the stream as it is and the stream without text and prompt, one
after the other: what is read at a step stays one dense block.

Legend: N layers, R rows in use, H heads, S positions of a row, K head width, B streams, G frames of
a group.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from valle.model.ar import AR, unable_to_end
from valle.model.layers import KVCache
from valle.model.sampling import RowSettings, Sampling, choose, draw, guide
from valle.model.tokens import CODEBOOK_SIZE
from valle.serve.engine.prefill import PIECE, Reader
from valle.serve.engine.request import Request
from valle.serve.engine.slots import Move

LONGEST_WINDOW = 64
"""Frames that repetition-aware sampling can look back on."""

MODE = "reduce-overhead"
"""Of `torch.compile`: CUDA graphs where there is CUDA."""

POSITIONS_STEP = 128
"""A compiled step sees a multiple of this many positions: few shapes, each captured once."""


@dataclass
class SlotCache:
    """Keys and values of the first rows, each as long as its own stream: `model.layers.Cache`."""

    keys: Float[Tensor, "N rows H S K"]
    values: Float[Tensor, "N rows H S K"]
    lengths: Int[Tensor, " rows"]
    visible: Bool[Tensor, "R 1 1 _"] | None = None
    """Which positions each row may see, this tick's included."""
    new: tuple[Tensor, slice, Tensor] | None = None
    """Rows `[R]`, all heads, and each row's next position `[R]`: where `append` writes."""

    causal = False  # one position per row at a time

    def begin(self, rows: int, multiple: int = 1) -> None:
        """Prepares a step of the first `rows`, over positions rounded up to `multiple`."""
        lengths = self.lengths[:rows]
        longest = -(-(int(lengths.max()) + 1) // multiple) * multiple
        steps = torch.arange(min(longest, self.keys.shape[3]), device=lengths.device)
        self.visible = (steps <= lengths[:, None])[:, None, None]
        self.new = torch.arange(rows, device=lengths.device), slice(None), lengths.clone()

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Stores one position `[R, H, 1, K]` per row; returns views that hold them all."""
        assert self.visible is not None and self.new is not None, "begin() comes first"
        count, longest = self.visible.shape[0], self.visible.shape[3]
        self.keys[layer][self.new] = key[:, :, 0]
        self.values[layer][self.new] = value[:, :, 0]
        block = (layer, slice(count), slice(None), slice(longest))
        return self.keys[block], self.values[block], self.visible

    def advance(self, positions: int) -> None:
        """Counts the new position of each row."""
        assert self.visible is not None, "begin() comes first"
        self.lengths[: self.visible.shape[0]] += positions


class Runner:
    """Weights, key-value memory, and what is kept on the device for each slot."""

    def __init__(
        self, model: AR, *, slots: int, positions: int, guided: bool = False,
        compiled: bool = False, piece: int = PIECE,
    ) -> None:  # fmt: skip
        """`positions` bounds text, prompt and speech of one stream together, `piece` what is read
        of a text and a prompt at a tick.

        `guided`: there are two rows to a slot, so that streams may have a `guidance_scale`.

        `compiled`: a step goes through `torch.compile`, on a GPU as CUDA graphs (not run on one
        yet), and to that end in few shapes: streams rounded up to a power of two.
        """
        config, like = model.config, model.head.weight
        self.model = model
        self.positions = positions
        self._device = like.device
        self._slots, self._compiled = slots, compiled
        self._rows_per_slot = 2 if guided else 1
        self._step = torch.compile(model.step, mode=MODE, dynamic=True) if compiled else model.step
        rows = slots * self._rows_per_slot
        whole = KVCache.empty(config, rows, positions, like)
        # what a mask hides is multiplied by zero, which garbage such as NaN would survive
        keys, values = whole.keys.zero_(), whole.values.zero_()
        self._cache = SlotCache(keys, values, self._zeros(rows))
        self.reader = Reader(
            model, self._rows_per_slot, positions, piece=piece, compiled=compiled
        )  # fmt: skip
        self._hidden = like.new_zeros(rows, config.width)
        self._recent = self._zeros(slots, LONGEST_WINDOW) - 1
        self._frames = self._zeros(slots)
        self._generators: list[torch.Generator] = []
        self._sampling: list[Sampling] = []
        self._settings = RowSettings.of([], self._device)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.long, device=self._device)

    @property
    def streams(self) -> int:
        """Slots in use."""
        return len(self._generators)

    def check(self, request: Request) -> None:
        """Raises ValueError, naming the field, for a request that no slot can hold."""
        needed = self.model.capacity(
            len(request.phonemes), request.prompt.shape[1], request.max_frames
        )
        if needed > self.positions:
            raise ValueError(
                f"max_frames: text, prompt and {request.max_frames} frames need {needed} "
                f"positions, a slot holds {self.positions}"
            )
        config = self.model.config
        if max(request.phonemes) >= config.n_phonemes or min(request.phonemes) < 0:
            raise ValueError(
                f"phonemes: the model knows {config.n_phonemes} symbols, not all these"
            )
        if len(request.prompt) != config.n_codebooks:
            raise ValueError(f"prompt: {len(request.prompt)} codebooks, not {config.n_codebooks}")
        if (
            request.prompt.size
            and not 0 <= request.prompt.min() <= request.prompt.max() < CODEBOOK_SIZE
        ):
            raise ValueError(f"prompt: codes outside 0 to {CODEBOOK_SIZE - 1}")
        if request.sampling.guided and self._rows_per_slot == 1:
            raise ValueError("guidance_scale: this engine was made without guidance")
        if request.sampling.repetition_window > LONGEST_WINDOW:
            raise ValueError(f"repetition_window: at most {LONGEST_WINDOW} frames")

    @torch.inference_mode()
    def seat(self, request: Request, slot: int, hidden: Float[Tensor, "R D"]) -> None:
        """Gives the next slot to what the reader has read; `hidden` is its last word."""
        assert slot == self.streams, "slots are filled in order"
        own, read = self._own(slot), self.reader.kept
        self._cache.keys[:, own, :, : read.length] = read.keys[:, :, :, : read.length]
        self._cache.values[:, own, :, : read.length] = read.values[:, :, :, : read.length]
        self._cache.lengths[own] = read.length
        self._hidden[own] = hidden
        self._recent[slot] = -1
        self._frames[slot] = 0
        self._generators.append(torch.Generator(self._device).manual_seed(request.seed))
        self._sampling.append(request.sampling)
        self._settings = RowSettings.of(self._sampling, self._device)

    def _own(self, slot: int) -> slice:
        """The rows of a slot."""
        return slice(slot * self._rows_per_slot, (slot + 1) * self._rows_per_slot)

    @torch.inference_mode()
    def sample(self) -> NDArray[np.int64]:
        """The next group `[B, G]` of every stream; what follows an EOS has no meaning."""
        streams, group = self.streams, self.model.config.group
        recent = self._recent[:streams]
        for said in range(group):
            known = recent[:, LONGEST_WINDOW - said :].clamp(0, CODEBOOK_SIZE - 1)
            logits = self._logits(known)
            logits = unable_to_end(logits, recent[:, -1] < 0)
            uniforms = torch.cat([draw(generator, 1) for generator in self._generators], dim=1)
            tokens = choose(logits, self._settings, uniforms, recent)
            recent = torch.cat([recent[:, 1:], tokens[:, None]], dim=1)
        self._recent[:streams] = recent
        return recent[:, LONGEST_WINDOW - group :].cpu().numpy()

    def _logits(self, known: Int[Tensor, "B g"]) -> Float[Tensor, "B 1025"]:
        """Logits of each stream's next frame, of whose group the frames `known` are drawn."""
        per_slot = self._rows_per_slot
        hidden = self._hidden[: self.streams * per_slot, None]
        known = known.repeat_interleave(per_slot, dim=0)
        logits = self.model.logits(hidden, known[:, :, None])[:, 0]
        if per_slot == 1:
            return logits
        return guide(logits[::2], logits[1::2], self._settings.guidance_scale[:, None])

    @torch.inference_mode()
    def advance(self) -> None:
        """Feeds the groups just drawn to the model."""
        streams, group = self.streams, self.model.config.group
        per_slot = self._rows_per_slot
        if self._compiled:
            streams = min(1 << (streams - 1).bit_length(), self._slots)
            # nobody's rows: they need numbers that a step can work on, and no more
            self._cache.lengths[self.streams * per_slot : streams * per_slot] = 0
            self._recent[self.streams : streams] = 0
        self._cache.begin(streams * per_slot, POSITIONS_STEP if self._compiled else 1)
        codes = self._recent[:streams, LONGEST_WINDOW - group :].repeat_interleave(per_slot, dim=0)
        first = self._frames[:streams].repeat_interleave(per_slot)
        self._hidden[: streams * per_slot] = self._step(codes, first, self._cache)
        self._frames[:streams] += group

    def release(self, slot: int, move: Move | None) -> None:
        """Forgets the stream of a slot; the last slot's stream takes its place."""
        generator, sampling = self._generators.pop(), self._sampling.pop()
        if move is not None:
            assert move == Move(self.streams, slot), "only the last slot moves"
            self._generators[slot], self._sampling[slot] = generator, sampling
            source, target = self._own(move.source), self._own(slot)
            length = int(self._cache.lengths[source][0])
            for store in (self._cache.keys, self._cache.values):
                store[:, target, :, :length] = store[:, source, :, :length]
            for rows in (self._cache.lengths, self._hidden):
                rows[target] = rows[source]
            for row in (self._recent, self._frames):
                row[slot] = row[move.source]
        self._settings = RowSettings.of(self._sampling, self._device)
