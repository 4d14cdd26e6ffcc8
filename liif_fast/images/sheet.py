"""Labeled pictures next to each other."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

_LABEL_HEIGHT = 20
_MARGIN = 8


def side_by_side(panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures of equal height in a row, each under its label. panels: (label, picture)."""
    width = sum(panel.width for _, panel in panels) + _MARGIN * (len(panels) - 1)
    sheet = Image.new("RGB", (width, panels[0][1].height + _LABEL_HEIGHT), "white")
    draw = ImageDraw.Draw(sheet)
    left = 0
    for label, panel in panels:
        draw.text((left + 4, 4), label, fill="black")
        sheet.paste(panel, (left, _LABEL_HEIGHT))
        left += panel.width + _MARGIN
    return sheet
