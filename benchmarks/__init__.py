"""Benchmarks of queue_service, on a real and durable Postgres. Never part of a test's verdict."""
