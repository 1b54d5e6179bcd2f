"""A short run of faults/fuzz.py: the same damaged files of each kind every time."""
import shutil
import sys

import pytest
from faults import fuzz


@pytest.mark.skipif(sys.platform != "linux", reason="it forks, and looks at /proc")
@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_damaged_files_are_refused_or_read(valid_files, name):
    shutil.copytree(valid_files, ".", dirs_exist_ok=True)
    found = list(fuzz.fuzz(name, range(25), seed=0))
    assert len(found) == 25 and {one.verdict for one in found} <= {"read", "refused"}, fuzz.report(name, found, 0)
