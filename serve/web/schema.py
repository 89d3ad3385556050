"""What clients send and get: pydantic at the HTTP border, and nowhere else."""

from typing import Literal

from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from valle.serve.web.audio_formats import AudioFormat


class SpeechRequest(BaseModel):
    """`POST /v1/audio/speech`, OpenAI's fields and ours."""

    model_config = ConfigDict(extra="forbid")

    model: str = "valle"
    """Ignored but for OpenAI's clients, which must send it."""

    input: str = Field(min_length=1, max_length=1_000_000)
    """What to say; the server's `max_characters` bounds it."""

    voice: str = Field("", max_length=100, pattern=r"^[A-Za-z0-9_-]*$")
    """Name of a reference recording of the server."""

    ref_audio: str | None = Field(None, max_length=4_000_000)
    """Instead of `voice`: a recording of 1 to 30 s, base64 of a sound file."""

    ref_text: str | None = Field(None, max_length=4096)
    """What is said in `ref_audio`. Other servers need it; these models have no use for it."""

    response_format: AudioFormat = "mp3"
    """The answer's format; pcm is 16-bit little endian, mono, 24 kHz, without a header."""

    speed: float = Field(1.0, ge=0.25, le=4)
    """How much faster than the model spoke; the pitch stays."""

    stream_format: Literal["audio", "sse"] = "audio"
    """The file itself, or server-sent events with pieces of it in base64."""

    seed: int = Field(0, ge=0, lt=2**63)
    """Same seed, same speech."""

    max_seconds: float | None = Field(None, gt=0)
    """Where to stop, in seconds before `speed`; None: at the server's limit."""

    temperature: float = Field(1.0, ge=0, le=2)
    """Of the AR model; 0 is greedy."""

    top_p: float = Field(0.9, gt=0, le=1)
    """Of the AR model."""

    chunked: bool | None = None
    """Sound before a sentence is done, at some cost in quality; None: as the server is set."""

    language: str = Field("en-us", max_length=20, pattern=r"^[a-zA-Z-]+$")
    """espeak voice name of the text."""


class ErrorDetail(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """OpenAI's envelope around it."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer other than 200."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status = status
        type = "server_error" if status >= 500 else "invalid_request_error"
        type = "rate_limit_error" if status == 429 else type
        self.detail = ErrorDetail(message=message, type=type, param=param, code=code)


def error_response(
    status: int, detail: ErrorDetail, headers: dict[str, str] | None = None
) -> JSONResponse:
    """An error in OpenAI's shape."""
    body = ErrorResponse(error=detail).model_dump()
    return JSONResponse(body, status_code=status, headers=headers)
