"""Fixtures of the tests of collections."""

from collections.abc import Iterator

import pytest
from warm import Warm


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """Runs code in child processes that start at once."""
    with Warm(tmp_path_factory.mktemp("warm")) as started:
        yield started
