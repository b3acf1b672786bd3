"""Draws flow.svg, the way data take through a step: python docs/flow.py."""

import pathlib
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 760, 470
FONT = "font-family='DejaVu Sans, Verdana, sans-serif'"
PARTS = [  # x, y, width, height, colour, title, lines
    (40, 90, 320, 112, "#CFE3F3", "judge", [
        "the last 128 losses and gradient norms",
        "errors in units of what is tolerated",
        "doubt -> ACCEPT, BOUND, SKIP or REVERT",
    ]),
    (400, 90, 320, 112, "#D8EFD9", "anchor", [
        "a copy of the params",
        "moved while both errors are below 1/2",
        "audit: cosine of gradients and way back",
    ]),
    (40, 240, 320, 112, "#FBE8C9", "inner", [
        "micro: a rate for every entry",
        "+ weight decay",
        "macro: one rate r, then the learning rate",
    ]),
    (400, 240, 320, 112, "#F4D6DE", "act", [
        "ACCEPT, BOUND: d times the inner update",
        "SKIP: zero",
        "REVERT: anchor - params",
    ]),
]  # fmt: skip
ARROWS = [  # from, to, label and where it stands
    ((200, 40), (200, 88), "value, |gradient|", (210, 62)),
    ((560, 40), (560, 88), "params, gradient", (570, 62)),
    ((360, 146), (398, 146), "", (0, 0)),
    ((130, 202), (130, 238), "verdict; gradient, bounded or 0", (140, 225)),
    ((430, 202), (330, 238), "audit", (400, 225)),
    ((360, 296), (398, 296), "", (0, 0)),
    ((600, 202), (600, 238), "anchor", (610, 225)),
    ((560, 352), (560, 412), "updates", (570, 386)),
]


def text(x: float, y: float, line: str, size: int = 13, weight: str = "normal") -> str:
    """Returns a line of text."""
    style = f"{FONT} font-size='{size}' font-weight='{weight}' fill='#222222'"
    return f"<text x='{x}' y='{y}' {style}>{escape(line)}</text>"


def drawing() -> str:
    """Returns the figure as SVG."""
    size = f"width='{WIDTH}' height='{HEIGHT}' viewBox='0 0 {WIDTH} {HEIGHT}'"
    head = "<path d='M0,0 L8,4 L0,8 z' fill='#444444'/>"
    lines = [
        f"<svg xmlns='http://www.w3.org/2000/svg' {size}>",
        "<defs><marker id='head' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='7' "
        f"markerHeight='7' orient='auto'>{head}</marker></defs>",
        f"<rect width='{WIDTH}' height='{HEIGHT}' fill='white'/>",
        "<rect x='20' y='72' width='720' height='300' rx='10' fill='none' "
        "stroke='#888888' stroke-dasharray='5 4'/>",
        text(34, 366, "error_regulate", weight="bold"),
        text(140, 28, "value = loss at params", weight="bold"),
        text(480, 28, "params, gradient at params", weight="bold"),
        text(440, 434, "params + updates: the next params", weight="bold"),
    ]
    for x, y, width, height, colour, title, content in PARTS:
        lines.append(
            f"<rect x='{x}' y='{y}' width='{width}' height='{height}' rx='6' "
            f"fill='{colour}' stroke='#666666'/>"
        )
        lines.append(text(x + 12, y + 24, title, size=15, weight="bold"))
        lines += [text(x + 12, y + 50 + 22 * i, line) for i, line in enumerate(content)]
    for (x1, y1), (x2, y2), label, (x, y) in ARROWS:
        lines.append(
            f"<line x1='{x1}' y1='{y1}' x2='{x2}' y2='{y2}' stroke='#444444' "
            "stroke-width='1.6' marker-end='url(#head)'/>"
        )
        if label:
            lines.append(text(x, y, label, size=12))
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    pathlib.Path(__file__).with_name("flow.svg").write_text(drawing())
