"""So that `pytest` finds the project's modules from any folder, and that it means the same on
every machine.

The contracts are pinned on the CPU, also where there is a GPU: there they hold bit for bit.
`python -m pytest --cuda` runs the tests that need a GPU instead, and only those.
"""

import os
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

HANDLERS = {
    number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
}


@pytest.fixture(autouse=True)
def signals_end_pytest_and_no_run():
    """A run takes these signals for itself, be it in a test or in the fixtures before it."""
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)
    yield
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def policy():
    """The tiny model, for tests that leave it as it is."""
    import engine

    return engine.load_policy("tiny", "cpu")


def pytest_addoption(parser):
    parser.addoption(
        "--cuda", action="store_true", help="run only the tests that need a GPU, on this machine's"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a GPU; run by --cuda")
    if not config.getoption("--cuda"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks; subprocesses inherit it


def pytest_collection_modifyitems(config, items):
    on_gpu = config.getoption("--cuda")
    reason = "runs on the CPU" if on_gpu else "needs a GPU and --cuda"
    for item in items:
        if on_gpu != bool(item.get_closest_marker("cuda")):
            item.add_marker(pytest.mark.skip(reason=reason))
