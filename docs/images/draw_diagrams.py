"""Draw the diagrams of the documentation: python docs/images/draw_diagrams.py writes model.svg and data_path.svg."""

from __future__ import annotations

from html import escape
from pathlib import Path

HERE = Path(__file__).parent
STYLE = (
    "text{font:14px sans-serif;fill:#222}.small{font-size:12px;fill:#555}rect{fill:#eef2fb;stroke:#3f51b5;rx:6}"
    ".tower{fill:#f7f7f7;stroke:#999}.loss{fill:#fdeee6;stroke:#d2691e}path{stroke:#444;fill:none;marker-end:url(#a)}"
)
ARROW = '<marker id="a" orient="auto" markerWidth="8" markerHeight="8" refX="7" refY="4"><path d="M0,0L8,4L0,8z" '
ARROW += 'style="fill:#444;stroke:none;marker-end:none"/></marker>'


def box(x: int, y: int, width: int, height: int, *lines: str, kind: str = "") -> str:
    """A rectangle with centred lines of text, the second and later ones small."""
    parts = [f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}"/>']
    first = y + height / 2 + 5 - 8 * (len(lines) - 1)
    for number, line in enumerate(lines):
        style = "" if number == 0 else ' class="small"'
        parts.append(
            f'<text{style} x="{x + width / 2}" y="{first + 17 * number}" text-anchor="middle">{escape(line)}</text>'
        )
    return "".join(parts)


def arrow(*points: tuple[int, int]) -> str:
    """A line through points with a head at its end."""
    return '<path d="M' + " L".join(f"{x},{y}" for x, y in points) + '"/>'


def picture(name: str, width: int, height: int, *parts: str) -> None:
    """Write one file."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">'
    body = f"<style>{STYLE}</style><defs>{ARROW}</defs>" + "".join(parts) + "</svg>\n"
    (HERE / name).write_text(head + body, encoding="utf-8")


def model() -> None:
    """The dual encoder, and one space-time block."""
    picture(
        "model.svg",
        960,
        420,
        box(20, 40, 190, 50, "T frames", "[B, T, 3, 224, 224]"),
        box(20, 130, 190, 50, "16 x 16 patches", "+ space and time position"),
        box(20, 220, 190, 60, "12 space-time blocks", "S = 1 + 196 T tokens"),
        box(20, 320, 190, 50, "CLS, linear", "video [B, 256]"),
        box(240, 40, 150, 50, "caption", "L tokens"),
        box(240, 220, 150, 60, "DistilBERT", "token 0"),
        box(240, 320, 150, 50, "linear", "text [B, 256]"),
        arrow((115, 90), (115, 130)),
        arrow((115, 180), (115, 220)),
        arrow((115, 280), (115, 320)),
        arrow((315, 90), (315, 220)),
        arrow((315, 280), (315, 320)),
        box(430, 320, 160, 50, "contrastive loss", "cosine / temperature", kind="loss"),
        arrow((390, 345), (430, 345)),
        arrow((115, 370), (115, 395), (510, 395), (510, 370)),
        box(620, 20, 320, 390, "", kind="tower"),
        '<text x="780" y="45" text-anchor="middle">one space-time block</text>',
        box(670, 70, 190, 46, "time attention", "same position, all frames"),
        box(670, 160, 190, 46, "space attention", "same frame, all positions"),
        box(670, 270, 190, 46, "MLP", "GELU"),
        '<text x="636" y="80">x</text>',
        arrow((765, 116), (765, 160)),
        arrow((765, 206), (765, 270)),
        arrow((765, 316), (765, 390)),
        arrow((650, 60), (650, 238), (765, 238)),
        '<text class="small" x="775" y="142">x + time</text>',
        '<text class="small" x="775" y="228">y = x + space (Frozen</text>',
        '<text class="small" x="775" y="244">in Time: not x + time)</text>',
        '<text class="small" x="775" y="356">y + MLP(y)</text>',
    )


def data_path() -> None:
    """From files on disk to a batch on the device."""
    steps = [
        ("sources", "annotations -> clips"),
        ("plan", "which clips and frames"),
        ("decode or shards", "frames as uint8"),
        ("load", "crop, flip, normalise"),
        ("step", "towers, loss, update"),
        ("records", "steps.jsonl"),
        ("report", "from the run folder"),
    ]
    parts = [box(20 + 165 * i, 30, 145, 56, *step) for i, step in enumerate(steps)]
    parts += [arrow((165 + 165 * i, 58), (185 + 165 * i, 58)) for i in range(len(steps) - 1)]
    picture("data_path.svg", 1180, 110, *parts)


if __name__ == "__main__":
    model()
    data_path()
