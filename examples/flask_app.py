"""Flask with SQLAlchemy's session: an order and the run that confirms it are committed together, or neither is.

`DATABASE_URL=postgresql://… python examples/flask_app.py [--port 8000]`
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from flask import Flask, abort, request
from sqlalchemy import create_engine, make_url
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from werkzeug.serving import make_server

from queue_service import App

queue = App()
# Its tasks, blocking. With `conn=` it needs no connection of its own; to ask about runs it has to be open.
q = queue.sync
engine = create_engine(make_url(os.environ["DATABASE_URL"]).set(drivername="postgresql+psycopg"))
web = Flask(__name__)


@queue.task
def confirm(number: int, email: str) -> str:
    return f"order {number}: mail to {email}"


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    number: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str]


@web.post("/orders")
def order() -> tuple[dict[str, int], int]:
    new: dict[str, Any] = request.get_json()
    try:
        with Session(engine) as session, session.begin():
            run_id = q.enqueue("confirm", new, conn=session)
            session.add(Order(**new))
    except IntegrityError:
        abort(409, "There is an order of this number.")
    return {"run": run_id}, 201


@web.get("/runs/<int:run_id>")
def run(run_id: int) -> dict[str, object]:
    found = q.get(run_id)
    if found is None:
        abort(404)
    return {"task": found.task, "state": found.state, "payload": dict(found.payload)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Orders, with Flask.")
    parser.add_argument("--port", type=int, default=8000)
    Base.metadata.create_all(engine)
    server = make_server("127.0.0.1", parser.parse_args().port, web, threaded=True)
    with q:
        print(f"http://127.0.0.1:{server.port}/", flush=True)
        server.serve_forever()
