"""The HTTP interface: OpenAI's speech endpoint as a FastAPI application.

Requests are bounded and validated before anything is decoded. Every error has OpenAI's format.
"""

import logging
import time
from functools import partial
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, Form, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from valle.model.tokens import SAMPLE_RATE
from valle.platform import registry
from valle.platform.audio import AudioError
from valle.serve.app_args import AppArgs
from valle.serve.deployments.interface import Deployments, OverloadedError
from valle.serve.web.alias_watcher import AliasWatcher, NoVersionError
from valle.serve.web.keys import ApiKeyMiddleware, read_keys
from valle.serve.web.metrics import Metrics, MetricsMiddleware
from valle.serve.web.prompts import PromptEncoder
from valle.serve.web.schema import ApiError, ErrorDetail, SpeechRequest, error_response
from valle.serve.web.service import SpeechService
from valle.serve.web.voices import VoiceError, VoiceMetadata, VoiceStore, pack_codes

UI = Path(__file__).resolve().parent.parent / "ui"
"""Folder of the web page."""

logger = logging.getLogger("ray.serve")


class BodyLimitMiddleware:
    """ASGI middleware: refuses a large body by its declared length, before it is read.

    Starlette's function middlewares are no alternative: with them, a stream that fails ends like
    one that is complete.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers 411 or 413."""
        if scope["type"] == "http" and (refusal := self._refusal(scope)):
            await refusal(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        length = Headers(scope=scope).get("content-length", "")
        if scope["method"] == "POST" and not length.isdigit():
            message = "Content-Length is required: send the body with its length"
            return error_response(411, ErrorDetail(message=message))
        if length and int(length) > self._limit:
            message = f"the body has {length} bytes, limit {self._limit}"
            return error_response(413, ErrorDetail(message=message, code="request_too_large"))
        return None


def create_api(args: AppArgs, deployments: Deployments, deployed: str | None = None) -> FastAPI:
    """The ASGI application of one ingress replica.

    `deployed` is the model's version when the application was deployed: that of requests while the
    registry has never answered this node.
    """
    metrics = Metrics()
    resolve = partial(registry.current_version, args.model, args.tracking_uri, deployed)
    watcher = AliasWatcher(resolve, deployments.preload, args.registry_poll_seconds)
    store = VoiceStore(args.voices)
    prompts = PromptEncoder(store, deployments)
    speech_service = SpeechService(args, deployments, prompts, watcher, metrics)

    api = FastAPI(title="valle", description="Text to speech in the voice of a recording")
    api.add_middleware(BodyLimitMiddleware, limit=args.max_body_bytes)
    if args.api_keys:
        api.add_middleware(ApiKeyMiddleware, keys=read_keys(args.api_keys))
    # added last, so outermost: it counts the refusals of the others too
    api.add_middleware(MetricsMiddleware, metrics=metrics)
    _add_error_handlers(api)
    _add_status_routes(api, registry.display_name(args.model), deployments, metrics)
    _add_voice_routes(api, store, prompts, watcher)

    @api.post("/v1/audio/speech", response_class=Response)
    async def create_speech(request: SpeechRequest) -> Response:
        """Speaks `input` in the voice of a recording; responds with an audio file."""
        return await speech_service.create_speech(request)

    @api.get("/", include_in_schema=False)
    async def index() -> FileResponse:
        """The web page, which may load nothing from other origins."""
        policy = "default-src 'self'; media-src 'self' blob:; frame-ancestors 'none'"
        return FileResponse(UI / "index.html", headers={"Content-Security-Policy": policy})

    api.mount("/ui", StaticFiles(directory=UI))
    return api


def _add_error_handlers(api: FastAPI) -> None:
    """Every error as an OpenAI error body."""

    @api.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return error_response(error.status, error.detail)

    @api.exception_handler(OverloadedError)
    async def overloaded(request: Request, error: OverloadedError) -> Response:
        detail = ErrorDetail(
            message="the server is busy; try again in a moment",
            type="rate_limit_error",
            code="overloaded",
        )
        return error_response(429, detail, {"Retry-After": "2"})

    @api.exception_handler(NoVersionError)
    async def no_version(request: Request, error: NoVersionError) -> Response:
        logger.warning("refused: %s", error)
        detail = ErrorDetail(
            message="the model's version is not known yet: the registry does not answer",
            type="server_error",
            code="model_unavailable",
        )
        return error_response(503, detail, {"Retry-After": "2"})

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


def _add_status_routes(
    api: FastAPI, model: str, deployments: Deployments, metrics: Metrics
) -> None:
    """Health, metrics and the list of models."""
    created = int(time.time())

    @api.get("/health/live")
    async def live() -> dict[str, str]:
        """The process responds."""
        return {"status": "ok"}

    @api.get("/health/ready")
    async def ready() -> Response:
        """Every deployment has a running replica, so speech requests can be answered."""
        missing = await deployments.not_running()
        content = {"status": "waiting" if missing else "ready", "waiting_for": missing}
        return JSONResponse(content, 503 if missing else 200)

    @api.get("/metrics")
    async def prometheus_metrics() -> Response:
        """Counters of this replica, in Prometheus' text format."""
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    @api.get("/v1/models")
    async def list_models() -> dict[str, object]:
        """The one model, as OpenAI lists models."""
        entry = {"id": "valle", "object": "model", "created": created, "owned_by": model}
        return {"object": "list", "data": [entry]}


def _add_voice_routes(
    api: FastAPI, store: VoiceStore, prompts: PromptEncoder, watcher: AliasWatcher
) -> None:
    """Listing, adding and deleting voices."""

    @api.get("/v1/audio/voices")
    async def list_voices() -> dict[str, list[dict[str, str]]]:
        """The reference recordings, as OpenAI-compatible servers list voices."""
        names = await run_in_threadpool(store.ids)
        return {"voices": [{"id": name, "name": name} for name in names]}

    @api.post("/v1/audio/voices")
    async def add_voice(
        name: Annotated[str, Form(max_length=100)],
        audio_sample: UploadFile,
        consent: Annotated[str, Form(min_length=3, max_length=1000)],
        text: Annotated[str | None, Form(max_length=4096)] = None,
    ) -> dict[str, object]:
        """Stores a recording of 1 to 60 s as a voice. `consent` says who agreed to it."""
        data = await audio_sample.read()
        try:
            wave = await run_in_threadpool(store.validate_recording, name, data)
            version = await watcher.version()
            metadata = VoiceMetadata(
                seconds=round(len(wave) / SAMPLE_RATE, 2),
                consent=consent,
                text=text,
                created=int(time.time()),
                # stored with the voice, so that requests need not encode it
                prompt=pack_codes(await prompts.encode(wave, version)),
                codec=await prompts.codec_sha256(version),
            )
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
        """Deletes a recording with its metadata."""
        try:
            await run_in_threadpool(store.delete, name)
        except VoiceError as error:
            raise ApiError(404, str(error), "name", error.code) from error
        logger.info("voice deleted id=%s", name)
        return {"id": name, "deleted": True}
