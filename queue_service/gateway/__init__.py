"""Server-sent events down, POST up: conversations for browsers and other clients, from any replica (`docs/gateway.md`)."""

from queue_service.gateway.access import Authorize, Limits, Principal, Token, everything, loopback
from queue_service.gateway.app import Gateway

__all__ = ["Authorize", "Gateway", "Limits", "Principal", "Token", "everything", "loopback"]
