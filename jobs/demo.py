"""Runs all jobs in sequence: corpus, prepare, train, publish, evaluate, serve, one request.

The stages call the jobs' own functions; the time of each is printed. The recipe `demo` fine-tunes
the shipped model for a few minutes and evaluates it before and after, `scratch` trains from random
weights. Either shows that the path works, not a better model: the version gets the alias `demo`,
and the champion stays what it is. A second run reuses the results that are present.
"""

import argparse
import json
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from valle.jobs import corpus, evaluate, prepare, publish, train
from valle.jobs.evaluation.intervals import Interval
from valle.jobs.evaluation.results import EvaluationReport
from valle.jobs.recipes import load, recipe_names
from valle.jobs.training.recipe import TrainRecipe
from valle.model.tokens import SAMPLE_RATE
from valle.platform import audio, console, registry, settings, storage
from valle.platform.cluster import connect
from valle.platform.lease import LeaseError
from valle.platform.recipe import exit_on_error
from valle.platform.retries import StorageError
from valle.platform.spectrogram import spectrogram_png

METRICS = {
    "wer": "word error rate (whisper tiny.en)",
    "speaker_similarity": "speaker similarity (cosine)",
    "speaker_id_accuracy": "speaker ID accuracy among all",
    "distillmos": "DistillMOS",
}
TEXT = "The whole path works, from a folder of speech to a spoken sentence."
VOICE = "joe"
ALIAS = "demo"
"""Of the demonstration's model: `champion` is for models that pass a gate."""
MODEL = f"models:/{registry.MODEL_NAME}@{ALIAS}"


SIGN_OF_LIFE_SECONDS = 30


@contextmanager
def stage(name: str, times: dict[str, float]) -> Iterator[None]:
    """Prints the name of a stage, every so often its seconds so far, and at its end its seconds,
    which are stored in `times`."""
    stream, ended = console.terminal(), threading.Event()

    def show_progress() -> None:
        while not ended.wait(SIGN_OF_LIFE_SECONDS):
            elapsed = time.perf_counter() - started
            print(f"    {name}: {elapsed:.0f} s so far", file=stream, flush=True)

    print(f"\n=== {name}", flush=True)
    started = time.perf_counter()
    ticker = threading.Thread(target=show_progress, daemon=True)
    ticker.start()
    try:
        yield
    finally:
        ended.set()
        ticker.join()
    times[name] = time.perf_counter() - started


def send_request(port: int, out: Path) -> float:
    """Sends one request to the endpoint; returns the seconds of audio.

    Writes the audio to `out` with suffix `.wav`, its spectrogram with `.png`.
    """
    body = json.dumps({"input": TEXT, "voice": VOICE, "response_format": "wav"}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/audio/speech", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        data = response.read()
    wave = audio.read(data, max_seconds=120)
    out.with_suffix(".wav").write_bytes(data)
    out.with_suffix(".png").write_bytes(spectrogram_png(wave, TEXT))
    return len(wave) / SAMPLE_RATE


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: `python -m valle.jobs.demo`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--recipe", required=True, help=f"path to YAML, or one of: {', '.join(recipe_names())}"
    )
    parser.add_argument("--port", type=int, default=8000, help="port of the endpoint")
    parser.add_argument(
        "--verbose", action="store_true", help="show the log of Ray and its workers on the terminal"
    )
    arguments = parser.parse_args(argv)
    log = None
    try:
        with exit_on_error(), console.quiet("demo", verbose=arguments.verbose) as log:
            if log is not None:
                print(f"The log of Ray and its workers: {log} (--verbose shows it here)")
            run(arguments.recipe, arguments.port)
    except KeyboardInterrupt:
        print("\nstopped; a second run reuses what is finished", file=sys.stderr)
        raise SystemExit(130) from None
    except (LeaseError, StorageError) as error:
        print(f"error: {error}" + (f"\nlog: {log}" if log else ""), file=sys.stderr)
        raise SystemExit(1) from error
    except Exception:
        if log is not None:
            print(f"log: {log}", file=sys.stderr)
        raise


def run(name: str, port: int) -> None:
    """Runs the stages of a recipe and prints their results."""
    corpus_recipe = load(name, "corpus", corpus.CorpusRecipe)
    prepare_recipe = load(name, "prepare", prepare.PrepareRecipe)
    train_recipe = load(name, "train", TrainRecipe)
    publish_recipe = load(name, "publish", publish.PublishRecipe)
    evaluate_recipe = load(name, "evaluate", evaluate.EvaluateRecipe)
    times: dict[str, float] = {}
    reports: dict[str, EvaluationReport] = {}

    def evaluate_model(name: str, model: str) -> None:
        with stage(f"evaluate {name}", times):
            out = storage.join(evaluate_recipe.out, name)
            reports[name] = evaluate.evaluate(replace(evaluate_recipe, model=model, out=out))

    # Every stage runs on one Ray instance; its start is a stage of its own.
    with ExitStack() as stack:
        with stage("Ray", times):
            stack.enter_context(connect())
        with stage("corpus", times):
            corpus_report = corpus.build_corpus(corpus_recipe)
            print(
                f"{corpus_report['utterances']} utterances, "
                f"{corpus_report['generated_seconds']} s of speech generated now"
            )
        with stage("prepare", times):
            report = prepare.prepare(prepare_recipe)
            print(
                f"{report['utterances']} utterances, {report['hours']} hours, "
                f"rejected: {report['rejected'] or 'none'}"
            )
        if train_recipe.warm_start:
            evaluate_model("before", str(registry.SHIPPED_BUNDLE))
        train_recipe = train.resolve_recipe(train_recipe)
        for kind in train_recipe.models:
            with stage(f"train {kind}", times):
                print(f"checkpoint: {train.fit(train_recipe, kind)}")
        with stage("publish", times):
            recipe = replace(publish_recipe, alias=ALIAS, gate=(), force=None)
            print(publish.publish(recipe))
        evaluate_model("after", MODEL)
        with stage("serve and one request", times):
            out = settings.read().home / "data" / Path(name).stem / "speech"
            out.parent.mkdir(parents=True, exist_ok=True)
            seconds = serve_and_request(publish_recipe.sample_prompt, port, out)

    print("\nstage                    seconds")
    for name, elapsed in {**times, "total": sum(times.values())}.items():
        print(f"{name:<24} {elapsed:7.1f}")
    print(f"\n{out}.wav: {seconds:.1f} s of speech, spectrogram beside it in {out.name}.png")
    print(f'text: "{TEXT}", voice: {VOICE}')
    print(compare(reports))
    print(verdict(reports))
    print(f"report with players: {storage.join(evaluate_recipe.out, 'after', 'report.html')}")
    print(f"runs and registry: mlflow ui --backend-store-uri {settings.read().tracking_uri}")
    print(f"serve this model: valle serve --model {MODEL} (make serve: the champion, unchanged)")


def compare(reports: dict[str, EvaluationReport]) -> str:
    """Table of the metrics of `METRICS`, one column per report."""
    systems = [report.systems["cross"] for report in reports.values()]
    items = max(metrics.items for metrics in systems)
    lines = [f"\n{items} sentences held out{'':<21}" + "".join(f"{n:>9}" for n in reports)]
    for name, label in METRICS.items():
        values = [metrics.get(name) for metrics in systems]
        cells = (f"{v.value:9.3f}" if isinstance(v, Interval) else f"{'-':>9}" for v in values)
        lines.append(f"{label:<40}{''.join(cells)}")
    return "\n".join(lines)


def verdict(reports: dict[str, EvaluationReport]) -> str:
    """The result in words: that all stages work, and how the word error rate has changed."""
    lines = ["The whole path works. A few minutes of training show the path, not a better model:"]
    if "before" in reports:
        before, after = (reports[name].systems["cross"].wer.value for name in ("before", "after"))
        change = "rose" if after > before else "fell" if after < before else "did not change:"
        lines.append(
            f"its word error rate {change} from {before:.1%} to {after:.1%} on sentences held out."
        )
    else:
        lines.append("its weights were random before, and it does not speak clearly yet.")
    lines.append(
        f"It has the alias {ALIAS}; the champion, which `make serve` serves, is unchanged."
    )
    return "\n".join(lines)


def serve_and_request(prompt: str, port: int, out: Path) -> float:
    """Starts the endpoint on the connected cluster, sends one request and stops the endpoint."""
    from valle.serve.app_args import AppArgs
    from valle.serve.run import endpoint

    voices = settings.read().home / "data" / "voices"
    recording = storage.read_bytes(prompt)
    storage.write_bytes(str(voices / f"{VOICE}.wav"), recording)
    with endpoint(AppArgs(model=MODEL, voices=str(voices), max_replicas=1), port):
        return send_request(port, out)


if __name__ == "__main__":
    main()
