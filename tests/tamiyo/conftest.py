"""Lets the tests here import their helpers: pytest's importlib mode leaves this folder off the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
