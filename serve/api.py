"""The HTTP border: OpenAI's speech endpoint as a FastAPI application.

Requests are bounded and validated before anything is decoded; every error has OpenAI's shape.
"""

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray.serve.exceptions import BackPressureError
from starlette.concurrency import run_in_threadpool

from valle.platform import storage
from valle.serve.schema import ApiError, AppArgs, ErrorDetail, ErrorResponse, SpeechRequest
from valle.serve.speech import speak


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


def _error(status: int, detail: ErrorDetail, headers: dict[str, str] | None = None) -> Response:
    body = ErrorResponse(error=detail).model_dump()
    return JSONResponse(body, status_code=status, headers=headers)
