"""Fixtures of the whole suite."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Two cores are enough for everybody only if nobody takes both; set before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in the suite may depend on a hub being there

# A shell that runs the tests in the background has them ignore Ctrl-C, and so would what they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine is no reason to fail: neither an example nor making one has a time limit.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """SmolLM2-135M-Instruct Q4_1, from the user's cache (`make test` puts it there before pytest starts)."""
    from worker_orcd import hub

    return hub.resolve("demo")


@pytest.fixture(scope="session")
def data_directory() -> Path:
    """`tests/data`."""
    return DATA


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Settings of whoever runs the tests do not reach the code under test."""
    for name in [name for name in os.environ if name.startswith("WORKER_ORCD_")]:
        monkeypatch.delenv(name)
    yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that use the real model say so, whether or not their author remembered the marker."""
    for item in items:
        if "demo_model" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.model)
