"""How many replicas a deployment needs, by what they say they have to do."""

import math

from ray.serve.config import AutoscalingContext

SLOT_DEMAND = "slot_demand"
"""What replicas report: requests that they work on or that wait in them."""


class SlotUtilizationPolicy:
    """An autoscaling policy: so many replicas that the slot demand fills a share of their slots.

    Requests that no replica has taken yet count as well. Serve applies delays and bounds.
    """

    def __init__(self, slots: int, target_utilization: float = 0.75) -> None:
        self._demand_per_replica = slots * target_utilization

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, object]]:
        """Replicas wanted, and no state to keep."""
        reported = context.aggregated_metrics.get(SLOT_DEMAND, {})
        demand = sum(reported.values()) + context.total_queued_requests
        return max(1, math.ceil(demand / self._demand_per_replica)), {}
