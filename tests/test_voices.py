"""The voice store, prompts of voices, and voices over HTTP."""

import base64
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from helpers.deployments import Call, FakeDeployments, recording_codes
from helpers.s3 import running_bucket

from valle.jobs.speakers import Joe
from valle.model.codec.interface import Codes, Wave
from valle.model.tokens import HOP, SAMPLE_RATE
from valle.platform.audio import AudioError, flac_bytes, read, wav_bytes
from valle.serve.app_args import AppArgs
from valle.serve.deployments.interface import PROMPT_FRAMES
from valle.serve.web.api import create_api
from valle.serve.web.callers import Caller
from valle.serve.web.prompts import PromptEncoder
from valle.serve.web.schema import SpeechRequest
from valle.serve.web.voices import (
    VoiceError,
    VoiceMetadata,
    VoiceStore,
    pack_codes,
    read_voice_metadata,
)

ANYBODY = Caller()
"""The sender of a request to a server without keys."""

TEXT = "The early train was late again, so we walked along the river and talked."


@pytest.fixture(scope="module")
def joe() -> Wave:
    return Joe().synthesize(TEXT, "joe", "en-us")


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[str]:
    """URI of a bucket on an S3 server that runs for this test."""
    with running_bucket(tmp_path) as uri:
        yield uri


def voice_metadata(prompt: Codes, codec: str = "0123abcd") -> VoiceMetadata:
    return VoiceMetadata(
        seconds=4.5, consent="Ann", created=1, text=TEXT, prompt=pack_codes(prompt), codec=codec
    )


def test_voice_store_on_s3_is_shared_by_replicas(bucket: str, joe: Wave) -> None:
    first_replica, second_replica = (VoiceStore(f"{bucket}/some/voices") for _ in range(2))
    assert second_replica.ids(ANYBODY) == []
    with pytest.raises(VoiceError, match="no voice 'Ann'"):
        second_replica.read("Ann", ANYBODY)
    prompt = np.random.default_rng(0).integers(0, 1024, (8, 225)).astype(np.int16)
    wave = first_replica.validate_recording("Ann", wav_bytes(joe), ANYBODY)
    first_replica.add("Ann", wave, voice_metadata(prompt), ANYBODY)
    assert second_replica.ids(ANYBODY) == ["Ann"]
    assert (read(second_replica.read("Ann", ANYBODY), max_seconds=30) == wave).all()
    assert read_voice_metadata(second_replica.read("Ann", ANYBODY)) == voice_metadata(prompt)
    with pytest.raises(VoiceError, match="there is a voice 'Ann'; delete it first"):
        second_replica.validate_recording("Ann", wav_bytes(joe), ANYBODY)
    second_replica.delete("Ann", ANYBODY)
    assert first_replica.ids(ANYBODY) == []
    with pytest.raises(VoiceError, match="no voice 'Ann'"):
        first_replica.read("Ann", ANYBODY)


def test_voice_store_keeps_a_recording_until_it_is_deleted(tmp_path: Path, joe: Wave) -> None:
    store = VoiceStore(str(tmp_path))
    silence = np.zeros(SAMPLE_RATE, np.float32)
    wave = store.validate_recording(
        "Ann-1", wav_bytes(np.concatenate([silence, joe, silence])), ANYBODY
    )
    assert len(wave) / SAMPLE_RATE == pytest.approx(len(joe) / SAMPLE_RATE, abs=0.4)
    prompt = np.random.default_rng(0).integers(0, 1024, (8, 225)).astype(np.int16)
    store.add("Ann-1", wave, voice_metadata(prompt), ANYBODY)
    assert store.ids(ANYBODY) == ["Ann-1"]
    assert [path.name for path in tmp_path.iterdir()] == ["Ann-1.flac"]
    metadata = read_voice_metadata(store.read("Ann-1", ANYBODY))
    assert metadata == voice_metadata(prompt) and (metadata.prompt_codes() == prompt).all()
    assert (read(store.read("Ann-1", ANYBODY), max_seconds=30) == wave).all()
    with pytest.raises(VoiceError, match="there is a voice 'Ann-1'; delete it first"):
        store.validate_recording("Ann-1", wav_bytes(joe), ANYBODY)
    with pytest.raises(VoiceError, match="there is a voice 'Ann-1'"):  # added meanwhile
        store.add("Ann-1", wave, voice_metadata(prompt), ANYBODY)
    store.delete("Ann-1", ANYBODY)
    assert not list(tmp_path.iterdir()) and store.ids(ANYBODY) == []
    for method in (store.read, store.delete):
        with pytest.raises(VoiceError, match="no voice 'Ann-1'"):
            method("Ann-1", ANYBODY)


def test_voice_store_reads_wav_files_put_there_by_hand(tmp_path: Path, joe: Wave) -> None:
    store = VoiceStore(str(tmp_path))
    for name in ("bob.wav", "no name.wav", "notes.txt", "BOB.WAV"):
        (tmp_path / name).write_bytes(wav_bytes(joe))
    assert store.ids(ANYBODY) == ["bob"] and read_voice_metadata(store.read("bob", ANYBODY)) is None
    assert store.read("bob", ANYBODY)[:4] == b"RIFF"
    with pytest.raises(VoiceError, match="there is a voice 'bob'"):
        store.validate_recording("bob", wav_bytes(joe), ANYBODY)
    store.delete("bob", ANYBODY)
    assert store.ids(ANYBODY) == []


def test_validate_recording_refuses_with_the_reason(tmp_path: Path, joe: Wave) -> None:
    store = VoiceStore(str(tmp_path))
    noise = np.random.default_rng(0).normal(0, 0.1, 3 * SAMPLE_RATE).astype(np.float32)
    for wave, reason in (
        (joe[: SAMPLE_RATE // 2], "too short: 0.50 s, at least 1 s of speech"),
        (np.tile(joe, 20), "too long: .* s, limit 60 s"),
        (joe * 0.02 / np.abs(joe).max(), "too quiet: -.* dB, at least -45 dB"),
        (np.zeros_like(joe), "nothing but silence"),
        (noise, ".*% of it is speech, at least 40%"),
    ):
        with pytest.raises(AudioError, match=reason):
            store.validate_recording("x", wav_bytes(wave), ANYBODY)
    with pytest.raises(AudioError, match="unreadable audio"):
        store.validate_recording("x", b"PK not a sound", ANYBODY)
    for name in ("../x", "a/b", "", "x" * 101, "a.b", "声" * 9):
        with pytest.raises(VoiceError, match="is not a valid name"):
            store.validate_recording(name, wav_bytes(joe), ANYBODY)
    assert not list(tmp_path.iterdir())


def forged(prompt: str) -> str:
    """A header that looks like an upload's, with codes that no codec made."""
    metadata = replace(
        voice_metadata(np.zeros((8, 1), np.int16)), prompt=prompt, codec="codec of one"
    )
    return json.dumps(asdict(metadata))


@pytest.mark.anyio
async def test_prompt_encoder_uses_stored_codes_of_the_same_codec(
    tmp_path: Path, joe: Wave
) -> None:
    """Recordings without codes, with those of another codec or with broken metadata are encoded
    once and cached."""
    deployments = FakeDeployments()
    store = VoiceStore(str(tmp_path))
    prompt = np.random.default_rng(0).integers(0, 1024, (8, 225)).astype(np.int16)
    store.add("ann", joe, voice_metadata(prompt, codec="codec of one"), ANYBODY)
    (tmp_path / "bob.wav").write_bytes(wav_bytes(joe))
    for name, comment in (
        ("eve", '{"consent": "cut o'),
        ("dan", "2019"),
        ("kim", '{"year": 2019}'),
        ("lea", forged("###")),
        ("mia", forged(base64.b64encode(bytes(3)).decode())),
        ("ned", forged(pack_codes(prompt + np.int16(1024)))),
    ):
        (tmp_path / f"{name}.flac").write_bytes(flac_bytes(joe, comment))
    prompts = PromptEncoder(store, deployments)

    async def prompt_of(voice: str, version: str) -> Codes:
        return await prompts.for_request(SpeechRequest(input="x", voice=voice), version, ANYBODY)

    assert (await prompt_of("ann", "one") == prompt).all() and not deployments.count("encode")
    cases = [("ann", "two"), ("bob", "one"), ("eve", "one"), ("dan", "one"), ("kim", "one")]
    cases += [("lea", "one"), ("mia", "one"), ("ned", "one")]
    for n_encoded, (voice, version) in enumerate(cases):
        for _ in range(2):  # the second time from the cache
            codes = await prompt_of(voice, version)
            assert codes.shape == (8, PROMPT_FRAMES) and deployments.count("encode") == (
                n_encoded + 1
            )
        assert deployments.calls[-1] == Call("encode", version)


@pytest.mark.anyio
async def test_voices_are_added_listed_and_deleted_over_http(tmp_path: Path, joe: Wave) -> None:
    args = AppArgs(model=f"/some/bundle#{'0' * 64}", voices=str(tmp_path), max_body_bytes=500_000)
    transport = httpx.ASGITransport(create_api(args, FakeDeployments()))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:

        async def add(sound: bytes, **data: str) -> httpx.Response:
            files = {"audio_sample": ("sound.wav", sound)}
            return await http.post("/v1/audio/voices", data=data, files=files)

        recording = wav_bytes(joe)
        added = await add(recording, name="ann", consent="Ann agreed")
        assert added.status_code == 200, added.text
        assert added.json()["id"] == "ann" and added.json()["seconds"] > 2
        stored = VoiceStore(str(tmp_path)).read("ann", ANYBODY)
        metadata = read_voice_metadata(stored)
        assert metadata is not None and metadata.consent == "Ann agreed"
        expected = recording_codes(read(stored, max_seconds=30)[: PROMPT_FRAMES * HOP])
        assert (metadata.prompt_codes() == expected).all()
        assert metadata.codec == f"codec of {args.model}"
        listed = await http.get("/v1/audio/voices")
        assert listed.json() == {"voices": [{"id": "ann", "name": "ann"}]}

        for data, status, param in (
            ({"name": "ann", "consent": "Ann agreed"}, 409, "name"),
            ({"name": "bob"}, 400, "consent"),
            ({"name": "bob", "consent": ""}, 400, "consent"),
            ({"name": "../bob", "consent": "Bob"}, 400, "name"),
        ):
            response = await add(recording, **data)
            assert (response.status_code, response.json()["error"]["param"]) == (status, param)
        response = await add(b"RIFF nothing", name="bob", consent="Bob")
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "unusable_recording"
        assert (await add(b"x" * 600_000, name="bob", consent="Bob")).status_code == 413

        deleted = await http.delete("/v1/audio/voices/ann")
        assert deleted.json() == {"id": "ann", "deleted": True}
        assert (await http.delete("/v1/audio/voices/ann")).status_code == 404
        assert (await http.get("/v1/audio/voices")).json() == {"voices": []}
        metrics = (await http.get("/metrics")).text
        assert 'valle_requests_total{route="/v1/audio/voices",status="409"} 1.0' in metrics
        assert 'valle_requests_total{route="/v1/audio/voices/{name}",status="404"} 1.0' in metrics


@pytest.mark.anyio
async def test_api_answers_unknown_paths_in_openai_format(tmp_path: Path) -> None:
    args = AppArgs(model=f"/some/bundle#{'0' * 64}", voices=str(tmp_path))
    transport = httpx.ASGITransport(create_api(args, FakeDeployments()))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        for name in ("nothing", "audio/speech"):
            response = await http.get(f"/v1/{name}")
            assert response.status_code in (404, 405)
            assert f"GET /v1/{name}: " in response.json()["error"]["message"]
        metrics = (await http.get("/metrics")).text
        assert 'valle_requests_total{route="none",status="404"} 1.0' in metrics
        assert "valle_requests_running 1.0" in metrics, "the request for metrics itself"
        [model] = (await http.get("/v1/models")).json()["data"]
        assert model["id"] == "valle" and model["object"] == "model"
