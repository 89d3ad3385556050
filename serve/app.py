"""Ray Serve: ingress -> AR -> NAR -> codec, separate deployments that scale on their own.

    serve run valle.serve.app:build_app model=models:/valle@champion voices=data/voices

Codes travel between deployments as small int16 arrays (12 KB for ten seconds), by value.
"""

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingPolicy

from valle.platform import registry, settings, storage
from valle.serve.app_args import AppArgs
from valle.serve.deployments.handles import AR, CODEC, NAR
from valle.serve.deployments.models import (
    MAX_ONGOING_REQUESTS,
    ARDeployment,
    CodecDeployment,
    NARDeployment,
)
from valle.serve.web.api import create_api
from valle.serve.web.keys import read_keys


def build_app(args: AppArgs) -> Application:
    """The application; Serve validates `args` before anything starts."""
    # replicas run in folders of their own: what is relative or local is fixed here
    tracking_uri = args.tracking_uri or settings.read().tracking_uri
    paths = {
        "voices": storage.absolute(args.voices), "model": registry.absolute(args.model),
    }  # fmt: skip
    if args.api_keys:
        read_keys(args.api_keys)  # what is wrong with it is noticed here
        paths["api_keys"] = storage.absolute(args.api_keys)
    args = args.model_copy(update={**paths, "tracking_uri": tracking_uri})
    accelerator = "cuda" if args.use_gpu else "cpu"
    # a new deployment's replicas answer before the old ones go; with GPUs there is rarely one left
    # for that, and they would wait for it for ever
    surge = 0 if args.use_gpu else 100

    def deploy(
        target: type, name: str, device: str, max_ongoing_requests: int, slots: int, *more: object
    ) -> Application:
        """`max_ongoing_requests`: those that a replica may hold at the same time; `slots`: how many
        of them fill it, so that another is wanted."""
        policy = AutoscalingPolicy(
            policy_function="valle.serve.deployments.scaling:SlotUtilizationPolicy",
            policy_kwargs={"slots": slots},
        )
        options: dict[str, Any] = {
            "name": name,
            "max_ongoing_requests": max_ongoing_requests,
            "max_queued_requests": 64,
            "autoscaling_config": {
                "min_replicas": 1, "max_replicas": args.max_replicas,
                "upscale_delay_s": args.upscale_delay_s,
                "downscale_delay_s": args.downscale_delay_s, "policy": policy,
            },
            # old ones finish what they have begun
            "graceful_shutdown_timeout_s": 2 * args.max_sentence_seconds,
            "health_check_period_s": 2,
            "max_surge_percent": surge,
            "ray_actor_options": {
                # small shares: on two cores all four deployments must fit beside each other
                "num_cpus": 0.3,
                "num_gpus": 1 if device == "cuda" else 0,
            },
        }  # fmt: skip
        return serve.deployment(target, **options).bind(args.model, tracking_uri, device, *more)

    def build_api() -> FastAPI:  # Serve calls it on each ingress replica; a `partial` it would not
        return create_api(args)

    ar = deploy(ARDeployment, AR, accelerator, args.slots, args.slots, args)
    nar = deploy(
        NARDeployment,
        NAR,
        accelerator,
        MAX_ONGOING_REQUESTS,
        args.nar_target_ongoing_requests,
        args,
    )
    codec = deploy(CodecDeployment, CODEC, "cpu", MAX_ONGOING_REQUESTS, MAX_ONGOING_REQUESTS, args)
    ingress = serve.deployment(
        serve.ingress(build_api)(),
        name="Ingress",
        max_ongoing_requests=1000,  # they only wait; the AR model's queue says who is too many
        max_surge_percent=surge,
        graceful_shutdown_timeout_s=args.max_seconds,  # of a whole answer
        ray_actor_options={"num_cpus": 0.1},
    )
    return ingress.bind(ar, nar, codec)
