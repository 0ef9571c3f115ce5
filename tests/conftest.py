import atexit
import os
import pathlib
import shutil
import tempfile

# One thread for each of two workers, and for what they start: two times two threads on two cores spin against each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

# Folders that are exported once for all workers, which have this variable from the process that starts them.
if "VITCOP_TEST_FOLDERS" not in os.environ:
    os.environ["VITCOP_TEST_FOLDERS"] = tempfile.mkdtemp(prefix="vitcop-test-")
    atexit.register(shutil.rmtree, os.environ["VITCOP_TEST_FOLDERS"], ignore_errors=True)

# Tests compile what they say, and find nothing of earlier runs.
os.environ["VITCOP_CACHE"] = "off"

import functools
import gc

import onnxscript
import pytest
import support
import torch
from hypothesis import HealthCheck, settings

# Same examples in every run; a deadline would measure the machine, not the code.
settings.register_profile(
    "suite", derandomize=True, deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
# Where each node of a trace was made, which nothing here reads: a seventh of the time of an export.
if hasattr(torch.fx.config, "do_not_emit_stack_traces"):
    torch.fx.config.do_not_emit_stack_traces = True
# For every file that torch writes, it asks each of a thousand functions for its domain, which is parsed from its source.
_traced = onnxscript.TracedOnnxFunction
_traced.function_ir = property(functools.cache(_traced.function_ir.fget))
# Files that take longest come first, so that no worker is left with one of them at the end.
LONGEST = (
    "test_stream", "test_generate", "test_export", "test_turns", "test_golden_e2e", "test_generate_programs", "test_meta",
    "test_cli_export", "test_programs", "test_isolation", "test_cli_bench", "test_baselines", "test_programs_on_caches",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--support-table", type=pathlib.Path, help="where to write the table of what tests cover")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--support-table") is not None:
        support.write(items, config.getoption("--support-table"))
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


def pytest_collection_finish() -> None:
    """The collector would walk torch's modules and graphs again and again: it comes seldom, and leaves out what stays."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
