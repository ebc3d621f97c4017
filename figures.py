"""Figures: a thin layer over matplotlib, and the curves of a training."""

from pathlib import Path

from matplotlib.figure import Figure

from files import replace_file


def new_figure(width: float, height: float, columns: int = 1):
    """A figure of that many inches, and its panels, side by side."""
    figure = Figure((width, height), layout="tight")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def plain(label: str) -> str:
    """Escapes "$", so that matplotlib does not take the name of a folder for a formula."""
    return label.replace("$", r"\$")


def save_figure(figure: Figure, file: Path):
    replace_file(file, lambda opened: figure.savefig(opened, dpi=110, bbox_inches="tight"))


def draw_curves(curves: list[tuple], file: Path, **labels):
    """Curves (x, y, style, label), y on a logarithmic axis. `labels`: title, xlabel and ylabel."""
    figure, [axis] = new_figure(6.5, 4.2)
    for x, y, style, label in curves:
        axis.plot(x, y, style, label=plain(label))
    axis.set(yscale="log", **labels)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=2)
    save_figure(figure, file)


def draw_losses(losses: dict[str, list], file: Path):
    """losses: {name: [(iteration, mean loss, …), …]}."""
    curves = []
    for i, (name, entries) in enumerate(losses.items()):
        iterations, values, *_ = zip(*entries, strict=True)
        curves.append((iterations, values, f"C{i}", name))
    draw_curves(curves, file, title="Training", xlabel="iteration", ylabel="loss")
