"""Tested hyperparameters for a machine and a time, with the scores that they reach (docs/benchmarks.md).

`python train.py --preset cpu_3min` uses a preset; settings on the command line override it.
"""
from dataclasses import dataclass
from typing import Any

import numpy as np

MEASURED_ON = "17 MB of TinyStories, 2 cores of an AMD EPYC 9004"
NOT_MEASURED = "estimated, not measured"


@dataclass(frozen=True)
class Preset:
    """Settings of train.py, and the curve of a run on held-out TinyStories.

    A preset for a GPU was never run: its memory is estimated, its learning rate follows the trend of the others.
    """
    about: str
    vocab_size: int                                     # of the tokenizer that they are made for
    settings: dict[str, Any]
    curve: tuple[tuple[float, float], ...] = ()         # minutes and bits per byte
    story: str = ""                                     # start of a story that the trained model wrote
    gpu_gb: int = 0                                     # memory of the GPU that it is made for


PRESETS = {
    "cpu_3min": Preset(
        "a first story, on any computer", 2048,
        dict(max_minutes=3.0, dim=128, n_layers=4, n_heads=2, n_kv_heads=2, batch_size=8, learning_rate=6e-3,
             eval_interval=600),
        ((1.5, 1.131), (2.3, 0.941), (3.0, 0.870)),
        "One day, a small girl named Amy went to the park with her mom. They saw a big peddle. Amy was very excited "
        "and wanted to play with her peddle."),
    "cpu_10min": Preset(
        "a coffee break", 2048,
        dict(max_minutes=10.0, dim=192, n_layers=4, n_heads=3, n_kv_heads=3, batch_size=8, learning_rate=6e-3,
             eval_interval=1000),
        ((3.4, 1.019), (6.2, 0.873), (9.0, 0.783), (10.0, 0.765)),
        "One day, a small dog named Max went for a walk. He saw a big tree. Max was very happy to find the tree. He "
        "went inside the tree and picked it up. He saw it was empty."),
    "cpu_30min": Preset(
        "a lunch break", 4096,
        dict(max_minutes=30.0, dim=256, n_layers=4, n_heads=4, n_kv_heads=4, batch_size=8, learning_rate=5e-3,
             eval_interval=2000),
        ((8.5, 0.923), (15.9, 0.820), (23.1, 0.755), (30.0, 0.693)),
        "One day, a little boy named Tim went to the park. He saw a big tree with lots of luxury. Tim wanted to make a "
        "luxury cake. He thought it would be a good place to draw."),
    "gpu_2gb": Preset(
        "the default model of 8 million parameters, in half batches", 4096,
        dict(batch_size=16, gradient_accumulation_steps=2, max_iters=20_000), gpu_gb=2),
    "gpu_4gb": Preset(
        "16 million parameters", 4096,
        dict(dim=384, n_heads=6, n_kv_heads=6, learning_rate=5e-3, max_iters=20_000), gpu_gb=4),
    "gpu_8gb": Preset(
        "27 million parameters", 4096,
        dict(dim=512, n_layers=8, n_heads=8, n_kv_heads=8, batch_size=64, learning_rate=4e-3, max_iters=20_000),
        gpu_gb=8),
    "gpu_large": Preset(
        "27 million parameters, in large batches", 4096,
        dict(dim=512, n_layers=8, n_heads=8, n_kv_heads=8, batch_size=128, learning_rate=4e-3, max_iters=20_000),
        gpu_gb=12),
    "gpu_16gb": Preset(
        "52 million parameters", 4096,
        dict(dim=640, n_layers=10, n_heads=10, n_kv_heads=10, batch_size=128, learning_rate=3.5e-3, max_iters=20_000),
        gpu_gb=16),
    "gpu_24gb": Preset(
        "88 million parameters, the layers of llama2.c's largest model", 4096,
        dict(dim=768, n_layers=12, n_heads=12, n_kv_heads=12, batch_size=128, learning_rate=3e-3, max_iters=20_000),
        gpu_gb=24),
    "gpu_40gb": Preset(
        "207 million parameters", 4096,
        dict(dim=1024, n_layers=16, n_heads=16, n_kv_heads=16, batch_size=128, learning_rate=2.5e-3,
             max_iters=20_000), gpu_gb=40),
}


def expected_curve(name: str) -> tuple[tuple[float, float], ...]:
    """Return the (minutes, bits per byte) of a preset; empty without a preset."""
    return PRESETS[name].curve if name in PRESETS else ()


def expected_bpb(name: str, minutes: float) -> float | None:
    """Return a preset's bits per byte after some minutes; None before the first point of its curve."""
    points = expected_curve(name)
    if not points or minutes < points[0][0]:
        return None
    return float(np.interp(minutes, *zip(*points)))


def presets_table() -> str:
    """Return the list of presets for --help."""
    lines = [f"presets (scores measured with {MEASURED_ON}):"]
    for name, preset in PRESETS.items():
        flags = " ".join(f"--{key} {value}" for key, value in preset.settings.items())
        gpu = f", for a GPU with {preset.gpu_gb} GB or more: {NOT_MEASURED}" if preset.gpu_gb else ""
        lines.append(f"  {name:10} {preset.about}{gpu}; made for train_vocab.py --vocab_size {preset.vocab_size}")
        lines.append(f"             {flags}")
        for minutes, bpb in preset.curve:
            lines.append(f"             after {minutes:g} minutes {bpb:.2f} bits per byte")
        if preset.story:
            lines.append(f"             {preset.story}")
    return "\n".join(lines)
