"""What every test may use: a printed seed, the same in every run of a test unless another is asked for."""

import gc
import os
import random
import zlib

import hypothesis
import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: a process of pytest has one core

GIVEN = os.environ.get("MASKALIGN_TEST_SEED")
# A change must not be refused for numbers that it was not drawn to meet: new ones are for who looks for trouble.
hypothesis.settings.register_profile("repeatable", derandomize=True)
if GIVEN is None:
    hypothesis.settings.load_profile("repeatable")


def pytest_collection_finish():
    """Take what is imported by now out of garbage collection, which would look at a million objects every time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def seed(request):
    """A seed that is printed with a failing test: by default one of the test's own, the same in every run.

    MASKALIGN_TEST_SEED=7 sets it for all tests; MASKALIGN_TEST_SEED=random draws another for every test.
    """
    if GIVEN is None:
        value = zlib.crc32(request.node.nodeid.encode()) % 2**31
    else:
        value = random.randrange(2**31) if GIVEN == "random" else int(GIVEN)
    print(f"MASKALIGN_TEST_SEED={value}  # seed of {request.node.nodeid}")
    return value


@pytest.fixture
def one_thread():
    """Tiny tensors: threads would only wait for each other."""
    import torch  # not needed by most tests of the command line

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub, which the client library asks with a cache of its own and without patience."""
    from tests.checkpoints.hub_server import serve

    with serve() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", str(tmp_path / "cache"), raising=False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True, raising=False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits between its attempts
        yield served
