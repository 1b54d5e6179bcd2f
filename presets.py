"""Settings for a machine and a span of time, found by measuring (docs/benchmarks.md), and what they gave.

`python train.py --preset cpu_3min` uses one; any setting beside it goes first. Each curve holds
(minutes, bits per byte on held-out TinyStories): what to expect at that time of such a run.
"""
from dataclasses import dataclass
from typing import Any

import numpy as np

MEASURED_ON = "17 MB of TinyStories, 2 cores of an AMD EPYC 9004"


@dataclass(frozen=True)
class Preset:
    """Settings of train.py. `vocab_size` is the one of step 1 that they were measured with."""
    about: str
    vocab_size: int
    settings: dict[str, Any]
    curve: tuple[tuple[float, float], ...] = ()
    story: str = ""


PRESETS = {
    "cpu_3min": Preset(
        "a first story, on any computer", 2048,
        dict(max_minutes=3.0, dim=128, n_layers=4, n_heads=2, n_kv_heads=2, batch_size=8,
             gradient_accumulation_steps=1, learning_rate=6e-3, eval_interval=600),
        ((1.9, 0.986), (3.0, 0.870)),
        "Once upon a time, there was a little girl named Lily. Lily liked to share the garden with her mom."),
    "cpu_10min": Preset(
        "a coffee break; not measured", 2048,
        dict(max_minutes=10.0, dim=192, n_layers=4, n_heads=3, n_kv_heads=3, batch_size=8,
             gradient_accumulation_steps=1, learning_rate=6e-3, eval_interval=1000)),
    "cpu_30min": Preset(
        "a lunch break", 4096,
        dict(max_minutes=30.0, dim=256, n_layers=4, n_heads=4, n_kv_heads=4, batch_size=8,
             gradient_accumulation_steps=1, learning_rate=5e-3, eval_interval=2000),
        ((8.5, 0.923), (15.9, 0.820), (23.1, 0.755), (30.0, 0.693)),
        "Once upon a time, there was a little girl who was very upset. One day she went out to play with her friends, "
        "but they didn't know how to play them."),
    "gpu_2gb": Preset(
        "the model of the settings block, on a GPU with 2 to 6 GB; not measured", 4096,
        dict(batch_size=16, gradient_accumulation_steps=2, max_iters=20_000)),
    "gpu_large": Preset(
        "a model of 30 million parameters, on a GPU with 24 GB or more; not measured", 4096,
        dict(dim=512, n_layers=8, n_heads=8, n_kv_heads=8, batch_size=128, gradient_accumulation_steps=1,
             learning_rate=4e-3, max_iters=20_000)),
}


def curve(name: str) -> tuple[tuple[float, float], ...]:
    """The curve of a preset; empty where there is no preset."""
    return PRESETS[name].curve if name in PRESETS else ()


def expected(name: str, minutes: float) -> float | None:
    """Bits per byte that a preset had reached by then, read off its curve; None before its first point."""
    points = curve(name)
    if not points or minutes < points[0][0]:
        return None
    return float(np.interp(minutes, *zip(*points)))


def table() -> str:
    """The list of presets for --help."""
    lines = [f"presets (measured with {MEASURED_ON}):"]
    for name, preset in PRESETS.items():
        end = f"; {preset.curve[-1][1]:.2f} bits per byte" if preset.curve else ""
        lines += [f"  {name:10} {preset.about}; made for train_vocab.py --vocab_size {preset.vocab_size}{end}",
                  f"             {' '.join(f'--{key} {value}' for key, value in preset.settings.items())}"]
        lines += [f"             {preset.story}"] if preset.story else []
    return "\n".join(lines)
