"""Looking: the only way from a run store to anything that a person sees."""
