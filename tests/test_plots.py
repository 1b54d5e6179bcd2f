"""loss.png: its curves and the moving average."""
import numpy as np
import pytest
from conftest import TINY, run_captured

from extras import plots


def test_moving_average():
    assert plots.smooth(np.array([])).tolist() == [] and plots.smooth(np.array([5.0])).tolist() == [5.0]
    values = np.arange(40.0) ** 2
    want = [values[max(i - 2, 0):i + 3].mean() for i in range(40)]
    assert plots.smooth(values).tolist() == pytest.approx(want, rel=1e-12)


def test_loss_plot(project, monkeypatch):
    """The plot shows train and val by tokens and by minutes, with a star at the lowest val."""
    pytest.importorskip("matplotlib")
    import train
    drawn, losses = [], iter([3.0, 2.0, 2.5])
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append((figure, path)))
    monkeypatch.setattr(train, "evaluate", lambda _: dict(val_loss=(y := next(losses)), perplexity=1, bpb=y / 2))
    done = run_captured("train", "--data_dir", project, "--preset", "cpu_3min", *TINY, "--eval_interval", 2,
                        "--max_iters", 6)
    assert done.returncode == 0 and [str(path) for _, path in drawn] == ["output/loss.png"] * 3
    by_tokens, by_minutes = drawn[-1][0].axes
    for panel in (by_tokens, by_minutes):
        raw, mean, val, star, *preset = panel.lines
        assert len(raw.get_xdata()) == len(mean.get_xdata()) == 6 and list(val.get_ydata()) == [3.0, 2.0, 2.5]
        assert list(star.get_ydata()) == [2.0] and star.get_xdata()[0] == val.get_xdata()[1]
        assert [text.get_text() for text in panel.texts] == ["2.000\n1.000 bpb"]
    assert list(by_tokens.lines[2].get_xdata()) == [512, 1024, 1536]
    assert list(preset[0].get_xdata()) == [1.5, 2.3, 3.0] and preset[0].get_ydata()[2] == pytest.approx(2 * 0.870)
    assert by_minutes.child_axes[0].get_ylabel() == "bits per byte (bpb) of val"
    low, high = by_tokens.get_ylim()
    assert 0 < low < 2 * 0.870 and high > 3.0 and by_minutes.get_ylim() == (low, high)
