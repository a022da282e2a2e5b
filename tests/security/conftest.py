"""Lends these tests what the tests of the packages are made of: they look at the worker as a whole."""

import importlib.util
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
for shared in ("gguf", "model", "text", "worker"):
    sys.path.insert(0, str(TESTS / shared))


def _conftest(name: str) -> object:
    spec = importlib.util.spec_from_file_location(f"conftest_of_{name}", TESTS / name / "conftest.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_server, _worker = _conftest("server"), _conftest("worker")
world = _server.world
tokenizer = _server.tokenizer
chat_template = _server.chat_template
events_of = _server.events_of
eventually = _server.eventually
kernels = _worker.kernels
tiny_model = _worker.tiny_model
config = _worker.config
start = _worker.start
