"""The statements of this package, by name."""

from queue_service.db.statements import Statements

SQL = Statements("queue_service.runs")
