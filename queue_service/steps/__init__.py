"""Steps: named parts of a run, with their results."""
