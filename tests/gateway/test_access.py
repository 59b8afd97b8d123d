"""Who may do what."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import httpx2
import pytest
from starlette.requests import Request

from queue_service import App
from queue_service.errors import ConfigError
from queue_service.gateway import Limits, Principal, Token, access, loopback
from tests.gateway.served import Client, Served, named, serving
from tests.support import eventually

ACME, OTHER = {"x-organization": "acme"}, {"x-organization": "other"}
TOKEN = "correct-horse-battery-staple"  # noqa: S105


def by_organization(request: Request) -> Principal:
    """Everybody is called Ann."""
    return Principal("ann", lambda _stream: True, organization_id=request.headers.get("x-organization"))


class TestAStreamOfSomebodyElse:
    @pytest.mark.parametrize(
        ("query", "headers"),
        [
            ("?stream=ann/a", {}),
            ("?cursor=ann/a:1", {}),
            ("?stream=bob/a&stream=ann/a", {}),
            ("", {"last-event-id": "ann/a:0"}),
            ("?stream=bob/a", {"last-event-id": "ann/a:0"}),
        ],
    )
    async def test_is_404_on_connecting_and_on_replay(
        self, app: App, bob: Client, query: str, headers: dict[str, str]
    ) -> None:
        await app.events.append("ann/a", "delta", "secret")
        answer = await bob.get(f"/api/chat/events{query}", **headers)
        assert answer.status_code == 404
        assert "secret" not in answer.text

    async def test_looks_like_one_that_does_not_exist(self, app: App, bob: Client) -> None:
        await app.events.append("ann/a", "delta", "secret")
        there, missing = [await bob.get(f"/api/sessions/ann/{name}/events") for name in "ab"]
        assert there.text.replace("ann/a", "ann/b") == missing.text

    async def test_is_asked_about_each_time(self, app: App) -> None:
        asked: list[str] = []

        def fickle(_request: Request) -> Principal:
            def owns(stream: str) -> bool:
                asked.append(stream)
                return len(asked) < 2

            return Principal("ann", owns)

        async with serving(app, authorize=fickle) as served, served.client() as client:
            assert (await client.get("/api/sessions/a/state")).status_code == 200
            assert (await client.get("/api/sessions/a/state")).status_code == 404

    async def test_may_be_found_out_by_asking_elsewhere(self, app: App) -> None:
        async def slowly(_request: Request) -> Principal:
            async def owns(stream: str) -> bool:
                await asyncio.sleep(0)
                return stream == "mine"

            return Principal("ann", owns)

        async with serving(app, authorize=slowly) as served, served.client() as client:
            assert (await client.get("/api/sessions/mine/state")).status_code == 200
            assert (await client.get("/api/sessions/other/state")).status_code == 404


async def test_nobody_is_401_everywhere(ann: Client) -> None:
    for path in ("/api/chat/events", "/api/sessions/ann/a/events", "/api/sessions/ann/a/state"):
        assert (await ann.http.get(path)).status_code == 401


async def test_a_hook_that_raises_refuses_and_the_server_goes_on(app: App) -> None:
    def broken(request: Request) -> Principal | None:
        if "x-break" in request.headers:
            raise RuntimeError("the user service is down")
        return named(request)

    async with serving(app, authorize=broken) as served, served.client() as client:
        assert (await client.get("/api/chat/events", **{"x-break": "1"})).status_code == 500
        async with client.connected() as (_, connection_id):
            answer = await client.post("interrupt", connection_id, {"stream": "ann/a"}, **{"x-break": "1"})
            assert answer.status_code == 500
            assert (await client.post("interrupt", connection_id, {"stream": "ann/a"})).status_code == 200


@pytest.mark.parametrize("hook", ["authorize", "owns"])
async def test_a_hook_that_does_not_answer_refuses_in_time(
    app: App, monkeypatch: pytest.MonkeyPatch, hook: str
) -> None:
    monkeypatch.setattr(access, "HOOK_DEADLINE", 0.05)

    async def never(*_: object) -> bool:
        return await asyncio.Event().wait()

    async def at_once(_request: Request) -> Principal:
        return Principal("ann", never)

    async with serving(app, authorize=never if hook == "authorize" else at_once) as served, served.client() as client:
        answer = await client.get("/api/sessions/ann/a/state")
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1


class TestAnOrigin:
    async def test_of_the_gateway_itself_may(self, served: Served, ann: Client) -> None:
        assert (await ann.get("/api/sessions/ann/a/state", origin=served.address)).status_code == 200

    @pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1", "http://localhost"])
    async def test_elsewhere_may_not(self, ann: Client, origin: str) -> None:
        assert (await ann.get("/api/sessions/ann/a/state", origin=origin)).status_code == 403
        assert (await ann.get("/api/chat/events", origin=origin)).status_code == 403
        async with ann.connected() as (_, connection_id):
            answer = await ann.post("mode", connection_id, {"stream": "ann/a", "mode": "x"}, origin=origin)
            assert answer.status_code == 403

    async def test_that_is_named_may(self, app: App) -> None:
        async with serving(app, origins=["https://app.example"]) as served, served.client() as client:
            assert (await client.get("/api/sessions/ann/a/state", origin="https://app.example")).status_code == 200
            assert (await client.get("/api/sessions/ann/a/state", origin="https://evil.example")).status_code == 403

    async def test_that_is_named_is_let_through_by_its_browser(self, app: App) -> None:
        async with serving(app, origins=["https://app.example"]) as served, served.client() as client:

            async def asked(origin: str) -> httpx2.Response:
                asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-connection-id"}
                return await client.http.options("/api/chat/send", headers={"Origin": origin, **asks})

            named, other = await asked("https://app.example"), await asked("https://evil.example")
            assert (named.status_code, named.headers["access-control-allow-origin"]) == (200, "https://app.example")
            assert "x-connection-id" in named.headers["access-control-allow-headers"].lower()
            assert "access-control-allow-origin" not in other.headers
            answer = await client.get("/api/sessions/ann/a/state", origin="https://app.example")
            assert answer.headers["access-control-allow-origin"] == "https://app.example"
            events = {**client.headers, "Origin": "https://app.example"}
            async with client.http.stream("GET", "/api/chat/events", headers=events) as response:
                assert response.headers["access-control-allow-origin"] == "https://app.example"


class TestLoopback:
    async def test_lets_this_machine_in_and_no_name_that_was_pointed_at_it(self, app: App) -> None:
        async with serving(app, authorize=loopback) as served, served.client() as client:
            port = served.address.rpartition(":")[2]
            for host in (f"127.0.0.1:{port}", f"localhost:{port}", "[::1]", "127.0.0.1"):
                assert (await client.get("/api/sessions/a/state", host=host)).status_code == 200
            for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "", "10.0.0.1"):
                assert (await client.get("/api/sessions/a/state", host=host)).status_code == 401

    @pytest.mark.parametrize("client", [("10.1.2.3", 5), ("2001:db8::1", 5), None])
    def test_lets_no_other_machine_in(self, client: Any) -> None:
        request = Request({"type": "http", "headers": [(b"host", b"localhost")], "client": client})
        assert loopback(request) is None


class TestAToken:
    async def test_lets_in_who_knows_it(self, app: App) -> None:
        async with serving(app, authorize=Token(TOKEN)) as served, httpx2.AsyncClient(base_url=served.address) as http:
            path = "/api/sessions/a/state"
            assert (await http.get(path)).status_code == 401
            assert (await http.get(path, headers={"authorization": "Bearer wrong"})).status_code == 401
            assert (await http.get(path, headers={"authorization": f"Basic {TOKEN}"})).status_code == 401
            assert (await http.get(f"{path}?token={TOKEN}")).status_code == 401
            assert (await http.get(path, headers={"authorization": f"Bearer {TOKEN}"})).status_code == 200

    async def test_becomes_a_cookie_that_no_script_reads_and_no_other_site_sends(self, app: App) -> None:
        async with serving(app, authorize=Token(TOKEN)) as served, httpx2.AsyncClient(base_url=served.address) as http:
            refused = await http.post("/api/login", json={"token": "wrong"})
            assert (refused.status_code, refused.json()["field"]) == (401, "token")
            answer = await http.post("/api/login", json={"token": TOKEN})
            assert answer.status_code == 204
            cookie = answer.headers["set-cookie"].lower()
            assert "httponly" in cookie
            assert "samesite=strict" in cookie
            assert (await http.get("/api/sessions/a/state")).status_code == 200

    def test_that_is_easily_guessed_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="16 characters"):
            Token("secret")

    @pytest.mark.parametrize("token", ["geheim-für-alle-und-dich", f" {TOKEN}", f"{TOKEN}\n"])
    def test_that_headers_cannot_carry_is_refused(self, token: str) -> None:
        with pytest.raises(ConfigError, match="ASCII"):
            Token(token)

    async def test_is_in_no_log_line(self, app: App, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG)
        async with serving(app, authorize=Token(TOKEN)) as served, httpx2.AsyncClient(base_url=served.address) as http:
            await http.post("/api/login", json={"token": TOKEN})
            await http.get("/api/sessions/a/state", headers={"authorization": f"Bearer {TOKEN}"})
            await http.get("/api/sessions/a/state", headers={"authorization": f"Bearer {TOKEN}-and-more"})
        ours = [record for record in caplog.records if record.name.partition(".")[0] in {"queue_service", "uvicorn"}]
        assert ours
        assert all(TOKEN not in record.getMessage() and TOKEN not in str(vars(record)) for record in ours)


async def test_a_principal_has_so_many_connections_and_no_more(app: App) -> None:
    async with serving(app, limits=Limits(connections=2)) as served:
        async with served.client() as ann, served.client("bob") as bob:
            async with ann.connected(), ann.connected():
                refused = await ann.get("/api/chat/events")
                assert refused.status_code == 429
                assert int(refused.headers["retry-after"]) >= 1
                async with bob.connected():
                    pass
            await eventually(lambda: served.gateway.connections == 0)
            async with ann.connected():
                pass


class TestOneIdInTwoOrganizations:
    """Two persons, who share nothing."""

    async def test_has_connections_for_each(self, app: App) -> None:
        async with serving(app, authorize=by_organization, limits=Limits(connections=1)) as served:
            async with served.client() as client, client.connected(headers=ACME) as (_, of_acme):
                assert (await client.get("/api/chat/events", **ACME)).status_code == 429
                async with client.connected(headers=OTHER) as (_, of_other):
                    assert (await client.get("/api/chat/events", **OTHER)).status_code == 429
                    assert (await client.post("watch", of_acme, {"stream": "a"}, **ACME)).status_code == 200
                    for connection_id, headers in ((of_acme, OTHER), (of_other, ACME), (of_acme, {})):
                        answer = await client.post("watch", connection_id, {"stream": "a"}, **headers)
                        assert (answer.status_code, answer.json()["field"]) == (404, "X-Connection-ID")

    async def test_has_connections_for_each_on_every_replica(self, app: App, database: str) -> None:
        async with App(database) as other, serving(app, authorize=by_organization) as here:
            async with serving(other, authorize=by_organization) as there, here.client() as client:
                async with there.client() as elsewhere, client.connected(headers=ACME) as (_, of_acme):
                    assert (await elsewhere.post("watch", of_acme, {"stream": "a"}, **OTHER)).status_code == 404
                    assert (await elsewhere.post("watch", of_acme, {"stream": "a"}, **ACME)).status_code == 200

    async def test_has_a_pace_for_each(self, app: App) -> None:
        async with serving(app, authorize=by_organization, limits=Limits(messages=0.01)) as served:
            async with served.client() as client:
                sent = [
                    await client.post("send", None, {"stream": "a", "client_message_id": str(n), "body": {}}, **headers)
                    for n, headers in enumerate((ACME, ACME, OTHER, OTHER, {}))
                ]
        assert [answer.status_code for answer in sent] == [202, 429, 202, 429, 202]


@pytest.mark.parametrize("limits", [{"connections": 0}, {"messages": 0}, {"messages": -1}])
def test_limits_that_would_let_nobody_in_are_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="positive"):
        Limits(**limits)


async def test_what_cannot_be_meant_is_refused_when_it_is_made(app: App) -> None:
    for options in ({"max_replay_gap": 0}, {"heartbeat": 0}, {"stall": -1}, {"retry": (3, 1)}):
        with pytest.raises(ConfigError):
            async with serving(app, **options):
                pass
