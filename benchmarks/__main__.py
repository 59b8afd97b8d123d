"""Measure: `scripts/bench`, or `python -m benchmarks [--database-url URL] [--runs N] [NAME…]`.

Each scenario is run several times; the median is shown with the range. The database is an embedded cluster in a temporary
directory unless a URL is given, with its default settings: nothing about durability is changed.
"""

from benchmarks import harness, queue, turns
from queue_service import App


def build(conninfo: str) -> App:
    app = App(conninfo)
    queue.add_tasks(app)
    return app


if __name__ == "__main__":
    assert turns.CALLERS, "importing it lists its scenarios"
    harness.run(build, __doc__ or "")
