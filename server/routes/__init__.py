"""The routes, one file an endpoint or a group of them."""

from __future__ import annotations

from typing import Any

from pilotfish.server.generation.flow import Endpoint
from pilotfish.server.routes.chat import Chat
from pilotfish.server.routes.completions import Completions

ENDPOINTS: tuple[Endpoint[Any], ...] = (Completions(), Chat())
"""The endpoints that generate text."""
