"""How a claimed run's handler is executed: where, and what becomes of the run."""
