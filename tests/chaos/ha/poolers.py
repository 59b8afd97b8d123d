"""The pgbouncer of a node, or of all clients: transactions, and settings that let it come back soon with another primary."""

from __future__ import annotations

from pathlib import Path

# How soon it tries again after the server has refused it, and how long a statement waits for a server, in seconds. With its
# defaults of 15 and 120 a switchover would last so long: what waits is not told that the primary is elsewhere by now.
RETRY, WAIT = 0.25, 1.5


def write_pooler(home: Path, *, listens: tuple[str, int], server: tuple[str, int]) -> None:
    (home / "users").write_text('"postgres" "postgres"\n')
    (home / "pgbouncer.ini").write_text(
        f"[databases]\n* = host={server[0]} port={server[1]}\n"
        f"[pgbouncer]\nlisten_addr = {listens[0]}\nlisten_port = {listens[1]}\nunix_socket_dir =\n"
        f"auth_type = trust\nauth_file = {home / 'users'}\nlogfile = {home / 'pgbouncer.log'}\n"
        "pool_mode = transaction\ndefault_pool_size = 20\nmax_client_conn = 500\n"
        # A server that has gone is tried again soon, and one that says nothing is given up.
        f"server_login_retry = {RETRY}\nserver_connect_timeout = 1\nquery_wait_timeout = {WAIT}\n"
        "tcp_keepalive = 1\ntcp_keepidle = 5\ntcp_keepintvl = 1\ntcp_keepcnt = 3\ntcp_user_timeout = 5000\n"
    )
