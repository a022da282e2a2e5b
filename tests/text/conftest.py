"""Fixtures of the tests of text, which share modules: the directory is not a package."""

import sys
from pathlib import Path

import pytest

from worker_orcd.gguf.reader import GGUFFile
from worker_orcd.text.tokenizer import Tokenizer, load_tokenizer

sys.path.insert(0, str(Path(__file__).parent))

from text_vocabularies import Vocabularies


@pytest.fixture(scope="session")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> Vocabularies:
    return Vocabularies(tmp_path_factory.mktemp("vocab"))


@pytest.fixture(scope="session")
def smollm2(demo_model: Path) -> Tokenizer:
    with GGUFFile(demo_model) as file:
        return load_tokenizer(file.metadata)
