"""The HTTP border: OpenAI's speech endpoint as a FastAPI application.

Requests are bounded and validated before anything is decoded; every error has OpenAI's shape.
"""

import logging
import threading
import time
from pathlib import Path
from typing import Annotated

from cachetools import TTLCache, cached
from fastapi import FastAPI, Form, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST
from ray import serve
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from valle.model.tokens import SAMPLE_RATE
from valle.platform.audio import AudioError
from valle.serve.app_args import AppArgs
from valle.serve.deployments.versions import AliasWatcher
from valle.serve.web.keys import ApiKeyMiddleware, read_keys
from valle.serve.web.metrics import Metrics, MetricsMiddleware
from valle.serve.web.prompts import PromptEncoder
from valle.serve.web.schema import ApiError, ErrorDetail, SpeechRequest, error_response
from valle.serve.web.service import SpeechService
from valle.serve.web.voices import VoiceError, VoiceMetadata, VoiceStore, pack_codes

UI = Path(__file__).resolve().parent.parent / "ui"

logger = logging.getLogger("ray.serve")


class BodyLimitMiddleware:
    """ASGI middleware: refuses large bodies by their declared length, before they are read.

    Not one of Starlette's function middlewares: they end a stream that has failed as if it were
    whole.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on what is small enough."""
        if scope["type"] == "http" and (refusal := self._refusal(scope)):
            await refusal(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        length = Headers(scope=scope).get("content-length", "")
        if scope["method"] == "POST" and not length.isdigit():
            return error_response(411, ErrorDetail(message="Content-Length is required"))
        if length and int(length) > self._limit:
            message = f"request of {length} bytes, limit {self._limit}"
            return error_response(413, ErrorDetail(message=message, code="request_too_large"))
        return None


def create_api(args: AppArgs) -> FastAPI:
    """The application of one ingress replica."""
    store = VoiceStore(args.voices)
    created = int(time.time())
    metrics = Metrics()
    watcher = AliasWatcher(args.model, args.tracking_uri or "", args.registry_poll_seconds)
    prompts = PromptEncoder(store)
    speech_service = SpeechService(args, prompts, watcher, metrics)
    api = FastAPI(title="valle", description="Text to speech in the voice of a recording")

    api.add_middleware(BodyLimitMiddleware, limit=args.max_body_bytes)
    if args.api_keys:
        api.add_middleware(ApiKeyMiddleware, keys=read_keys(args.api_keys))
    api.add_middleware(
        MetricsMiddleware, metrics=metrics
    )  # added last: outermost, it counts refusals too

    @api.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        headers = {"Retry-After": "2"} if error.status == 429 else None
        return error_response(error.status, error.detail, headers)

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:]) or None
        return error_response(400, ErrorDetail(message=f"{param}: {first['msg']}", param=param))

    @api.exception_handler(HTTPException)
    async def not_found(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        headers = dict(error.headers or {})
        return error_response(error.status_code, ErrorDetail(message=message), headers)

    @api.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        detail = ErrorDetail(message="the server failed", type="server_error")
        return error_response(500, detail, {"Retry-After": "2"})

    @api.get("/health/live")
    async def live() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @api.get("/health/ready")
    async def ready() -> Response:
        """Every deployment has a replica that runs, so that a request would be answered."""
        missing = await run_in_threadpool(_not_running)
        content = {"status": "waiting" if missing else "ready", "waiting_for": missing}
        return JSONResponse(content, 503 if missing else 200)

    @api.get("/metrics")
    async def prometheus_metrics() -> Response:
        """For Prometheus."""
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    @api.get("/v1/models")
    async def list_models() -> dict[str, object]:
        """The one model, in the shape of OpenAI's list."""
        entry = {"id": "valle", "object": "model", "created": created, "owned_by": args.model}
        return {"object": "list", "data": [entry]}

    @api.get("/v1/audio/voices")
    async def list_voices() -> dict[str, list[dict[str, str]]]:
        """The reference recordings, in the shape that clients of OpenAI-like servers read."""
        names = await run_in_threadpool(store.ids)
        return {"voices": [{"id": name, "name": name} for name in names]}

    @api.post("/v1/audio/voices")
    async def add_voice(
        name: Annotated[str, Form(max_length=100)],
        audio_sample: UploadFile,
        consent: Annotated[str, Form(min_length=3, max_length=1000)],
        text: Annotated[str | None, Form(max_length=4096)] = None,
    ) -> dict[str, object]:
        """Keeps a recording of 2 to 30 s as a voice. `consent`: who agreed to that."""
        data = await audio_sample.read()
        try:
            wave = await run_in_threadpool(store.validate_recording, name, data)
            version = await watcher.version()
            metadata = VoiceMetadata(
                seconds=round(len(wave) / SAMPLE_RATE, 2), consent=consent, text=text,
                created=int(time.time()), prompt=pack_codes(await prompts.encode(wave, version)),
                codec=await prompts.codec_sha256(version),
            )  # fmt: skip
            await run_in_threadpool(store.add, name, wave, metadata)
        except AudioError as error:
            message = f"audio_sample: {error}"
            raise ApiError(400, message, "audio_sample", "unusable_recording") from error
        except VoiceError as error:
            status = 409 if error.code == "voice_exists" else 400
            raise ApiError(status, str(error), "name", error.code) from error
        logger.info("voice added id=%s seconds=%.1f", name, metadata.seconds)
        return {
            "id": name,
            "name": name,
            "seconds": metadata.seconds,
            "created_at": metadata.created,
        }

    @api.delete("/v1/audio/voices/{name}")
    async def delete_voice(name: str) -> dict[str, object]:
        """Removes a recording and all that is known of it."""
        try:
            await run_in_threadpool(store.delete, name)
        except VoiceError as error:
            raise ApiError(404, str(error), "name", error.code) from error
        logger.info("voice deleted id=%s", name)
        return {"id": name, "deleted": True}

    @api.post("/v1/audio/speech", response_class=Response)
    async def create_speech(request: SpeechRequest) -> Response:
        """Speaks `input` in the voice of a recording; answers with a sound file."""
        return await speech_service.create_speech(request)

    @api.get("/", include_in_schema=False)
    async def index() -> FileResponse:
        """The page; it needs nothing from elsewhere, and may load nothing from there."""
        policy = "default-src 'self'; media-src 'self' blob:; frame-ancestors 'none'"
        return FileResponse(UI / "index.html", headers={"Content-Security-Policy": policy})

    api.mount("/ui", StaticFiles(directory=UI))
    return api


@cached(TTLCache(1, 1.0), lock=threading.Lock())  # anybody may ask, and the controller answers
def _not_running() -> list[str]:
    """Deployments of this application without a replica that runs, a second ago at most."""
    app = serve.status().applications[serve.get_replica_context().app_name]
    return [
        name
        for name, deployment in app.deployments.items()
        if not deployment.replica_states.get("RUNNING")
    ]
