"""Presets: valid settings and expected results."""
import importlib

import pytest

from model import ModelArgs
from tinyllm import cli, presets
from tinyllm.cli import UserError
from tinyllm.presets import PRESETS, Preset

KNOWN = {name: preset.settings for name, preset in PRESETS.items()}


def read(*argv):
    return cli.parse_settings(vars(importlib.import_module("train")), argv, presets=KNOWN)


@pytest.mark.parametrize("name", PRESETS)
def test_precedence(name):
    plain, _ = read()
    cfg, given = read("--preset", name, "--seed", "7", "--batch_size", "3")
    assert (cfg.seed, cfg.batch_size, given["batch_size"]) == (7, 3, 3)
    for setting, value in KNOWN[name].items():
        assert isinstance(value, type(getattr(plain, setting))), setting
        assert setting == "batch_size" or getattr(cfg, setting) == given[setting] == value
    assert set(given) == {"preset", "seed", "batch_size", *KNOWN[name]}
    ModelArgs(dim=cfg.dim, n_layers=cfg.n_layers, n_heads=cfg.n_heads, n_kv_heads=cfg.n_kv_heads)


def test_an_unknown_preset_is_refused_with_the_list():
    with pytest.raises(UserError, match="unknown preset 'cpu_3'; expected cpu_3min, cpu_10min"):
        read("--preset", "cpu_3")


def test_expected_bpb_is_interpolated(monkeypatch):
    monkeypatch.setitem(PRESETS, "mine", Preset("", 512, {}, ((1.0, 2.0), (3.0, 1.0))))
    assert [presets.expected_bpb("mine", minutes) for minutes in (0.5, 1, 2, 3, 9)] == [None, 2.0, 1.5, 1.0, 1.0]
    assert presets.expected_bpb("", 2) is None


def test_help_lists_presets(capsys):
    with pytest.raises(SystemExit):
        train = importlib.import_module("train")
        cli.parse_settings(vars(train), ["--help"], presets=KNOWN, epilog=presets.presets_table())
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in PRESETS) and "--dim 128 --n_layers 4" in shown
    gpu_lines = [line for line in shown.splitlines() if line.startswith("  gpu_")]
    assert all("estimated, not measured" in line for line in gpu_lines) and len(gpu_lines) == 7


def test_training_reports_the_preset_result(run_in_process, project, monkeypatch, capsys):
    tiny = dict(dim=32, n_layers=1, n_heads=2, n_kv_heads=2, max_seq_len=32, batch_size=2, max_iters=4, eval_interval=2,
                sample_tokens=0, compile=False)
    monkeypatch.setitem(PRESETS, "mine", Preset("", 512, tiny, ((0.0, 1.25), (9.0, 1.25))))
    run_in_process("train", "--preset", "mine", "--data_dir", project)
    assert capsys.readouterr().out.count("mine reached 1.250 bits per byte by this time") == 2
