"""What the tests of the native engine share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from native.compiling import Compiled


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiled]:
    """Objects and programs in C++, each made once."""
    made = Compiled(tmp_path_factory.mktemp("compiled"))
    yield made
    made.close()
