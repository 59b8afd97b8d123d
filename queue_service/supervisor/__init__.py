"""The child process of a deployment: it is given turns, and its end is their end."""

from queue_service.supervisor.supervisor import ChildEnd, Supervisor

__all__ = ["ChildEnd", "Supervisor"]
