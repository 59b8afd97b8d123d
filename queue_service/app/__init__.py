"""What users import: the App, and what it is made of. Each module here is one of its faces."""

from queue_service.app.app import App

__all__ = ["App"]
