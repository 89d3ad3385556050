"""API keys: missing, wrong or over their limits; and paths that need none."""

import asyncio
import hashlib
from pathlib import Path

import httpx
import pytest
import yaml
from helpers.deployments import FakeDeployments
from starlette.types import Receive, Scope, Send

from valle.serve.app_args import AppArgs
from valle.serve.web import keys
from valle.serve.web.api import create_api
from valle.serve.web.keys import ApiKey, ApiKeyMiddleware, read_keys


def key(name: str, secret: str, **limits: int) -> ApiKey:
    digest = hashlib.sha256(secret.encode()).hexdigest()
    return ApiKey(name=name, sha256=digest, **limits)


def client(middleware: object) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(middleware)  # type: ignore[arg-type]
    return httpx.AsyncClient(transport=transport, base_url="http://test")


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
    args = AppArgs(model=f"/some/bundle#{'0' * 64}", voices=str(tmp_path), api_keys=str(file))
    api = create_api(args, FakeDeployments())
    async with client(api) as http:
        for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": f"Basic {secret}"}):
            response = await http.get("/v1/audio/voices", headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
        response = await http.get("/v1/audio/voices", headers={"Authorization": f"Bearer {secret}"})
        assert response.status_code == 200
        assert (await http.get("/health/live")).status_code == 200
        assert (await http.get("/docs")).status_code == 401
    # Serve leaves a route prefix in the path, beside `root_path`
    transport = httpx.ASGITransport(api, root_path="/tts")
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        assert (await http.get("/tts/v1/audio/voices")).status_code == 401
        assert (await http.get("/tts/health/live")).status_code == 200


@pytest.mark.anyio
async def test_each_key_has_its_own_limits() -> None:
    gate, entered = asyncio.Event(), asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        entered.set()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await gate.wait()  # the head is sent, the body is not: it still runs
        await send({"type": "http.response.body", "body": b"ok"})

    middleware = ApiKeyMiddleware(
        slow, [key("a", "A", requests_per_minute=3, concurrent=1), key("b", "B")]
    )
    async with client(middleware) as http:

        def get(secret: str) -> "asyncio.Task[httpx.Response]":
            headers = {"Authorization": f"Bearer {secret}"}
            return asyncio.create_task(http.get("/v1/x", headers=headers))

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


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([], "must be a list of keys"),
        ([{"name": "a", "sha256": "x"}], "a: sha256 must be 64 digits"),
        ([{"name": "a", "sha256": "0" * 64, "speed": 1}], "speed"),
        ([{"name": "a", "sha256": "0" * 64, "concurrent": 0}], "a: limits must be above 0"),
        ([{"name": "a", "sha256": d * 64} for d in "01"], "two keys have the same name"),
    ],
)
def test_read_keys_refuses_a_bad_file(tmp_path: Path, content: object, reason: str) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=reason):
        read_keys(str(file))
