"""The roofline picture: tokens a second against the bytes that a token needs, both logarithmic.

results of suites -> SVG; empty without one
"""

import math
from collections.abc import Iterator
from statistics import median
from typing import Any, NamedTuple

WIDTH, HEIGHT = 860, 480
LEFT, RIGHT, TOP, BOTTOM = 70, 30, 30, 50
LABEL_GAP = 13.0  # between the lines of neighbouring labels
STYLE = (
    "text{font:12px sans-serif;fill:#222}.grid{stroke:#ddd}.lead{stroke:#999}"
    ".roof{stroke:#c33;stroke-width:2}.dot{fill:#1769aa}"
)


class Dot(NamedTuple):
    """A row of a suite that was measured at batch 1."""

    name: str
    gigabytes: float  # of a token
    tok_s: float
    share: float


def roofline(results: list[dict[str, Any]]) -> str:
    """The newest of every row, below the roof of the newest suite's bandwidth."""
    suites = [result for result in results if result["kind"] == "suite"]
    dots = {dot.name: dot for result in suites for dot in dots_of(result)}
    if not dots:
        return ""
    reads = [gb_s for model in suites[-1]["models"] for gb_s in model["read_gb_s"]]
    return "\n".join(draw(sorted(dots.values(), key=lambda d: d.gigabytes), median(reads))) + "\n"


def dots_of(result: dict[str, Any]) -> Iterator[Dot]:
    """The rows that have a share."""
    for model in result["models"]:
        for reached in model["reached"]:
            row = reached["row"]
            if reached["what"] == "share" and row["batch"] == 1:
                gigabytes = row["bytes_per_step"] / 1e9
                yield Dot(reached["name"], gigabytes, row["tok_s"], reached["value"])


def draw(dots: list[Dot], gb_s: float) -> Iterator[str]:
    """The lines of the picture."""
    low, high = bounds([dot.gigabytes for dot in dots])
    bottom, top = bounds([*(dot.tok_s for dot in dots), gb_s / dots[0].gigabytes])

    def x(gigabytes: float) -> float:
        part = math.log(gigabytes / low) / math.log(high / low)
        return LEFT + part * (WIDTH - LEFT - RIGHT)

    def y(tok_s: float) -> float:
        part = math.log(tok_s / bottom) / math.log(top / bottom)
        return HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM)

    yield f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
    yield f"<style>{STYLE}</style>"
    yield f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>'
    for tick in ticks(low, high):
        yield line("grid", x(tick), TOP, x(tick), HEIGHT - BOTTOM)
        yield text(x(tick), HEIGHT - BOTTOM + 18, f"{tick:g}", "middle")
    for tick in ticks(bottom, top):
        yield line("grid", LEFT, y(tick), WIDTH - RIGHT, y(tick))
        yield text(LEFT - 8, y(tick) + 4, f"{tick:g}", "end")
    yield text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, "GB that a token needs", "middle")
    yield text(LEFT, TOP - 12, "tokens a second", "start")
    left, right = max(low, gb_s / top), min(high, gb_s / bottom)
    yield line("roof", x(left), y(gb_s / left), x(right), y(gb_s / right))
    yield text(WIDTH - RIGHT, TOP + 14, f"the roof: {gb_s:.0f} GB/s, measured", "end")
    below = -math.inf
    for dot in dots:
        at_x, at_y = x(dot.gigabytes), y(dot.tok_s)
        below = max(below + LABEL_GAP, at_y + 24)
        yield line("lead", at_x, at_y, at_x - 8, below - 4)
        yield f'<circle class="dot" cx="{at_x:.1f}" cy="{at_y:.1f}" r="4"/>'
        yield text(at_x - 10, below, f"{dot.name} {dot.share:.0%}", "end")
    yield "</svg>"


def bounds(values: list[float]) -> tuple[float, float]:
    """A range with some room on both sides of the values."""
    return min(values) / 2.5, max(values) * 1.6


def ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within a range."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high]


def line(style: str, x1: float, y1: float, x2: float, y2: float) -> str:
    """A straight line."""
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def text(x: float, y: float, words: str, anchor: str) -> str:
    """Words that start, end or have their middle at a place."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>'
