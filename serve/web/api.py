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
from starlette.exceptions import HTTPException

from valle.model.tokens import SAMPLE_RATE
from valle.platform import registry
from valle.platform.audio import AudioError
from valle.serve.app_args import AppArgs
from valle.serve.deployments.interface import (
    Deployments,
    OverloadedError,
    RefusedCallError,
    UnavailableError,
)
from valle.serve.key_limits import KeyLimits, LocalKeyLimits
from valle.serve.web.alias_watcher import AliasWatcher, NoVersionError
from valle.serve.web.api_docs import add_docs
from valle.serve.web.authorization import ApiKeyMiddleware
from valle.serve.web.body_limit import BodyLimitMiddleware
from valle.serve.web.callers import Caller, caller_of
from valle.serve.web.failures import FailureMiddleware
from valle.serve.web.json_body import shorten
from valle.serve.web.keys import KeyFile
from valle.serve.web.metrics import Metrics, MetricsMiddleware
from valle.serve.web.missing_parts import MissingParts
from valle.serve.web.origins import LOCAL_HOSTS, HostMiddleware, ResponseMiddleware, cors
from valle.serve.web.prompts import PromptEncoder
from valle.serve.web.schema import (
    ApiError,
    ErrorDetail,
    SpeechRequest,
    check_json_content_type,
    error_response,
    max_speech_body_bytes,
    parse_speech_request,
    validation_error,
)
from valle.serve.web.service import SpeechService
from valle.serve.web.threads import run_decoding, run_storage
from valle.serve.web.voices import (
    VoiceError,
    VoiceMetadata,
    VoiceStore,
    VoiceStoreError,
    pack_codes,
)

UI = Path(__file__).resolve().parent.parent / "ui"
"""Folder of the web page."""

SPEECH_PATH, VOICES_PATH = "/v1/audio/speech", "/v1/audio/voices"

MAX_OTHER_BODY_BYTES = 65_536
"""Size limit of bodies on all other paths, which use none."""

MODEL_ID = "valle"
PARAMS_OF_CALLS = {
    "phonemes": "input",
    "prompt": "voice",
    "recording": "voice",
    "max_frames": "max_seconds",
    "seed": "seed",
    "temperature": "temperature",
    "top_p": "top_p",
}
"""Fields of the models' calls, with the field of a speech request that they come from."""

logger = logging.getLogger("ray.serve")


def create_api(
    args: AppArgs,
    deployments: Deployments,
    deployed: str | None = None,
    *,
    limits: KeyLimits | None = None,
    local_only: bool = False,
    replica: str = "",
) -> FastAPI:
    """The ASGI application of one ingress replica.

    `deployed` is the model's version when the application was deployed: that of requests while the
    registry has never answered this node. `limits` counts for all replicas, None for this one
    alone. `local_only`: the server listens on a loopback address. `replica` labels the metrics.
    """
    metrics = Metrics(replica)
    limits = limits or LocalKeyLimits()
    resolve = partial(registry.current_version, args.model, args.tracking_uri, deployed)
    watcher = AliasWatcher(resolve, deployments.preload, args.registry_poll_seconds)
    store = VoiceStore(args.voices, args.max_voices)
    prompts = PromptEncoder(store, deployments)
    speech_service = SpeechService(args, deployments, prompts, watcher, metrics)

    api = FastAPI(
        title="valle",
        description="Text to speech in the voice of a recording",
        docs_url=None,
        redoc_url=None,
        # a redirect names a scheme and a host, and behind TLS the wrong scheme
        redirect_slashes=False,
    )
    _add_middlewares(api, args, limits, metrics, local_only=local_only)
    _add_error_handlers(api)
    missing_parts = MissingParts(deployments, watcher, store)
    _add_status_routes(api, registry.display_name(args.model), missing_parts, metrics)
    _add_voice_routes(api, store, prompts, watcher)
    _add_speech_route(api, args, speech_service, limits)
    add_docs(api)

    @api.get("/", include_in_schema=False)
    async def index() -> FileResponse:
        """The web page, which may load nothing from other origins."""
        policy = (
            "default-src 'self'; media-src 'self' blob:; frame-ancestors 'none'; "
            "base-uri 'none'; form-action 'self'"
        )
        return FileResponse(UI / "index.html", headers={"Content-Security-Policy": policy})

    api.mount("/ui", StaticFiles(directory=UI))
    return api


def _add_middlewares(
    api: FastAPI, args: AppArgs, limits: KeyLimits, metrics: Metrics, *, local_only: bool
) -> None:
    """From the innermost, which is added first, to the outermost."""
    max_speech_bytes = min(max_speech_body_bytes(args.max_characters), args.max_body_bytes)
    max_bytes = {SPEECH_PATH: max_speech_bytes, VOICES_PATH: args.max_body_bytes}
    hosts = args.allowed_hosts or (LOCAL_HOSTS if local_only else ("*",))

    api.add_middleware(FailureMiddleware)
    api.add_middleware(
        BodyLimitMiddleware,
        limit=lambda path: max_bytes.get(path, MAX_OTHER_BODY_BYTES),
        seconds=args.max_body_seconds,
    )
    if args.api_keys:
        api.add_middleware(
            ApiKeyMiddleware,
            keys=KeyFile(args.api_keys, args.api_keys_poll_seconds),
            limits=limits,
            count_refusal=lambda reason: metrics.unauthorized.labels(reason).inc(),
        )
    api.add_middleware(HostMiddleware, allowed_hosts=hosts, allow_origins=args.allow_origins)
    # preflights never have a key, and errors need its headers as well
    api.add_middleware(cors, allow_origins=args.allow_origins)
    api.add_middleware(ResponseMiddleware)
    # outermost: it counts the refusals of the others too
    api.add_middleware(MetricsMiddleware, metrics=metrics)


def _add_speech_route(
    api: FastAPI, args: AppArgs, speech_service: SpeechService, limits: KeyLimits
) -> None:
    """OpenAI's speech endpoint. It parses its body itself, within bounds."""
    schema = SpeechRequest.model_json_schema()
    body = {"required": True, "content": {"application/json": {"schema": schema}}}

    @api.post(SPEECH_PATH, response_class=Response, openapi_extra={"requestBody": body})
    async def create_speech(request: Request) -> Response:
        """Speaks `input` in the voice of a recording; responds with an audio file."""
        caller = caller_of(request)
        caller.require("speak")
        check_json_content_type(request.headers.get("content-type", ""))
        speech_request = parse_speech_request(await request.body())
        if speech_request.ref_audio is not None:
            caller.require("inline")
            if not args.inline:
                message = "ref_audio: this server speaks in stored voices only; use `voice`"
                raise ApiError(403, message, "ref_audio", "not_permitted")
        await _spend_characters(caller, len(speech_request.input), limits)
        response = await speech_service.create_speech(speech_request, caller)
        if ignored := speech_request.ignored_fields():
            response.headers["X-Ignored-Fields"] = ", ".join(ignored)
        return response


async def _spend_characters(caller: Caller, n_characters: int, limits: KeyLimits) -> None:
    """Raises ApiError where the key's characters of this minute do not suffice."""
    allowed = caller.characters_per_minute
    if allowed is None:
        return
    if n_characters > allowed:
        message = f"input: {n_characters} characters, key {caller.key} allows {allowed} a minute"
        raise ApiError(400, message, "input", "too_many_characters")
    if wait := await limits.spend_characters(caller.key, n_characters, allowed):
        message = f"key {caller.key}: {allowed} characters a minute are allowed"
        headers = {"Retry-After": str(wait)}
        raise ApiError(429, message, "input", "rate_limit_exceeded", headers)


def _add_error_handlers(api: FastAPI) -> None:
    """Every error as an OpenAI error body."""

    @api.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return error_response(error.status, error.detail, error.headers)

    @api.exception_handler(OverloadedError)
    async def overloaded(request: Request, error: OverloadedError) -> Response:
        detail = ErrorDetail(
            message="the server is busy; try again in a moment",
            type="rate_limit_error",
            code="overloaded",
        )
        return error_response(429, detail, {"Retry-After": "2"})

    @api.exception_handler(RefusedCallError)
    async def refused_by_model(request: Request, error: RefusedCallError) -> Response:
        logger.error("a replica refused a call: %s", error, exc_info=error)
        field, _, reason = str(error).partition(": ")
        param = PARAMS_OF_CALLS.get(field)
        if param is None:  # nothing that the client can change
            return await failed(request, error)
        return error_response(400, ErrorDetail(message=f"{param}: {reason}", param=param))

    @api.exception_handler(UnavailableError)
    async def unavailable(request: Request, error: UnavailableError) -> Response:
        logger.error("no replica has answered: %s", error, exc_info=error)
        message = "the models are not available; try again in a moment"
        return _unavailable(message, "unavailable", retry_seconds=5)

    @api.exception_handler(VoiceStoreError)
    async def no_voice_store(request: Request, error: VoiceStoreError) -> Response:
        logger.error("the voice store does not answer: %s", error)
        message = "the store of the voices does not answer; try again in a moment"
        return _unavailable(message, "voice_store_unavailable", retry_seconds=10)

    @api.exception_handler(NoVersionError)
    async def no_version(request: Request, error: NoVersionError) -> Response:
        logger.warning("refused: %s", error)
        message = "the model's version is not known yet: the registry does not answer"
        return _unavailable(message, "model_unavailable", retry_seconds=2)

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        api_error = validation_error(error.errors())
        return error_response(api_error.status, api_error.detail)

    @api.exception_handler(HTTPException)
    async def not_found(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {shorten(request.url.path)}: {error.detail}"
        headers = dict(error.headers or {})
        return error_response(error.status_code, ErrorDetail(message=message), headers)

    @api.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        """An error of a middleware; `FailureMiddleware` answers those of the application."""
        detail = ErrorDetail(message="the server failed", type="server_error")
        return error_response(500, detail, {"Retry-After": "2"})


def _unavailable(message: str, code: str, *, retry_seconds: int) -> Response:
    """A 503 that says when to try again."""
    detail = ErrorDetail(message=message, type="server_error", code=code)
    return error_response(503, detail, {"Retry-After": str(retry_seconds)})


def _add_status_routes(
    api: FastAPI, model: str, missing_parts: MissingParts, metrics: Metrics
) -> None:
    """Health, metrics and the list of models."""
    entry = {
        "id": MODEL_ID,
        "object": "model",
        "created": int(time.time()),
        "owned_by": model,
    }

    @api.get("/health/live")
    async def live() -> dict[str, str]:
        """The process responds."""
        return {"status": "ok"}

    @api.get("/health/ready")
    async def ready() -> Response:
        """Speech requests can be answered: every deployment has a running replica, there is a model
        version, and Serve's controller and the voice store answer."""
        missing = await missing_parts.names()
        content = {"status": "waiting" if missing else "ready", "waiting_for": missing}
        return JSONResponse(content, 503 if missing else 200)

    @api.get("/metrics")
    async def prometheus_metrics() -> Response:
        """Counters of this replica, in Prometheus' text format."""
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    @api.get("/v1/models")
    async def list_models() -> dict[str, object]:
        """The one model, as OpenAI lists models."""
        return {"object": "list", "data": [entry]}

    @api.get("/v1/models/{name:path}")
    async def retrieve_model(name: str) -> dict[str, object]:
        """The model. Speech requests may name any; this one exists."""
        if name != MODEL_ID:
            message = f"no model {shorten(name)!r}; the one here is {MODEL_ID!r}"
            raise ApiError(404, message, "model", "model_not_found")
        return entry


def _add_voice_routes(
    api: FastAPI, store: VoiceStore, prompts: PromptEncoder, watcher: AliasWatcher
) -> None:
    """Listing, adding and deleting voices."""

    @api.get(VOICES_PATH)
    async def list_voices(request: Request) -> dict[str, list[dict[str, str]]]:
        """The voices that the key may use, as OpenAI-compatible servers list voices."""
        names = await run_storage(store.ids, caller_of(request))
        return {"voices": [{"id": name, "name": name} for name in names]}

    @api.post(VOICES_PATH)
    async def add_voice(
        request: Request,
        name: Annotated[str, Form(max_length=100)],
        audio_sample: UploadFile,
        consent: Annotated[str, Form(min_length=3, max_length=1000)],
        text: Annotated[str | None, Form(max_length=4096)] = None,
    ) -> dict[str, object]:
        """Stores a recording of 1 to 60 s as a voice. `consent` says who agreed to it."""
        caller = caller_of(request)
        caller.require("add")
        data = await audio_sample.read()
        try:
            wave = await run_decoding(store.validate_recording, name, data, caller)
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
            await run_storage(store.add, name, wave, metadata, caller)
        except AudioError as error:
            message = f"audio_sample: {error}"
            raise ApiError(400, message, "audio_sample", "unusable_recording") from error
        except VoiceError as error:
            status = {"voice_exists": 409, "too_many_voices": 507}.get(error.code, 400)
            raise ApiError(status, str(error), "name", error.code) from error
        logger.info("voice added %s voice=%s seconds=%.1f", caller, name, metadata.seconds)
        return {
            "id": name,
            "name": name,
            "seconds": metadata.seconds,
            "created_at": metadata.created,
        }

    @api.delete("/v1/audio/voices/{name}")
    async def delete_voice(name: str, request: Request) -> dict[str, object]:
        """Deletes a recording with its metadata, and what replicas remember of it."""
        caller = caller_of(request)
        caller.require("delete")
        try:
            await run_storage(store.delete, name, caller)
            await prompts.forget()
        except VoiceError as error:
            status = 403 if error.code == "not_permitted" else 404
            raise ApiError(status, str(error), "name", error.code) from error
        logger.info("voice deleted %s voice=%s", caller, name)
        return {"id": name, "deleted": True}
