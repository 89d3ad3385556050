"""How many replicas a deployment needs, by what they say they have to do."""

import math

from ray.serve.config import AutoscalingContext

WANTED = "slots_wanted"
"""What replicas report: requests that they work on or that wait in them."""


class BySlots:
    """An autoscaling policy: so many replicas that the slots wanted fill a share of their slots.

    Requests that no replica has taken yet count as well. Serve applies delays and bounds.
    """

    def __init__(self, slots: int, share: float = 0.75) -> None:
        self._wanted_each = slots * share

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, object]]:
        """Replicas wanted, and no state to keep."""
        reported = context.aggregated_metrics.get(WANTED, {})
        wanted = sum(reported.values()) + context.total_queued_requests
        return max(1, math.ceil(wanted / self._wanted_each)), {}
