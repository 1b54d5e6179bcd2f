"""Compare two or more runs: the settings that differ, and bits per byte after equal tokens and equal minutes.

    python -m tools.compare output output/old-1

Prints tables and, if matplotlib is installed, draws OUT_DIR/compare.png. Interpolates values between two evaluations.
"""
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))         # for python tools/compare.py
from tinyllm import checkpoint, cli, optional, runlog
from tinyllm.cli import UserError, escape_control_chars, format_command

# ---- settings -----------------------------------------------------------------------------------
folders = []                        # output folders of two or more runs
out_dir = "output"                  # folder for compare.png
# ---- end of settings ----------------------------------------------------------------------------

EXAMPLE = "python -m tools.compare output output/old-1"
Points = list[tuple[float, float]]
N_POINTS = 4                        # rows of a bpb table
MAX_WIDTH = 28                      # maximum characters of a table cell


@dataclass
class RunHistory:
    """Settings, speeds and validation bpb of a run, read from its logs."""
    folder: str
    settings: dict[str, Any]
    parameters: int
    by_tokens: Points
    by_minutes: Points
    speeds: list[float]

    @property
    def best(self) -> tuple[float, float]:
        """Lowest bpb, as (tokens, bpb)."""
        return min(self.by_tokens, key=lambda point: point[1])


def main() -> None:
    cfg, _ = cli.parse_settings(globals(), positional=("folders",))
    if len(cfg.folders) < 2:
        raise UserError(f"expected the output folders of two or more runs\n       {EXAMPLE}")
    runs = [read_run(folder) for folder in cfg.folders]
    print_table(["settings that differ", *cfg.folders], setting_rows(runs))
    if len({data_sha256(folder) for folder in cfg.folders}) > 1:
        print("\nnote: these runs have different text or vocabularies; their bits per byte are not comparable")
    print_table(["", *cfg.folders], summary_rows(runs))
    by_tokens = [run.by_tokens for run in runs]
    by_minutes = [run.by_minutes for run in runs]
    print_bpb_table("tokens", cfg.folders, by_tokens, decimals=0)
    print_bpb_table("minutes", cfg.folders, by_minutes, decimals=2)
    path = Path(cfg.out_dir) / "compare.png"
    labels = [f"{run.folder}, best {run.best[1]:.3f}" for run in runs]
    try:
        optional.load("plots").draw_comparison(path, labels, by_tokens, by_minutes)
        print(f"\nwrote {path}")
    except UserError as error:              # without matplotlib
        print(f"\n{error}")


# ---- the logs -----------------------------------------------------------------------------------

def read_run(folder: str) -> RunHistory:
    """Read the logs of a run. Raises UserError if they contain no evaluation."""
    path = Path(folder) / "log.jsonl"
    if not path.is_file():
        raise UserError(f"no {path}; expected the output folders of runs\n       {EXAMPLE}")
    header, *entries = runlog.read_log(path) or [{}]
    model_args = header.get("model_args", {})           # fine-tuning keeps the shape of the initial model
    if not isinstance(header.get("config"), dict) or not isinstance(model_args, dict):
        raise UserError(f"{path} is not a log of train.py, or its first line is damaged")
    evals = [entry for entry in entries if runlog.has_numbers(entry, "iter", "tokens", "bpb")]
    if not evals:
        raise UserError(f"{path} has no evaluation\n"
                        f"       {format_command('train', out_dir=path.parent, init_from='resume')}")
    clock = runlog.read_clock(path.with_name("clock.jsonl"))
    minutes = {entry["iter"]: entry["seconds"] / 60 for entry in clock}
    return RunHistory(
        folder=folder,
        settings={**header["config"], **model_args},
        parameters=header.get("parameters", 0),
        by_tokens=[(entry["tokens"], entry["bpb"]) for entry in evals],
        by_minutes=[(minutes[entry["iter"]], entry["bpb"]) for entry in evals if entry["iter"] in minutes],
        speeds=[entry["tokens_per_second"] for entry in clock if runlog.has_numbers(entry, "tokens_per_second")])


def data_sha256(folder: str) -> str:
    """Return the digest of text, split and vocabulary from the latest checkpoint, or "" if there is none."""
    path = Path(folder, "last.pt")
    return checkpoint.load_checkpoint(path, mmap=True)["data_sha256"] if path.exists() else ""


# ---- the tables ----------------------------------------------------------------------------------

def setting_rows(runs: list[RunHistory]) -> list[list[str]]:
    """Return a row for each setting that differs between the runs or that some runs lack."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = []
    for name in names:
        values = [repr(run.settings[name]) if name in run.settings else "-" for run in runs]
        if len(set(values)) > 1:
            rows.append([name, *values])
    return rows or [["none", *[""] * len(runs)]]


def summary_rows(runs: list[RunHistory]) -> list[list[str]]:
    return [["best val bpb", *[f"{run.best[1]:.4f}" for run in runs]],
            ["  at tokens", *[f"{run.best[0]:,}" for run in runs]],
            ["parameters", *[f"{run.parameters:,}" for run in runs]],
            ["tokens/s, median", *[f"{median(run.speeds or [0]):,.0f}" for run in runs]]]


def print_bpb_table(unit: str, folders: list[str], curves: list[Points], decimals: int) -> None:
    """Print bpb at N_POINTS positions where the evaluations of all runs overlap; * marks the lowest."""
    start = max((points[0][0] for points in curves if points), default=0.0)
    end = min(points[-1][0] if points else -1.0 for points in curves)
    if start > end:
        print(f"\nthe evaluations of these runs do not overlap in {unit}; use a smaller --eval_interval")
        return
    rows = []
    for x in sorted(set(np.linspace(start, end, N_POINTS).tolist())):
        values = [f"{np.interp(x, *zip(*points)):.4f}" for points in curves]
        lowest = min(values, key=float)
        rows.append([f"  {x:,.{decimals}f}", *[f"*{value}" if value == lowest else value for value in values]])
    print_table([f"val bpb at {unit} (* lowest)", *folders], rows)


def print_table(header: list[str], rows: list[list[str]]) -> None:
    cells = []
    for row in [header, *rows]:
        short = [text if len(text) <= MAX_WIDTH else f"{text[:MAX_WIDTH - 3]}..." for text in row]
        cells.append([escape_control_chars(text) for text in short])
    widths = [max(len(text) for text in column) for column in zip(*cells)]
    print()
    for first, *others in cells:
        columns = [text.rjust(width) for text, width in zip(others, widths[1:])]
        print("  ".join([first.ljust(widths[0]), *columns]).rstrip())


if __name__ == "__main__":
    cli.run_script(main)
