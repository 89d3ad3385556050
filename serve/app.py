"""The Ray Serve application: ingress -> AR -> NAR -> codec, deployments that scale on their own.

    serve run valle.serve.app:build_app model=models:/valle@champion voices=data/voices

Codes travel between deployments by value, as int16 arrays (12 KB for ten seconds).
"""

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application, Deployment
from ray.serve.config import AutoscalingPolicy

from valle.platform import registry, settings, storage
from valle.serve.app_args import AppArgs
from valle.serve.deployments.ar import ARDeployment
from valle.serve.deployments.codec import CodecDeployment
from valle.serve.deployments.handles import AR, CODEC, NAR, ServeDeployments
from valle.serve.deployments.key_limits import KEY_LIMITS, KeyLimitsDeployment, ServeKeyLimits
from valle.serve.deployments.listening import default_ingress_replicas, listening_host
from valle.serve.deployments.nar import NARDeployment
from valle.serve.web.api import create_api
from valle.serve.web.exposure import refuse_exposure
from valle.serve.web.keys import read_keys
from valle.serve.web.origins import is_loopback

INGRESS_TARGET_REQUESTS = 50
"""Requests per ingress replica that autoscaling aims at: text, encoding and streams of so many keep
a core busy."""

MAX_BATCHED_REQUESTS = 32
"""Requests that a NAR or codec replica may hold; those of similar length form a batch."""


def build_app(args: AppArgs) -> Application:
    """The application; Serve validates `args` before anything starts.

    Raises ValueError for an address beyond this machine without keys (`refuse_exposure`), and what
    `registry.pin` raises for a missing or damaged model.
    """
    args = _resolve_paths(args)
    refuse_exposure(listening_host(), args)
    # a missing or damaged model fails here, before anything starts
    deployed = registry.pin(args.model, args.tracking_uri, allow_cached=True)
    accelerator = "cuda" if args.use_gpu else "cpu"
    ar = _deploy(
        ARDeployment, AR, args, accelerator, slots=args.slots, max_ongoing_requests=args.slots
    )
    nar = _deploy(
        NARDeployment,
        NAR,
        args,
        accelerator,
        slots=args.nar_target_ongoing_requests,
        max_ongoing_requests=MAX_BATCHED_REQUESTS,
    )
    codec = _deploy(
        CodecDeployment,
        CODEC,
        args,
        "cpu",
        slots=MAX_BATCHED_REQUESTS,
        max_ongoing_requests=MAX_BATCHED_REQUESTS,
    )

    ingress = _ingress(args, deployed)
    if args.api_keys:
        return ingress.bind(ar, nar, codec, _key_limits().bind())
    return ingress.bind(ar, nar, codec)


def _key_limits() -> Deployment:
    """The deployment, of one replica, that counts the requests of API keys."""
    return serve.deployment(
        KeyLimitsDeployment,
        name=KEY_LIMITS,
        num_replicas=1,  # two replicas would count separately
        max_ongoing_requests=1000,
        health_check_period_s=2,
        ray_actor_options={"num_cpus": 0},
    )


def _ingress(args: AppArgs, deployed: str) -> Deployment:
    """The deployment that answers HTTP requests."""

    # a builder, which Serve calls on each ingress replica; it does not accept a `partial`
    def build_api() -> FastAPI:
        host = listening_host()
        refuse_exposure(host, args)  # Serve may have been started on another host since
        return create_api(
            args,
            ServeDeployments(args.max_call_seconds),
            deployed,
            # without keys there is nothing to count
            limits=ServeKeyLimits() if args.api_keys else None,
            local_only=host is not None and is_loopback(host),
            replica=serve.get_replica_context().replica_id.unique_id,
        )

    min_replicas = args.ingress_replicas or default_ingress_replicas()
    return serve.deployment(
        serve.ingress(build_api)(),
        name="Ingress",
        max_ongoing_requests=1000,  # they only wait; the AR deployment's queue is the limit
        autoscaling_config={
            "min_replicas": min_replicas,
            "max_replicas": max(min_replicas, args.max_replicas),
            "target_ongoing_requests": INGRESS_TARGET_REQUESTS,
            "upscale_delay_s": args.upscale_delay_s,
            "downscale_delay_s": args.downscale_delay_s,
        },
        health_check_period_s=2,
        max_surge_percent=_max_surge_percent(args),
        # of a whole response
        graceful_shutdown_timeout_s=args.max_real_time_factor * args.max_seconds,
        ray_actor_options={"num_cpus": 0.1},
    )


def _resolve_paths(args: AppArgs) -> AppArgs:
    """`args` with absolute paths and a tracking URI: replicas run in other working directories.
    Raises ValueError for a file of keys that cannot be used."""
    updates = {
        "voices": storage.absolute(args.voices),
        # a registry URI, or the absolute path of a folder that every node has
        "model": storage.absolute(args.model),
        "tracking_uri": args.tracking_uri or settings.read().tracking_uri,
    }
    if args.api_keys:
        read_keys(args.api_keys)
        updates["api_keys"] = storage.absolute(args.api_keys)
    return args.model_copy(update=updates)


def _max_surge_percent(args: AppArgs) -> int:
    """New replicas start before old ones stop, but on GPUs: there is rarely a free one to start on,
    and the update would wait for it."""
    return 0 if args.use_gpu else 100


def _deploy(
    target: type,
    name: str,
    args: AppArgs,
    device: str,
    *,
    slots: int,
    max_ongoing_requests: int,
) -> Application:
    """A deployment whose replicas hold up to `max_ongoing_requests` and count as full with `slots`
    of them (autoscaling)."""
    policy = AutoscalingPolicy(
        policy_function="valle.serve.deployments.scaling:SlotUtilizationPolicy",
        policy_kwargs={"slots": slots},
    )
    options: dict[str, Any] = {
        "name": name,
        "max_ongoing_requests": max_ongoing_requests,
        "max_queued_requests": 64,
        "autoscaling_config": {
            "min_replicas": 1,
            "max_replicas": args.max_replicas,
            "upscale_delay_s": args.upscale_delay_s,
            "downscale_delay_s": args.downscale_delay_s,
            "policy": policy,
        },
        # a replica that stops finishes the sentences it has begun
        "graceful_shutdown_timeout_s": args.max_real_time_factor * args.max_sentence_seconds,
        "health_check_period_s": 2,
        "max_surge_percent": _max_surge_percent(args),
        "ray_actor_options": {
            # small shares: on two cores all four deployments must fit beside each other
            "num_cpus": 0.3,
            "num_gpus": 1 if device == "cuda" else 0,
        },
    }
    deployment = serve.deployment(target, **options)
    return deployment.bind(args.model, args.tracking_uri, device, args)
