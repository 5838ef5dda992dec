"""Draws docs/images/how_it_works.png: one step of the metric phase, computed on a toy whose phi has two numbers.

    python docs/draw.py            (part of make docs)

The toy: 400 examples in two groups, outputs that bend as phi moves, and the accuracy of the worse group as the metric.
"""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

PATH = Path(__file__).resolve().parent / "images" / "how_it_works.png"
SPREAD, RATE = 0.35, 0.07  # of a perturbation, of an update
UPDATES, PAIRS = 20, 8  # updates in a step, pairs of calls in an update
REACH = 1.7  # of the axes
BLUE, ORANGE, GREEN, GRAY = "tab:blue", "tab:orange", "tab:green", "tab:gray"


class Toy:
    """Outputs [..., rows] at a phi z [..., 2], as they are and to first order; labels -1 and 1, and groups, [rows]."""

    def __init__(self, generator: np.random.Generator, rows: int = 400):
        self.groups = np.arange(rows) % 4 == 0
        self.labels = generator.integers(0, 2, rows) * 2 - 1
        towards = np.where(self.groups[:, None], [0.7, 0.9], [-0.4, 0.3]) * self.labels[:, None]
        self.slope = towards + generator.normal(0, 0.3, (rows, 2))
        self.bend = generator.normal(0, 0.25, rows)
        self.start = np.where(self.groups, -0.4, 0.5) * self.labels + generator.normal(0, 0.6, rows)

    def linearised(self, z: np.ndarray) -> np.ndarray:
        return self.start + z @ self.slope.T

    def outputs(self, z: np.ndarray) -> np.ndarray:
        return self.linearised(z) + self.bend * (z**2).sum(-1)[..., None]

    def metric(self, outputs: np.ndarray, rows: np.ndarray = slice(None)) -> np.ndarray:
        """Accuracy of the worse group: [..., rows] -> [...]; no gradient anywhere."""
        right, groups = (outputs * self.labels > 0)[..., rows], self.groups[rows]
        return np.minimum(right[..., groups].mean(-1), right[..., ~groups].mean(-1))


def ascent(toy: Toy, generator: np.random.Generator) -> np.ndarray:
    """Where pairs of metric calls on linearised outputs lead: [updates + 1, 2]."""
    path = [np.zeros(2)]
    for _ in range(UPDATES):
        half = np.sort(generator.permutation(len(toy.labels))[: len(toy.labels) // 2])
        offsets = generator.normal(0, SPREAD, (PAIRS, 2))
        ends = (toy.metric(toy.linearised(path[-1] + sign * offsets), half) for sign in (1, -1))
        slope = (next(ends) - next(ends)) @ offsets
        path.append(path[-1] + RATE * slope / max(1e-9, np.linalg.norm(slope)))
    return np.array(path)


def draw(path: Path = PATH) -> None:
    generator = np.random.default_rng(2)
    toy = Toy(generator)
    way = ascent(toy, generator)
    points = generator.normal(0, 2 * SPREAD, (200, 2))
    scores = toy.metric(toy.linearised(points))

    matplotlib.rcParams.update({"font.size": 10})
    figure = Figure(figsize=(13, 3.9), dpi=110, layout="constrained")
    first, second, third, fourth = figure.subplots(1, 4)
    titles = (
        "1. Linearise the outputs at phi\n(some backward passes)",
        "2. Call the metric on linearised\noutputs (no pass)",
        "3. Learn a value function, and go\nup its gradient",
        "4. A real pass: take the step,\nor take it back",
    )
    for axes, title in zip((first, second, third, fourth), titles, strict=True):
        axes.set_title(title, fontsize=11)
    for axes in (second, third):
        axes.set(xlim=(-REACH, REACH), ylim=(-REACH, REACH), aspect="equal", xticks=[], yticks=[])

    along = np.linspace(-1.2, 1.2, 60)
    for row in range(0, 36, 3):
        color = ORANGE if toy.groups[row] else BLUE
        line = along[:, None] * np.array([0.6, 0.8])
        first.plot(along, toy.outputs(line)[:, row], color=color, linewidth=1.6)
        first.plot(along, toy.linearised(line)[:, row], color=color, linewidth=1, linestyle=":")
    first.axvline(0, color="black", linewidth=1)
    first.set(xlabel="along one direction of phi", ylabel="output of a row", xticks=[0], xticklabels=["phi"], yticks=[])

    shown = second.scatter(*points.T, c=scores, cmap="viridis", s=20)
    second.scatter(0, 0, color="black", s=60)
    second.set_xlabel("each point: one metric call")
    figure.colorbar(shown, ax=second, label="worse group's accuracy", shrink=0.8)

    grid = np.stack(np.meshgrid(np.linspace(-REACH, REACH, 60), np.linspace(-REACH, REACH, 60)), axis=-1)
    third.contour(grid[..., 0], grid[..., 1], toy.metric(toy.linearised(grid)), 10, cmap="viridis", linewidths=0.8)
    third.plot(*way.T, "o-", color=GREEN, markersize=3, linewidth=1.2)
    third.scatter(0, 0, color="black", s=60, zorder=3)
    third.set_xlabel(f"{UPDATES} updates, {2 * PAIRS} calls each")

    value, real = toy.metric(toy.linearised(way)), toy.metric(toy.outputs(way))
    error = np.sqrt(real[0] * (1 - real[0]) / toy.groups.sum())
    fourth.axhspan(real[0] - error, real[0] + error, color=GRAY, alpha=0.2, linewidth=0, label="standard error at phi")
    fourth.plot(value, color=GREEN, linestyle=":", label="on linearised outputs")
    fourth.plot([0, UPDATES], [real[0], real[-1]], "o", color="black", label="real passes")
    fourth.set(xlabel="update", ylabel="worse group's accuracy", xticks=[0, UPDATES // 2, UPDATES])
    fourth.legend(fontsize="small", framealpha=0.6, loc="lower right")

    path.parent.mkdir(exist_ok=True)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    drawn.quantize(255, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)


if __name__ == "__main__":
    draw()
