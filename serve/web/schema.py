"""Bodies of requests and errors, validated by pydantic; OpenAI's fields and some more."""

import secrets
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal

from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from valle.serve.web.audio_formats import AudioFormat
from valle.serve.web.json_body import JsonError, parse_json_object, shorten

MAX_REF_AUDIO_CHARACTERS = 4_000_000
"""Length limit of a recording in base64: 30 s of 16-bit stereo at 24 kHz fit."""

MAX_SIDE_TEXT_CHARACTERS = 4096
"""Length limit of texts that are not spoken."""

JSON_BYTES_PER_CHARACTER = 12
"""Bytes that a character takes at most in JSON: two escapes of six."""


class SpeechRequest(BaseModel):
    """Body of `POST /v1/audio/speech`."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str = Field("valle", max_length=200)
    """Ignored; OpenAI's clients send it."""

    input: str = Field(min_length=1, max_length=1_000_000)
    """Text to speak, at most `max_characters` of the server."""

    voice: str = Field("", max_length=201, pattern=r"^[A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)?$")
    """Name of a reference recording on the server; OpenAI's `{"id": NAME}` is the same. A key that
    may use all voices names another owner's as `owner.name`."""

    ref_audio: str | None = Field(None, max_length=MAX_REF_AUDIO_CHARACTERS)
    """A recording of 1 to 60 s instead of `voice`: an audio file in base64."""

    ref_text: str | None = Field(None, max_length=MAX_SIDE_TEXT_CHARACTERS)
    """Transcript of `ref_audio`. Accepted because other servers need it; not used."""

    instructions: str | None = Field(None, max_length=MAX_SIDE_TEXT_CHARACTERS)
    """OpenAI's description of the manner of speaking. Accepted; not used."""

    user: str | None = Field(None, max_length=200)
    """Accepted because OpenAI's clients send it with other requests; not used."""

    stream: bool | None = None
    """Accepted because other servers have it; not used: texts of several sentences are streamed."""

    response_format: AudioFormat = "mp3"
    """Format of the response; pcm is 16-bit little endian, mono, 24 kHz, without a header."""

    speed: float = Field(1.0, ge=0.25, le=4)
    """Playback speed over the model's own; the pitch stays."""

    stream_format: Literal["audio", "sse"] = "audio"
    """The audio file itself, or server-sent events with parts of it in base64."""

    seed: int = Field(default_factory=lambda: secrets.randbelow(2**31), ge=0, lt=2**63)
    """Seed of the AR model's sampling: the same seed gives the same speech. Drawn at random where a
    request has none; the response's `X-Seed` says which."""

    max_seconds: float | None = Field(None, gt=0)
    """Length limit of the speech, in seconds before `speed`; None: the server's limit."""

    temperature: float = Field(1.0, ge=0, le=2)
    """Sampling temperature of the AR model; 0 is greedy."""

    top_p: float = Field(0.9, gt=0, le=1)
    """Nucleus of the AR model's sampling: the smallest set of codes with this probability."""

    chunked: bool | None = None
    """Send the beginning of a sentence before its end is synthesized, at some cost in quality;
    None: the server's default."""

    language: str = Field("en-us", max_length=35, pattern=r"^[a-zA-Z0-9_-]+$")
    """Language of the text: a BCP 47 tag in any case (`en`, `en-US`, `pt-BR`), or an espeak
    voice."""

    def ignored_fields(self) -> list[str]:
        """Names of the fields that were sent and have no effect."""
        return [name for name in IGNORED_FIELDS if getattr(self, name) is not None]


IGNORED_FIELDS = ("instructions", "ref_text", "stream", "user")
"""Fields of `SpeechRequest` that other servers use, and this one accepts without an effect."""


def max_speech_body_bytes(max_characters: int) -> int:
    """Bytes that the largest acceptable speech request takes, however its JSON is written."""
    n_characters = max_characters + 3 * MAX_SIDE_TEXT_CHARACTERS
    return MAX_REF_AUDIO_CHARACTERS + JSON_BYTES_PER_CHARACTER * n_characters


def parse_speech_request(data: bytes) -> SpeechRequest:
    """The request in a JSON body. A field that is null counts as not sent.

    Raises ApiError that names the first wrong field.
    """
    try:
        members = parse_json_object(data)
    except JsonError as error:
        raise ApiError(400, str(error), error.param) from error
    fields = {name: value for name, value in members.items() if value is not None}
    _refuse_unknown_fields(fields)
    fields["voice"] = _voice_name(fields.get("voice", ""))
    try:
        return SpeechRequest.model_validate(fields)
    except ValidationError as error:
        raise validation_error(error.errors(include_url=False, include_input=False)) from error


def validation_error(errors: Sequence[Any]) -> "ApiError":
    """The first of pydantic's errors as an error of the API."""
    location = [str(part) for part in errors[0]["loc"] if part != "body"]
    param = shorten(".".join(location)) or None
    message = shorten(errors[0]["msg"])
    if "UploadFile" in message:  # FastAPI names its own class
        message = "must be a file, with a file name"
    return ApiError(400, f"{param or 'body'}: {message}", param)


def check_json_content_type(content_type: str) -> None:
    """Raises ApiError for a body that is not declared as JSON. A page of another origin may send
    every other kind without asking the server first."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        message = f"Content-Type must be application/json, not {shorten(kind) or 'missing'}"
        raise ApiError(415, message, code="unsupported_media_type")


def _refuse_unknown_fields(fields: Mapping[str, Any]) -> None:
    known = list(SpeechRequest.model_fields)
    for name in fields:
        if name not in known:
            near = get_close_matches(shorten(name), known, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
            raise ApiError(400, f"{shorten(name)}: no such field; {hint}", shorten(name))


def _voice_name(value: Any) -> Any:
    """The name in OpenAI's voice object; anything else unchanged, for pydantic to judge."""
    if not isinstance(value, dict):
        return value
    if list(value) != ["id"]:
        raise ApiError(400, 'voice: an object must be {"id": NAME}, without other fields', "voice")
    return value["id"]


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
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.headers = headers
        kind = "rate_limit_error" if status == 429 else "invalid_request_error"
        self.detail = ErrorDetail(message=message, type=kind, param=param, code=code)


def error_response(
    status: int, detail: ErrorDetail, headers: dict[str, str] | None = None
) -> JSONResponse:
    """An error in OpenAI's format."""
    body = ErrorResponse(error=detail).model_dump()
    return JSONResponse(body, status_code=status, headers=headers)
