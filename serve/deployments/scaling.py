"""Autoscaling: the number of replicas that a deployment's load needs."""

import math

from ray.serve.config import AutoscalingContext

SLOT_DEMAND = "slot_demand"
"""Metric that replicas report: requests that run or wait in them."""


class SlotUtilizationPolicy:
    """Autoscaling policy: as many replicas as bring the slot demand down to a share of their slots.

    Requests that no replica has accepted yet count as demand. Serve applies delays and bounds.
    """

    def __init__(self, slots: int, target_utilization: float = 0.75) -> None:
        """`slots`: requests that fill a replica."""
        self._demand_per_replica = slots * target_utilization

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, object]]:
        """The number of replicas, and an empty state."""
        reported = context.aggregated_metrics.get(SLOT_DEMAND, {})
        demand = sum(reported.values()) + context.total_queued_requests
        return max(1, math.ceil(demand / self._demand_per_replica)), {}
