"""The charts of report.html as inline SVG: bars for shares, histograms, a curve, intervals.

Colours are CSS classes of synth/pipeline/report.html, because its security policy allows no style attributes. All text
is escaped here.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 58, 24, 10, 42  # margins around the plot, with room for half a label at the right end
KINDS = ("open", "full")  # of the first and the second series; distinguishable without colour


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most `most` + 1 round numbers (1, 2 or 5 times a power of ten apart) that enclose low and high."""
    span = (high - low) or 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(factor * power for factor in (1, 2, 5, 10, 20) if _steps(low, high, factor * power) <= most)
    first = math.floor(low / step + 1e-9)
    return [round(n * step, 12) for n in range(first, first + max(_steps(low, high, step), 1) + 1)]


def _steps(low: float, high: float, step: float) -> int:
    return math.ceil(high / step - 1e-9) - math.floor(low / step + 1e-9)


def bar(count: float, whole: float, kind: str) -> str:
    """A bar that fills its cell by the share of count in whole; the number is shown beside it."""
    width = 100 * count / whole if whole else 0
    drawn = f'<rect width="{width:.2f}%" height="14" class="{kind}"/>'
    return f'<svg width="100%" height="14" aria-hidden="true">{drawn}</svg>'


def bars(title: str, axis: str, labels: Sequence[str], series: Mapping[str, Sequence[int]]) -> str:
    """Counts of two series side by side over the same labels, with a legend."""
    marks = ticks(0, max(1, *(max(counts) for counts in series.values())), 4)
    marks = [mark for mark in marks if mark == int(mark)]
    plot = _Plot((0.0, float(len(labels))), (0.0, marks[-1]))
    drawn = [plot.grid(marks)]
    wide = 0.8 / len(series)
    for place, (name, counts) in enumerate(series.items()):
        for n, count in enumerate(counts):
            if count:
                x, y = plot.x(n + 0.1 + place * wide), plot.y(count)
                size = f'width="{plot.x(wide) - plot.x(0) - 1.5:.1f}" height="{plot.y(0) - y:.1f}"'
                tip = escape(f"{name}: {count:,} at {labels[n]}")
                drawn.append(f'<rect x="{x:.1f}" y="{y:.1f}" {size} class="{KINDS[place]}"><title>{tip}</title></rect>')
    every = -(-len(labels) // 11)
    drawn += [plot.below(n + 0.5, label) for n, label in enumerate(labels) if not n % every]
    keys = "".join(
        f'<li><svg width="12" height="12" aria-hidden="true"><rect x="1" y="1" width="10" height="10" class="{kind}"/>'
        f"</svg>{escape(name)} ({sum(counts):,})</li>"
        for (name, counts), kind in zip(series.items(), KINDS, strict=False)
    )
    return f'<ul class="legend">{keys}</ul>' + plot.svg(title, axis, drawn)


def curve(title: str, points: Points, axis: str = "step") -> str:
    """A line through the points (one point: a dot)."""
    xs, ys = zip(*points, strict=True)
    marks, steps = ticks(min(ys), max(ys)), ticks(min(xs), max(xs))
    plot = _Plot((min(xs), max(xs)) if min(xs) < max(xs) else (min(xs) - 1, max(xs) + 1), (marks[0], marks[-1]))
    drawn = [plot.grid(marks), *(plot.below(x, f"{x:g}") for x in steps if min(xs) <= x <= max(xs))]
    if len(points) > 1:
        line = " ".join(f"{plot.x(x):.1f},{plot.y(y):.1f}" for x, y in points)
        drawn.append(f'<polyline points="{line}" class="curve"/>')
    for x, y in points if len(points) <= 40 else ():
        drawn.append(
            f'<circle cx="{plot.x(x):.1f}" cy="{plot.y(y):.1f}" r="2.5" class="full">'
            f"<title>{y:.4g} at {escape(axis)} {x:g}</title></circle>"
        )
    ends = f"{title}, from {ys[0]:.3g} to {ys[-1]:.3g}"
    return plot.svg(ends, axis, drawn)


def intervals(title: str, values: Mapping[str, tuple[float, float, float]]) -> str:
    """Value, low and high per name as a dot with a line, on an axis from 0 to 1, extended to the values if needed."""
    height = 34 * len(values) + BOTTOM - 12
    lows, highs = [low for _, low, _ in values.values()], [high for *_, high in values.values()]
    marks = ticks(min(0.0, *lows), max(1.0, *highs))
    plot = _Plot((marks[0], marks[-1]), (0.0, 1.0), left=112, right=16, height=height)
    drawn = [
        f'<line x1="{plot.x(tick):.1f}" x2="{plot.x(tick):.1f}" y1="4" y2="{height - BOTTOM + 16}" class="grid"/>'
        f'<text x="{plot.x(tick):.1f}" y="{height - 8}" text-anchor="middle">{tick:g}</text>'
        for tick in marks
    ]
    for place, (name, (value, low, high)) in enumerate(values.items()):
        y = 20 + 34 * place
        ends = f"M{plot.x(low):.1f} {y}H{plot.x(high):.1f}" + "".join(
            f"M{plot.x(x):.1f} {y - 6}v12" for x in (low, high)
        )
        tip = escape(f"{name}: {value:.3f}, from {low:.3f} to {high:.3f}")
        drawn.append(
            f'<text x="0" y="{y + 4}">{escape(name)}</text><path d="{ends}" class="interval"/>'
            f'<circle cx="{plot.x(value):.1f}" cy="{y}" r="5" class="{KINDS[place % 2]}"><title>{tip}</title></circle>'
        )
    return _svg(title, drawn, height)


def _svg(title: str, drawn: Sequence[str], height: int) -> str:
    named = escape(title, quote=True)
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{named}">{"".join(drawn)}</svg>'


class _Plot:
    """Maps values to positions in the picture."""

    def __init__(
        self,
        xs: tuple[float, float],
        ys: tuple[float, float],
        left: int = LEFT,
        right: int = RIGHT,
        height: int = HEIGHT,
    ):
        self.xs, self.ys, self.left, self.right, self.height = xs, ys, left, right, height

    def x(self, value: float) -> float:
        low, high = self.xs
        return self.left + (value - low) / (high - low) * (WIDTH - self.left - self.right)

    def y(self, value: float) -> float:
        low, high = self.ys
        return TOP + (high - value) / (high - low) * (self.height - TOP - BOTTOM)

    def grid(self, marks: Sequence[float]) -> str:
        """Lines at the marks of the y axis, with their numbers; the lowest is the x axis."""
        ends = f'x1="{self.left}" x2="{WIDTH - self.right}"'
        drawn = []
        for place, mark in enumerate(marks):
            y, kind = self.y(mark), "grid" if place else "axis"
            drawn.append(f'<line {ends} y1="{y:.1f}" y2="{y:.1f}" class="{kind}"/>')
            drawn.append(f'<text x="{self.left - 6}" y="{y + 4:.1f}" text-anchor="end">{mark:g}</text>')
        return "".join(drawn)

    def below(self, value: float, label: str) -> str:
        y = self.height - BOTTOM + 16
        return f'<text x="{self.x(value):.1f}" y="{y}" text-anchor="middle">{escape(label)}</text>'

    def svg(self, title: str, axis: str, drawn: Sequence[str]) -> str:
        middle = (self.left + WIDTH - self.right) / 2
        name = f'<text x="{middle}" y="{self.height - 6}" text-anchor="middle">{escape(axis)}</text>'
        return _svg(title, [*drawn, name], self.height)
