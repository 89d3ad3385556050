"""Prometheus metrics of an ingress replica (`/metrics`).

Each replica counts its own responses, and a request for the metrics reaches one replica, whichever
it is. So every sample has the label `replica`, and a query sums over it. Ray exports queues and
latencies of all deployments at its metrics port.
"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from valle.model.tokens import FRAME_RATE
from valle.serve.web.stats import SpeechStats

LATENCY_BUCKETS = (0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 40)
REAL_TIME_FACTOR_BUCKETS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2, 4)


class Metrics:
    """Counters and histograms of one replica."""

    def __init__(self, replica: str = "") -> None:
        """`replica` labels the samples; without it they have no such label."""
        self._replica = replica
        self._registry = registry = CollectorRegistry()
        self.unauthorized = Counter(
            "valle_unauthorized_requests",
            "Requests without a valid key, by reason",
            ["reason"],
            registry=registry,
        )
        self.requests = Counter(
            "valle_requests",
            "Responses, by route and status",
            ["route", "status"],
            registry=registry,
        )
        self.running = Gauge("valle_requests_running", "Requests in progress", registry=registry)
        self._audio = Counter(
            "valle_audio_seconds", "Seconds of speech synthesized", registry=registry
        )
        self._characters = Counter(
            "valle_input_characters", "Characters of text spoken", registry=registry
        )
        self._limited = Counter(
            "valle_responses_hit_limit", "Responses cut at a length limit", registry=registry
        )
        self._first = Histogram(
            "valle_time_to_first_audio_seconds",
            "From request to first audio",
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        self._factor = Histogram(
            "valle_real_time_factor",
            "Seconds of synthesis per second of speech",
            buckets=REAL_TIME_FACTOR_BUCKETS,
            registry=registry,
        )

    def record_response(self, stats: SpeechStats) -> None:
        """Counts a response that has ended."""
        duration = stats.n_frames / FRAME_RATE
        self._audio.inc(duration)
        self._characters.inc(stats.characters)
        self._limited.inc(int(stats.hit_limit))
        self._first.observe(stats.time_to_first_audio)
        self._factor.observe(stats.wall_seconds / duration)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self)

    def collect(self) -> Iterator[Metric]:
        """The samples with the replica's label, as a registry yields them."""
        for metric in self._registry.collect():
            if self._replica:
                metric.samples = [
                    sample._replace(labels={**sample.labels, "replica": self._replica})
                    for sample in metric.samples
                ]
            yield metric


class MetricsMiddleware:
    """ASGI middleware: counts responses by route and status, and requests in progress."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = "none"  # stays so where the client disconnects before the response

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            with self._metrics.running.track_inprogress():
                await self._app(scope, receive, counted)
        except Exception:  # Starlette's outer handler answers with 500
            status = "500" if status == "none" else "broken"
            raise
        finally:
            # the route's pattern, not the path: each voice would be a series of its own
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.requests.labels(route, status).inc()
