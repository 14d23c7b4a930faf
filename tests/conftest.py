"""What the tests of every room share. Nothing here touches the network."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tiny tensors gain nothing from threads, and no result should depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of trained models and text that some machines have."""
    folder = ROOT / os.environ.get("DRAFTSMITH_SHARED", "../shared")
    if not (folder / "models").is_dir():
        pytest.skip(f"no models in {folder.resolve()}; set DRAFTSMITH_SHARED to where they are")
    return folder.resolve()
