"""Settings of all tests."""

import torch
from hypothesis import settings

# A wall-time limit for each example would be a test of the machine.
settings.register_profile("esper", deadline=None)
settings.load_profile("esper")
torch.set_num_threads(1)
