"""The child process of a deployment: it is given turns, and its end is their end."""

from queue_service.supervisor.child import serve
from queue_service.supervisor.conversation import Conversation
from queue_service.supervisor.supervisor import ChildEnd, Supervisor
from queue_service.supervisor.supervisors import Supervisors

__all__ = ["ChildEnd", "Conversation", "Supervisor", "Supervisors", "serve"]
