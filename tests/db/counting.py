"""Asks as a scaler does."""

from __future__ import annotations

from typing import Any

import psycopg


def wanted(conn: psycopg.Connection[Any], *arguments: object) -> int:
    places = ", ".join(["%s"] * len(arguments))
    row = conn.execute(f"select queue_service.wanted_workers({places})".encode(), arguments).fetchone()
    assert row is not None
    number: int = row[0]
    return number
