"""Learning and episodes: where a population and a controller meet."""
