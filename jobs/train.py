"""Trains the AR and NAR models on a token dataset, on Ray Train.

A run of the same name resumes from its last checkpoint, with the next batch. Metrics, samples and
parameters go to MLflow.
"""

import logging
from collections.abc import Sequence
from functools import partial

from valle.jobs.recipes import parse_arguments
from valle.jobs.training import ray_train
from valle.jobs.training.language_model import LanguageModelTrainee
from valle.jobs.training.recipe import TrainRecipe, warm_start_uri
from valle.model.codec.loading import load_codec
from valle.model.config import Kind
from valle.model.normalize import TEXT_VERSION
from valle.platform import checkpoint, settings
from valle.platform.cluster import connect
from valle.platform.dataset import read_manifest
from valle.platform.recipe import exit_on_error, resolve_paths

logger = logging.getLogger(__name__)


def fit(recipe: TrainRecipe, kind: Kind) -> str:
    """Trains one model on the connected cluster; returns the URI of its last checkpoint.

    Raises ValueError before anything starts if the cluster can never hold the workers.
    """
    return ray_train.fit(
        recipe,
        partial(LanguageModelTrainee, recipe, kind),
        section="train",
        name=f"{recipe.run}-{kind}",
        score=checkpoint.WORD_ERROR_RATE if recipe.quick_check else None,
    )


def resolve_recipe(recipe: TrainRecipe) -> TrainRecipe:
    """The recipe with absolute paths, its data and the sources of a warm start checked."""
    recipe = resolve_paths(recipe)
    manifest = read_manifest(recipe.data)
    if manifest.text_version != TEXT_VERSION:
        logger.warning(
            "the dataset %s has phonemes of text version %d, this code speaks text as version %d; "
            "prepare it again, or the model reads numbers otherwise than it learnt them",
            recipe.data, manifest.text_version, TEXT_VERSION,
        )  # fmt: skip
    for kind in recipe.models:
        if kind in recipe.warm_start:
            checkpoint.find_best(warm_start_uri(recipe, kind))  # a missing source is noticed here
    if recipe.samples:
        codec = load_codec(recipe.codec, cache=settings.read().cache)
        codec.identity.check(manifest.codec, f"the dataset {recipe.data}")
    return recipe


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: `python -m valle.jobs.train --recipe demo`."""
    recipe = parse_arguments(argv, "train", TrainRecipe, __doc__ or "")
    recipe = resolve_recipe(recipe)
    with exit_on_error(), connect():
        for kind in recipe.models:
            print(f"{kind}: checkpoint at {fit(recipe, kind)}")


if __name__ == "__main__":
    main()
