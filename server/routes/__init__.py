"""The routes: one file for each endpoint or group of endpoints."""

from __future__ import annotations

from typing import Any

from pilotfish.server.generation.flow import Endpoint
from pilotfish.server.routes.chat import Chat
from pilotfish.server.routes.completions import Completions
from pilotfish.server.routes.messages import Messages
from pilotfish.server.routes.responses import Responses

ENDPOINTS: tuple[Endpoint[Any], ...] = (Completions(), Chat(), Responses(), Messages())
"""The endpoints that generate text."""
