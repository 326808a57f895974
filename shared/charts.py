"""Small charts as SVG text; colours come from the page's style, so light and dark pages share them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

import numpy as np

NOTHING = '<p class="muted">Nothing was recorded.</p>'
_COLOURS = 5
_SMOOTHED_FROM = 90
_DRAWN_MAX = 600

Row = tuple[str, float, float, float]
Points = list[tuple[float, float]]
End = tuple[float, float, str, str]


def line_chart(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, x_label: str, y_label: str, zero: bool = False
) -> str:
    """Lines over a common axis.

    A line of 90 points or more is drawn faint, and its running mean over a thirtieth of them on top.

    Args:
        series: Name -> x and y; points that are not finite are left out.
        x_label: With unit.
        y_label: With unit; the chart's heading.
        zero: Let the y axis begin at 0.

    Returns:
        A ``figure`` element, or a sentence where nothing can be drawn.
    """
    lines = {
        name: [(float(a), float(b)) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
        for name, (x, y) in series.items()
    }
    points = [point for line in lines.values() for point in line]
    if not points:
        return NOTHING
    width, height, left, right, top, bottom = 540, 270, 54, 62, 10, 46
    x0, x1 = _span([point[0] for point in points])
    y0, y1, y_step = _rounded(*_span([point[1] for point in points] + ([0.0] if zero else [])))

    def at(point: tuple[float, float]) -> tuple[float, float]:
        return (
            left + (point[0] - x0) / (x1 - x0) * (width - left - right),
            height - bottom - (point[1] - y0) / (y1 - y0) * (height - top - bottom),
        )

    parts = [_open(width, height, f"{y_label} over {x_label}: {', '.join(lines)}")]
    for tick in _ticks(y0, y1, y_step):
        _, y = at((x0, tick))
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{width - right}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    whole = all(point[0].is_integer() for point in points)
    for tick in _ticks(x0, x1, max(1.0, _step(x0, x1)) if whole else _step(x0, x1)):
        x, _ = at((tick, y0))
        parts.append(f'<text x="{x:.1f}" y="{height - bottom + 19}" text-anchor="middle">{_number(tick)}</text>')
    ends: list[End] = []
    smoothed = 0
    for index, (name, line) in enumerate(lines.items()):
        if not line:
            continue
        style = f"s{index % _COLOURS + 1}"
        shown = line
        if len(line) >= _SMOOTHED_FROM:
            smoothed = max(smoothed, len(line) // 30)
            parts.append(f'<polyline class="faint {style}" points="{_path(_thinned(line), at)}"/>')
            shown = _thinned(_smooth(line, len(line) // 30))
        parts.append(f'<polyline class="{style}" points="{_path(shown, at)}"><title>{escape(name)}</title></polyline>')
        x, y = at(shown[-1])
        parts.append(f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
        ends.append((y, x, f"{shown[-1][1]:.3g}", style))
    for y, x, text, style in _apart(ends, 19, height - bottom):
        parts.append(f'<text class="end {style}" x="{x + 9:.1f}" y="{y + 4:.1f}">{text}</text>')
    parts.append(
        f'<text x="{(left + width - right) / 2}" y="{height - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    told = f"{y_label} (thick: mean over {smoothed} points)" if smoothed else y_label
    return _plot("".join(parts) + "</svg>", told, list(lines) if len(lines) > 1 else [])


def interval_chart(rows: Sequence[Row], *, chance: Mapping[str, float] | None = None) -> str:
    """Scores with their 95 % intervals, one line each.

    Args:
        rows: Label, value, lower and upper end, in [0, 1]; a row with a number that is not finite has no line.
        chance: Label -> what guessing scores, drawn as a dashed line.
    """
    return arms_chart({"": rows}, chance=chance)


def arms_chart(arms: Mapping[str, Sequence[Row]], *, chance: Mapping[str, float] | None = None) -> str:
    """`interval_chart` of several arms, one below another for each label, told apart by colour and by shape.

    It is made of boxes, not SVG, so that its text keeps its size on a small screen.

    Args:
        arms: Arm -> its rows; labels that arms share stand together.
        chance: Label -> what guessing scores, drawn as a dashed line.
    """
    labels = list(dict.fromkeys(row[0] for rows in arms.values() for row in rows))
    if not labels:
        return NOTHING
    parts = []
    for label in labels:
        tracks, values = "", ""
        guessed = (chance or {}).get(label, math.nan)
        dashed = f'<i class="chance" style="left:{_percent(guessed)}"></i>' if math.isfinite(guessed) else ""
        for index, (arm, rows) in enumerate(arms.items()):
            style = f"s{index % _COLOURS + 1 if len(arms) > 1 else 2}"
            for _, value, lower, upper in [row for row in rows if row[0] == label]:
                if not all(map(math.isfinite, (value, lower, upper))):
                    tracks, values = tracks + f'<div class="track">{dashed}</div>', values + "<span>undefined</span>"
                    continue
                tracks += (
                    f'<div class="track">{dashed}<i class="bar {style}" '
                    f'style="left:{_percent(lower)};right:{_percent(1 - upper)}"></i><i class="dot {style} '
                    f'{("round", "square")[index % 2]}" style="left:{_percent(value)}" title="{escape(arm)}"></i></div>'
                )
                values += f"<span><b>{value:.3f}</b> {lower:.2f} to {upper:.2f}</span>"
        name = f'<div class="name">{escape(label)}</div>'
        parts.append(f'{name}<div class="tracks">{tracks}</div><div class="values">{values}</div>')
    axis = "".join(f'<span style="left:{20 * tick}%">{tick / 5:g}</span>' for tick in range(6))
    told = "Band: 95 % interval." + (" Dashed: guessing." if chance else "")
    body = f'<div class="arms">{"".join(parts)}<div class="axis">{axis}</div></div>'
    return _plot(body, told, list(arms) if len(arms) > 1 else [], shapes=True)


def forest_chart(rows: Sequence[Row]) -> str:
    """Differences with their 95 % intervals around none, one line each, in points (hundredths).

    Args:
        rows: Label, difference, lower and upper end, in [-1, 1]; a row with a number that is not finite has no line.
    """
    usable = [row for row in rows if all(map(math.isfinite, row[1:]))]
    if not rows:
        return NOTHING
    reach = max((abs(number) for row in usable for number in row[1:]), default=0.0)
    widest = _rounded(0.0, max(100 * reach, 1.0))[1]
    parts = []
    for label, value, lower, upper in rows:
        zero = f'<i class="chance" style="left:{_percent(0.5)}"></i>'
        if (label, value, lower, upper) not in usable:
            track, told = f'<div class="track">{zero}</div>', "<span>undefined</span>"
        else:
            left, dot, right = (0.5 + 50 * number / widest for number in (lower, value, upper))
            track = (
                f'<div class="track">{zero}<i class="bar s2" style="left:{_percent(left)};right:{_percent(1 - right)}">'
                f'</i><i class="dot s2 round" style="left:{_percent(dot)}"></i></div>'
            )
            told = f"<span><b>{100 * value:+.1f}</b> {100 * lower:+.1f} to {100 * upper:+.1f}</span>"
        name = f'<div class="name">{escape(label)}</div>'
        parts.append(f'{name}<div class="tracks">{track}</div><div class="values">{told}</div>')
    axis = "".join(
        f'<span style="left:{percent}%">{told}</span>'
        for percent, told in ((0, f"{-widest:+g}"), (50, "0"), (100, f"{widest:+g}"))
    )
    body = f'<div class="arms">{"".join(parts)}<div class="axis">{axis}</div></div>'
    return _plot(body, "Points; band: 95 % interval; dashed: no difference.", [], wide=True)


def histogram(values: Sequence[float], *, x_label: str, bins: int = 20, style: int = 2, percent: bool = True) -> str:
    """How often values between 0 and 1 occur.

    Args:
        values: Those that are not finite are left out; those outside are put at the ends.
        x_label: What they are a share of.
        bins: Columns.
        style: Which of the page's colours, 1 to 5.
        percent: Write values as percentages; else as they are.
    """
    told = (lambda value: f"{value:.0%}") if percent else (lambda value: f"{value:g}")
    finite = np.array([value for value in values if math.isfinite(value)])
    if len(finite) == 0:
        return NOTHING
    counts, _ = np.histogram(np.clip(finite, 0, 1), bins=bins, range=(0, 1))
    width, height, bottom, left = 360, 150, 42, 34
    parts = [_open(width, height, f"histogram of the {x_label}", "small")]
    floor, step = height - bottom, (width - left - 10) / bins
    parts.append(f'<text x="{left - 6}" y="18" text-anchor="end">{counts.max()}</text>')
    parts.append(f'<path class="grid" d="M{left} {floor + 0.5}H{width - 10}"/>')
    for index, count in enumerate(counts):
        tall = (floor - 12) * count / counts.max()
        parts.append(
            f'<rect class="s{style}" x="{left + index * step + 0.75:.1f}" y="{floor - tall:.1f}" '
            f'width="{step - 1.5:.1f}" height="{tall:.1f}">'
            f"<title>{told(index / bins)} to {told((index + 1) / bins)}: {count}</title></rect>"
        )
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        x = left + share * (width - left - 10)
        parts.append(f'<text x="{x:.1f}" y="{floor + 17}" text-anchor="{anchor}">{told(share)}</text>')
    parts.append(f'<text x="{(left + width - 10) / 2}" y="{height - 5}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join(parts) + "</svg>"


def confusion_matrix(classes: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """Counts by label (row) and prediction (column), shaded by their share of the row, as a table."""
    head = "".join(f'<th class="n" scope="col">{escape(name)}</th>' for name in classes)
    lines = []
    for place, (name, row) in enumerate(zip(classes, counts, strict=True)):
        total = max(1, sum(row))
        cells = "".join(
            f'<td class="n{" same" if place == column else ""}" style="--share:{count / total:.3f}">{count}</td>'
            for column, count in enumerate(row)
        )
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    return (
        f'<div class="scroll"><table class="matrix"><thead><tr><th>label \\ predicted</th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def duration_bars(rows: Sequence[tuple[str, float]]) -> str:
    """Seconds of some steps, each beginning where the one before ended: how a time was spent."""
    total = sum(seconds for _, seconds in rows)
    if total <= 0:
        return NOTHING
    parts, start = [], 0.0
    for name, seconds in rows:
        left, right = _percent(start / total), _percent(1 - (start + seconds) / total)
        bar = f'<div class="track plain"><i class="bar s2" style="left:{left};right:{right}"></i></div>'
        parts.append(
            f'<div class="name">{escape(name)}</div><div class="tracks">{bar}</div>'
            f'<div class="values"><span>{seconds:.1f} s</span></div>'
        )
        start += seconds
    return f'<figure class="plot wide"><div class="arms">{"".join(parts)}</div></figure>'


def _percent(share: float) -> str:
    return f"{100 * min(max(share, 0.0), 1.0):.2f}%"


def _open(width: float, height: float, told: str, kind: str = "") -> str:
    return (
        f'<svg class="chart {kind}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(told, quote=True)}">'
    )


def _plot(body: str, heading: str, names: Sequence[str], *, shapes: bool = False, wide: bool = False) -> str:
    items = ""
    for index, name in enumerate(names):
        style = f"s{index % _COLOURS + 1}"
        mark = ("round", "square")[index % 2] if shapes else "dash"
        items += f'<span><i class="key {mark} {style}"></i>{escape(name)}</span>'
    legend = f'<figcaption class="legend"><b>{escape(heading)}</b>{items}</figcaption>'
    return f'<figure class="plot{" wide" if shapes or wide else ""}">{legend}{body}</figure>'


def _path(line: Points, at: Callable[[tuple[float, float]], tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, line))


def _thinned(line: Points) -> Points:
    """At most so many points that the eye loses nothing and the page stays small; the last one is kept."""
    step = -(-len(line) // _DRAWN_MAX)
    return line if step == 1 else line[::-1][::step][::-1]


def _smooth(line: Points, window: int) -> Points:
    """Running mean around each point; at the ends over what is there."""
    sums = np.concatenate([[0.0], np.cumsum([y for _, y in line])])
    places = np.arange(len(line))
    first, last = np.maximum(places - window // 2, 0), np.minimum(places + window // 2 + 1, len(line))
    means = (sums[last] - sums[first]) / (last - first)
    return [(x, float(mean)) for (x, _), mean in zip(line, means, strict=True)]


def _apart(ends: list[End], least_px: float, floor: float) -> list[End]:
    """Move texts down until they no longer touch, then all up if the last fell out."""
    placed: list[End] = []
    for y, x, text, style in sorted(ends):
        placed.append((max(y, placed[-1][0] + least_px) if placed else y, x, text, style))
    excess = max(0.0, placed[-1][0] - floor)
    return [(y - excess, x, text, style) for y, x, text, style in placed]


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    least = max(abs(low), abs(high), 1e-300) * 1e-9
    room = max(0.5, least * 1e8)
    return (low, high) if high - low > least else (low - room, high + room)


def _step(low: float, high: float) -> float:
    """The least of 1, 2 and 5 times a power of ten that divides a span into five or fewer."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)


def _rounded(low: float, high: float) -> tuple[float, float, float]:
    """A span widened to whole steps, and the step."""
    step = _step(low, high)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, step


def _ticks(low: float, high: float, step: float) -> list[float]:
    """Multiples of a step between two ends."""
    first = math.ceil(low / step - 1e-9)
    return [place * step for place in range(first, math.floor(high / step + 1e-9) + 1)]


def _number(value: float) -> str:
    return f"{value:.6g}" if value else "0"
