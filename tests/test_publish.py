"""Publishing: which version becomes champion, and what a refusal says."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.evaluations import make_report, measurement, replace_evaluation

from valle.jobs import evaluate, model_versions
from valle.jobs import publish as publish_job
from valle.jobs.evaluate import EvaluateRecipe
from valle.jobs.evaluation.gate import Bound
from valle.jobs.evaluation.report import write_report
from valle.jobs.evaluation.results import EvaluationReport
from valle.jobs.publish import GateError, PublishRecipe, publish
from valle.jobs.recipes import load, recipe_names
from valle.platform import bundle, registry
from valle.platform import model_versions as versions
from valle.platform.model_versions import LostRaceError
from valle.platform.recipe import RecipeError

pytestmark = pytest.mark.usefixtures("database")

EVALUATION = EvaluateRecipe(items="demo", recordings="r", out="reports")


@pytest.fixture
def errors(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Word errors of each item in the evaluations to come, which need no models."""
    return replace_evaluation(monkeypatch)


def test_a_version_without_an_evaluation_stays_a_candidate(publish_recipe: PublishRecipe) -> None:
    """Whether there is a champion or not; other aliases move at once."""
    plain = replace(publish_recipe, force=None)
    published = publish(plain)
    assert (published.version, published.alias) == (1, None)
    assert "it is not evaluated, so it does not take the champion's place" in str(published)
    assert versions.champion_version() is None
    assert registry.pin(registry.CHAMPION).startswith(str(registry.SHIPPED_BUNDLE))
    assert registry.pin("models:/valle@candidate").startswith("models:/valle/1#")

    assert publish(publish_recipe).alias == "champion"
    tags = versions.list_versions()[0].tags
    assert tags["promoted_because"] == "forced: untrained models, for tests (not evaluated)"
    assert publish(replace(plain, alias="demo")).alias == "demo"
    assert publish(plain).version == 4
    assert versions.champion_version() == 2
    assert registry.pin("models:/valle@demo").startswith("models:/valle/3#")


def test_the_champion_is_compared_with_the_report_in_the_registry(
    publish_recipe: PublishRecipe, errors: list[int], home: Path
) -> None:
    recipe = replace(publish_recipe, force=None, evaluation=EVALUATION)
    assert publish(recipe).version == 1 and versions.champion_version() == 1
    errors[0] = 4
    with pytest.raises(GateError, match=r"version 2 stays .*: word_errors is worse .* by 0\.300"):
        publish(recipe)
    assert versions.champion_version() == 1
    forced = publish(replace(recipe, force="a rehearsal"))
    assert (forced.version, versions.champion_version()) == (3, 3)
    because = versions.list_versions()[0].tags["promoted_because"]
    assert because.startswith("forced: a rehearsal (refused for: word_errors is worse")


def test_a_champion_without_a_report_is_a_refusal_with_a_way_out(
    publish_recipe: PublishRecipe, errors: list[int], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(publish_recipe)
    recipe = replace(publish_recipe, force=None, evaluation=EVALUATION)
    with pytest.raises(GateError, match=r"champion, version 1, has no report .* attach-report 1"):
        publish(recipe)
    # the way out, as the message has it
    evaluate.evaluate(replace(EVALUATION, model="models:/valle/1", out="of-one"))
    with pytest.raises(SystemExit):
        model_versions.main(["attach-report", "2", str(home / "of-one/none.json")])
    model_versions.main(["attach-report", "1", str(home / "of-one/report.json")])
    assert publish(recipe).version == 3 and versions.champion_version() == 3
    capsys.readouterr()


def test_attach_report_refuses_the_report_of_another_model(
    publish_recipe: PublishRecipe, errors: list[int], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(publish_recipe)
    write_report(make_report([measurement(1)]), str(home / "other"), None)
    with pytest.raises(SystemExit):
        model_versions.main(["attach-report", "1", str(home / "other/report.json")])
    assert "whose files are not those of version 1" in capsys.readouterr().err


def test_a_report_that_was_replaced_in_the_registry_is_a_refusal(
    publish_recipe: PublishRecipe, errors: list[int]
) -> None:
    recipe = replace(publish_recipe, force=None, evaluation=EVALUATION)
    publish(recipe)
    report = registry.resolve(registry.CHAMPION) / "report.json"
    content = json.loads(report.read_text())
    report.write_text(json.dumps(content | {"code_version": "another"}))
    with pytest.raises(GateError, match="the report of version 1 is not the one that was attached"):
        publish(recipe)


def test_a_version_compared_with_an_earlier_champion_is_not_promoted(
    publish_recipe: PublishRecipe, errors: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While version 3 is evaluated, another process promotes version 2."""
    recipe = replace(publish_recipe, force=None, evaluation=EVALUATION)
    publish(recipe)
    publish(replace(publish_recipe, force=None))
    evaluate_version = publish_job.evaluate_version

    def slowly(*arguments: object) -> EvaluationReport:
        versions.promote(2, "meanwhile")
        return evaluate_version(*arguments)  # type: ignore[arg-type]  # passed through

    monkeypatch.setattr(publish_job, "evaluate_version", slowly)
    with pytest.raises(LostRaceError, match="champion moved from version 1 to 2 in the meantime"):
        publish(recipe)
    assert versions.champion_version() == 2


def test_two_publishes_at_once_give_two_versions(publish_recipe: PublishRecipe) -> None:
    """Into a registry that does not exist yet; `candidate` is the later one."""
    barrier = threading.Barrier(2)
    packed = bundle.verify

    def run(_: int) -> int:
        barrier.wait(30)
        return publish(replace(publish_recipe, force=None)).version

    publish(replace(publish_recipe, force=None))
    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(run, range(2))) == [2, 3]
    assert registry.pin("models:/valle@candidate").startswith("models:/valle/3#")
    for number in (1, 2, 3):
        assert packed(registry.resolve(f"models:/valle/{number}"))


def test_a_bundle_that_was_changed_is_not_registered(
    publish_recipe: PublishRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = versions.publish

    def tampered(folder: Path, tags: dict[str, str]) -> int:
        (folder / "ar/config.json").write_text("{}")
        return upload(folder, tags)

    monkeypatch.setattr(versions, "publish", tampered)
    with pytest.raises(bundle.BundleError, match="ar/config.json has 2 bytes"):
        publish(publish_recipe)
    assert versions.list_versions() == []


def test_recipe_names_what_does_not_go_together(publish_recipe: PublishRecipe) -> None:
    bounds = (Bound(metric="cross/wer", at_most=0.3),)
    for changes, message in (
        ({"gate": bounds}, "gate: needs `evaluation`"),
        ({"alias": "Latest"}, "alias: 'Latest' is no name"),
        ({"alias": "latest"}, "alias: 'latest' is no name"),
        ({"alias": "3"}, "alias: '3' is no name"),
        ({"alias": "demo", "force": "x"}, "alias: demo moves without a gate"),
        ({"alias": "demo", "evaluation": EVALUATION, "gate": bounds}, "alias: demo moves without"),
        (
            {"evaluation": replace(EVALUATION, limit=3), "gate": bounds, "force": None},
            "evaluation.limit: the gate is for the whole set",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            replace(publish_recipe, **({"force": None} | changes))


@pytest.mark.parametrize("name", recipe_names())
def test_no_shipped_recipe_takes_the_champion_s_place_without_a_gate(name: str) -> None:
    try:
        recipe = load(name, "publish", PublishRecipe)
    except RecipeError as error:
        assert "has no section 'publish'" in str(error)
        return
    assert recipe.force is None
    assert recipe.alias != "champion" or (recipe.evaluation and recipe.gate)


def test_publish_alone_publishes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_status:
        publish_job.main([])
    assert exit_status.value.code == 2
    assert "--recipe is required" in capsys.readouterr().err
