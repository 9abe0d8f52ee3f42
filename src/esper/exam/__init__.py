"""Controls, statistics, and the comparisons that decide whether learning to grow is worth it."""
