"""The endpoint on a Ray cluster, with untrained models: every path through Serve."""

import base64
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import soundfile
from helpers import clusters
from helpers.tiny_models import tiny_ar, tiny_nar

from valle.jobs.bench.replicas import replica_processes
from valle.jobs.publish import PublishRecipe, publish
from valle.jobs.speakers import Joe
from valle.model.chunks import Chunking, nar_decode_chunks
from valle.model.codec.interface import Wave
from valle.model.nar_decoding import NARRequest, nar_decode
from valle.model.sentences import PAUSE
from valle.model.text import phoneme_ids
from valle.model.tokens import EOS
from valle.model.valle import Synthesis, Synthesizer
from valle.platform import audio, checkpoint, registry
from valle.serve.app_args import AppArgs
from valle.serve.run import deploy
from valle.serve.web.audio_formats import encode_audio
from valle.serve.web.voices import read_voice_metadata

ROOT = Path(__file__).resolve().parent.parent


def check_streams(endpoint: str, synthesizer: Synthesizer, prompt: Wave) -> None:
    """Two sentences through OpenAI's client: the stream is the sentences, each as alone."""
    text = "Hello there. Good bye."
    parts, limited = [], False
    for number, sentence in enumerate(("Hello there.", "Good bye.")):
        synthesis = replace(Synthesis(), seed=7 + number, max_seconds=1.0)
        result = synthesizer.synthesize(sentence, prompt, synthesis)
        parts.append(result.wave)
        limited |= result.hit_limit
    expected = np.concatenate([parts[0], PAUSE, parts[1]])
    expected = np.clip(expected * 32767, -32767, 32767).round().astype(int)

    with openai.OpenAI(base_url=f"{endpoint}/v1", api_key="none", timeout=60) as client:
        speech = client.audio.speech
        fields = {"model": "valle", "voice": "ann", "input": text, "extra_body": {"seed": 7}}
        with speech.with_streaming_response.create(response_format="pcm", **fields) as response:
            data = b"".join(response.iter_bytes())
        samples = np.frombuffer(data, "<i2").astype(int)
        assert len(samples) == len(expected) and np.abs(samples - expected).max() <= 1

        with speech.with_streaming_response.create(
            response_format="pcm", stream_format="sse", **fields
        ) as response:
            lines = [line for line in response.iter_lines() if line]
        events = [json.loads(line.removeprefix("data: ")) for line in lines]
        *deltas, last_event = events
        assert {event["type"] for event in deltas} == {"speech.audio.delta"} and len(deltas) >= 2
        assert b"".join(base64.b64decode(event["audio"]) for event in deltas) == data
        usage = last_event["usage"]
        with speech.with_streaming_response.create(
            response_format="pcm", **{**fields, "extra_body": {"seed": 7, "max_seconds": 0.1}}
        ) as response:
            short = b"".join(response.iter_bytes())
        assert len(short) == 2 * 320 * 7  # seven frames fit, and no second sentence
        assert last_event["type"] == "speech.audio.done"
        assert last_event["hit_limit"] == limited
        assert usage["output_tokens"] * 320 == len(parts[0]) + len(parts[1])
        assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]

        wav = speech.create(response_format="wav", **fields).read()
        wave, _ = soundfile.read(io.BytesIO(wav), dtype="int16")
        assert (wave == samples).all()
        with pytest.raises(openai.NotFoundError, match="no voice 'bob'"):
            speech.create(model="valle", voice="bob", input=text)


def check_chunks(endpoint: str, synthesizer: Synthesizer, prompt: Wave) -> None:
    """A sentence in chunks has the codes of `nar_decode_chunks`, decoded at once."""
    text = "hello there"  # a longer one would be split: a sentence has at most one second here
    codes = synthesizer.encode_prompt(prompt, Synthesis())
    ids = phoneme_ids(text, "en-us")
    for seed in range(50):  # EOS comes at random: take a seed with three chunks
        synthesis = replace(Synthesis(), seed=seed, max_seconds=1.0)
        sentence_codes = synthesizer.synthesize_phonemes(ids, codes, synthesis).codes
        if sentence_codes.shape[1] > 55:
            break
    body = {"input": text, "voice": "ann", "seed": seed, "response_format": "pcm", "chunked": True}
    with httpx.stream("POST", f"{endpoint}/v1/audio/speech", json=body, timeout=60) as response:
        assert response.status_code == 200 and response.headers["x-hit-limit"] == "unknown"
        data = b"".join(response.iter_bytes())
    samples = np.frombuffer(data, "<i2").astype(int)
    assert len(samples) == sentence_codes.shape[1] * 320 > 55 * 320

    decoded = nar_decode_chunks(
        lambda nar_request: nar_decode(synthesizer.nar, nar_request, synthesis.nar_decoding),
        NARRequest(ids, codes, sentence_codes[0]),
        Chunking(),
        synthesizer.ar.config.group_size,
    )
    wave = synthesizer.codec.decode([decoded])[0]
    expected = np.clip(wave * 32767, -32767, 32767).round().astype(int)
    assert np.abs(samples - expected).max() <= 2


def check_an_upload_stores_its_prompt(endpoint: str, synthesizer: Synthesizer, home: Path) -> None:
    """The codes stored with a voice are those of its recording."""
    joe = Joe().synthesize(
        "We walked along the river and talked until it was dark.", "joe", "en-us"
    )
    files = {"audio_sample": ("joe.wav", audio.wav_bytes(joe))}
    form = {"name": "joe", "consent": "CC0"}
    added = httpx.post(f"{endpoint}/v1/audio/voices", data=form, files=files, timeout=60)
    assert added.status_code == 200, added.text
    stored = (home / "voices/joe.flac").read_bytes()
    metadata = read_voice_metadata(stored)
    expected = synthesizer.encode_prompt(audio.read(stored, max_seconds=30), Synthesis())
    assert metadata is not None and metadata.codec == synthesizer.codec.identity.sha256
    assert (metadata.prompt_codes() == expected).all()
    body = {"input": "hello", "voice": "joe", "response_format": "pcm", "seed": 3}
    named = httpx.post(f"{endpoint}/v1/audio/speech", json=body, timeout=60)
    inline = body | {"voice": "", "ref_audio": base64.b64encode(stored).decode()}
    by_content = httpx.post(f"{endpoint}/v1/audio/speech", json=inline, timeout=60)
    assert named.status_code == 200 and named.content == by_content.content
    assert httpx.delete(f"{endpoint}/v1/audio/voices/joe").status_code == 200


@pytest.mark.ray
def test_endpoint_equals_the_reference_path(endpoint: str, home: Path) -> None:
    recording = (home / "voices/ann.wav").read_bytes()
    with httpx.Client(base_url=endpoint, timeout=60) as client:

        def speech(**body: object) -> httpx.Response:
            return client.post("/v1/audio/speech", json={"response_format": "wav", **body})

        response = speech(input="hello there", voice="ann", seed=7)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "audio/wav"

        # through four deployments, sample by sample the reference path
        synthesizer: Synthesizer = registry.load_synthesizer(registry.resolve(registry.CHAMPION))
        synthesis = replace(Synthesis(), seed=7, max_seconds=1.0)
        prompt = audio.read(recording, max_seconds=30)
        expected = synthesizer.synthesize_phonemes(
            phoneme_ids("hello there", "en-us"),
            synthesizer.encode_prompt(prompt, synthesis),
            synthesis,
        )
        samples, _ = soundfile.read(io.BytesIO(response.content), dtype="int16")
        reference, _ = soundfile.read(io.BytesIO(encode_audio(expected.wave, "wav")), dtype="int16")
        # replicas have one torch thread, this process several: sums differ in their last bit
        assert np.abs(samples.astype(int) - reference).max() <= 1 and samples.std() > 10
        assert response.headers["x-hit-limit"] == str(expected.hit_limit).lower()

        assert speech(input="hello there", voice="ann", seed=8).content != response.content
        default = client.post("/v1/audio/speech", json={"input": "hello there", "voice": "ann"})
        assert default.headers["content-type"] == "audio/mpeg"  # OpenAI's default
        assert soundfile.info(io.BytesIO(default.content)).format == "MP3"
        faster = speech(input="hello there", voice="ann", seed=7, speed=2.0)
        ratio = soundfile.info(io.BytesIO(faster.content)).frames / len(samples)
        assert ratio == pytest.approx(0.5, abs=0.1)
        inline = base64.b64encode(recording).decode()
        assert speech(input="hello there", ref_audio=inline, seed=7).content == response.content
        assert client.get("/v1/audio/voices").json() == {"voices": [{"id": "ann", "name": "ann"}]}
        assert client.get("/health/live").json() == {"status": "ok"}
        assert client.get("/health/ready").json() == {"status": "ready", "waiting_for": []}

        check_streams(endpoint, synthesizer, prompt)
        check_chunks(endpoint, synthesizer, prompt)
        check_an_upload_stores_its_prompt(endpoint, synthesizer, home)

        refused = {
            (400, "input"): {"input": "", "voice": "ann"},
            (400, "voice"): {"input": "hello"},
            (400, "volume"): {"input": "hello", "voice": "ann", "volume": 3},
            (400, "response_format"): {"input": "x", "voice": "ann", "response_format": "midi"},
            (400, "speed"): {"input": "x", "voice": "ann", "speed": 5},
            (400, "ref_audio"): {"input": "hello", "ref_audio": "bm90IGF1ZGlv"},
            (400, "language"): {"input": "One. Two.", "voice": "ann", "language": "xx"},
            (400, "max_seconds"): {"input": "hello", "voice": "ann", "max_seconds": 0},
            (404, "voice"): {"input": "hello", "voice": "bob"},
        }
        for (status, param), body in refused.items():
            response = speech(**body)
            assert (response.status_code, response.json()["error"]["param"]) == (status, param)
        assert speech(input="...", voice="ann").json()["error"]["message"].startswith("text:")
        assert "5000 characters, limit 4096" in speech(input="x" * 5000, voice="ann").text
        outside = speech(input="hello", voice="../voices/ann")
        assert outside.status_code == 400
        snippet = base64.b64encode(audio.wav_bytes(np.full(9, 0.1, np.float32))).decode()
        assert "0.00 s, at least 1 s" in speech(input="hello", ref_audio=snippet).text
        large = client.post("/v1/audio/speech", content=b"x" * 2_000_000)
        assert large.status_code == 413
        assert large.json()["error"]["code"] == "request_too_large"
        counted = client.post("/v1/audio/speech", content=iter([b"x" * 300_000] * 10))
        assert counted.status_code in (413, 415)
        json_type = {"Content-Type": "application/json"}
        chunked = iter([b'{"input": "hello there", "voice": "ann", ', b'"seed": 7}'])
        without_length = client.post("/v1/audio/speech", content=chunked, headers=json_type)
        assert without_length.status_code == 200
        broken = client.post("/v1/audio/speech", content=b"{", headers=json_type)
        assert broken.status_code == 400
        assert client.head("/health/live").status_code == client.head("/").status_code == 200
        rebound = client.get("/v1/audio/voices", headers={"Host": "evil.example"})
        assert rebound.status_code == 421, "the endpoint listens on a loopback address"


@pytest.mark.ray
@pytest.mark.parametrize("eos_bias", [-1e9], ids=["never stops"])
def test_a_client_that_leaves_ends_the_synthesis(endpoint: str) -> None:
    body = {"input": "And on it goes. " * 60, "voice": "ann", "response_format": "pcm"}
    complete = httpx.post(f"{endpoint}/v1/audio/speech", json=body, timeout=120)
    assert complete.status_code == 200
    complete_seconds = clusters.audio_seconds(endpoint)
    with httpx.stream("POST", f"{endpoint}/v1/audio/speech", json=body, timeout=60) as response:
        chunks = response.iter_raw()
        assert next(chunks)
        clusters.wait_for(clusters.slot_demand, 10, "the next sentence")
    clusters.wait_for(clusters.endpoint_idle, 30, "the slot")
    assert clusters.audio_seconds(endpoint) - complete_seconds < complete_seconds / 2


@contextmanager
def steady_clients(endpoint: str, body: dict[str, object]) -> Iterator[list[httpx.Response]]:
    """Four clients that send request after request; yields their responses, some from the start."""
    responses: list[httpx.Response] = []
    stop = threading.Event()

    def run_client() -> None:
        with httpx.Client(base_url=endpoint, timeout=60) as client:
            while not stop.is_set():
                responses.append(client.post("/v1/audio/speech", json=body))

    with ThreadPoolExecutor(4) as clients:
        running = [clients.submit(run_client) for _ in range(4)]
        try:
            clusters.wait_for(lambda: len(responses) > 4, 60, "the first responses")
            yield responses
        finally:
            stop.set()
        for future in running:
            future.result()


@pytest.mark.ray
def test_a_new_deployment_fails_no_request(endpoint: str, app_args: AppArgs) -> None:
    """Other arguments replace every replica."""
    body = {"input": "hello there", "voice": "ann", "response_format": "pcm", "seed": 1}
    with steady_clients(endpoint, body) as responses:
        old_pids = {process.pid for process in replica_processes()}
        assert len(old_pids) == 4
        deploy(app_args.model_copy(update={"slots": 4}))
        clusters.wait_for(
            lambda: not old_pids & {p.pid for p in replica_processes()}, 60, "the last old replica"
        )
        n_responses = len(responses)
        clusters.wait_for(
            lambda: len(responses) > n_responses + 8, 60, "responses of the new replicas"
        )

    assert {response.status_code for response in responses} == {200}
    first, *others = (np.frombuffer(response.content, "<i2").astype(int) for response in responses)
    for samples in others:  # batched with other neighbours
        assert len(samples) == len(first) and np.abs(samples - first).max() <= 2


@pytest.mark.ray
def test_a_new_champion_fails_no_request(
    endpoint: str, publish_recipe: PublishRecipe, home: Path
) -> None:
    """No response mixes two versions."""
    prompt = audio.read((home / "voices/ann.wav").read_bytes(), max_seconds=30)

    def served(response: httpx.Response) -> str:
        """The version, without the digits of its bundle's hash."""
        return response.headers.get("x-model", "").partition("#")[0]

    def expected(version: str) -> np.ndarray:
        synthesizer = registry.load_synthesizer(registry.resolve(version))
        synthesis = replace(Synthesis(), seed=1, max_seconds=1.0)
        wave, _ = soundfile.read(
            io.BytesIO(
                encode_audio(synthesizer.synthesize("hello there", prompt, synthesis).wave, "wav")
            ),
            dtype="int16",
        )
        return wave.astype(int)

    body = {"input": "hello there", "voice": "ann", "seed": 1, "response_format": "wav"}
    with steady_clients(endpoint, body) as responses:
        codec = registry.load_synthesizer(registry.resolve(registry.CHAMPION)).codec.identity
        for kind, model in (("ar", tiny_ar(seed=1)), ("nar", tiny_nar(seed=1))):
            if kind == "ar":
                model.head.bias.data[EOS] = 4.2
            metadata = checkpoint.new_metadata(model.config, codec, "test", {})
            folder = home / f"runs/test-{kind}/step_{30:08d}"
            checkpoint.save(folder, model.state_dict(), metadata)
        assert publish(publish_recipe).version == 2
        clusters.wait_for(lambda: served(responses[-1]) == "models:/valle/2", 60, "version 2")

    assert {response.status_code for response in responses} == {200}
    seen = {version: expected(version) for version in ("models:/valle/1", "models:/valle/2")}
    assert set(map(served, responses)) == set(seen)
    for response in responses:
        samples, _ = soundfile.read(io.BytesIO(response.content), dtype="int16")
        reference = seen[served(response)]
        assert len(samples) == len(reference) and np.abs(samples - reference).max() <= 1


@pytest.mark.ray
def test_the_command_serves_behind_haproxy(publish_recipe: PublishRecipe, home: Path) -> None:
    """`make serve` with the flags for many clients: same responses, errors and streams."""
    publish(publish_recipe)
    port = clusters.free_port()
    folder = tempfile.mkdtemp(prefix="valle-haproxy-")
    flags = {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(clusters.free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(clusters.free_port()),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
        "RAY_TMPDIR": folder,
        "VALLE_HOME": str(home),
    }
    command = [sys.executable, "-m", "valle.serve.run", "--port", str(port), "--voices", "voices"]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | flags, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        clusters.wait_for(lambda: clusters.responds(f"{url}/health/live"), 180, "the endpoint")
        with httpx.Client(base_url=url, timeout=60) as client:
            body = {"input": "Hello there. Good bye.", "voice": "ann", "seed": 1}
            body |= {"response_format": "pcm"}
            complete = client.post("/v1/audio/speech", json=body)
            assert complete.status_code == 200
            [config] = Path(folder).rglob("*.cfg")  # one per node
            assert f":{port}" in config.read_text()  # HAProxy listens there
            with client.stream("POST", "/v1/audio/speech", json=body) as response:
                assert b"".join(response.iter_bytes()) == complete.content
            refused = client.post("/v1/audio/speech", json={**body, "voice": "bob"})
            assert refused.status_code == 404
            assert refused.json()["error"]["code"] == "voice_not_found"
            assert client.get("/health/ready").json()["status"] == "ready"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)
