"""What the web layer needs of the models: `Deployments`, without Ray Serve.

`handles.ServeDeployments` implements it over Serve's handles; tests inject a fake that runs in
their own process. A `version` is a pinned name (`registry.pin`); all calls for one response name
the same version.
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from valle.model.chunks import Chunking, CodesChunk
from valle.model.codec.encodec_stream import EncodecState
from valle.model.codec.interface import Codes, Wave
from valle.model.nar_decoding import NARRequest
from valle.model.tokens import FRAME_RATE
from valle.model.valle import Synthesis
from valle.serve.engine.request import Request

PROMPT_FRAMES = int(Synthesis().prompt_seconds * FRAME_RATE)
"""Upper bound of a prompt, in frames: AR replicas reserve key-value memory for so many."""


class OverloadedError(Exception):
    """A deployment's queue is full; the call has not been accepted."""


class UnavailableError(Exception):
    """No replica has answered a call: those that took it died or failed, or none came in time."""


class RefusedCallError(ValueError):
    """A replica has refused the arguments of a call; the message begins with the field's name."""


@dataclass(frozen=True)
class DecodedChunk:
    """Samples of a stream's next codes."""

    wave: Wave
    state: EncodecState
    """Decoder state that the next call needs."""


class Deployments(Protocol):
    """The AR, NAR and codec deployments of one application.

    A caller that is cancelled, or closes a generator, cancels the call. A full queue raises
    OverloadedError in calls that come before a response has begun: `encode`, `codec_sha256`,
    `languages` and, without `retry`, those of the AR model. All other calls wait for a place, so
    that new requests cannot interrupt responses that have begun.

    A call whose replica dies is made again, once, on another one: calls are functions of their
    arguments, and a stream that begins again continues where it broke. UnavailableError: that
    replica died too, or the time was over. RefusedCallError: no replica can answer the call.
    """

    def stream_codes(
        self, version: str, request: Request, chunking: Chunking, *, retry: bool
    ) -> AsyncGenerator[CodesChunk]:
        """First codebook of a sentence in chunks, while the AR model draws it."""

    async def generate_codes(self, version: str, request: Request, *, retry: bool) -> CodesChunk:
        """First codebook of a sentence as one chunk."""

    async def nar_decode(self, version: str, request: NARRequest) -> Codes:
        """All codebooks `[8, T]`."""

    async def encode(self, version: str, wave: Wave) -> Codes:
        """Codes `[8, T]` of a recording at 24 kHz."""

    async def decode(self, version: str, codes: Codes) -> Wave:
        """Samples at 24 kHz of codes `[8, T]`."""

    async def decode_next(
        self, version: str, codes: Codes, state: EncodecState | None
    ) -> DecodedChunk:
        """Samples of a stream's next codes `[8, T]`; `state` is None for the first ones, of which
        there must be `encodec_stream.MIN_FIRST_CHUNK` frames."""

    async def codec_sha256(self, version: str) -> str:
        """Hash of the codec's weights."""

    async def languages(self, version: str) -> tuple[str, ...]:
        """Languages that the model was trained on."""

    async def preload(self, version: str) -> None:
        """Loads a version in every replica. Raises the error of a replica that cannot load it."""

    async def forget_prompts(self) -> None:
        """Removes the prompts of ended requests from the memory of every replica. Called when a
        voice has been deleted."""

    async def not_running(self) -> list[str]:
        """Names of the deployments that have no running replica, as of a second ago at most."""
