"""The HTTP border: bodies, origins, methods and headers, with stand-ins for the models."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator

import httpx
import openai
import pytest
from helpers.asgi import BODY, JSON, SPEECH, VOICES, StreamingRequest, asgi_client
from helpers.deployments import FakeDeployments
from helpers.recordings import speech
from starlette.types import Message

from valle.platform.audio import wav_bytes
from valle.serve.app_args import AppArgs
from valle.serve.deployments.interface import OverloadedError, RefusedCallError
from valle.serve.web.api import create_api
from valle.serve.web.schema import SpeechRequest
from valle.serve.web.threads import (
    DECODING_THREADS,
    MAX_WAITING_RECORDINGS,
    STORAGE_THREADS,
    run_decoding,
    run_encoding,
    run_storage,
    run_text,
)


@pytest.mark.anyio
async def test_bodies_in_every_encoding_of_json_are_read(http: httpx.AsyncClient) -> None:
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"):
        data = json.dumps(BODY).encode(encoding)
        response = await http.post(SPEECH, content=data, headers=JSON)
        assert response.status_code == 200, (encoding, response.text)
    kinds = {"application/json; charset=utf-8": 200, "application/vnd.x+json": 200}
    kinds |= {"text/plain": 415, "application/x-www-form-urlencoded": 415, "": 415}
    for kind, status in kinds.items():
        data = json.dumps(BODY).encode()
        response = await http.post(SPEECH, content=data, headers={"Content-Type": kind})
        assert response.status_code == status, kind


@pytest.mark.anyio
async def test_fields_of_openai_are_taken_and_said_to_be_ignored(http: httpx.AsyncClient) -> None:
    fields = {"instructions": "Be cheerful.", "stream": True, "user": "me", "speed": None}
    response = await http.post(SPEECH, json=BODY | fields | {"voice": {"id": "ann"}})
    assert response.status_code == 200, response.text
    assert response.headers["x-ignored-fields"] == "instructions, stream, user"
    plain = await http.post(SPEECH, json=BODY)
    assert "x-ignored-fields" not in plain.headers
    assert plain.headers["x-model"] == "b%C3%B6ndle#1a2b3c4d", "no path of the server, in ASCII"
    # without a seed, each request draws its own, and says which
    other = await http.post(SPEECH, json=BODY)
    assert plain.headers["x-seed"] != other.headers["x-seed"]
    again = await http.post(SPEECH, json=BODY | {"seed": int(plain.headers["x-seed"])})
    assert again.content == plain.content != other.content


@pytest.mark.anyio
async def test_every_field_of_the_openai_client_is_accepted(args: AppArgs) -> None:
    from openai.types.audio import SpeechCreateParams

    assert set(SpeechCreateParams.__annotations__) <= set(SpeechRequest.model_fields)
    transport = httpx.ASGITransport(create_api(args, FakeDeployments()))
    async with openai.AsyncOpenAI(
        base_url="http://test/v1", api_key="x", http_client=httpx.AsyncClient(transport=transport)
    ) as openai_client:
        speech = await openai_client.audio.speech.create(
            model="gpt-4o-mini-tts",
            voice={"id": "ann"},
            input="Hi there.",
            instructions="Be cheerful.",
            response_format="wav",
            speed=1.5,
            stream_format="audio",
        )
        assert speech.content[:4] == b"RIFF"
        assert (await openai_client.models.retrieve("valle")).id == "valle"
        with pytest.raises(openai.NotFoundError, match="no model 'gpt-5'"):
            await openai_client.models.retrieve("gpt-5")


async def _stream(data: bytes, parts: int, state: dict[str, int]) -> AsyncIterator[bytes]:
    size = len(data) // parts + 1
    for start in range(0, len(data), size):
        state["sent"] = state.get("sent", 0) + 1
        yield data[start : start + size]


@pytest.mark.anyio
async def test_a_body_without_a_length_is_counted_while_it_is_read(
    http: httpx.AsyncClient, args: AppArgs
) -> None:
    data = json.dumps(BODY).encode()
    response = await http.post(SPEECH, content=_stream(data, 5, {}), headers=JSON)
    assert "content-length" not in response.request.headers
    assert response.status_code == 200, response.text

    # a megabyte a part: one part after the limit nothing more is asked for
    limits = {SPEECH: 4_200_000, VOICES: args.max_body_bytes, "/v1/models": 65_536}
    for path, limit in limits.items():
        state: dict[str, int] = {}
        headers = JSON if path == SPEECH else {"Content-Type": "multipart/form-data; boundary=x"}
        part = b'--x\r\nContent-Disposition: form-data; name="audio_sample"; filename="a"\r\n\r\n'
        body = _stream(part + b"x" * 40_000_000, 40, state)
        response = await http.post(path, content=body, headers=headers)
        if path == "/v1/models":
            assert response.status_code == 405
        else:
            assert response.status_code == 413, path
            assert response.json()["error"]["code"] == "request_too_large"
            assert response.headers["connection"] == "close"
            assert state["sent"] <= limit / 1_000_000 + 2


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([("content-length", "5"), ("transfer-encoding", "chunked")], 400),
        ([("content-length", "5"), ("content-length", "6")], 400),
        ([("content-length", "-5")], 400),
        ([("content-length", "+5")], 400),
        ([("content-length", "5, 5")], 400),
        ([("content-length", "\xb2")], 400),
        ([("content-length", "")], 400),
        ([("content-length", "9" * 5000)], 413),
        ([("content-length", "0" * 50 + "99999999")], 413),
    ],
)
async def test_an_ambiguous_length_is_refused(
    args: AppArgs, headers: list[tuple[str, str]], status: int
) -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        raise AssertionError("nothing of the body may be read")

    scope = {
        "type": "http", "method": "POST", "path": SPEECH, "root_path": "", "query_string": b"",
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers],
    }  # fmt: skip
    await create_api(args, FakeDeployments())(scope, receive, send)
    assert sent[0]["status"] == status


@pytest.mark.anyio
async def test_a_body_that_does_not_arrive_is_not_waited_for(args: AppArgs) -> None:
    api = create_api(args.model_copy(update={"max_body_seconds": 0.05}), FakeDeployments())
    request = StreamingRequest(api, SPEECH, BODY)
    request._incoming = asyncio.Queue()  # the body of a client that sends none
    started = await request.message()
    await request.task
    assert started["status"] in (200, 408)


@pytest.mark.anyio
async def test_a_form_is_in_utf_8(http: httpx.AsyncClient) -> None:
    """Its parser would take any of Python's codecs, punycode's in quadratic time among them."""
    parts = [("name", b"bob"), ("consent", b"I am J\xc3\xb6rg."), ("audio_sample", None)]
    data = b""
    for name, value in parts:
        file = b"" if value is not None else b'; filename="bob.wav"'
        value = wav_bytes(speech(2)) if value is None else value
        data += b'--x\r\nContent-Disposition: form-data; name="%b"%b' % (name.encode(), file)
        data += b"\r\n\r\n%b\r\n" % value
    data += b"--x--\r\n"
    for charset, status in {
        "; charset=punycode": 415,
        "; Charset = utf-7": 415,
        "; charset*=utf-8''punycode": 415,
        "; charset=utf-8; charset=punycode": 415,
        '; charset="UTF-8"': 200,
    }.items():
        headers = {"Content-Type": f"multipart/form-data; boundary=x{charset}"}
        response = await http.post(VOICES, content=data, headers=headers)
        assert response.status_code == status, (charset, response.text)


@pytest.mark.anyio
async def test_a_text_is_no_recording(http: httpx.AsyncClient) -> None:
    form = {"name": "bob", "consent": "I am Bob.", "audio_sample": "bob.wav"}
    response = await http.post(VOICES, data=form)
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert message == "audio_sample: must be a file, with a file name"


@pytest.mark.anyio
async def test_head_answers_as_get_without_a_body(http: httpx.AsyncClient) -> None:
    for path in ("/", "/health/live", "/health/ready", "/v1/models", "/v1/models/valle", "/docs"):
        head, get = await http.head(path), await http.get(path)
        assert head.status_code == get.status_code == 200, path
        assert not head.content and head.headers["content-type"] == get.headers["content-type"]
    assert (await http.head(SPEECH)).status_code == 405
    assert (await http.head("/v1/models/x")).status_code == 404
    metrics = (await http.get("/metrics")).text
    assert 'valle_requests_total{route="/health/live",status="200"} 2.0' in metrics


@pytest.mark.anyio
async def test_nothing_redirects_and_pages_load_nothing_from_elsewhere(
    http: httpx.AsyncClient,
) -> None:
    for path in (
        "/ui", "/ui/", "/docs/", "/v1/models/", "/v1/audio/voices/", "/v1/audio/speech/", "//",
        "/health/live/", "/redoc", "/docs/oauth2-redirect",
    ):  # fmt: skip
        for method in ("GET", "POST"):
            response = await http.request(method, path, content=b"")
            assert not response.is_redirect and "location" not in response.headers, path
    for path in ("/", "/docs"):
        page = await http.get(path)
        assert "://" not in page.text.replace("http://www.w3.org", ""), path
        policy = page.headers["content-security-policy"]
        assert "base-uri 'none'" in policy and "form-action" in policy
    for path in ("/", "/docs", "/ui/app.js", "/v1/models", "/nothing", "/docs/swagger-ui.css"):
        assert (await http.get(path)).headers["x-content-type-options"] == "nosniff"
    assert (await http.get("/docs/api_docs.py")).status_code == 404


@pytest.mark.anyio
async def test_long_paths_are_not_echoed(http: httpx.AsyncClient) -> None:
    response = await http.get("/" + "x" * 50_000)
    assert response.status_code == 404 and len(response.content) < 500


@pytest.mark.anyio
async def test_a_request_that_the_models_refuse_is_a_400(args: AppArgs) -> None:
    deployments = FakeDeployments()
    deployments.fail("generate_codes", RefusedCallError("phonemes: ids must be 0 to 9"))
    async with asgi_client(create_api(args, deployments)) as http:
        response = await http.post(SPEECH, json=BODY)
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["param"], error["message"]) == ("input", "input: ids must be 0 to 9")


@pytest.mark.anyio
async def test_slow_storage_takes_no_thread_from_encoding() -> None:
    """Nor do texts and recordings: each kind of work has its own threads."""
    gate = threading.Event()
    stuck = [asyncio.create_task(run_storage(gate.wait, 30)) for _ in range(2 * STORAGE_THREADS)]
    stuck += [asyncio.create_task(run_text(gate.wait, 30)) for _ in range(20)]
    stuck += [
        asyncio.create_task(run_decoding(gate.wait, 30))
        for _ in range(DECODING_THREADS + MAX_WAITING_RECORDINGS)
    ]
    try:
        async with asyncio.timeout(10):
            assert await run_encoding(lambda: "encoded") == "encoded"
            with pytest.raises(OverloadedError):  # a queue without end is no service
                await run_decoding(gate.wait, 30)
        assert not any(task.done() for task in stuck)
    finally:
        gate.set()
        await asyncio.gather(*stuck)
