"""What an ingress replica has seen, for Prometheus (`/metrics`).

Each replica counts for itself; Ray exports the deployments' own figures (queues, latencies) at its
metrics port for all of them.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from valle.model.tokens import FRAME_RATE
from valle.serve.web.stats import SpeechStats

LATENCY_BUCKETS = (0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 40)


class Metrics:
    """Counters of one replica."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "valle_requests", "Answers, by route and status", ["route", "status"], registry=registry
        )
        self.running = Gauge("valle_requests_running", "Not answered yet", registry=registry)
        self._audio = Counter("valle_audio_seconds", "Speech made", registry=registry)
        self._characters = Counter("valle_input_characters", "Text spoken", registry=registry)
        self._limited = Counter(
            "valle_responses_hit_limit", "Answers cut at a length limit", registry=registry
        )
        self._first = Histogram(
            "valle_time_to_first_audio_seconds", "From request to first sound",
            buckets=LATENCY_BUCKETS, registry=registry,
        )  # fmt: skip
        self._factor = Histogram(
            "valle_real_time_factor", "Seconds of work for a second of speech",
            buckets=(0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2, 4), registry=registry,
        )  # fmt: skip

    def record_response(self, stats: SpeechStats) -> None:
        """Counts an answer that has ended."""
        duration = stats.frames / FRAME_RATE
        self._audio.inc(duration)
        self._characters.inc(stats.characters)
        self._limited.inc(int(stats.hit_limit))
        self._first.observe(stats.time_to_first_audio)
        self._factor.observe(stats.wall_seconds / duration)

    def render(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)


class MetricsMiddleware:
    """ASGI middleware: counts answers by route and status, and those that still run."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes everything on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = "none"  # the client had gone

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            with self._metrics.running.track_inprogress():
                await self._app(scope, receive, counted)
        except Exception:  # whoever answers for it is further out
            status = "500" if status == "none" else "broken"
            raise
        finally:
            # the route's pattern, not the path: names of voices would be a series each
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.requests.labels(route, status).inc()
