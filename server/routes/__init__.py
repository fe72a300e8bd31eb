"""The routes: one file for each endpoint or group of endpoints."""

from __future__ import annotations

from typing import Any

from pilotfish.server.generation.flow import Endpoint
from pilotfish.server.routes.chat import Chat
from pilotfish.server.routes.completions import Completions
from pilotfish.server.routes.messages import Messages

ENDPOINTS: tuple[Endpoint[Any], ...] = (Completions(), Chat(), Messages())
"""The endpoints that generate text."""
