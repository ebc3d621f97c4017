"""Figures are files that can be opened, and show a curve for each training."""

from PIL import Image

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
