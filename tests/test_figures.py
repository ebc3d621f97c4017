"""Figures are files that can be opened, and show a curve for each training."""

from matplotlib.text import Text
from PIL import Image

import figures
from figures import draw_losses, new_figure


def test_a_curve_for_each_training(tmp_path):
    file = tmp_path / "new folder" / "loss.png"
    losses = {"ARD": [(50, 0.4), (100, 0.1)], "no history": [(50, 0.5, 7.0), (100, 0.3, 7.0)]}
    draw_losses(losses, file)
    pixels = Image.open(file).convert("RGB")
    colours = {colour for _, colour in pixels.getcolors(maxcolors=2**24)}
    assert {(31, 119, 180), (255, 127, 14)} <= colours  # matplotlib's first two


def test_panels_stand_side_by_side():
    _, axes = new_figure(4, 3, columns=3)
    assert axes.shape == (3,)


def test_a_dollar_in_a_name_is_no_formula(tmp_path, monkeypatch):
    """And the powers of ten at a logarithmic axis stay formulas."""
    saved = []
    save = figures.save_figure
    monkeypatch.setattr(figures, "save_figure", lambda *given: (save(*given), saved.append(given)))
    draw_losses({"a$^$b": [(50, 0.4), (100, 0.0004)]}, tmp_path / "a.png")
    texts = saved[0][0].findobj(Text)
    assert {r"a\$^\$b", r"$\mathdefault{10^{-3}}$"} <= {text.get_text() for text in texts}
    assert all(text.get_parse_math() for text in texts)
