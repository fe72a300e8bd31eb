"""The dashboard *Service*: what clients get, and what the servers have to give."""

from __future__ import annotations

from panels import Board, Panel, Query, Row

NO_REQUESTS = "No requests in this time range"
NO_SERVER = "No server has been scraped in this time range"


def quantiles(metric: str, *shares: float) -> tuple[Query, ...]:
    """Of a histogram, over all selected servers."""
    return tuple(
        Query(f"histogram_quantile({share}, sum by (le) (rate({metric}_bucket{{$i}}[$__rate_interval])))", f"p{share:.0%}".rstrip("%"))
        for share in shares
    )
