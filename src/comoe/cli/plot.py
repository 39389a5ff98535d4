"""The picture of a pack as a file: SVG, PNG or PDF, the same bytes for the same picture.

Only this file imports matplotlib, and this file is imported only where a picture is asked for. What is drawn is
`cli.picture`'s to say.
"""

from collections.abc import Callable, Sequence
from errno import EDQUOT, ENOSPC
from io import BytesIO
from math import log
from pathlib import Path
from typing import Any

from matplotlib import colormaps, style
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from comoe.cli.picture import ClusterTree, LayerCurve, Picture, StepLoss, apart, spread
from comoe.store.whole import whole
from comoe.types import StorageFull, UsageError
from comoe.units import format_size

UNDATED: dict[str, dict[str, Any]] = {
    ".svg": {"Date": None},
    ".png": {"Software": None},
    ".pdf": {"CreationDate": None},
}
"""The endings of pictures, and what each leaves out of its metadata: it would differ from day to day."""

SETTINGS = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "font.size": 9,
    "grid.alpha": 0.3,
    "pdf.fonttype": 42,
    "savefig.dpi": 150,
    "svg.fonttype": "none",
    "svg.hashsalt": "comoe",
    "text.parse_math": False,
}
"""Text stays text, and is never taken for a formula: names come from the manifest."""

WIDTH = 12.0
TITLE_HEIGHT, CURVES_HEIGHT, TREES_TITLE_HEIGHT, TREES_HEIGHT = 0.4, 5.2, 0.5, 1.8
FRONTIER_RATIO = 1.2
MOST_TREES, TREES_PER_ROW = 12, 4
MOST_LEAVES_NAMED = 40

NAME_SIZE, NAME_WIDTH, NAMES_HEIGHT = 6.5, 0.02, 40
"""In points the letters of a step's name and the room for all names; as a share of the panel, the room for one."""

LINEAR_LOSS, LEAST_TOP_LOSS = 1e-3, 1e-2
"""Losses nearer to zero than the first are drawn on a linear scale, for they may be negative: most of that is noise.
The axis goes up to the second at least."""

MEAN, WORST, APART = "#1f5fa8", "#d9742b", "#8a8a8a"
LAYER_COLOURS = "viridis"
CLUSTER_COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#bcbd22", "#17becf")


def save(picture: Picture, path: Path) -> None:
    """Draw `picture` into the file `path`, which is replaced where it exists, whole or not at all.

    Raises UsageError where it has another ending, cannot be written, or there is nothing to draw; StorageFull.
    """
    ending = path.suffix.lower()
    if ending not in UNDATED:
        raise UsageError(f"{path} does not end in .svg, .png or .pdf: give --plot a file that does.")
    if not (picture.frontier or picture.curves or picture.trees):
        raise UsageError(
            "there is nothing to draw: the pack has no losses, errors or clusters; calibrate it, or leave out --plot."
        )
    drawn = BytesIO()
    with style.context(["default", SETTINGS]):  # and nothing that whoever draws has set
        _draw(picture).savefig(drawn, format=ending[1:], metadata=UNDATED[ending])
    _write(path, drawn.getvalue())


def _write(path: Path, data: bytes) -> None:
    try:
        with whole(path) as file:
            file.write(data)
    except OSError as error:
        if error.errno in (ENOSPC, EDQUOT):
            raise StorageFull(f"the disk is full: {path} was not written. Make room and try again.") from error
        raise UsageError(f"{path} cannot be written ({error.strerror}): choose another place.") from error


def _draw(picture: Picture) -> Figure:
    """Loss and errors side by side, trees below; what is empty takes no room."""
    shown = [picture.trees[at] for at in spread(len(picture.trees), MOST_TREES)]
    rows = -(-len(shown) // TREES_PER_ROW)
    upper = CURVES_HEIGHT if picture.frontier or picture.curves else 0.0
    lower = TREES_TITLE_HEIGHT + rows * TREES_HEIGHT if shown else 0.0
    figure = Figure((WIDTH, TITLE_HEIGHT + upper + lower), layout="constrained")
    figure.suptitle(_plain(picture.title), fontweight="bold")
    heights = [height for height in (upper, lower) if height]
    parts = list(figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights).flat)
    if upper:
        _draw_curves(parts[0], picture)
    if lower:
        parts[-1].suptitle(_trees_title(len(shown), picture), x=0.01, ha="left", fontsize="medium")
        _draw_trees(parts[-1], shown, rows)
    return figure


def _draw_curves(part: SubFigure, picture: Picture) -> None:
    panels: list[Callable[[Axes], None]] = []
    if picture.frontier:
        panels.append(lambda axes: _draw_frontier(axes, picture.frontier))
    if picture.curves:
        panels.append(lambda axes: _draw_layers(axes, picture.curves))
    ratios = [FRONTIER_RATIO, 1.0] if len(panels) > 1 else [1.0]
    for panel, axes in zip(panels, part.subplots(1, len(panels), squeeze=False, width_ratios=ratios).flat, strict=True):
        panel(axes)


def _draw_frontier(axes: Axes, frontier: Sequence[StepLoss]) -> None:
    """Loss against bytes, both logarithmic; losses of zero and below have a linear part of the axis."""
    shares, certificates = [step.share for step in frontier], [step.certificate for step in frontier]
    worst = [(found.loss_worst_domain, *found.loss_worst_domain_ci95) for found in certificates]
    mean = [(found.loss, *found.loss_ci95) for found in certificates]
    for losses, colour, label in ((worst, WORST, "worst domain"), (mean, MEAN, "mean of all domains")):
        middle, low, high = zip(*losses, strict=True)
        axes.plot(shares, middle, "o-", color=colour, markersize=3, linewidth=1.2, label=f"{label}, 95 % interval")
        axes.vlines(shares, low, high, color=colour, alpha=0.5, linewidth=2.5)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    axes.set_yscale("symlog", linthresh=LINEAR_LOSS, linscale=0.5)
    drawn = [loss for losses in (*worst, *mean) for loss in losses]
    axes.set_ylim(1.2 * min(0.0, *drawn) - LINEAR_LOSS / 4, max(LEAST_TOP_LOSS, 1.5 * max(drawn)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{100 * loss:g} %"))
    axes.set_title("Loss of every certified step: more nats per token than the exact model", pad=NAMES_HEIGHT)
    axes.set_xlabel("resident bytes of the experts, share of their bytes as bf16")
    axes.set_ylabel("loss")
    axes.legend(loc="upper right", frameon=False)
    _name_steps(axes, frontier)


def _name_steps(axes: Axes, frontier: Sequence[StepLoss]) -> None:
    """The steps' names above the panel, with lines to their places where they would stand on each other."""
    ordered = sorted(frontier, key=lambda step: step.share)
    left, right = axes.get_xlim()
    places = [log(step.share / left) / log(right / left) for step in ordered]
    for step, place, moved in zip(ordered, places, apart(places, NAME_WIDTH), strict=True):
        axes.annotate(
            _plain(step.step),
            (place, 1.0),
            (moved, 1.03),
            "axes fraction",
            rotation=90,
            ha="center",
            va="bottom",
            fontsize=NAME_SIZE,
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": APART, "shrinkA": 0, "shrinkB": 0},
        )


def _draw_layers(axes: Axes, curves: Sequence[LayerCurve]) -> None:
    """A line per layer, coloured from the first layer to the last."""
    last = max(curve.layer for curve in curves)
    colours = ScalarMappable(Normalize(0, max(1, last)), colormaps[LAYER_COLOURS])
    for curve in curves:
        points = [(step.nbytes, step.error) for step in curve.steps if step.nbytes and step.error]
        colour = colours.cmap(curve.layer / max(1, last))
        axes.plot(*zip(*points, strict=True), ".-", color=colour, markersize=3, linewidth=0.8)
    axes.set_title("Error of every layer in every step; exact experts have none")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda nbytes, _: format_size(nbytes)))
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda error, _: f"{error:g}"))
    axes.set_xlabel("bytes of the layer's experts")
    axes.set_ylabel("relative squared error of the layer's output")
    axes.figure.colorbar(colours, ax=axes, label="sparse layer", ticks=MaxNLocator(8, integer=True), pad=0.02)


def _trees_title(shown: int, picture: Picture) -> str:
    number = len(picture.trees)
    which = f"{shown} of {number} layers" if shown < number else "every layer"
    coloured = any(joint.cluster is not None for tree in picture.trees for joint in tree.joints)
    how = "; a colour is a cluster that shares bytes" if coloured else ""
    return f"Experts in the order in which they join, {which}: the lower, the more alike are their outputs{how}"


def _draw_trees(part: SubFigure, trees: Sequence[ClusterTree], rows: int) -> None:
    panels = list(part.subplots(rows, -(-len(trees) // rows), squeeze=False).flat)
    for tree, axes in zip(trees, panels, strict=False):
        _draw_tree(axes, tree)
    for axes in panels[len(trees) :]:
        axes.set_axis_off()


def _draw_tree(axes: Axes, tree: ClusterTree) -> None:
    """Brackets, the lower ones of a cluster in its colour."""
    brackets, colours = [], []
    for (left, right), (low_left, low_right), height, cluster in tree.joints:
        brackets.append([(left, low_left), (left, height), (right, height), (right, low_right)])
        colours.append(APART if cluster is None else CLUSTER_COLOURS[cluster % len(CLUSTER_COLOURS)])
    axes.add_collection(LineCollection(brackets, colors=colours, linewidths=0.8))
    axes.set_xlim(-1, len(tree.experts))
    axes.set_ylim(0, len(tree.joints) + 1)
    axes.set_title(f"layer {tree.layer}", fontsize="small")
    axes.grid(False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_yticks([])
    if len(tree.experts) <= MOST_LEAVES_NAMED:
        axes.set_xticks(range(len(tree.experts)), [str(e) for e in tree.experts], rotation=90, fontsize=6)
        axes.tick_params(length=0, pad=1)
    else:
        axes.set_xticks([])


def _plain(text: str) -> str:
    """`text` without characters that a file of text cannot hold."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
