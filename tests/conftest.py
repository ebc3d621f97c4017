"""The modules lie at the top of the repository. Two threads at most: these networks are tiny, and
on a busy machine threads that wait for one another cost more than they bring (OMP_NUM_THREADS=1 is
respected)."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def no_loss_curves(monkeypatch):
    """No training draws its curve of losses: that takes longer than to train a tiny network."""
    import training

    monkeypatch.setattr(training, "draw_losses", lambda losses, file: None)


@pytest.fixture(scope="module")
def few_shapes():
    """A data set of 300 shapes in place of 50,000, which take seconds to draw."""
    import data

    draw = data.shapes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "shapes", lambda count, *more: draw(min(count, 300), *more))
        yield


@pytest.fixture
def float64():
    """In double precision, a right answer agrees to 1e-10 and a nearly right one does not."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
