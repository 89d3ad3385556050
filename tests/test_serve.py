"""Publishing, the registry, the command line and the endpoint, on untrained models."""

import base64
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import clusters
import httpx
import numpy as np
import openai
import pytest
import soundfile
from models import TINY, tiny_ar, tiny_nar

from valle.__main__ import main as speak_main
from valle.__main__ import read_reference
from valle.jobs.export import ExportRecipe, export
from valle.jobs.publish import PublishRecipe, publish
from valle.model.chunks import fill_in_chunks
from valle.model.codec import Codec
from valle.model.tokens import EOS
from valle.model.valle import Synthesis, Voice, text_ids
from valle.platform import audio, checkpoint, registry, storage, tracking
from valle.platform.quantize import to_int8
from valle.serve.audio import encode
from valle.serve.run import make_starter_voices
from valle.serve.speech import PAUSE
from valle.serve.stream import CHUNKING


@pytest.fixture
def published(home: Path, tiny_codec: Codec, tiny_codec_folder: Path) -> PublishRecipe:
    """A recipe over untrained checkpoints that speak noise for at most a second."""
    for kind, model in (("ar", tiny_ar()), ("nar", tiny_nar())):
        if kind == "ar":
            model.head.bias.data[EOS] = 4.2  # stops after some fifteen frames
        about = checkpoint.describe(kind, TINY, tiny_codec.identity, "test", {})
        for step in (5, 20):
            folder = home / f"runs/test-{kind}/step_{step:08d}"
            checkpoint.save(folder, model.state_dict(), about)
    noise = np.random.default_rng(0).normal(0, 0.1, 36_000).astype(np.float32)
    storage.write_bytes("voices/ann.wav", audio.wav_bytes(noise))
    return PublishRecipe(
        ar="runs/test-ar", nar="runs/test-nar", codec=str(tiny_codec_folder),
        sample_prompt="voices/ann.wav", sample_seconds=1.0,
    )  # fmt: skip


def test_publish_registers_plain_files_and_moves_the_alias(
    published: PublishRecipe, home: Path
) -> None:
    import mlflow

    assert publish(published) == 1
    assert publish(published) == 2
    folder = registry.resolve(registry.CHAMPION)
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert names == {
        "ar/config.json", "ar/model.safetensors", "nar/config.json", "nar/model.safetensors",
        "codec/config.json", "codec/model.safetensors", "bundle.json", "sample.wav", "sample.png",
    }  # fmt: skip
    client = mlflow.MlflowClient()
    version = client.get_model_version_by_alias("valle", "champion")
    assert int(version.version) == 2
    assert version.tags["ar"].endswith("runs/test-ar/step_00000020")


def test_an_exported_model_speaks_like_its_source_and_seeds_a_registry(
    published: PublishRecipe, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absolute = replace(published, ar=str(home / published.ar), nar=f"file://{home / published.nar}")
    version = publish(absolute)
    judged = home / "judged"
    judged.mkdir()
    (judged / "report.json").write_text(f'{{"bundle": {{"ar": "{home}/runs/test-ar"}}}}')
    registry.attach(version, judged)
    (home / "small").mkdir()
    (home / "small/report.md").write_text("of another model")
    source = registry.resolve(registry.CHAMPION)
    small = export(ExportRecipe(out="small"))
    exact = export(ExportRecipe(out="exact", precision="fp32"))
    sizes = [(f / "ar/model.safetensors").stat().st_size for f in (source, exact, small)]
    assert sizes[0] == sizes[1] and sizes[2] < sizes[0] / 3
    for path in small.rglob("*.json"):
        assert str(home) not in path.read_text()
    assert '"ar": "runs/test-ar"' in (small / "report.json").read_text()
    assert not (small / "report.md").exists()
    prompt = audio.read(storage.read_bytes("voices/ann.wav"), max_seconds=60)
    how = Synthesis(max_seconds=0.4)
    said = [registry.load_voice(f).speak("Hello.", prompt, how).codes for f in (source, exact)]
    np.testing.assert_array_equal(*said)
    ours, theirs = (checkpoint.load_weights(f / "nar") for f in (small, source))
    for name, value in theirs.items():
        bound = value.abs().amax(-1, keepdim=True) / 253
        assert ((ours[name] - value).abs() <= bound).all(), name

    assert registry.seed() is None  # there is a champion already
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home}/another.db")
    monkeypatch.setattr(registry, "SHIPPED", small)
    assert registry.seed() == 1 and registry.seed() is None
    assert registry.champion() == 1
    again = registry.load_ar(registry.resolve(registry.CHAMPION)).head.weight
    assert again.equal(registry.load_ar(small).head.weight)


def test_weights_without_their_scales_are_refused(published: PublishRecipe, home: Path) -> None:
    folder = home / "runs/test-ar/step_00000020"
    stored = to_int8(checkpoint.load_weights(folder))
    del stored["head.weight.scale"]
    checkpoint.save(folder, stored, checkpoint.read(folder))
    with pytest.raises(ValueError, match="head.weight is int8 and has no head.weight.scale"):
        checkpoint.load(folder)


def test_starter_voices_are_made_once(home: Path) -> None:
    folder = str(home / "fresh")
    make_starter_voices(folder)
    assert sorted(storage.list_files(folder, (".wav",))) == ["heart.wav", "joe.wav"]
    wave = audio.read(storage.read_bytes(storage.join(folder, "joe.wav")), max_seconds=60)
    assert 3 < len(wave) / 24_000 < 8
    (home / "fresh/joe.wav").unlink()
    make_starter_voices(folder)
    assert list(storage.list_files(folder, (".wav",))) == ["heart.wav"]


@pytest.fixture
def mlflow_server(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A real tracking server that keeps artifacts itself, as a team's would."""
    port = clusters.free_port()
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
        "--workers", "1", "--backend-store-uri", f"sqlite:///{home}/server.db",
        "--artifacts-destination", str(home / "server-artifacts"),
    ]  # fmt: skip
    with (home / "server.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        clusters.wait_for(lambda: clusters.answers(f"{address}/health"), 120, "MLflow")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)


def log_as_worker(run_id: str, address: str) -> None:
    """What the first worker of a training does, in a process of its own."""
    worker = tracking.worker_run(run_id, address)
    worker.metrics({"train/loss": 2.5}, step=3)
    worker.samples([("hello", np.zeros(2_400, np.float32))], step=3)
    worker.close()


@pytest.mark.slow
def test_runs_and_registry_on_a_real_mlflow_server(
    published: PublishRecipe, home: Path, mlflow_server: str
) -> None:
    import mlflow

    with (
        tracking.driver_run("served", {"optimization": {"warmup": 5}}) as run_id,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other,
    ):
        other.submit(log_as_worker, run_id, mlflow_server).result()
    client = mlflow.MlflowClient()
    run = client.get_run(run_id)
    assert (run.info.status, run.data.metrics["train/loss"]) == ("FINISHED", 2.5)
    assert run.data.params == {"optimization.warmup": "5"}
    kept = {a.path for a in client.list_artifacts(run_id, "samples/00000003")}
    assert kept == {"samples/00000003/hello.wav", "samples/00000003/hello.png"}

    assert publish(published) == 1
    folder = registry.resolve(registry.CHAMPION)
    assert (folder / "codec/model.safetensors").read_bytes() == (
        Path(published.codec) / "model.safetensors"
    ).read_bytes()
    prompt = audio.read((home / "voices/ann.wav").read_bytes(), max_seconds=10)
    spoken = registry.load_voice(folder).speak("hello", prompt, Synthesis(max_seconds=0.2))
    assert spoken.codes.shape[0] == 8
    # artifacts went through the server, not into a folder of this process
    assert any((home / "server-artifacts").rglob("sample.wav"))
    assert not (home / "mlruns").exists() and not (home / "mlflow.db").exists()


def test_parts_that_do_not_belong_together_are_refused(
    published: PublishRecipe, home: Path
) -> None:
    with pytest.raises(ValueError, match="ar: the checkpoint holds a model of kind 'nar'"):
        publish(replace(published, ar="runs/test-nar"))
    with pytest.raises(ValueError, match="codec mismatch: the AR checkpoint"):
        publish(replace(published, codec="nano"))
    with pytest.raises(FileNotFoundError, match="no checkpoint in .*: train first"):
        checkpoint.choose(str(home / "runs/none"))
    with pytest.raises(FileNotFoundError, match="train and publish one"):
        registry.resolve("models:/valle@champion")


def test_command_line_speaks_and_is_repeatable(
    published: PublishRecipe, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(published)
    arguments = ["hello there", str(home / "voices/ann.wav")]
    for name in ("one.wav", "two.wav"):
        assert speak_main([*arguments, str(home / name), "--max-ar-steps", "40"]) == 0
    assert (home / "one.wav").read_bytes() == (home / "two.wav").read_bytes()
    by_path = [
        "--ar-ckpt", str(home / "runs/test-ar/step_00000020"),
        "--nar-ckpt", str(home / "runs/test-nar/step_00000020"), "--codec", published.codec,
    ]  # fmt: skip
    assert speak_main([*arguments, str(home / "three.wav"), "--max-ar-steps", "40", *by_path]) == 0
    assert (home / "three.wav").read_bytes() == (home / "one.wav").read_bytes()
    assert "s of speech" in capsys.readouterr().out
    several = [arguments[0], f"{arguments[1]};{arguments[1]}", str(home / "four.wav")]
    assert speak_main([*several, "--max-ar-steps", "40"]) == 0
    assert (home / "four.wav").read_bytes() != (home / "one.wav").read_bytes()
    for wrong in (["...", arguments[1]], ["hello", f"{arguments[1]};{home / 'none.wav'}"]):
        assert speak_main([*wrong, str(home / "x.wav")]) == 2
    assert "text: nothing to say in it" in capsys.readouterr().err


def test_several_recordings_share_the_prompt(tmp_path: Path) -> None:
    """A tenth of a second of each tone, where the first alone would have filled it."""
    for hertz in (200, 400):
        tone = 0.5 * np.sin(2 * np.pi * hertz * np.arange(24_000) / 24_000)
        (tmp_path / f"{hertz}.wav").write_bytes(audio.wav_bytes(tone.astype(np.float32)))
    wave = read_reference(f"{tmp_path / '200.wav'};{tmp_path / '400.wav'}", 0.2)
    assert len(wave) == 4_800
    for part, hertz in ((wave[:2_400], 200), (wave[2_400:], 400)):
        assert np.abs(np.fft.rfft(part)).argmax() == hertz // 10
    assert len(read_reference(str(tmp_path / "200.wav"), 0.2)) == 24_000


@pytest.fixture
def endpoint(
    published: PublishRecipe, home: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    from ray import serve

    from valle.serve.app import build_app
    from valle.serve.schema import AppArgs

    publish(published)
    port = clusters.free_port()
    with clusters.embedded():
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        args = AppArgs(
            voices="voices", max_replicas=1, sentence_seconds=1.0, max_body_bytes=1_000_000
        )
        serve.run(build_app(args), name="valle")
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            serve.shutdown()


def check_streams(endpoint: str, voice: Voice, prompt: audio.Wave) -> None:
    """Two sentences through OpenAI's client: what comes in pieces is what each says alone."""
    text = "Hello there. Good bye."
    parts = []
    for number, sentence in enumerate(("Hello there.", "Good bye.")):
        how = replace(Synthesis(), seed=7 + number, max_seconds=1.0)
        parts.append(voice.speak(sentence, prompt, how).wave)
    expected = np.concatenate([parts[0], PAUSE, parts[1]])
    expected = np.clip(expected * 32767, -32767, 32767).round().astype(int)

    with openai.OpenAI(base_url=f"{endpoint}/v1", api_key="none", timeout=60) as client:
        speech = client.audio.speech
        asked = {"model": "valle", "voice": "ann", "input": text, "extra_body": {"seed": 7}}
        with speech.with_streaming_response.create(response_format="pcm", **asked) as answer:
            data = b"".join(answer.iter_bytes())
        heard = np.frombuffer(data, "<i2").astype(int)
        assert len(heard) == len(expected) and np.abs(heard - expected).max() <= 1

        with speech.with_streaming_response.create(
            response_format="pcm", stream_format="sse", **asked
        ) as answer:
            lines = [line for line in answer.iter_lines() if line]
        events = [json.loads(line.removeprefix("data: ")) for line in lines]
        *deltas, done = events
        assert {event["type"] for event in deltas} == {"speech.audio.delta"} and len(deltas) >= 2
        assert b"".join(base64.b64decode(event["audio"]) for event in deltas) == data
        usage = done["usage"]
        with speech.with_streaming_response.create(
            response_format="pcm", **{**asked, "extra_body": {"seed": 7, "max_seconds": 0.1}}
        ) as answer:
            short = b"".join(answer.iter_bytes())
        assert len(short) == 2 * 320 * 7  # so many frames fit, and no second sentence
        assert done["type"] == "speech.audio.done"
        assert usage["output_tokens"] * 320 == len(parts[0]) + len(parts[1])
        assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]

        wav = speech.create(response_format="wav", **asked).read()
        wave, _ = soundfile.read(io.BytesIO(wav), dtype="int16")
        assert (wave == heard).all()
        with pytest.raises(openai.NotFoundError, match="no voice 'bob'"):
            speech.create(model="valle", voice="bob", input=text)


def check_chunks(endpoint: str, voice: Voice, prompt: audio.Wave) -> None:
    """A sentence in chunks: the NAR model's codes so far, each frame's when it was ready, decoded
    as one."""
    text = "A sentence that is said before it is done, which takes a while."
    codes = voice.encode_prompt(prompt, Synthesis())
    ids = text_ids(text, "en-us")
    for seed in range(50):  # the model stops by chance: take one that goes on for three chunks
        how = replace(Synthesis(), seed=seed, max_seconds=1.0)
        whole = voice.speak_codes(ids, codes, how).codes
        if whole.shape[1] > 55:
            break
    body = {"input": text, "voice": "ann", "seed": seed, "response_format": "pcm", "chunked": True}
    with httpx.stream("POST", f"{endpoint}/v1/audio/speech", json=body, timeout=60) as answer:
        assert answer.status_code == 200 and "x-hit-limit" not in answer.headers
        data = b"".join(answer.iter_bytes())
    heard = np.frombuffer(data, "<i2").astype(int)
    assert len(heard) == whole.shape[1] * 320 > 55 * 320

    filled = fill_in_chunks(voice.nar, ids, codes, whole[0], how, CHUNKING, voice.ar.config.group)
    wave = voice.codec.decode([filled])[0]
    expected = np.clip(wave * 32767, -32767, 32767).round().astype(int)
    assert np.abs(heard - expected).max() <= 2


@pytest.mark.ray
def test_endpoint(endpoint: str, home: Path) -> None:
    recording = (home / "voices/ann.wav").read_bytes()
    with httpx.Client(base_url=endpoint, timeout=60) as client:

        def speech(**body: object) -> httpx.Response:
            return client.post("/v1/audio/speech", json={"response_format": "wav", **body})

        good = speech(input="hello there", voice="ann", seed=7)
        assert good.status_code == 200, good.text
        assert good.headers["content-type"] == "audio/wav"

        # through four deployments = the reference path, sample for sample
        voice: Voice = registry.load_voice(registry.resolve(registry.CHAMPION))
        how = replace(Synthesis(), seed=7, max_seconds=1.0)
        prompt = audio.read(recording, max_seconds=30)
        expected = voice.speak_codes(
            text_ids("hello there", "en-us"), voice.encode_prompt(prompt, how), how
        )
        heard, _ = soundfile.read(io.BytesIO(good.content), dtype="int16")
        reference, _ = soundfile.read(io.BytesIO(encode(expected.wave, "wav")), dtype="int16")
        # a replica has one torch thread, this process more: sums differ in their last bit
        assert np.abs(heard.astype(int) - reference).max() <= 1 and heard.std() > 10
        assert good.headers["x-hit-limit"] == str(expected.hit_limit).lower()

        assert speech(input="hello there", voice="ann", seed=8).content != good.content
        usual = client.post("/v1/audio/speech", json={"input": "hello there", "voice": "ann"})
        assert usual.headers["content-type"] == "audio/mpeg"  # as OpenAI's answers
        assert soundfile.info(io.BytesIO(usual.content)).format == "MP3"
        faster = speech(input="hello there", voice="ann", seed=7, speed=2.0)
        ratio = soundfile.info(io.BytesIO(faster.content)).frames / len(heard)
        assert ratio == pytest.approx(0.5, abs=0.1)
        inline = base64.b64encode(recording).decode()
        assert speech(input="hello there", ref_audio=inline, seed=7).content == good.content
        assert client.get("/v1/audio/voices").json() == {"voices": [{"id": "ann", "name": "ann"}]}
        assert client.get("/health/live").json() == {"status": "ok"}
        assert client.get("/health/ready").json() == {"status": "ready", "waiting_for": []}

        check_streams(endpoint, voice, prompt)
        check_chunks(endpoint, voice, prompt)

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
            answer = speech(**body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
        assert speech(input="...", voice="ann").json()["error"]["message"].startswith("text:")
        outside = speech(input="hello", voice="../voices/ann")
        assert outside.status_code == 400
        snippet = base64.b64encode(audio.wav_bytes(np.full(9, 0.1, np.float32))).decode()
        assert "0.00 s, at least 1 s" in speech(input="hello", ref_audio=snippet).text
        large = client.post("/v1/audio/speech", content=b"x" * 2_000_000)
        assert large.status_code == 413
        assert large.json()["error"]["code"] == "request_too_large"
        endless = client.post("/v1/audio/speech", content=iter([b"{}"]))
        assert endless.status_code == 411
        assert client.post("/v1/audio/speech", content=b"{").status_code == 400


@pytest.mark.ray
def test_serve_run_starts_the_application(published: PublishRecipe, home: Path) -> None:
    """`serve run valle.serve.app:build_app`, as the README says it, on a cluster of its own."""
    publish(published)
    port = clusters.free_port()
    with clusters.embedded():
        import ray

        config = home / "serve.yaml"
        config.write_text(
            f"http_options: {{host: 127.0.0.1, port: {port}}}\n"
            "applications:\n"
            "- name: valle\n"
            "  import_path: valle.serve.app:build_app\n"
            f"  args: {{voices: {home}/voices, max_replicas: 1, sentence_seconds: 1.0}}\n"
        )
        serve = Path(sys.executable).parent / "serve"
        address = ray.get_runtime_context().gcs_address
        command = [str(serve), "run", f"--address={address}", str(config)]
        root = Path(__file__).resolve().parent.parent
        process = subprocess.Popen(command, cwd=root, start_new_session=True)
        try:
            url = f"http://127.0.0.1:{port}"
            clusters.wait_for(lambda: clusters.answers(f"{url}/health/live"), 120, "the endpoint")
            body = {"input": "hello", "voice": "ann"}
            assert httpx.post(f"{url}/v1/audio/speech", json=body, timeout=60).status_code == 200
        finally:
            process.terminate()
            process.wait(timeout=60)
