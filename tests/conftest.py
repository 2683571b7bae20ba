"""What holds for every test."""

import gc

import pytest


def pytest_collection_finish(session: pytest.Session) -> None:
    """Ten thousand tests and their modules stay: looking through them for garbage again and again took a twentieth."""
    gc.collect()
    gc.freeze()
