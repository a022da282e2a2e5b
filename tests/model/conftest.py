"""Lets the tests of model and runner share modules: the directory is not a package."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    torch.set_num_threads(1)
