"""Settings for a machine and a time, found by measuring (docs/benchmarks.md), and what a run with them reaches.

`python train.py --preset cpu_3min` uses a preset; settings on the command line take precedence over it.
"""
from dataclasses import dataclass
from typing import Any

import numpy as np

MEASURED_ON = "17 MB of TinyStories, 2 cores of an AMD EPYC 9004"


@dataclass(frozen=True)
class Preset:
    """Settings of train.py, and the curve of a run on held-out TinyStories."""
    about: str
    vocab_size: int                                         # of the tokenizer that they were measured with
    settings: dict[str, Any]
    curve: tuple[tuple[float, float, str], ...] = ()        # minutes, bits per byte, the beginning of a story


PRESETS = {
    "cpu_3min": Preset(
        "a first story, on any computer", 2048,
        dict(max_minutes=3.0, dim=128, n_layers=4, n_heads=2, n_kv_heads=2, batch_size=8, learning_rate=6e-3,
             eval_interval=600),
        ((1.5, 1.131, "Once upon a time, there was a little girl named Amy. Amy liked to go on a trick."),
         (2.3, 0.941, "One day, a small boy named Tim and his dog, Spot, were playing in the garden. They saw a big, "
                      "red ball in the grass. Tim wanted to make the ball very hard."),
         (3.0, 0.870, "One day, a small girl named Amy went to the park with her mom. They saw a big peddle. Amy was "
                      "very excited and wanted to play with her peddle."))),
    "cpu_10min": Preset(
        "a coffee break", 2048,
        dict(max_minutes=10.0, dim=192, n_layers=4, n_heads=3, n_kv_heads=3, batch_size=8, learning_rate=6e-3,
             eval_interval=1000),
        ((3.4, 1.019, "One day, Jrizz saw a big, red vais. It was a bird, a bird named Brizz. Brizz was very sad."),
         (6.2, 0.873, "One day, a small dog named Max went for a walk. Max saw a big tree. He wanted to climb it."),
         (9.0, 0.783, "One day, a dog named Spot went for a walk. He saw a big tree with many leaves. Spot wanted to "
                      "play with the leaves, but he was too big and strong."),
         (10.0, 0.765, "One day, a small dog named Max went for a walk. He saw a big tree. Max was very happy to find "
                       "the tree. He went inside the tree and picked it up. He saw it was empty."))),
    "cpu_30min": Preset(
        "a lunch break", 4096,
        dict(max_minutes=30.0, dim=256, n_layers=4, n_heads=4, n_kv_heads=4, batch_size=8, learning_rate=5e-3,
             eval_interval=2000),
        ((8.5, 0.923, "One day, a little girl named Lucy went outside to play in her room."),
         (15.9, 0.820, "One day, Tom and his dog, Max were walking in a park. Max saw a big, shiny vine. He wanted to "
                       "pick it up and see what was behind it."),
         (23.1, 0.755, "One day, a little boy named Tim went to the park. He saw a big pile of luhes. He wanted to see "
                       "what was inside the luhes, so he started to peek into the luhes."),
         (30.0, 0.693, "One day, a little boy named Tim went to the park. He saw a big tree with lots of luxury. Tim "
                       "wanted to make a luxury cake. He thought it would be a good place to draw."))),
    "gpu_2gb": Preset(
        "the model of the settings block in half the memory, for a GPU with 2 to 6 GB; not measured", 4096,
        dict(batch_size=16, gradient_accumulation_steps=2, max_iters=20_000)),
    "gpu_large": Preset(
        "a model of 27 million parameters, for a GPU with 24 GB or more; not measured", 4096,
        dict(dim=512, n_layers=8, n_heads=8, n_kv_heads=8, batch_size=128, learning_rate=4e-3, max_iters=20_000)),
}


def expected_curve(name: str) -> list[tuple[float, float]]:
    """Return minutes and bits per byte of a preset, or an empty list without a preset."""
    if name not in PRESETS:
        return []
    return [(minutes, bpb) for minutes, bpb, _ in PRESETS[name].curve]


def expected_bpb(name: str, minutes: float) -> float | None:
    """Return the bits per byte of a preset after some minutes; None before the first point of its curve."""
    points = expected_curve(name)
    if not points or minutes < points[0][0]:
        return None
    return float(np.interp(minutes, *zip(*points)))


def presets_table() -> str:
    """Return the list of presets for --help."""
    lines = [f"presets (measured with {MEASURED_ON}):"]
    for name, preset in PRESETS.items():
        flags = " ".join(f"--{key} {value}" for key, value in preset.settings.items())
        lines.append(f"  {name:10} {preset.about}; made for train_vocab.py --vocab_size {preset.vocab_size}")
        lines.append(f"             {flags}")
        for minutes, bpb, story in preset.curve:
            lines.append(f"             after {minutes:g} minutes {bpb:.2f} bits per byte: {story}")
    return "\n".join(lines)
