"""A plot of a study: hit rate over capacity, and over the part of it that is promised."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saltern.replay.player import Policy
from saltern.replay.study import Point, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg")

_COLOR_BY_POLICY = {Policy.GUARANTEED: "#1b6ca8", Policy.STATIC: "#d1651c", Policy.LRU: "#6b6b6b"}
# Everything in a drawing is made anew in every run, but the same study shall give the same file.
_STYLE = {
    "svg.hashsalt": "saltern",
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
}


class PlotError(Exception):
    """The plot can't be drawn; the text says what to do."""


def check_plot(path: Path) -> None:
    """Raise `PlotError` unless a plot can be drawn to such a file: before the work, not after it."""
    if path.suffix not in SUFFIXES:
        raise PlotError(f"{path} is neither a .png nor an .svg")
    if not path.parent.is_dir():
        raise PlotError(f"there is no folder {path.parent} for the plot")
    try:
        import matplotlib as mpl  # noqa: F401
    except ImportError as error:
        raise PlotError("a plot needs matplotlib: pip install 'saltern[plot]'") from error


def draw(study: Study, path: Path) -> None:
    """Write the plot of a study. Raises `PlotError`."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    quotas = {point.quota for point in study.points}
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9 if len(quotas) > 1 else 5, 3.6), layout="constrained")
        panels = figure.subplots(1, 2 if len(quotas) > 1 else 1, sharey=True, squeeze=False)[0]
        _over_capacity(panels[0], study)
        if len(quotas) > 1:
            _over_quota(panels[1], study)
        figure.suptitle(f"{study.trace}: all tenants together, and dashed the one that hits least")
        metadata: dict[str, Any] = {"Date": None} if path.suffix == ".svg" else {}
        try:
            figure.savefig(path, metadata=metadata, dpi=150)
        except OSError as error:
            raise PlotError(f"{path} can't be written: {error.strerror}") from error


def _over_capacity(axes: "Axes", study: Study) -> None:
    """Draw one line a policy, each with the largest quota: how much memory to buy."""
    quota = max(point.quota for point in study.points)
    capacities = sorted({point.capacity_blocks for point in study.points})
    for policy in Policy:
        points = sorted(
            (point for point in study.points if point.policy == policy.value and point.quota == quota),
            key=lambda point: point.capacity_blocks,
        )
        if points:
            across = [point.capacity_blocks for point in points]
            _line(axes, across, points, color=_COLOR_BY_POLICY[policy], label=policy.value)
    axes.set_xscale("log")
    axes.set_xticks(capacities, [f"{capacity:,}" for capacity in capacities])
    axes.set_xticks([], minor=True)
    axes.set_xlabel(f"capacity in blocks, of {study.distinct_blocks:,} different ones; quota {quota:.0%}")
    axes.set_ylabel("hit rate")
    axes.yaxis.set_major_formatter(_percent)
    axes.set_ylim(bottom=0)
    axes.legend(edgecolor="none")


def _over_quota(axes: "Axes", study: Study) -> None:
    """Draw one line a capacity, of the first policy that knows quotas: what a guarantee costs."""
    policy = next(point.policy for point in study.points if point.policy != Policy.LRU.value)
    capacities = sorted({point.capacity_blocks for point in study.points})
    for number, capacity in enumerate(capacities):
        points = sorted(
            (point for point in study.points if point.policy == policy and point.capacity_blocks == capacity),
            key=lambda point: point.quota,
        )
        shade = str(0.7 * (1 - (number + 1) / len(capacities)))
        _line(axes, [point.quota for point in points], points, color=shade, label=f"{capacity:,} blocks")
    axes.set_xlabel(f"quota: promised part of what can be, {policy}")
    axes.xaxis.set_major_formatter(_percent)
    axes.legend(edgecolor="none")


def _line(axes: "Axes", across: Sequence[float], points: Sequence[Point], *, color: str, label: str) -> None:
    axes.plot(across, [point.hit_rate for point in points], "o-", color=color, label=label, markersize=3)
    worst = [min(share.hit_rate for share in point.of_the_trace) for point in points]
    axes.plot(across, worst, "o--", color=color, markersize=3, linewidth=1)


def _percent(value: float, _: object = None) -> str:
    return f"{value:.0%}"
