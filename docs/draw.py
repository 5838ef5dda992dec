"""Draws docs/images/how_it_works.png: one round of the method, computed on a toy of two coordinates.

    python docs/draw.py            (part of make docs)

The toy: 200 examples in two groups, a linear model, and the accuracy of the worse group as the metric. The loss is that
of the greater group, so that loss and metric pull in different directions.
"""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

PATH = Path(__file__).resolve().parent / "images" / "how_it_works.png"
STEP = 0.9  # how far from phi the passes go, in the coordinates' unit
SPREAD = 0.55  # standard deviation of the points on which the metric is called
BLUE, ORANGE, GREEN = "tab:blue", "tab:orange", "tab:green"


def toy(generator: np.random.Generator):
    """Outputs at a point z, [..., 2] -> [..., rows]; labels and groups, [rows]."""
    groups = np.arange(200) % 4 == 0
    labels = generator.integers(0, 2, 200) * 2 - 1
    towards = np.where(groups[:, None], [0.5, 1.0], [-1.0, 0.35]) * labels[:, None]
    slope = towards + generator.normal(0, 0.25, (200, 2))
    start = np.where(groups, -0.35, 0.15) * labels + generator.normal(0, 0.6, 200)
    return lambda z: start + z @ slope.T, labels, groups


def metric(outputs: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Accuracy of the worse group: [..., rows] -> [...]; no gradient anywhere."""
    right = outputs * labels > 0
    return np.minimum(right[..., groups].mean(-1), right[..., ~groups].mean(-1))


def features(z: np.ndarray) -> np.ndarray:
    x, y = z[..., 0], z[..., 1]
    return np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1)


def arrow(axes, vector, color: str, label: str, at) -> None:
    style = {"arrowstyle": "-|>", "color": color, "linewidth": 2.2, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=vector, xytext=(0, 0), arrowprops=style)
    axes.annotate(label, xy=at, color=color, fontsize=9, ha="center")


def draw(path: Path = PATH) -> None:
    generator = np.random.default_rng(2)
    outputs, labels, groups = toy(generator)
    points = generator.normal(0, SPREAD, (150, 2))
    scores = metric(outputs(points), labels, groups)
    fit, *_ = np.linalg.lstsq(features(points), scores, rcond=None)

    matplotlib.rcParams.update({"font.size": 10})
    figure = Figure(figsize=(11, 4.1), dpi=120, layout="constrained")
    first, second, third = figure.subplots(1, 3, sharex=True, sharey=True)
    for axes, title in (
        (first, "1. A few forward passes\naround phi"),
        (second, "2. The metric, on predictions\ninterpolated between them"),
        (third, "3. A value function, fitted; its gradient\nblended into the loss's by trust"),
    ):
        axes.set_title(title, fontsize=11)
        axes.set_xlim(-1.6, 1.6)
        axes.set_ylim(-1.6, 1.6)
        axes.set_aspect("equal")
        axes.set_xticks([])
        axes.set_yticks([])

    for corner in STEP * np.array([[1, 0], [-1, 0], [0, 1], [0, -1]]):
        first.plot(*np.stack([np.zeros(2), corner]).T, color="tab:gray", linewidth=1, zorder=1)
        first.scatter(*corner, color=BLUE, s=70, zorder=2)
    first.scatter(0, 0, color="black", s=70, zorder=3)
    first.annotate("phi", (0.08, -0.28))
    first.annotate("each point: one pass over the\nobservation split, all its outputs kept", (0, -1.48), ha="center")

    shown = second.scatter(*points.T, c=scores, cmap="viridis", s=22)
    second.scatter(0, 0, color="black", s=70)
    second.annotate("each point: one metric call, no pass", (0, -1.48), ha="center")
    figure.colorbar(shown, ax=second, label="worse group's accuracy", shrink=0.85)

    grid = np.stack(np.meshgrid(np.linspace(-1.6, 1.6, 80), np.linspace(-1.6, 1.6, 80)), axis=-1)
    third.contour(grid[..., 0], grid[..., 1], features(grid) @ fit, 12, cmap="viridis", linewidths=0.8)
    third.scatter(0, 0, color="black", s=70)
    uphill = fit[1:3] / np.linalg.norm(fit[1:3])
    gradient = (outputs(np.eye(2)) - outputs(np.zeros(2))) @ (labels * ~groups)  # of the greater group's margin
    downhill = gradient / np.linalg.norm(gradient)
    blended = uphill + downhill
    arrow(third, 0.85 * downhill, BLUE, "the loss", downhill + [0, 0.1])
    arrow(third, 0.85 * uphill, ORANGE, "the metric", uphill * 0.95 + [0.3, 0])
    arrow(third, 0.85 * blended, GREEN, "the step", blended * 0.92)
    path.parent.mkdir(exist_ok=True)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    drawn.quantize(255, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)


if __name__ == "__main__":
    draw()
