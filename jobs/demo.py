"""The whole path in one go: corpus, prepare, train, publish, serve, one request.

Runs the jobs' own functions one after the other with the recipe `demo`, and says how long each
took. Run it again and it goes on with what is there.
"""

import argparse
import json
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from valle.jobs import corpus, prepare, publish, train
from valle.model.tokens import SAMPLE_RATE
from valle.platform import audio, checkpoint, recipe, settings, storage, tracking
from valle.platform.cluster import connect

TEXT = "The whole path works, from a folder of speech to a spoken sentence."
VOICE = "joe"


@contextmanager
def stage(name: str, times: dict[str, float]) -> Iterator[None]:
    """Announces a stage and measures it."""
    print(f"\n=== {name}", flush=True)
    started = time.perf_counter()
    yield
    times[name] = time.perf_counter() - started


def request(port: int, out: Path) -> float:
    """One request to the endpoint, as any client would send it; returns seconds of audio."""
    body = json.dumps({"input": TEXT, "voice": VOICE}).encode()
    call = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/audio/speech", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(call, timeout=300) as answer:
        data = answer.read()
    wave = audio.read(data, max_seconds=120)
    out.with_suffix(".wav").write_bytes(data)
    out.with_suffix(".png").write_bytes(tracking.spectrogram(wave, TEXT))
    return len(wave) / SAMPLE_RATE


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: `python -m valle.jobs.demo`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="demo", help="name in jobs/recipes, or path to YAML")
    parser.add_argument("--port", type=int, default=8000, help="of the endpoint")
    arguments = parser.parse_args(argv)
    name = arguments.recipe
    corpus_recipe = recipe.load(name, "corpus", corpus.CorpusRecipe)
    prepare_recipe = recipe.load(name, "prepare", prepare.PrepareRecipe)
    train_recipe = recipe.load(name, "train", train.TrainRecipe)
    publish_recipe = recipe.load(name, "publish", publish.PublishRecipe)
    times: dict[str, float] = {}
    reached: dict[str, str] = {}

    with ExitStack() as stack:
        with stage("Ray", times):
            stack.enter_context(connect())
        with stage("corpus", times):
            made = corpus.make(corpus_recipe)
            print(f"{made['lines']} lines, {made['made_seconds']} s of speech made now")
        with stage("prepare", times):
            report = prepare.prepare(prepare_recipe)
            print(
                f"{report['utterances']} utterances, {report['hours']} hours, "
                f"rejected: {report['rejected'] or 'none'}"
            )
        train_recipe = train.prepare_run(train_recipe)
        for kind in train_recipe.models:
            with stage(f"train {kind}", times):
                reached[kind] = train.fit(train_recipe, kind)
                print(f"checkpoint: {reached[kind]}")
        with stage("publish", times):
            print(f"registry: valle version {publish.publish(publish_recipe)}, alias champion")
        with stage("serve and one request", times):
            out = settings.read().home / "data" / "demo" / "speech"
            seconds = serve_and_request(publish_recipe.sample_prompt, arguments.port, out)

    print("\nstage                    seconds")
    for name, taken in {**times, "total": sum(times.values())}.items():
        print(f"{name:<24} {taken:7.1f}")
    print(f"\n{out}.wav: {seconds:.1f} s of speech, spectrogram beside it in {out.name}.png")
    print(f'said: "{TEXT}" in the voice of {VOICE}')
    print("With this little training it mumbles. Whether the text matters yet, in nats per code:")
    for trained, uri in reached.items():
        found = storage.read_json(storage.join(uri, checkpoint.METRICS))
        print(
            f"  {trained}: validation loss {found['validation/loss']:.3f} with the right text, "
            f"{found['validation/loss_wrong_text']:.3f} with another's"
        )
    print(f"runs and registry: mlflow ui --backend-store-uri {settings.read().tracking_uri}")
    print("endpoint: make serve")


def serve_and_request(prompt: str, port: int, out: Path) -> float:
    """Starts the endpoint on the connected cluster, sends one request, stops it."""
    from ray import serve

    from valle.serve.app import build_app
    from valle.serve.schema import AppArgs

    voices = settings.read().home / "data" / "voices"
    recording = storage.read_bytes(prompt)
    storage.write_bytes(str(voices / f"{VOICE}.wav"), recording)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build_app(AppArgs(voices=str(voices), max_replicas=1)), name="valle")
    try:
        return request(port, out)
    finally:
        serve.shutdown()


if __name__ == "__main__":
    main()
