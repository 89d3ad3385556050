"""The HTTP border: OpenAI's speech endpoint as a FastAPI application.

Requests are bounded and validated before anything is decoded; every error has OpenAI's shape.
"""

import base64
import binascii
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray import serve
from ray.serve.exceptions import BackPressureError
from starlette.concurrency import run_in_threadpool

from valle.model.sampling import Sampling
from valle.model.tokens import FRAME_RATE
from valle.model.valle import Synthesis, text_ids
from valle.platform import audio, storage
from valle.serve.audio import MEDIA_TYPES, encode
from valle.serve.request import Request as EngineRequest
from valle.serve.schema import AppArgs, ErrorDetail, ErrorResponse, SpeechRequest

logger = logging.getLogger("ray.serve")

MAX_PROMPT_SECONDS = 30.0
PROMPT_FRAMES = int(Synthesis().prompt_seconds * FRAME_RATE)


class ApiError(Exception):
    """An answer other than 200."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status = status
        self.detail = ErrorDetail(message=message, param=param, code=code)


def create_api(args: AppArgs) -> FastAPI:
    """The application of one ingress replica."""
    api = FastAPI(title="valle", description="Text to speech in the voice of a recording")

    @api.middleware("http")
    async def refuse_large_bodies(
        request: Request, proceed: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        length = request.headers.get("content-length", "")
        if request.method == "POST" and not length.isdigit():
            return _error(411, ErrorDetail(message="Content-Length is required"))
        if length and int(length) > args.max_body_bytes:
            message = f"request of {length} bytes, limit {args.max_body_bytes}"
            return _error(413, ErrorDetail(message=message, code="request_too_large"))
        return await proceed(request)

    @api.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return _error(error.status, error.detail)

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:]) or None
        return _error(400, ErrorDetail(message=f"{param}: {first['msg']}", param=param))

    @api.exception_handler(BackPressureError)
    async def busy(request: Request, error: BackPressureError) -> Response:
        detail = ErrorDetail(message="the server is busy", type="rate_limit_error")
        return _error(429, detail, {"Retry-After": "2"})

    @api.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        detail = ErrorDetail(message="the server failed", type="server_error")
        return _error(500, detail, {"Retry-After": "2"})

    @api.get("/health/live")
    async def live() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @api.get("/v1/audio/voices")
    async def voices() -> dict[str, list[dict[str, str]]]:
        """The reference recordings, in the shape that clients of OpenAI-like servers read."""
        names = await run_in_threadpool(lambda: list(storage.list_files(args.voices, (".wav",))))
        stems = [Path(name).stem for name in names]
        return {"voices": [{"id": stem, "name": stem} for stem in stems]}

    @api.post("/v1/audio/speech", response_class=Response)
    async def speech(request: SpeechRequest) -> Response:
        """Speaks `input` in the voice of a recording; answers with a sound file."""
        return await speak(request, args)

    return api


async def speak(request: SpeechRequest, args: AppArgs) -> Response:
    """One request through the deployments: codec, AR, NAR, codec."""
    started = time.perf_counter()
    app = serve.get_replica_context().app_name
    ar, nar, codec = (serve.get_deployment_handle(name, app) for name in ("AR", "NAR", "Codec"))
    try:
        ids = await run_in_threadpool(text_ids, request.input, request.language)
    except ValueError as error:
        raise ApiError(400, str(error), "input") from error
    if len(ids) > args.max_phonemes:
        message = f"input: {len(ids)} phonemes, limit {args.max_phonemes}; send it in parts"
        raise ApiError(400, message, "input")
    wave = await run_in_threadpool(_reference, request, args)
    how = Synthesis()
    prompt = await codec.encode.remote(wave, PROMPT_FRAMES)
    sampling = Sampling(
        temperature=request.temperature, top_p=request.top_p,
        repetition_threshold=how.ar.repetition_threshold,
    )  # fmt: skip
    asked = EngineRequest(
        id=uuid.uuid4().hex, phonemes=ids, prompt=prompt, sampling=sampling,
        max_frames=int(args.max_seconds * FRAME_RATE), seed=request.seed,
    )  # fmt: skip
    first, hit_limit = await ar.generate.remote(asked)
    if not len(first):
        raise ApiError(500, "the model stopped at once; try another seed", code="empty_speech")
    codes = await nar.generate.remote(ids, prompt, first)
    spoken = await codec.decode.remote(codes)
    seconds = time.perf_counter() - started
    duration = len(first) / FRAME_RATE
    logger.info(
        "speech characters=%d audio_s=%.2f wall_s=%.2f real_time_factor=%.2f hit_limit=%s",
        len(request.input), duration, seconds, seconds / duration, hit_limit,
    )  # fmt: skip
    headers = {"X-Hit-Limit": str(hit_limit).lower(), "X-Seed": str(request.seed)}
    body = await run_in_threadpool(encode, spoken, request.response_format, request.speed)
    media_type = MEDIA_TYPES[request.response_format]
    return Response(body, media_type=media_type, headers=headers)


def _reference(request: SpeechRequest, args: AppArgs) -> audio.Wave:
    """The recording whose voice is wanted, decoded under limits."""
    if request.ref_audio is not None:
        try:
            data = base64.b64decode(request.ref_audio, validate=True)
        except binascii.Error as error:
            raise ApiError(400, f"ref_audio: not base64 ({error})", "ref_audio") from error
        param = "ref_audio"
    elif request.voice:
        # the schema allows word characters only, so a name cannot leave the folder
        path = storage.join(args.voices, f"{request.voice}.wav")
        if not storage.exists(path):
            raise ApiError(404, f"no voice {request.voice!r}", "voice", "voice_not_found")
        data, param = storage.read_bytes(path), "voice"
    else:
        raise ApiError(400, "give a voice, or a recording as ref_audio", "voice")
    try:
        return audio.read(data, max_seconds=MAX_PROMPT_SECONDS)
    except audio.AudioError as error:
        raise ApiError(400, f"{param}: {error}", param) from error


def _error(status: int, detail: ErrorDetail, headers: dict[str, str] | None = None) -> Response:
    body = ErrorResponse(error=detail).model_dump()
    return JSONResponse(body, status_code=status, headers=headers)
