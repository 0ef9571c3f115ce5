import pytest
import torch
from hypothesis import HealthCheck, settings

# Same examples in every run; a deadline would measure the machine, not the code.
settings.register_profile(
    "suite", derandomize=True, deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")
torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
