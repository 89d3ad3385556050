"""The voice store: what is kept, what is refused, and that deleted means gone."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from botocore.config import Config
from fastapi import Response
from fastapi.responses import StreamingResponse
from helpers import clusters
from starlette.types import Message

from valle.jobs.speakers import Joe
from valle.model.codec.encodec import Encodec
from valle.model.codec.interface import Codes, Wave
from valle.model.tokens import HOP, SAMPLE_RATE
from valle.platform.audio import AudioError, flac_bytes, read, wav_bytes
from valle.serve.app_args import AppArgs
from valle.serve.deployments.versions import AliasWatcher
from valle.serve.web.api import create_api
from valle.serve.web.prompts import PROMPT_FRAMES, PromptEncoder
from valle.serve.web.schema import SpeechRequest
from valle.serve.web.service import SpeechService
from valle.serve.web.voices import (
    VoiceError,
    VoiceMetadata,
    VoiceStore,
    pack_codes,
    read_voice_metadata,
)

TEXT = "The early train was late again, so we walked along the river and talked."


@pytest.fixture(scope="module")
def joe() -> Wave:
    return Joe().synthesize(TEXT, "joe", "en-us")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """URI of a bucket on an S3 server of its own, spoken to over HTTP."""
    import boto3

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    port = clusters.free_port()
    with (tmp_path / "s3.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=log, stderr=log
        )
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        client = boto3.client("s3", config=Config(retries={"max_attempts": 20}))
        client.create_bucket(Bucket="valle")
        yield "s3://valle"
    finally:
        server.terminate()
        server.wait()


def ann(prompt: Codes) -> VoiceMetadata:
    return VoiceMetadata(
        seconds=4.5,
        consent="Ann",
        created=1,
        text=TEXT,
        prompt=pack_codes(prompt),
        codec="0123abcd",
    )


def test_voices_are_kept_in_s3(bucket: str, joe: Wave) -> None:
    """Two replicas, one bucket: what one adds or deletes, the other sees."""
    first_replica, second_replica = (VoiceStore(f"{bucket}/some/voices") for _ in range(2))
    assert second_replica.ids() == []
    with pytest.raises(VoiceError, match="no voice 'Ann'"):
        second_replica.read("Ann")
    prompt = np.random.default_rng(0).integers(0, 1024, (8, 225)).astype(np.int16)
    wave = first_replica.validate_recording("Ann", wav_bytes(joe))
    first_replica.add("Ann", wave, ann(prompt))
    assert second_replica.ids() == ["Ann"]
    assert (read(second_replica.read("Ann"), max_seconds=30) == wave).all()
    assert read_voice_metadata(second_replica.read("Ann")) == ann(prompt)
    with pytest.raises(VoiceError, match="there is a voice 'Ann'; delete it first"):
        second_replica.validate_recording("Ann", wav_bytes(joe))
    second_replica.delete("Ann")
    assert first_replica.ids() == []
    with pytest.raises(VoiceError, match="no voice 'Ann'"):
        first_replica.read("Ann")


def test_a_recording_is_kept_until_it_is_deleted(tmp_path: Path, joe: Wave) -> None:
    store = VoiceStore(str(tmp_path))
    silence = np.zeros(SAMPLE_RATE, np.float32)
    wave = store.validate_recording("Ann-1", wav_bytes(np.concatenate([silence, joe, silence])))
    assert len(wave) / SAMPLE_RATE == pytest.approx(len(joe) / SAMPLE_RATE, abs=0.2)
    prompt = np.random.default_rng(0).integers(0, 1024, (8, 225)).astype(np.int16)
    store.add("Ann-1", wave, ann(prompt))
    assert store.ids() == ["Ann-1"]
    assert [path.name for path in tmp_path.iterdir()] == ["Ann-1.flac"]
    metadata = read_voice_metadata(store.read("Ann-1"))
    assert metadata == ann(prompt) and (metadata.prompt_codes() == prompt).all()
    assert (read(store.read("Ann-1"), max_seconds=30) == wave).all()
    with pytest.raises(VoiceError, match="there is a voice 'Ann-1'; delete it first"):
        store.validate_recording("Ann-1", wav_bytes(joe))
    with pytest.raises(VoiceError, match="there is a voice 'Ann-1'"):  # two at the same time
        store.add("Ann-1", wave, ann(prompt))
    store.delete("Ann-1")
    assert not list(tmp_path.iterdir()) and store.ids() == []
    for gone in (store.read, store.delete):
        with pytest.raises(VoiceError, match="no voice 'Ann-1'"):
            gone("Ann-1")


def test_a_recording_put_there_by_hand_is_a_voice(tmp_path: Path, joe: Wave) -> None:
    store = VoiceStore(str(tmp_path))
    for name in ("bob.wav", "no name.wav", "notes.txt", "BOB.WAV"):
        (tmp_path / name).write_bytes(wav_bytes(joe))
    assert store.ids() == ["bob"] and read_voice_metadata(store.read("bob")) is None
    assert store.read("bob")[:4] == b"RIFF"
    with pytest.raises(VoiceError, match="there is a voice 'bob'"):
        store.validate_recording("bob", wav_bytes(joe))
    store.delete("bob")
    assert store.ids() == []


def test_what_is_no_voice_is_refused_with_the_reason(tmp_path: Path, joe: Wave) -> None:
    store = VoiceStore(str(tmp_path))
    noise = np.random.default_rng(0).normal(0, 0.1, 3 * SAMPLE_RATE).astype(np.float32)
    for wave, reason in (
        (joe[:SAMPLE_RATE], "too short: .* s of sound, at least 2 s"),
        (np.tile(joe, 10), "too long: .* s, limit 30 s"),
        (joe * 0.02 / np.abs(joe).max(), "too quiet: -.* dB, at least -45 dB"),
        (np.zeros_like(joe), "nothing but silence"),
        (noise, ".*% of it is speech, at least 40%"),
    ):
        with pytest.raises(AudioError, match=reason):
            store.validate_recording("x", wav_bytes(wave))
    with pytest.raises(AudioError, match="unreadable audio"):
        store.validate_recording("x", b"PK not a sound")
    for name in ("../x", "a/b", "", "x" * 101, "a.b", "声" * 9):
        with pytest.raises(VoiceError, match="is no name"):
            store.validate_recording(name, wav_bytes(joe))
    assert not list(tmp_path.iterdir())


@pytest.mark.anyio
async def test_an_uploaded_voice_is_not_encoded_again(
    tmp_path: Path, joe: Wave, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own codes, where the codec is the one that made them; those put there by hand, those of
    another codec and broken ones as well are encoded when they are asked for."""
    encoded = []

    async def encode(prompts: PromptEncoder, wave: Wave, version: str) -> Codes:
        encoded.append(version)
        return np.zeros((8, 225), np.int16)

    async def codec_sha256(prompts: PromptEncoder, version: str) -> str:
        return {"one": "0123abcd", "two": "another"}[version]

    monkeypatch.setattr(PromptEncoder, "encode", encode)
    monkeypatch.setattr(PromptEncoder, "codec_sha256", codec_sha256)
    store = VoiceStore(str(tmp_path))
    prompt = np.random.default_rng(0).integers(0, 1024, (8, 225)).astype(np.int16)
    store.add("ann", joe, ann(prompt))
    (tmp_path / "bob.wav").write_bytes(wav_bytes(joe))
    for name, comment in (
        ("eve", '{"consent": "cut o'),
        ("dan", "2019"),
        ("kim", '{"year": 2019}'),
    ):
        (tmp_path / f"{name}.flac").write_bytes(flac_bytes(joe, comment))
    prompts = PromptEncoder(store)

    async def encode_prompt(voice: str, version: str) -> Codes:
        return await prompts.for_request(SpeechRequest(input="x", voice=voice), version)

    assert (await encode_prompt("ann", "one") == prompt).all() and encoded == []
    cases = [("ann", "two"), ("bob", "one"), ("eve", "one"), ("dan", "one"), ("kim", "one")]
    for voice, version in cases:
        assert (await encode_prompt(voice, version) == 0).all() and encoded.pop() == version
        await encode_prompt(voice, version)
        assert encoded == []  # remembered


@pytest.mark.anyio
async def test_voices_over_http(
    tmp_path: Path, joe: Wave, tiny_codec: Encodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def encode(prompts: PromptEncoder, wave: Wave, version: str) -> Codes:
        """What the codec's deployment does."""
        return tiny_codec.encode([wave[: PROMPT_FRAMES * HOP]])[0]

    async def codec_sha256(prompts: PromptEncoder, version: str) -> str:
        return tiny_codec.identity.sha256

    async def version(watcher: AliasWatcher) -> str:
        return "models:/valle/1"

    monkeypatch.setattr(PromptEncoder, "encode", encode)
    monkeypatch.setattr(PromptEncoder, "codec_sha256", codec_sha256)
    monkeypatch.setattr(AliasWatcher, "version", version)
    app = create_api(AppArgs(voices=str(tmp_path), max_body_bytes=500_000))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:

        async def add(sound: bytes, **data: str) -> httpx.Response:
            files = {"audio_sample": ("sound.wav", sound)}
            return await http.post("/v1/audio/voices", data=data, files=files)

        good = wav_bytes(joe)
        added = await add(good, name="ann", consent="Ann agreed")
        assert added.status_code == 200, added.text
        assert added.json()["id"] == "ann" and added.json()["seconds"] > 2
        stored = VoiceStore(str(tmp_path)).read("ann")
        metadata = read_voice_metadata(stored)
        assert metadata is not None and metadata.consent == "Ann agreed"
        expected = await encode(PromptEncoder(VoiceStore("")), read(stored, max_seconds=30), "")
        assert (metadata.prompt_codes() == expected).all()
        listed = await http.get("/v1/audio/voices")
        assert listed.json() == {"voices": [{"id": "ann", "name": "ann"}]}
        for data, status, param in (
            ({"name": "ann", "consent": "Ann agreed"}, 409, "name"),
            ({"name": "bob"}, 400, "consent"),
            ({"name": "bob", "consent": ""}, 400, "consent"),
            ({"name": "../bob", "consent": "Bob"}, 400, "name"),
        ):
            answer = await add(good, **data)
            assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
        answer = await add(b"RIFF nothing", name="bob", consent="Bob")
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "unusable_recording"
        assert (await add(b"x" * 600_000, name="bob", consent="Bob")).status_code == 413
        gone = await http.delete("/v1/audio/voices/ann")
        assert gone.json() == {"id": "ann", "deleted": True}
        assert (await http.delete("/v1/audio/voices/ann")).status_code == 404
        assert (await http.get("/v1/audio/voices")).json() == {"voices": []}

        for name in ("nothing", "audio/speech"):
            answer = await http.get(f"/v1/{name}")
            assert answer.status_code in (404, 405)
            assert f"GET /v1/{name}: " in answer.json()["error"]["message"]
        seen = (await http.get("/metrics")).text
        assert 'valle_requests_total{route="/v1/audio/voices",status="409"} 1.0' in seen
        assert 'valle_requests_total{route="/v1/audio/voices/{name}",status="404"} 1.0' in seen
        assert 'valle_requests_total{route="none",status="404"} 1.0' in seen
        assert "valle_requests_running 1.0" in seen  # this one
        [model] = (await http.get("/v1/models")).json()["data"]
        assert model["id"] == "valle" and model["object"] == "model"


@pytest.mark.anyio
async def test_a_stream_that_fails_does_not_end_as_if_it_were_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half an answer without its last chunk: the server then breaks the connection."""

    async def half() -> AsyncIterator[bytes]:
        yield b"half"
        raise RuntimeError("the second sentence failed")

    async def create_speech(service: SpeechService, request: SpeechRequest) -> Response:
        return StreamingResponse(half())

    monkeypatch.setattr(SpeechService, "create_speech", create_speech)
    body = b'{"input": "One. Two."}'
    sent: list[Message] = []
    incoming: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if incoming:
            return incoming.pop()
        await asyncio.sleep(60)  # a client that stays
        raise AssertionError("the stream never ended")

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    scope = {
        "type": "http", "method": "POST", "path": "/v1/audio/speech", "root_path": "",
        "query_string": b"", "headers": headers, "asgi": {"version": "3.0"},
    }  # fmt: skip
    with pytest.raises((RuntimeError, ExceptionGroup), match=r"failed|unhandled errors"):
        await create_api(AppArgs(voices=str(tmp_path)))(scope, receive, send)
    parts = [message for message in sent if message["type"] == "http.response.body"]
    assert [part["body"] for part in parts] == [b"half"] and parts[0]["more_body"]
