"""What every test may use: a printed seed, and few threads so that two tests can share the machine."""

import os
import random

import pytest


@pytest.fixture
def seed(request):
    """A seed that is printed with a failing test; MASKALIGN_TEST_SEED repeats a run."""
    value = int(os.environ.get("MASKALIGN_TEST_SEED", random.randrange(2**31)))
    print(f"MASKALIGN_TEST_SEED={value}  # seed of {request.node.nodeid}")
    return value
