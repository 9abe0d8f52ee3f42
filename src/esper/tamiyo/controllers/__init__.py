"""Controllers: never, random, periodic, heuristic, behind one interface."""
