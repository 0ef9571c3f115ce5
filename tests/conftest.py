import os

# One thread for each of two workers, and for what they start: two times two threads on two cores spin against each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, settings

# Same examples in every run; a deadline would measure the machine, not the code.
settings.register_profile(
    "suite", derandomize=True, deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
