"""Metrics of measurements, evaluation sets, and an evaluation on Ray from recordings to gate."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from helpers.evaluations import measurement
from helpers.tiny_bundles import save_checkpoints
from helpers.token_datasets import write_dataset

from valle.jobs import model_versions
from valle.jobs.evaluate import EvaluateRecipe, evaluate
from valle.jobs.evaluation import scores
from valle.jobs.evaluation.gate import Bound
from valle.jobs.evaluation.intervals import Interval, bootstrap_mean, bootstrap_ratio
from valle.jobs.evaluation.items import SETS, EvaluationItem, check_unseen, item_seed, load_items
from valle.jobs.evaluation.metrics.speaker_similarity import equal_error_rate, load_speaker_encoder
from valle.jobs.evaluation.metrics.words import (
    count_edits,
    load_recognizer,
    normalize_transcript,
    word_error_rate,
)
from valle.jobs.evaluation.report import read_report
from valle.jobs.publish import GateError, PublishRecipe, publish
from valle.jobs.speakers import Espeak, texts
from valle.model.codec.encodec import Encodec
from valle.platform import audio, registry, storage
from valle.platform import model_versions as versions
from valle.platform.resources import Placement


def test_count_edits_ignores_spelling() -> None:
    edits = count_edits("Dr. Smith's colour is twenty-one.", "doctor smith's color is 21")
    assert edits.word_errors == 0
    edits = count_edits("the cat sat down", "the bat sat")
    assert (edits.words, edits.word_errors) == (4, 2)
    with pytest.raises(ValueError, match="no words in the reference"):
        count_edits("...", "hello")


def test_word_error_rate_weights_by_words() -> None:
    assert word_error_rate(["good", "bad dog"], ["good", "bad"]) == pytest.approx(1 / 3)


def test_longest_repetition_for_any_period() -> None:
    natural = np.random.default_rng(0).integers(0, 1024, 300).astype(np.int16)
    assert scores.longest_repetition(natural) < 5
    for period in (1, 7, 75):
        looped = natural.copy()
        looped[100:250] = np.resize(natural[100 : 100 + period], 150)
        assert scores.longest_repetition(looped) >= 150 - period


def test_find_faults_at_the_limits() -> None:
    natural = np.random.default_rng(0).integers(0, 1024, 300).astype(np.int16)
    looped = natural.copy()
    looped[100:250] = np.resize(natural[100:175], 150)  # 75 frames once more: one second
    assert scores.find_faults(looped, False) == scores.Faults(False, empty=False, looped=False)
    looped[100:300] = np.resize(natural[:3], 200)
    assert scores.find_faults(looped, True) == scores.Faults(True, empty=False, looped=True)
    assert scores.find_faults(None, False).empty
    assert scores.find_faults(natural[:14], False).empty
    assert not scores.find_faults(natural[:15], False).empty


def test_bootstrap_mean_is_a_ratio_to_ones() -> None:
    values = np.random.default_rng(0).normal(size=50).tolist()
    assert bootstrap_mean(values) == bootstrap_ratio(values, [1.0] * 50)
    assert bootstrap_mean([2.0, 2.0]) == Interval(2.0, 2.0, 2.0)
    assert bootstrap_mean([]) is None


def test_summarize_metrics_and_intervals() -> None:
    rows = [measurement(n, errors=n % 3, speaker="abc"[n % 3]) for n in range(60)]
    metrics = scores.summarize(rows)["cross"]
    assert metrics.wer.value == pytest.approx(0.1)
    assert 0.07 < metrics.wer.low < 0.1 < metrics.wer.high < 0.13
    assert metrics.speaker_id_accuracy == Interval(1, 1, 1) and metrics.equal_error_rate == 0.0
    assert metrics.impostor_similarity == Interval(0, 0, 0) and metrics.n_speakers == 3
    assert metrics.real_time_factor == 0.5 and metrics.faults == 0.0
    assert metrics.by.speaker["b"].wer.value == pytest.approx(0.1)
    assert [metrics.by.speaker[speaker].items for speaker in "abc"] == [20, 20, 20]
    assert metrics.by.speaker["b"].speaker_similarity is None  # one speaker: nobody else


def test_summarize_without_measured_fields() -> None:
    rows = [measurement(n, distillmos=None, seconds=0.0, empty=True) for n in range(3)]
    metrics = scores.summarize(rows)["cross"]
    assert metrics.distillmos is None and metrics.second_wer is None
    assert metrics.real_time_factor is None
    assert (metrics.empty, metrics.hit_limit, metrics.faults) == (1.0, 0.0, 1.0)


def test_summarize_identifies_among_candidates() -> None:
    """Outputs that all sound like speaker a are identified only where that is right."""
    like_a = np.array([1, 0, 0], np.float32)
    rows = [replace(measurement(n, speaker="abc"[n % 3]), embedding=like_a) for n in range(60)]
    accuracy = scores.summarize(rows)["cross"].speaker_id_accuracy
    assert accuracy is not None and accuracy.value == pytest.approx(1 / 3)
    # the candidates are two of the three; other metrics stay those of all
    subset = scores.summarize(rows, ("a", "b", "nobody"))["cross"]
    assert subset.speaker_id_accuracy is not None
    assert (subset.speaker_id_accuracy.value, subset.n_speakers, subset.items) == (0.5, 2, 60)


def test_equal_error_rate_of_normal_distributions() -> None:
    assert equal_error_rate(np.array([0.8, 0.9]), np.array([0.1, 0.2])) == 0.0
    generator = np.random.default_rng(0)
    same, different = generator.normal(1, 1, 4_000), generator.normal(-1, 1, 4_000)
    assert equal_error_rate(same, different) == pytest.approx(0.1587, abs=0.015)  # Phi(-1)


def test_item_seed_depends_on_item_and_seed() -> None:
    assert len({item_seed("a", 0), item_seed("b", 0), item_seed("b", 1)}) == 3
    assert item_seed("a", 0) == item_seed("a", 0) < 2**63


def test_load_class_of_unknown_metric_model() -> None:
    with pytest.raises(ValueError, match="nothing.here:Recognizer: no such class"):
        load_recognizer("nothing.here:Recognizer")
    with pytest.raises(
        ValueError, match="valle.jobs.evaluation.gate:SpeakerEncoder: no such class"
    ):
        load_speaker_encoder("valle.jobs.evaluation.gate:SpeakerEncoder")


def test_load_items_lines_end_at_line_feeds(home: Path) -> None:
    rows = [
        {"id": str(n), "text": "one\u2028two\x85", "prompt": "p.wav", "speaker": "s"}
        for n in (1, 2)
    ]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (home / "set.jsonl").write_bytes(lines.encode("utf-8-sig") + b"\n\n")
    assert [item.text for item in load_items(str(home / "set.jsonl"))] == ["one\u2028two\x85"] * 2
    (home / "set.jsonl").write_bytes(lines.encode() + b"\ncaf\xe9")
    with pytest.raises(ValueError, match=r"set.jsonl:3: not UTF-8"):
        load_items(str(home / "set.jsonl"))


def test_load_items_names_the_bad_line(home: Path) -> None:
    good = {"id": "1", "text": "Hello there.", "prompt": "p.wav", "speaker": "x"}
    path = home / "set.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps({**good, "id": 2}))
    with pytest.raises(ValueError, match=r"set.jsonl:2: wrong value type for field \"id\""):
        load_items(str(path))
    path.write_text("\n".join([json.dumps(good)] * 2))
    with pytest.raises(ValueError, match="two items have the same id"):
        load_items(str(path))
    with pytest.raises(ValueError, match="give a path to JSONL, or one of: "):
        load_items("none")
    with pytest.raises(ValueError, match="items: 'nano' is called 'standard'"):
        load_items("nano")


def test_check_unseen_finds_texts_and_speakers(home: Path, tiny_codec: Encodec) -> None:
    write_dataset(str(home / "tokens"), tiny_codec)
    item = EvaluationItem(id="1", text="Hello there.", prompt="p", speaker="s0")
    check_unseen([item], str(home / "tokens"))
    with pytest.raises(ValueError, match="its text is in"):
        check_unseen([replace(item, text="Sentence 7!")], str(home / "tokens"))
    with pytest.raises(ValueError, match="holds s0"):
        check_unseen([replace(item, group="unseen voices")], str(home / "tokens"))


def test_shipped_sets_share_no_sentence_with_the_training_lists() -> None:
    training_sentences = {
        normalize_transcript(line)
        for path in texts.FOLDER.glob("*.txt")
        if path.stem != "held_out"
        for line in path.read_text().splitlines()
    }
    sets = sorted(SETS.glob("*.jsonl"))
    assert sets
    for path in sets:
        for item in load_items(str(path)):
            assert normalize_transcript(item.text) not in training_sentences, (path.name, item.id)


@pytest.fixture
def recipe_with_evaluation(
    home: Path, tiny_codec: Encodec, tiny_codec_folder: Path
) -> PublishRecipe:
    """Untrained models and three items in two espeak voices."""
    folders = {kind: home / f"runs/{kind}/step_00000001" for kind in ("ar", "nar")}
    save_checkpoints(folders, tiny_codec.identity, eos_bias=3.5)
    engine = Espeak()
    items = []
    for number, (voice, text) in enumerate(
        [("m3", "Good morning to you."), ("f2", "Good evening."), ("m3", "See you tomorrow.")]
    ):
        for name, words in (("prompt", "The weather is fine today."), ("reference", text)):
            wave = engine.synthesize(words, voice, "en-us")
            storage.write_bytes(f"speech/{name}{number}.wav", audio.wav_bytes(wave))
        items.append(
            {"id": f"i{number}", "text": text, "prompt": f"prompt{number}.wav", "speaker": voice}
            | ({"reference": f"reference{number}.wav"} if number else {})
        )
    (home / "set.jsonl").write_text("\n".join(json.dumps(item) for item in items))
    evaluation = EvaluateRecipe(items=str(home / "set.jsonl"), recordings="speech", out="report",
                                placement=Placement(gpus_per_worker=0.5))  # fmt: skip
    return PublishRecipe(
        ar="runs/ar", nar="runs/nar", codec=str(tiny_codec_folder), sample_seconds=0.5,
        sample_prompt="speech/prompt0.wav", evaluation=evaluation,
    )  # fmt: skip


@pytest.mark.ray
def test_publish_evaluates_gates_and_rolls_back(
    ray_cluster: None,
    recipe_with_evaluation: PublishRecipe,
    home: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Untrained models through the real metric models: two actors on halves of a GPU measure what
    one on the CPU does; then promotion, refusal and rollback."""
    assert publish(recipe_with_evaluation).version == 1
    assert versions.champion_version() == 1
    bundle_folder = registry.resolve(registry.CHAMPION)
    shared = read_report(str(bundle_folder / "report.json"))
    rows = {(result.id, result.system) for result in shared.results}
    with_reference = {(f"i{n}", system) for n in (1, 2) for system in shared.systems}
    assert rows == with_reference | {("i0", "cross")} and len(shared.systems) == 5
    assert shared.training_data_checked is False
    recordings = shared.systems["recording"]
    assert recordings.wer.value < 1.0 and recordings.speaker_id_accuracy == Interval(1, 1, 1)
    page = (home / "report/version-1/report.html").read_text()
    assert page.count("<audio") >= 8 and (home / "report/version-1/audio/codec/i1.wav").exists()

    assert recipe_with_evaluation.evaluation is not None
    on_cpu = Placement(accelerator="cpu")
    single = evaluate(
        replace(recipe_with_evaluation.evaluation, workers=1, out="single", placement=on_cpu)
    )
    assert (shared.accelerator, single.accelerator) == ("gpu", "cpu")
    for result, expected in zip(single.results, shared.results, strict=True):
        same_time = replace(result, synthesis_seconds=expected.synthesis_seconds)
        assert asdict(same_time) == asdict(expected)

    # the gate reads one figure: one row of one actor gives it
    only_cross = replace(recipe_with_evaluation.evaluation, systems=("cross",), workers=1)
    strict = replace(
        recipe_with_evaluation,
        evaluation=only_cross,
        gate=(Bound(metric="cross/wer", at_most=0.01),),
    )
    with pytest.raises(GateError, match="version 2 stays a candidate: cross/wer is .* at most"):
        publish(strict)
    assert versions.champion_version() == 1
    assert publish(replace(strict, force="a rehearsal")).version == 3
    assert versions.champion_version() == 3
    model_versions.main(["rollback", "--reason", "rehearsed"])
    assert versions.champion_version() == 1
    output = capsys.readouterr().out
    assert "forced: a rehearsal (refused for: cross/wer is" in output
    assert "rolled back: rehearsed" in output and "candidate" in output
    with pytest.raises(ValueError, match="version 1 replaced no other"):
        versions.roll_back("again")
    with pytest.raises(ValueError, match="the registry has no 9"):
        versions.promote(9, "typo")
