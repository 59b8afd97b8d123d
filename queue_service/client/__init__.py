"""A chat client of the gateway: events come down in order and once, messages go up in order and are accepted once."""

try:
    import httpx2 as _httpx2  # noqa: F401 - asked for here, where it can be said what is missing
except ModuleNotFoundError as missing:
    from queue_service.errors import install_extra

    raise ModuleNotFoundError(f"The client needs httpx2. {install_extra('client')}") from missing

from queue_service.client.chat import ChatClient
from queue_service.client.model import MessageReceipt
from queue_service.events.model import Event

__all__ = ["ChatClient", "Event", "MessageReceipt"]
