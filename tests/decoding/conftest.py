"""Targets that the tests of the loop share."""

import pytest
from scripted import TARGETS
from toys import tiny_target

from decoding.target import Target


@pytest.fixture(scope="module", params=TARGETS)
def target(request) -> Target:
    return tiny_target(**TARGETS[request.param])


@pytest.fixture(scope="module")
def llama() -> Target:
    """Its greedy answers hardly repeat a token."""
    return tiny_target(seed=6, tied=False)
