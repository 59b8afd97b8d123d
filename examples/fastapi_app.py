"""FastAPI with SQLAlchemy's async session: an order and the run that confirms it are committed together, or neither is.

`DATABASE_URL=postgresql://… python examples/fastapi_app.py [--port 8000]`
"""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel
from sqlalchemy import make_url
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from queue_service import App

queue = App()
engine = create_async_engine(make_url(os.environ["DATABASE_URL"]).set(drivername="postgresql+psycopg"))


@queue.task
async def confirm(number: int, email: str) -> str:
    return f"order {number}: mail to {email}"


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    number: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str]


class NewOrder(BaseModel):
    number: int
    email: str


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with queue:
        yield
    await engine.dispose()


web = FastAPI(lifespan=lifespan)


@web.post("/orders", status_code=201)
async def order(new: NewOrder) -> dict[str, int]:
    try:
        async with AsyncSession(engine) as session, session.begin():
            run_id = await queue.enqueue("confirm", new.model_dump(), conn=session)
            session.add(Order(**new.model_dump()))
    except IntegrityError:
        raise HTTPException(409, "There is an order of this number.") from None
    return {"run": run_id}


@web.get("/runs/{run_id}")
async def run(run_id: int) -> dict[str, object]:
    found = await queue.get(run_id)
    if found is None:
        raise HTTPException(404)
    return {"task": found.task, "state": found.state, "payload": dict(found.payload)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Orders, with FastAPI.")
    parser.add_argument("--port", type=int, default=8000)
    with socket.create_server(("127.0.0.1", parser.parse_args().port)) as listening:
        print(f"http://127.0.0.1:{listening.getsockname()[1]}/docs", flush=True)
        uvicorn.Server(uvicorn.Config(web, log_level="warning")).run(sockets=[listening])
