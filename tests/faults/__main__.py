"""The long form: many rounds, and a line for each stage and fault."""
import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from . import __doc__ as about
from .faults import AT_OPERATIONS, FAULTS, ONCE, WITH_MOUNT, Trial, attempt, can_mount
from .stages import Stages

STAGES = ("download", "vocabulary", "preprocess", "train", "train_seldom")


def main() -> int:
    asked = arguments()
    signal.signal(signal.SIGINT, signal.default_int_handler)    # else the scripts inherit that it is ignored
    work = Path(tempfile.mkdtemp(prefix="faults-"))
    stages, failed = Stages(work), 0
    for name in asked.stage:
        for fault in asked.fault:
            if fault in WITH_MOUNT and not can_mount():
                print(f"{name:12}  {fault:11}  skipped: this process cannot mount file systems")
            elif not asked.every or fault in AT_OPERATIONS:
                failed += rounds(stages, name, fault, asked)
    if not failed and not asked.keep:
        shutil.rmtree(work)
    return min(failed, 1)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=about,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--fault", nargs="+", choices=FAULTS, default=FAULTS)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--every", action="store_true", help="break at each file operation in turn, and only there")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of the one round to do")
    parser.add_argument("--keep", action="store_true", help="keep the folders of the rounds that went well too")
    return parser.parse_args()


def rounds(stages: Stages, name: str, fault: str, asked: argparse.Namespace) -> int:
    """Do the rounds of a stage and a fault, and print their line; returns how many failed."""
    stage, began, failed, broken, landed = stages[name], time.monotonic(), [], 0, 0
    numbers = sorted({number for number, _ in stage.operations}) if asked.every else range(asked.rounds)
    for i in numbers if asked.only is None else [asked.only]:
        chance = random.Random(f"{asked.seed} {name} {fault} {i}")
        breaks = 1 if asked.every or fault in ONCE else chance.choice((1, 1, 2, 3))
        trial = Trial(stage, stages.folder / f"{name}-{fault}-{i}", chance, i if asked.every else 0)
        try:
            landed += attempt(trial, FAULTS[fault], breaks)
            broken += breaks
        except Exception as error:      # whatever it is, the next round can do
            failed.append(i)
            every = " --every" * asked.every
            tell(trial, error, f"--stage {name} --fault {fault} --seed {asked.seed} --only {i}{every}")
        else:
            if not asked.keep:
                shutil.rmtree(trial.place)
    print(f"{name:12}  {fault:11}  {len(numbers) if asked.only is None else 1:4} rounds  {landed} of {broken} breaks "
          f"inside  {len(failed)} failed{': ' if failed else ''}{', '.join(map(str, failed))}  "
          f"{time.monotonic() - began:.0f} s", flush=True)
    return len(failed)


def tell(trial: Trial, error: Exception, again: str) -> None:
    """What happened in a failed round: the error, then each run with what it said."""
    print(f"FAILED: {type(error).__name__}: {str(error)[-1500:]}", *trial.story,
          f"its files: {trial.place}\nagain: python -m tests.faults {again}\n", sep="\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
