"""Two replicas of one gateway: a client is connected to one, and its POSTs come to the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest

from queue_service import App
from queue_service.db.execute import Connection
from queue_service.replicas.model import Change, Done
from queue_service.services import replica as replicas
from queue_service.services.replica import LEASE_SERVICE, NOTICES_SERVICE, REQUESTS_SERVICE, Replica
from tests.gateway.served import Client, Served, Stream, serving
from tests.support import eventually, one, quick_app, refusing, rows, service

BODIES: dict[str, dict[str, Any]] = {
    "reconnect": {"streams": {"ann/a": 0}},
    "watch": {"stream": "ann/a"},
    "unwatch": {"stream": "ann/a"},
    "switch": {"stream": "ann/a"},
}
ANN = ("org", "ann")


@pytest.fixture
async def other(database: str) -> AsyncIterator[App]:
    async with quick_app(database) as opened:
        yield opened


@pytest.fixture
async def there(other: App) -> AsyncIterator[Served]:
    async with serving(other) as running:
        yield running


@asynccontextmanager
async def connected(
    here: Served, there: Served, query: str = "", user: str = "ann"
) -> AsyncIterator[tuple[Stream, Callable[..., Any]]]:
    """A connection to one replica, and `post`, which goes to the other."""
    async with here.client(user) as client, there.client(user) as elsewhere:
        async with client.connected(query) as (stream, connection_id):

            async def post(name: str, body: dict[str, Any]) -> Any:
                return await elsewhere.post(name, connection_id, body)

            yield stream, post


async def stored(conn: Connection) -> int:
    count: int = await one(conn, "select count(*) from queue_service.gateway_requests")
    return count


class TestAPostThatComesToAnotherReplica:
    async def test_watches_after_the_cursor_it_is_given(self, app: App, served: Served, there: Served) -> None:
        await app.events.append_many("ann/a", [("delta", n) for n in range(4)])
        async with connected(served, there) as (stream, post):
            answer = await post("watch", {"stream": "ann/a", "cursor": 2})
            assert (answer.status_code, answer.json()) == (200, {"stream": "ann/a", "head": 4})
            assert [(await stream.event())["seq"] for _ in range(2)] == [3, 4]

    async def test_watches_no_longer(self, app: App, served: Served, there: Served) -> None:
        async with connected(served, there, "?stream=ann/a&stream=ann/b") as (stream, post):
            answer = await post("unwatch", {"stream": "ann/a"})
            assert (answer.status_code, answer.json()) == (200, {"stream": "ann/a"})
            await app.events.append("ann/a", "delta")
            await app.events.append("ann/b", "delta")
            assert (await stream.event())["stream"] == "ann/b"

    async def test_switches_to_one_stream_and_no_other(self, app: App, served: Served, there: Served) -> None:
        async with connected(served, there, "?stream=ann/a&stream=ann/b") as (stream, post):
            answer = await post("switch", {"stream": "ann/c"})
            assert (answer.status_code, answer.json()) == (200, {"stream": "ann/c", "head": 0})
            for each in ("ann/a", "ann/b", "ann/c"):
                await app.events.append(each, "delta")
            assert (await stream.event())["stream"] == "ann/c"

    async def test_goes_on_after_a_reconnect_where_the_client_says(
        self, app: App, served: Served, there: Served
    ) -> None:
        for each in ("ann/a", "ann/b", "ann/c"):
            await app.events.append_many(each, [("delta", n) for n in range(3)])
        async with connected(served, there, "?stream=ann/c&cursor=3") as (stream, post):
            answer = await post("reconnect", {"streams": {"ann/a": 2, "ann/b": 1}})
            assert answer.json() == {"streams": {"ann/a": 3, "ann/b": 3}}
            got = {(event["stream"], event["seq"]) for event in [await stream.event() for _ in range(3)]}
            assert got == {("ann/a", 3), ("ann/b", 2), ("ann/b", 3)}
            await app.events.append("ann/c", "delta")
            await app.events.append("ann/a", "delta")
            assert (await stream.event())["stream"] == "ann/a"

    async def test_leaves_nothing_behind(self, served: Served, there: Served, conn: Connection) -> None:
        async with connected(served, there) as (_, post):
            for name, body in BODIES.items():
                assert (await post(name, body)).status_code == 200
        assert await stored(conn) == 0

    async def test_is_found_by_polling_where_no_notice_is_heard(
        self, app: App, other: App, served: Served, there: Served
    ) -> None:
        for each in (app, other):
            each.opened.services.stop(NOTICES_SERVICE)
        async with connected(served, there) as (stream, post):
            assert (await post("watch", {"stream": "ann/a"})).status_code == 200
            await app.events.append("ann/a", "delta")
            assert (await stream.event())["seq"] == 1

    async def test_is_for_the_eyes_of_its_owner_only(self, app: App, served: Served, there: Served) -> None:
        async with served.client("ann") as ann, there.client("bob") as bob, ann.connected() as (stream, connection_id):
            answer = await bob.post("watch", connection_id, {"stream": "bob/a"})
            assert (answer.status_code, answer.json()["field"]) == (404, "X-Connection-ID")
            answer = await bob.post("watch", connection_id, {"stream": "shared"})
            assert (answer.status_code, answer.json()["field"]) == (404, "X-Connection-ID")
            await app.events.append("shared", "delta")
            await ann.post("watch", connection_id, {"stream": "ann/a"})
            await app.events.append("ann/a", "delta")
            assert (await stream.event())["stream"] == "ann/a"

    async def test_about_a_stream_of_somebody_else_is_404(self, served: Served, there: Served) -> None:
        async with connected(served, there) as (_, post):
            answer = await post("watch", {"stream": "bob/a"})
        assert (answer.status_code, answer.json()["field"]) == (404, "stream")

    @pytest.mark.parametrize("name", BODIES)
    async def test_of_a_connection_that_is_gone_is_404(
        self, served: Served, there: Served, name: str, conn: Connection
    ) -> None:
        async with served.client() as ann, there.client() as elsewhere:
            async with ann.connected() as (_, connection_id):
                pass
            await eventually(lambda: served.gateway.connections == 0)
            answer = await elsewhere.post(name, connection_id, BODIES[name])
        assert (answer.status_code, answer.json()["field"]) == (404, "X-Connection-ID")
        assert await stored(conn) == 0

    async def test_many_at_once_are_all_carried_out(
        self, app: App, served: Served, there: Served, conn: Connection
    ) -> None:
        async with served.client() as ann, there.client() as elsewhere:

            async def come_back(number: int) -> int:
                async with ann.connected() as (stream, connection_id):
                    answer = await elsewhere.post("reconnect", connection_id, {"streams": {f"ann/{number % 10}": 0}})
                    assert (await stream.event())["stream"] == f"ann/{number % 10}"
                    return int(answer.status_code)

            for number in range(10):
                await app.events.append(f"ann/{number}", "delta")
            assert set(await asyncio.gather(*(come_back(number) for number in range(90)))) == {200}
        assert await stored(conn) == 0


class TestAReplicaThatIsGone:
    async def test_is_not_waited_for_where_it_left(self, served: Served, other: App, conn: Connection) -> None:
        async with serving(other) as there, there.client() as ann, ann.connected() as (_, connection_id):
            pass
        assert await one(conn, "select count(*) from queue_service.gateways") == 1
        async with served.client() as ann:
            answer = await ann.post("watch", connection_id, {"stream": "ann/a"})
        assert (answer.status_code, answer.json()["field"]) == (404, "X-Connection-ID")
        assert await stored(conn) == 0

    async def test_answers_as_it_leaves_what_it_was_asked(self, app: App, other: App) -> None:
        async with app.opened.replica.joined():
            async with other.opened.replica.joined():
                other.opened.services.stop(REQUESTS_SERVICE)
                connection_id = other.opened.replica.new_connection_id()
                asking = asyncio.create_task(app.opened.replica.change(connection_id, ANN, Change("only", {})))
                await eventually(lambda: stored_in(app))
            assert await asking is Done.GONE

    async def test_counts_as_gone_when_its_lease_has_lapsed(
        self, app: App, served: Served, there: Served, conn: Connection
    ) -> None:
        lapse = "update queue_service.gateways set expires_at = clock_timestamp() where id = %s"
        beating = service(app.opened.services, LEASE_SERVICE).task
        app.opened.services.stop(LEASE_SERVICE)
        await eventually(lambda: beating is not None and beating.done())
        async with connected(served, there) as (_, post):
            await conn.execute(lapse.encode(), [app.opened.replica.id])
            assert (await post("watch", {"stream": "ann/a"})).status_code == 404
            await app.opened.replica._beat()
            assert (await post("watch", {"stream": "ann/a"})).status_code == 200

    @pytest.mark.usefixtures("served")
    async def test_is_forgotten_by_those_that_live(self, app: App, conn: Connection) -> None:
        await conn.execute(
            "insert into queue_service.gateways (id, expires_at, revision) "
            "values ('dead', clock_timestamp() - interval '2 minutes', '9999'), "
            "('silent', clock_timestamp() - interval '10 s', '9999')"
        )
        await app.opened.replica._beat()
        left = {name for (name,) in await rows(conn, "select id from queue_service.gateways")}
        assert left == {"silent", app.opened.replica.id}

    async def test_enters_itself_again_where_its_row_is_lost(
        self, database: str, conn: Connection, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(replicas, "BEAT", timedelta(milliseconds=20))
        async with quick_app(database) as app, serving(app):
            await conn.execute("truncate queue_service.gateways")
            await eventually(lambda: one(conn, "select count(*) from queue_service.gateways"))


class TestAReplicaThatDoesNotAnswer:
    async def test_costs_its_asker_a_503_in_time_and_leaves_nothing(
        self, app: App, other: App, served: Served, there: Served, conn: Connection, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(replicas, "PATIENCE", 0.2)
        app.opened.services.stop(REQUESTS_SERVICE)
        async with connected(served, there) as (_, post):
            async with asyncio.timeout(5):
                answer = await post("watch", {"stream": "ann/a"})
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert other.opened.replica._waiting == {}
        assert await stored(conn) == 1
        await conn.execute("update queue_service.gateway_requests set expires_at = expires_at - interval '10 s'")
        await other.opened.replica._beat()
        assert await stored(conn) == 0

    async def test_does_not_carry_out_late_what_its_asker_has_given_up(
        self, app: App, served: Served, there: Served, conn: Connection, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(replicas, "PATIENCE", 0.2)
        app.opened.services.stop(REQUESTS_SERVICE)
        async with connected(served, there) as (_, post):
            assert (await post("watch", {"stream": "ann/a"})).status_code == 503
            await conn.execute("update queue_service.gateway_requests set expires_at = clock_timestamp()")
            app.opened.services.ensure(REQUESTS_SERVICE, app.opened.replica._serve)
            monkeypatch.setattr(replicas, "PATIENCE", 10.0)
            assert (await post("watch", {"stream": "ann/b"})).status_code == 200
            (connection,) = served.gateway._connections
            assert connection.streams == ["ann/b"]

    def test_waits_for_longer_than_a_request_may_be_carried_out(self) -> None:
        look = replicas.QUIET_POLL + replicas.WAITING_POLL
        assert look < replicas.LIFETIME.total_seconds() < replicas.PATIENCE

    async def test_is_asked_by_so_many_at_once_and_no_more(
        self, served: Served, there: Served, conn: Connection, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(replicas, "MAX_WAITING", 0)
        async with connected(served, there) as (_, post):
            answer = await post("watch", {"stream": "ann/a"})
        assert (answer.status_code, await stored(conn)) == (503, 0)

    @pytest.mark.usefixtures("served")
    async def test_is_told_apart_from_one_that_cannot_do_it(
        self, app: App, other: App, caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken(_change: Change) -> None:
            raise RuntimeError("no")

        holder, asker = app.opened.replica, other.opened.replica
        async with asker.joined():
            with holder.holding(holder.new_connection_id(), ANN, broken):
                (connection_id,) = holder._connections
                assert await asker.change(connection_id, ANN, Change("only", {})) is Done.FAILED
        assert "a connection could not be changed" in caplog.text


class TestARequestThatIsBroken:
    @pytest.mark.parametrize("body", ["", "{}", "[1]", '{"connection": "x"}', "\x01"])
    async def test_is_so_for_its_asker_only(
        self,
        app: App,
        served: Served,
        there: Served,
        conn: Connection,
        caplog: pytest.LogCaptureFixture,
        body: str,
    ) -> None:
        async with connected(served, there) as (_, post):
            await conn.execute(
                "insert into queue_service.gateway_requests (id, gateway, expires_at, body) "
                "values ('later.1', %s, clock_timestamp() + interval '1 minute', %s)",
                [app.opened.replica.id, body],
            )
            assert (await post("watch", {"stream": "ann/a"})).status_code == 200
            answers = await rows(conn, "select id, answer from queue_service.gateway_requests")
            assert answers == [("later.1", "failed")]
        assert "another replica asks for what this one does not know" in caplog.text


class TestItsServices:
    async def test_are_shown_and_a_failing_one_degrades_the_replica(self, ann: Client, conn: Connection) -> None:
        health = (await ann.get("/healthz")).json()
        assert health["services"].keys() >= {LEASE_SERVICE, NOTICES_SERVICE, REQUESTS_SERVICE}
        await conn.execute("alter table queue_service.gateway_requests rename to hidden")

        async def has(status: str) -> bool:
            return (await ann.get("/healthz")).text.startswith(f'{{"status":"{status}"')

        await eventually(lambda: has("degraded"))
        await conn.execute("alter table queue_service.hidden rename to gateway_requests")
        await eventually(lambda: has("ok"))

    async def test_end_with_the_last_gateway_of_an_app(self, app: App, conn: Connection) -> None:
        replica: Replica = app.opened.replica
        async with replica.joined():
            async with replica.joined():
                pass
            assert service(app.opened.services, REQUESTS_SERVICE)
            assert await one(conn, "select count(*) from queue_service.gateways") == 1
        # (What listens for all lingers for a while.)
        assert {each.name for each in app.opened.services} <= {"listener"}
        assert await one(conn, "select count(*) from queue_service.gateways") == 0

    async def test_are_not_begun_where_the_others_cannot_know_of_it(self, app: App, conn: Connection) -> None:
        async with refusing(conn, "gateways", "true"):
            with pytest.raises(Exception, match="refused"):
                async with app.opened.replica.joined():
                    pass
        assert [each.name for each in app.opened.services] == []


def stored_in(app: App) -> bool:
    """Whether this App waits for another replica, and its request is stored."""
    return bool(app.opened.replica._waiting) and not app.opened.replica._asking._under_way
