"""Hosts and web origins that may use the endpoint, and CORS."""

from pathlib import Path

import pytest
from helpers.asgi import BODY, JSON, SPEECH, VOICES, asgi_client
from helpers.deployments import FakeDeployments

from valle.serve.app_args import AppArgs
from valle.serve.web.api import create_api
from valle.serve.web.origins import is_loopback

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
    async with asgi_client(create_api(args, FakeDeployments(), local_only=True)) as http:
        response = await http.get(VOICES, headers={"Host": host})
        assert response.status_code == status
    named = args.model_copy(update={"allowed_hosts": ("tts.example.com", "*.example.org")})
    async with asgi_client(create_api(named, FakeDeployments(), local_only=True)) as http:
        for name, expected in (
            ("tts.example.com:443", 200), ("a.b.example.org", 200), ("example.org", 421),
            ("evil-example.org", 421), ("localhost", 421),
        ):  # fmt: skip
            assert (await http.get(VOICES, headers={"Host": name})).status_code == expected, name


@pytest.mark.anyio
@pytest.mark.parametrize("method", ["POST", "DELETE", "PUT", "PATCH"])
async def test_pages_of_other_origins_change_nothing(args: AppArgs, method: str) -> None:
    allowed = args.model_copy(update={"allow_origins": ("https://Chat.example.com/",)})
    path = f"{VOICES}/nobody" if method == "DELETE" else SPEECH
    async with asgi_client(create_api(allowed, FakeDeployments())) as http:
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
        # a name that is none is not the same origin as no origin
        headers = JSON | {"Origin": "null", "Host": "a!b.example"}
        response = await http.request(method, path, content=b"{}", headers=headers)
        assert response.status_code == 403


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
    async with asgi_client(create_api(args.model_copy(update=update), deployments)) as http:
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
    async with asgi_client(create_api(args.model_copy(update=update), deployments)) as http:
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
    async with asgi_client(create_api(args, deployments)) as http:  # the default: no other origin
        answer = await http.options(SPEECH, headers=origin | preflight)
        assert "access-control-allow-origin" not in answer.headers


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
