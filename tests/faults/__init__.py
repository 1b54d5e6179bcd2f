"""Whatever happens to a process or a disk, the same command typed again ends with the files of an unbroken run.

    python -m tests.faults --rounds 100                                 # every stage, every fault; hours
    python -m tests.faults --rounds 20 --stage train --fault kill       # some of it
    python -m tests.faults --every --stage preprocess --fault full      # at each file operation in turn

The scripts themselves run, on little text, as processes: broken one to three times, then once in peace, and then every
file is compared with that of the reference, a run that nothing broke. tests/test_faults.py is a sample of it.
"""
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]      # conftest and the scripts, as pytest finds them
