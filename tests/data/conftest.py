import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for `encoded`

SHARED_DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture
def shared_data():
    """Finds a file or folder of the real data next to the repository."""

    def find(name):
        path = SHARED_DATA / name
        if not path.exists():
            pytest.skip(f"real data is not there: {path}")
        return path

    return find
