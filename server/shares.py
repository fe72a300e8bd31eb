"""Max-min fair shares: how many places each of several has, where they are shared by weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Demand(NamedTuple):
    """The weight of one among those that share, and how many places it has use for."""

    weight: float
    places: float


def equal_shares(places: float, demands: Mapping[str, Demand]) -> dict[str, float]:
    """Return how many of the places each has: in proportion to its weight, and no more than it demands, what it leaves
    being shared by the others."""
    shares: dict[str, float] = {}
    left, weights = places, sum(demand.weight for demand in demands.values())
    for name, demand in sorted(demands.items(), key=lambda item: item[1].places / item[1].weight):
        shares[name] = min(demand.places, left * demand.weight / weights)
        left, weights = left - shares[name], weights - demand.weight
    return shares
