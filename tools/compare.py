"""Compare two or more runs: the settings that differ, and bits per byte after equal tokens and equal minutes.

    python -m tools.compare output output/old-1

Prints tables, and draws OUT_DIR/compare.png where matplotlib is installed. Values between two evaluations are
interpolated; beyond the last evaluation there are none.
"""
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from extras import plots
from extras.plots import Points
from tinyllm import checkpoint, cli, runlog, shards
from tinyllm.cli import UserError, escape_control_chars, format_command

# ---- settings -----------------------------------------------------------------------------------
folders = []                        # the folders of the runs, two or more
out_dir = "output"                  # where compare.png is written
# ---- end of settings ----------------------------------------------------------------------------

EXAMPLE = "python -m tools.compare output output/old-1"
N_POINTS = 4      # where curves are compared: at both ends of what they share, and between
WIDTH = 28      # characters of a value that are shown


@dataclass
class RunHistory:
    """What a folder tells about its run: the first line of its log, and val bpb by tokens and by minutes."""
    name: str
    first: dict[str, Any]
    by_tokens: Points
    by_minutes: Points
    speeds: list[float]
    steps: int

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the run; where the model has its own, as after fine-tuning, those."""
        return {**self.first["config"], **self.first.get("model_args", {})}

    @property
    def best(self) -> tuple[float, float]:
        """After how many tokens bpb was lowest, and how low."""
        return min(self.by_tokens, key=lambda point: point[1])


def main() -> None:
    cfg, _ = cli.parse_settings(globals(), positional=("folders",))
    compare_runs(cfg.folders, cfg.out_dir)


def compare_runs(folders: list[str], out_dir: str) -> None:
    """Print the table, and draw the picture where matplotlib is installed."""
    if len(folders) < 2:
        raise UserError(f"name the folders of two or more runs\n       {EXAMPLE}")
    runs = [read_run(folder) for folder in folders]
    print_table([["settings that differ", *folders], *differences(runs)])
    if not same_text(runs):
        print("\nwarning: nothing in their checkpoints says that these runs were validated on the same text;\n"
              "         bits per byte of different texts say little about the models")
    print_table([["", *folders], *summary_rows(runs)])
    missing = []
    for unit, curves in ("tokens", [run.by_tokens for run in runs]), ("minutes", [run.by_minutes for run in runs]):
        if rows := bpb_rows(unit, curves):
            print_table([[f"val bpb at {unit} (* lowest)", *folders], *rows])
        else:
            missing.append(unit)
    if missing:
        print(f"\nthe evaluations of these runs share no stretch of {' or '.join(missing)}; to be compared, they want "
              f"more of them, as with --eval_interval {max(min(run.steps for run in runs) // 10, 1)}")
    try:
        path = Path(out_dir) / "compare.png"
        draw(runs, path)
        print(f"\nwrote {path}")
    except ImportError:
        print("\nfor a picture of the curves: pip install matplotlib")


# ---- the logs -----------------------------------------------------------------------------------

def read_run(folder: str) -> RunHistory:
    """Raises UserError when the folder has no log with an evaluation."""
    path = Path(folder) / "log.jsonl"
    if not path.is_file():
        raise UserError(f"no {path}; name the folders of runs\n       {EXAMPLE}")
    first, *entries = runlog.read_log(path) or [{}]
    if not all(isinstance(first.get(name, {}), dict) for name in ("config", "model_args")) or "config" not in first:
        raise UserError(f"{path} is no log of a training, or its first line is damaged")
    if path.read_bytes().count(b"\n") > len(entries) + 1:
        print(f"note: line {len(entries) + 2} of {path} is damaged; what stands before it counts")
    evaluations = [entry for entry in entries if numbers(entry, "iter", "tokens", "bpb")]
    if not evaluations:
        raise UserError(f"{path} has no evaluation; they come every {first['config'].get('eval_interval', '')} steps, "
                        "and at the end\n       go on with it: "
                        + format_command("train", out_dir=path.parent, init_from="resume"))
    clock = [entry for entry in runlog.read_log(path.with_name("clock.jsonl")) if numbers(entry, "iter", "seconds")]
    minutes = {entry["iter"]: entry["seconds"] / 60 for entry in clock}
    return RunHistory(folder, first, [(entry["tokens"], entry["bpb"]) for entry in evaluations],
                   [(minutes[entry["iter"]], entry["bpb"]) for entry in evaluations if entry["iter"] in minutes],
                   [entry["tokens_per_second"] for entry in clock if numbers(entry, "tokens_per_second")],
                   evaluations[-1]["iter"])


def numbers(entry: dict[str, Any], *names: str) -> bool:
    return all(isinstance(entry.get(name), (int, float)) and abs(entry[name]) < 1e300 for name in names)


def same_text(runs: list[RunHistory]) -> bool:
    """Whether the checkpoints are known to have one text, if not by one digest, then by one list of sources."""
    digests = [data_sha256(Path(run.name)) for run in runs]
    texts = [sources(str(run.settings.get("data_dir")), digest) for run, digest in zip(runs, digests)]
    return any(all(found[0] and found[0] == one for one in found) for found in (digests, texts))


def data_sha256(folder: Path) -> str:
    """The digest of text, split and vocabulary in a checkpoint of the run; empty when there is none."""
    for name in ("last.pt", "ckpt.pt"):
        try:
            return checkpoint.load_checkpoint(folder / name, mmap=True).get("data_sha256", "")
        except UserError:
            pass
    return ""


def sources(data_dir: str, digest: str) -> list[Any]:
    """The text of shards with that digest, whatever their vocabulary: rule of the split and digests of the files."""
    for path in sorted(Path(data_dir).glob("tok*/manifest.json")):
        try:
            found = shards.read_manifest(path.parent)
        except UserError:
            continue
        if found.sha256 == digest:
            return [found.val_threshold, sorted({source.sha256 for shard in found.shards for source in shard.sources})]
    return []


# ---- the table ----------------------------------------------------------------------------------

def differences(runs: list[RunHistory]) -> list[list[str]]:
    """A row for each setting that not all runs have, or not with the same value."""
    names = {name: None for run in runs for name in run.settings}
    rows = [[name, *(repr(run.settings[name]) if name in run.settings else "-" for run in runs)] for name in names]
    return [row for row in rows if len(set(row[1:])) > 1] or [["none"]]


def summary_rows(runs: list[RunHistory]) -> list[list[str]]:
    parameters = [run.first["parameters"] if numbers(run.first, "parameters") else math.nan for run in runs]
    return [["best val bpb", *(f"{run.best[1]:.4f}" for run in runs)],
            ["  at tokens", *(f"{run.best[0]:,}" for run in runs)],
            ["parameters", *(f"{count:,}" for count in parameters)],
            ["tokens/s, median", *(f"{median(run.speeds):,.0f}" if run.speeds else "-" for run in runs)]]


def bpb_rows(unit: str, curves: list[Points]) -> list[list[str]]:
    """A row for each place that all curves reach, with a star at the lowest."""
    rows = []
    for place in shared_x(curves):
        bpb = [f"{interpolate(points, place):.4f}" for points in curves]
        rows.append([f"  {place:,.0f}" if unit == "tokens" else f"  {place:.2f}",
                     *(f"{'*' if text == min(bpb, key=float) else ''}{text}" for text in bpb)])
    return rows


def shared_x(curves: list[Points]) -> list[float]:
    if not all(curves):
        return []
    begin, end = max(points[0][0] for points in curves), min(points[-1][0] for points in curves)
    return sorted(set(np.linspace(begin, end, N_POINTS).tolist())) if begin <= end else []


def interpolate(points: Points, place: float) -> float:
    return float(np.interp(place, *zip(*points)))


def print_table(rows: list[list[str]]) -> None:
    rows = [[escape_control_chars(text if len(text) <= WIDTH else text[:WIDTH - 3] + "...") if i else text
             for i, text in enumerate(row)] for row in rows]
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    print()
    for row in rows:
        print("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip())


def draw(runs: list[RunHistory], path: Path) -> None:
    figure, *panels = plots.new_figure("val, bits per byte")
    for panel, name in zip(panels, ("by_tokens", "by_minutes")):
        for i, run in enumerate(runs):
            plots.plot_evals(panel, getattr(run, name), f"{run.name}, best {run.best[1]:.3f}", f"C{i}")
        panel.legend()
    plots.zoom_y_axis(panels[0], [run.by_tokens for run in runs])
    plots.save(figure, path)


if __name__ == "__main__":
    cli.run_script(main)
