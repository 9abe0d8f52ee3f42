"""Recording: the store of a run, its writer, and what deserves attention."""
