"""API keys: missing, wrong, over their limits, taken out; what they may do, and whose voices."""

import asyncio
import base64
import hashlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from helpers.deployments import FakeDeployments
from helpers.recordings import speech
from starlette.types import Receive, Scope, Send

from valle.jobs.speakers import Joe
from valle.platform.audio import wav_bytes
from valle.serve.app_args import AppArgs
from valle.serve.key_limits import LEASE_SECONDS, LocalKeyLimits
from valle.serve.web import keys
from valle.serve.web.api import create_api
from valle.serve.web.authorization import ApiKeyMiddleware
from valle.serve.web.keys import KeyFile, read_keys

MODEL = "/some/bundle#" + "1a2b3c4d" * 8
"""A folder: no registry is asked about it."""

SPEECH, VOICES = "/v1/audio/speech", "/v1/audio/voices"


def entry(name: str, secret: str = "", **fields: Any) -> dict[str, Any]:
    """A line of the file; the secret is the name in upper case."""
    digest = hashlib.sha256((secret or name.upper()).encode()).hexdigest()
    return {"name": name, "sha256": digest, **fields}


def write_keys(folder: Path, *entries: dict[str, Any]) -> str:
    file = folder / "keys.yaml"
    file.write_text(yaml.safe_dump(list(entries)))
    return str(file)


def client(application: object) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(application, raise_app_exceptions=False)  # type: ignore[arg-type]
    return httpx.AsyncClient(transport=transport, base_url="http://test")


def as_key(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


@pytest.fixture(scope="module")
def recording() -> bytes:
    text = "The early train was late again, so we walked along the river and talked."
    return wav_bytes(Joe().synthesize(text, "joe", "en-us"))


@pytest.fixture
def voices(tmp_path: Path) -> Path:
    """A folder with one voice that was put there by hand."""
    folder = tmp_path / "voices"
    folder.mkdir()
    (folder / "shared.wav").write_bytes(wav_bytes(speech(2)))
    return folder


@pytest.fixture
async def http(voices: Path, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """An application with the keys ann, bob, a boss who may use all voices, and a listener."""
    uri = write_keys(
        tmp_path,
        entry("ann", requests_per_minute=1000, max_voices=1),
        entry("bob", requests_per_minute=1000, characters_per_minute=50),
        entry("boss", requests_per_minute=1000, voices="all"),
        entry("listener", requests_per_minute=1000, may=["speak"]),
    )
    args = AppArgs(model=MODEL, voices=str(voices), api_keys=uri)
    async with client(create_api(args, FakeDeployments())) as http_client:
        yield http_client


@pytest.mark.anyio
async def test_a_key_of_the_command_opens_the_api(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys.main(["web"])
    first, _, *rest = capsys.readouterr().out.splitlines()
    secret = first.rpartition(" ")[2]
    file = tmp_path / "keys.yaml"
    file.write_text("\n".join(rest))
    assert secret not in file.read_text()
    args = AppArgs(model=MODEL, voices=str(tmp_path), api_keys=str(file))
    api = create_api(args, FakeDeployments())
    async with client(api) as http:
        for headers in ({}, as_key("no"), as_key(""), {"Authorization": f"Basic {secret}"}):
            for method, path in (("GET", VOICES), ("POST", SPEECH), ("GET", "/x"), ("PUT", "/")):
                response = await http.request(method, path, headers=headers)
                assert response.status_code == (405 if path == "/" else 401)
            response = await http.get(VOICES, headers=headers)
            assert response.json()["error"]["code"] == "invalid_api_key"
        assert (await http.get(VOICES, headers=as_key(secret))).status_code == 200
        for path in ("/health/live", "/", "/docs", "/docs/swagger-ui.css", "/openapi.json"):
            assert (await http.get(path)).status_code == 200, path
        metrics = await http.get("/metrics", headers=as_key(secret))
        assert 'valle_unauthorized_requests_total{reason="unknown"} 4.0' in metrics.text
        assert 'valle_unauthorized_requests_total{reason="missing"} 12.0' in metrics.text
        assert (await http.get("/metrics")).status_code == 401
    # Serve leaves a route prefix in the path, beside `root_path`
    transport = httpx.ASGITransport(api, root_path="/tts")
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        assert (await http.get("/tts/v1/audio/voices")).status_code == 401
        assert (await http.get("/tts/health/live")).status_code == 200


@pytest.mark.anyio
async def test_refused_keys_are_logged_but_not_each(
    http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "ray.serve"):
        for _ in range(50):
            await http.get(VOICES, headers=as_key("wrong"))
    lines = [line for line in caplog.messages if line.startswith("401")]
    assert len(lines) == 1 and "wrong" not in lines[0]


@pytest.mark.anyio
async def test_a_websocket_needs_a_key(tmp_path: Path) -> None:
    reached: list[str] = []

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        reached.append(scope["type"])

    uri = write_keys(tmp_path, entry("ann"))
    refused: list[str] = []
    middleware = ApiKeyMiddleware(application, KeyFile(uri, 1), LocalKeyLimits(), refused.append)
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    scope = {"type": "websocket", "path": "/", "headers": []}
    await middleware(scope, receive, send)
    assert not reached and sent[0]["type"] == "websocket.close" and refused == ["missing"]
    scope["headers"] = [(b"authorization", b"Bearer ANN")]
    await middleware(scope, receive, send)
    await middleware({"type": "lifespan"}, receive, send)
    await middleware({"type": "something new", "path": "/", "headers": []}, receive, send)
    assert reached == ["websocket", "lifespan"]


@pytest.mark.anyio
async def test_each_key_has_its_own_limits(tmp_path: Path) -> None:
    gate, entered = asyncio.Event(), asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        entered.set()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await gate.wait()  # the head is sent, the body is not: it still runs
        await send({"type": "http.response.body", "body": b"ok"})

    uri = write_keys(tmp_path, entry("a", requests_per_minute=3, concurrent=1), entry("b"))
    middleware = ApiKeyMiddleware(slow, KeyFile(uri, 10), LocalKeyLimits(), lambda _: None)
    async with client(middleware) as http:

        def get(secret: str) -> "asyncio.Task[httpx.Response]":
            return asyncio.create_task(http.get("/v1/x", headers=as_key(secret)))

        running = get("A")
        await entered.wait()
        concurrent = await get("A")
        assert concurrent.status_code == 429 and concurrent.headers["retry-after"] == "1"
        assert concurrent.json()["error"]["type"] == "rate_limit_error"
        of_another_key = get("B")
        gate.set()
        assert (await running).status_code == (await of_another_key).status_code == 200
        assert [(await get("A")).status_code for _ in range(3)] == [200, 200, 429]
        over_the_limit = await get("A")
        assert 1 <= int(over_the_limit.headers["retry-after"]) <= 61
        assert (await get("B")).status_code == 200


@pytest.mark.anyio
async def test_limits_hold_over_all_replicas() -> None:
    now = 0.0
    limits = LocalKeyLimits(lambda: now)

    async def start(replica: str, running: int, key: str = "k") -> int:
        return await limits.start_request(replica, key, running, 100, 3)

    assert [await start("a", 0), await start("a", 1), await start("b", 0)] == [0, 0, 0]
    assert await start("b", 1) == await start("a", 2) == await start("c", 0) == 1
    assert await start("c", 0, "another key") == 0
    await limits.report_running("a", {"k": 1})  # one has ended
    assert await start("c", 0) == 0 and await start("c", 1) == 1
    now = LEASE_SECONDS / 2
    await limits.report_running("c", {"k": 1})
    now = LEASE_SECONDS + 1  # a and b are dead: they report nothing
    assert [await start("c", 1), await start("c", 2), await start("c", 3)] == [0, 0, 1]

    one_minute = LocalKeyLimits()
    replicas = ["a", "b", "c", "a", "b"]
    waits = [await one_minute.start_request(r, "k", 0, 4, 9) for r in replicas]
    assert waits[:4] == [0, 0, 0, 0] and 1 <= waits[4] <= 61


@pytest.mark.anyio
async def test_a_key_that_is_taken_out_of_the_file_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0
    uri = write_keys(tmp_path, entry("ann"), entry("bob"))
    key_file = KeyFile(uri, 10, lambda: now)

    async def known() -> list[str]:
        return [name for name in ("ann", "bob", "eve") if await key_file.find(name.upper())]

    write_keys(tmp_path, entry("bob"), entry("eve"))
    now = 9.9
    assert await known() == ["ann", "bob"]
    now = 10.0  # the first request after that time sees the new file
    assert await known() == ["bob", "eve"]
    with caplog.at_level(logging.ERROR, "ray.serve"):
        for broken in ("- name: ann\n", "[", "", "- name: \x80"):
            caplog.clear()
            Path(uri).write_bytes(broken.encode("latin-1"))
            for _ in range(3):
                now += 10
                assert await known() == ["bob", "eve"], "the last good keys stay"
            assert len(caplog.messages) == 1, broken
        Path(uri).unlink()
        now += 10
        assert await known() == ["bob", "eve"]
        with pytest.raises(FileNotFoundError):
            KeyFile(uri, 10)  # a replica that starts now lets nobody in
    write_keys(tmp_path, entry("eve"))
    now += 10
    assert await known() == ["eve"]


@pytest.mark.anyio
async def test_voices_belong_to_the_key_that_added_them(
    http: httpx.AsyncClient, recording: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async def add(secret: str, name: str) -> httpx.Response:
        form = {"name": name, "consent": f"{secret} agreed"}
        files = {"audio_sample": ("x.wav", recording)}
        return await http.post(VOICES, data=form, files=files, headers=as_key(secret))

    async def names(secret: str) -> list[str]:
        listed = (await http.get(VOICES, headers=as_key(secret))).json()["voices"]
        return [voice["id"] for voice in listed]

    async def speak(secret: str, voice: str) -> int:
        body = {"input": "Hi there.", "voice": voice, "response_format": "pcm"}
        headers = as_key(secret) | {"X-Request-ID": "number-7"}
        return (await http.post(SPEECH, json=body, headers=headers)).status_code

    async def delete(secret: str, voice: str) -> int:
        return (await http.delete(f"{VOICES}/{voice}", headers=as_key(secret))).status_code

    with caplog.at_level(logging.INFO, "ray.serve"):
        # two owners, one name: neither replaces the other
        assert (await add("ANN", "me")).status_code == (await add("BOB", "me")).status_code == 200
        assert (await add("ANN", "me")).status_code == 409
        assert (await add("BOB", "shared")).status_code == 409, "it would hide the shared voice"
        full = await add("ANN", "second")
        assert full.status_code == 507 and "limit 1" in full.json()["error"]["message"]
        assert (await add("LISTENER", "x")).status_code == 403
        assert await names("ANN") == await names("BOB") == ["me", "shared"]
        assert await names("LISTENER") == ["shared"]
        assert await names("BOSS") == ["ann.me", "bob.me", "shared"]
        assert await speak("ANN", "me") == await speak("ANN", "shared") == 200
        assert await speak("LISTENER", "me") == await speak("LISTENER", "ann.me") == 404
        assert await speak("BOSS", "ann.me") == await speak("ANN", "ann.me") == 200
        assert await delete("BOB", "ann.me") == 404 and await delete("LISTENER", "me") == 403
        assert await delete("ANN", "shared") == 403, "shared voices take a key for all voices"
        assert await delete("ANN", "me") == await delete("BOSS", "shared") == 200
        assert await names("BOB") == ["me"] and await names("BOSS") == ["bob.me"]
    lines = [line for line in caplog.messages if "key=" in line]
    assert any(
        line.startswith("speech key=ann request=number-7 voice=me characters=9") for line in lines
    )
    assert any(line.startswith("voice added key=bob request=") for line in lines)
    assert any(line.startswith("voice deleted key=boss request=") for line in lines)


@pytest.mark.anyio
async def test_a_name_cannot_leave_the_folder_of_its_owner(
    http: httpx.AsyncClient, recording: bytes
) -> None:
    for voice in ("..", "owned", "a.b.c", ".me", "bob.", "../bob/me", "%2e%2e%2fme", "me\x00"):
        body = {"input": "Hi there.", "voice": voice}
        for secret in ("ANN", "BOSS"):
            response = await http.post(SPEECH, json=body, headers=as_key(secret))
            assert response.status_code in (400, 404), voice
    for name in ("ann.x", "../x", "a/b", ""):
        form = {"name": name, "consent": "mine"}
        files = {"audio_sample": ("x.wav", recording)}
        response = await http.post(VOICES, data=form, files=files, headers=as_key("ANN"))
        assert response.status_code == 400, name


@pytest.mark.anyio
async def test_a_key_has_characters_a_minute(http: httpx.AsyncClient) -> None:
    async def speak(secret: str, text: str) -> httpx.Response:
        body = {"input": text, "voice": "shared"}
        return await http.post(SPEECH, json=body, headers=as_key(secret))

    too_long = await speak("BOB", "And so on. " * 5)
    assert too_long.status_code == 400 and "allows 50 a minute" in too_long.text
    assert (await speak("BOB", "The early train was late again.")).status_code == 200
    refused = await speak("BOB", "The early train was late again.")
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    assert (await speak("ANN", "The early train was late again.")).status_code == 200


@pytest.mark.anyio
async def test_inline_recordings_need_the_permission(
    http: httpx.AsyncClient, voices: Path, recording: bytes
) -> None:
    body = {"input": "Hi there.", "ref_audio": base64.b64encode(recording).decode()}
    assert (await http.post(SPEECH, json=body, headers=as_key("ANN"))).status_code == 200
    refused = await http.post(SPEECH, json=body, headers=as_key("LISTENER"))
    assert refused.status_code == 403 and refused.json()["error"]["code"] == "not_permitted"
    args = AppArgs(model=MODEL, voices=str(voices), inline=False)
    async with client(create_api(args, FakeDeployments())) as without:
        switched_off = await without.post(SPEECH, json=body)
        assert switched_off.status_code == 403
        assert switched_off.json()["error"]["param"] == "ref_audio"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([], "must be a list of keys"),
        ({"name": "a"}, "must be a list of keys"),
        ([1], "api_keys"),
        ([{"name": "a", "sha256": "x"}], "a: sha256 must be 64 digits"),
        ([{"name": "a", "sha256": "0" * 64, "speed": 1}], "speed"),
        ([{"name": "a", "sha256": "0" * 64, "concurrent": 0}], "a: limits must be above 0"),
        ([{"name": "a", "sha256": "0" * 64, "characters_per_minute": 0}], "above 0"),
        ([{"name": "a", "sha256": "0" * 64, "may": ["fly"]}], "may"),
        ([{"name": "a", "sha256": "0" * 64, "voices": "none"}], "voices"),
        ([{"name": "../a", "sha256": "0" * 64}], "name"),
        ([{"name": "a", "sha256": d * 64} for d in "01"], "two keys have the same name"),
        ([{"name": n, "sha256": n * 64} for n in "Aa"], "sha256"),
        ([entry("a"), entry("A", "b")], "two keys have the same name"),
    ],
)
def test_read_keys_refuses_a_bad_file(tmp_path: Path, content: object, reason: str) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=reason):
        read_keys(str(file))
