"""The target that the contract is tried on."""

import pytest
from toys import tiny_target

from decoding.target import Target


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target(vocab=40, seed=0, tied=False)
