"""The HTTP border: bodies, origins, methods and headers, with stand-ins for the models."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from helpers.asgi import StreamingRequest
from helpers.deployments import FakeDeployments
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.types import ASGIApp, Message

from valle.platform.audio import wav_bytes
from valle.serve.app_args import AppArgs
from valle.serve.web.api import create_api
from valle.serve.web.json_body import MAX_JSON_VALUES, JsonError, parse_json_object
from valle.serve.web.origins import is_loopback
from valle.serve.web.readiness import Readiness
from valle.serve.web.schema import SpeechRequest

SPEECH, VOICES = "/v1/audio/speech", "/v1/audio/voices"
BODY = {"input": "Hi there.", "voice": "ann", "response_format": "pcm"}
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def args(tmp_path: Path) -> AppArgs:
    wave = np.random.default_rng(0).normal(0, 0.1, 48_000).astype(np.float32)
    (tmp_path / "ann.wav").write_bytes(wav_bytes(wave))
    return AppArgs(model="/some/böndle", voices=str(tmp_path))


def client(api: ASGIApp, **options: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(api, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test", **options)


@pytest.fixture
async def http(args: AppArgs) -> AsyncIterator[httpx.AsyncClient]:
    async with client(create_api(args, FakeDeployments())) as http_client:
        yield http_client


HOSTILE = {
    "keys": "{" + ",".join(f'"k{i}":1' for i in range(300_000)) + "}",
    "same key": "{" + ",".join(['"k":1'] * 300_000) + "}",
    "numbers": '{"input":[' + ",".join("1" * 1_500_000) + "]}",
    "strings": '{"input":[' + ",".join(['""'] * 900_000) + "]}",
    "objects": '{"input":[' + ",".join(["{}"] * 900_000) + "]}",
    "nested lists": '{"input":' + "[" * 1_900_000 + "]" * 1_900_000 + "}",
    "nested objects": '{"a":' * 600_000 + "1" + "}" * 600_000,
    "long key": '{"' + "k" * 3_900_000 + '":1}',
    "long wrong value": '{"response_format":"' + "k" * 3_900_000 + '"}',
    "large integer": '{"seed":' + "9" * 3_900_000 + "}",
    "large exponent": '{"speed":1e' + "9" * 3_900_000 + "}",
    "spaces": "{" + " " * 3_900_000 + '"voise":1}',
    "escapes": '{"input":"' + "\\n" * 1_900_000 + '"}',
    "unfinished string": '{"input":"' + "x" * 3_900_000,
    "quotes": '"' * 3_900_000,
    "colons": "{" + ":" * 3_900_000,
}


@pytest.mark.anyio
@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_body_is_refused_without_being_built(
    http: httpx.AsyncClient, name: str
) -> None:
    """Few objects are made of it, and little of it is echoed."""
    data = HOSTILE[name].encode()
    response = await http.post(SPEECH, content=data, headers=JSON)
    assert response.status_code == 400 and len(response.content) < 2000
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("name", ["keys", "strings", "nested lists", "objects"])
def test_parse_json_object_makes_no_values_of_a_hostile_body(name: str) -> None:
    import tracemalloc

    data = HOSTILE[name].encode()
    tracemalloc.start()
    try:
        with pytest.raises(JsonError, match="more than"):
            parse_json_object(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * len(data)  # the decoded text, and pieces of it


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"[]", "must be a JSON object, not a list"),
        (b'"x"', "not a string"),
        (b"null", "not null"),
        (b"7", "not a number"),
        (b"", "the body is empty"),
        (b"{", "the body is not JSON"),
        (b'{"input":"a","input":"b"}', "input: given twice"),
        (b'{"speed":NaN}', "NaN is no number"),
        (b'{"max_seconds":-Infinity}', "-Infinity is no number"),
        (b'{"max_seconds":1e999,"input":"a"}', "max_seconds: Input should be a finite number"),
        (b'{"input":"\xff"}', "not text in UTF-8"),
        (b'{"voise":"ann"}', "voise: no such field; did you mean voice?"),
        (b'{"volume_multiplier":2}', "volume_multiplier: no such field; known: model, input"),
        (b'{"input":"a","voice":{"name":"x"}}', 'voice: an object must be {"id": NAME}'),
        (b'{"input":"a","voice":{"id":7}}', "voice: Input should be a valid string"),
        (b'{"input":{"a":1},"voice":"ann"}', "input: Input should be a valid string"),
        (b'{"input":"\\ud800","voice":"ann"}', "input"),
        (b'{"\\ud800":1}', "no such field"),
    ],
)
async def test_a_wrong_body_is_named(http: httpx.AsyncClient, body: bytes, message: str) -> None:
    response = await http.post(SPEECH, content=body, headers=JSON)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


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
    assert plain.headers["x-model"] == "b%C3%B6ndle", "no path of the server, in ASCII"
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


HOSTS = [
    ("localhost", 200), ("localhost:8000", 200), ("127.0.0.1:8000", 200), ("[::1]:8000", 200),
    ("LOCALHOST", 200), ("evil.example", 421), ("localhost.evil.example", 421), ("", 421),
    ("evil@localhost", 421), ("localhost:8000:1", 421), ("127.0.0.1.", 421), ("[::1", 421),
]  # fmt: skip


@pytest.mark.anyio
@pytest.mark.parametrize(("host", "status"), HOSTS)
async def test_a_local_server_answers_to_local_names_only(
    args: AppArgs, host: str, status: int
) -> None:
    """DNS rebinding: a page's own name that resolves to 127.0.0.1."""
    async with client(create_api(args, FakeDeployments(), local_only=True)) as http:
        response = await http.get(VOICES, headers={"Host": host})
        assert response.status_code == status
    named = args.model_copy(update={"allowed_hosts": ("tts.example.com", "*.example.org")})
    async with client(create_api(named, FakeDeployments(), local_only=True)) as http:
        for name, expected in (
            ("tts.example.com:443", 200), ("a.b.example.org", 200), ("example.org", 421),
            ("evil-example.org", 421), ("localhost", 421),
        ):  # fmt: skip
            assert (await http.get(VOICES, headers={"Host": name})).status_code == expected, name


@pytest.mark.anyio
@pytest.mark.parametrize("method", ["POST", "DELETE", "PUT", "PATCH"])
async def test_pages_of_other_origins_change_nothing(args: AppArgs, method: str) -> None:
    allowed = args.model_copy(update={"allow_origins": ("https://chat.example.com/",)})
    path = f"{VOICES}/nobody" if method == "DELETE" else SPEECH
    async with client(create_api(allowed, FakeDeployments())) as http:
        for origin, passes in {
            "http://evil.example": False, "null": False, "https://chat.example.com.evil": False,
            "http://chat.example.com": False, "http://test:81": False, "http://[": False,
            "https://chat.example.com": True, "http://test": True, "https://test": True, None: True,
        }.items():  # fmt: skip
            headers = JSON | ({} if origin is None else {"Origin": origin})
            response = await http.request(method, path, content=b"{}", headers=headers)
            assert (response.status_code != 403) is passes, (origin, response.text)
            shown = response.headers.get("access-control-allow-origin")
            assert shown == (origin if origin == "https://chat.example.com" else None)


@pytest.mark.anyio
async def test_preflights_need_no_key_and_errors_can_be_read(args: AppArgs, tmp_path: Path) -> None:
    (tmp_path / "keys.yaml").write_text(f'[{{name: a, sha256: "{"0" * 64}"}}]')
    update = {
        "allow_origins": ("https://chat.example.com",),
        "api_keys": str(tmp_path / "keys.yaml"),
    }
    origin = {"Origin": "https://chat.example.com"}
    asked = "content-type,authorization,x-stainless-lang"
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": asked}
    deployments = FakeDeployments()
    async with client(create_api(args.model_copy(update=update), deployments)) as http:
        answer = await http.options(SPEECH, headers=origin | preflight)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == origin["Origin"]
        assert answer.headers["access-control-allow-headers"] == asked
        other = await http.options(SPEECH, headers=preflight | {"Origin": "https://evil.example"})
        assert other.status_code == 400 and "access-control-allow-origin" not in other.headers
        refused = await http.post(SPEECH, json=BODY, headers=origin)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == origin["Origin"]
    update.pop("api_keys")
    async with client(create_api(args.model_copy(update=update), deployments)) as http:
        large = {"Content-Length": "99999999", **origin, **JSON}
        assert (await http.post(SPEECH, json=BODY, headers=origin)).status_code == 200
        answers = [await http.post(SPEECH, content=b"{", headers=origin | JSON)]
        answers.append(await http.post(SPEECH, content=b"", headers=large))
        deployments.fail("nar_decode", RuntimeError("the models failed"))
        answers.append(await http.post(SPEECH, json=BODY, headers=origin))
        assert [answer.status_code for answer in answers] == [400, 413, 500]
        for answer in answers:
            assert answer.headers["access-control-allow-origin"] == origin["Origin"]
            assert answer.json()["error"]["message"]
    async with client(create_api(args, deployments)) as http:  # the default: no other origin
        answer = await http.options(SPEECH, headers=origin | preflight)
        assert "access-control-allow-origin" not in answer.headers


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
async def test_probes_ask_serve_one_question_at_a_time() -> None:
    answer, n_questions = asyncio.Event(), 0

    async def not_running() -> list[str]:
        nonlocal n_questions
        n_questions += 1
        await answer.wait()
        return ["AR"]

    readiness = Readiness(not_running, deadline_seconds=0.05)
    waiting = [readiness.waiting_for() for _ in range(40)]
    assert await asyncio.gather(*waiting) == [["an answer from Serve"]] * 40
    assert await readiness.waiting_for() == ["an answer from Serve"] and n_questions == 1
    answer.set()
    assert await readiness.waiting_for() == ["AR"]
    assert await readiness.waiting_for() == ["AR"] and n_questions == 2


@pytest.mark.anyio
async def test_a_request_that_the_models_refuse_is_a_400(args: AppArgs) -> None:
    deployments = FakeDeployments()
    deployments.fail("generate_codes", ValueError("phonemes: ids must be 0 to 9"))
    async with client(create_api(args, deployments)) as http:
        response = await http.post(SPEECH, json=BODY)
        assert response.status_code == 400 and response.json()["error"]["code"] == "unspeakable"


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("[::1]", True),
        ("localhost", True), ("LocalHost", True), ("::ffff:127.0.0.1", True), ("0.0.0.0", False),
        ("::", False), ("", False), ("0", False), ("10.0.0.7", False), ("example.com", False),
        ("::ffff:10.0.0.7", False), ("localhost.example.com", False), ("2130706433", False),
    ],
)  # fmt: skip
def test_is_loopback(host: str, local: bool) -> None:
    assert is_loopback(host) is local


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5)
    ),
    max_leaves=30,
)
field_names = st.sampled_from([*SpeechRequest.model_fields, "Input", "voise", ""])
plausible = st.fixed_dictionaries(
    {"input": st.text(max_size=40), "voice": st.just("ann")},
    optional={
        "response_format": st.sampled_from(["pcm", "wav", "mp3", "midi"]),
        "speed": st.floats() | st.integers(),
        "seed": st.integers(),
        "temperature": st.floats(),
        "top_p": st.floats(),
        "max_seconds": st.floats() | st.integers(),
        "chunked": st.booleans(),
        "stream_format": st.sampled_from(["audio", "sse"]),
        "language": st.sampled_from(["en-us", "de", "xx", ""]),
        "ref_audio": st.text(max_size=20),
    },
)
bodies = (
    plausible.map(json.dumps).map(str.encode)
    | st.dictionaries(field_names, json_values, max_size=12).map(json.dumps).map(str.encode)
    | json_values.map(json.dumps).map(str.encode)
    | st.binary(max_size=200)
    | st.text(alphabet='{}[]":,\\ueE+-.0123456789 \tNaInfity', max_size=200).map(str.encode)
)


@pytest.mark.fuzz
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=bodies)
def test_no_body_makes_the_server_fail(args: AppArgs, body: bytes) -> None:
    """Whatever JSON, or no JSON, is sent: an answer in bounded time, and never a 500."""

    async def post() -> httpx.Response:
        async with client(create_api(args, FakeDeployments())) as http, asyncio.timeout(20):
            return await http.post(SPEECH, content=body, headers=JSON)

    response = asyncio.run(post())
    assert response.status_code in (200, 400, 404, 413, 429), (body, response.text)
    assert len(response.content) < 3000 or response.status_code == 200


@pytest.mark.fuzz
@given(value=json_values)
def test_parse_json_object_equals_json_loads(value: object) -> None:
    """The bounded parser accepts what is small, and reads it as Python's own does."""
    data = json.dumps(value).encode()
    try:
        parsed = parse_json_object(data)
    except JsonError:
        text = data.decode()
        many = sum(map(text.count, ',[{"')) > MAX_JSON_VALUES / 2
        assert many or not isinstance(value, dict) or "NaN" in text or "Infinity" in text
    else:
        assert parsed == json.loads(data)
