"""Bodies of requests and errors, validated by pydantic; OpenAI's fields and some more."""

from typing import Literal

from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from valle.serve.web.audio_formats import AudioFormat


class SpeechRequest(BaseModel):
    """Body of `POST /v1/audio/speech`."""

    model_config = ConfigDict(extra="forbid")

    model: str = "valle"
    """Ignored; OpenAI's clients send it."""

    input: str = Field(min_length=1, max_length=1_000_000)
    """Text to speak, at most `max_characters` of the server."""

    voice: str = Field("", max_length=100, pattern=r"^[A-Za-z0-9_-]*$")
    """Name of a reference recording on the server."""

    ref_audio: str | None = Field(None, max_length=4_000_000)
    """A recording of 1 to 60 s instead of `voice`: an audio file in base64."""

    ref_text: str | None = Field(None, max_length=4096)
    """Transcript of `ref_audio`. Accepted because other servers need it; not used."""

    response_format: AudioFormat = "mp3"
    """Format of the response; pcm is 16-bit little endian, mono, 24 kHz, without a header."""

    speed: float = Field(1.0, ge=0.25, le=4)
    """Playback speed over the model's own; the pitch stays."""

    stream_format: Literal["audio", "sse"] = "audio"
    """The audio file itself, or server-sent events with parts of it in base64."""

    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the AR model's sampling: the same seed gives the same speech."""

    max_seconds: float | None = Field(None, gt=0)
    """Length limit of the speech, in seconds before `speed`; None: the server's limit."""

    temperature: float = Field(1.0, ge=0, le=2)
    """Sampling temperature of the AR model; 0 is greedy."""

    top_p: float = Field(0.9, gt=0, le=1)
    """Nucleus of the AR model's sampling: the smallest set of codes with this probability."""

    chunked: bool | None = None
    """Send the beginning of a sentence before its end is synthesized, at some cost in quality;
    None: the server's default."""

    language: str = Field("en-us", max_length=20, pattern=r"^[a-zA-Z-]+$")
    """espeak voice name of the text's language."""


class ErrorDetail(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """OpenAI's error body."""

    error: ErrorDetail


class ApiError(Exception):
    """A request that is refused: the client has to change it."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status = status
        self.detail = ErrorDetail(message=message, param=param, code=code)


def error_response(
    status: int, detail: ErrorDetail, headers: dict[str, str] | None = None
) -> JSONResponse:
    """An error in OpenAI's format."""
    body = ErrorResponse(error=detail).model_dump()
    return JSONResponse(body, status_code=status, headers=headers)
