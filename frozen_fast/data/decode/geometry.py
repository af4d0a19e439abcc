"""Boxes and sizes of a view, in upright pixels and in pixels as stored. Pure arithmetic."""

from __future__ import annotations

from typing import NamedTuple

from frozen_fast.data.decode.types import TestView, TrainView


class Box(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int


class Steps(NamedTuple):
    """What a view does to upright frames: resize (None: not), crop, then resize to the resolution, then flip."""

    size: tuple[int, int] | None
    box: Box
    flip: bool


def view_steps(view: TrainView | TestView, height: int, width: int) -> Steps:
    """Spell a view out for frames of a size.

    TestView follows torchvision: the short side becomes `resize`, the long side is cut down to whole pixels, and
    the centre crop's corner is rounded half to even.

    Args:
        view: the view.
        height: upright height, pixels.
        width: upright width, pixels.

    Raises:
        ValueError: a training crop that does not lie inside the frame.
    """
    if isinstance(view, TrainView):
        box = Box(view.top, view.left, view.height, view.width)
        inside = 0 <= box.top <= height - box.height and 0 <= box.left <= width - box.width
        if not inside or box.height < 1 or box.width < 1:
            raise ValueError(f"view: got {view}; allowed: a box inside {height} x {width} pixels (height x width)")
        return Steps(None, box, view.flip)
    short = view.resize
    if height <= width:
        size = (short, max(short, int(short * width / height)))
    else:
        size = (max(short, int(short * height / width)), short)
    share = {"begin": 0.0, "centre": 0.5, "end": 1.0}[view.place]
    corner = (round((size[0] - short) * share), round((size[1] - short) * share))
    return Steps(None if size == (height, width) else size, Box(*corner, short, short), False)


def stored_box(box: Box, height: int, width: int, rotation_degrees: int) -> Box:
    """The box of stored pixels that becomes `box` when the frame is turned clockwise.

    Args:
        box: in upright pixels.
        height: stored height, before the turn.
        width: stored width, before the turn.
        rotation_degrees: clockwise turn, 0, 90, 180 or 270.
    """
    if rotation_degrees == 90:
        return Box(height - box.left - box.width, box.top, box.width, box.height)
    if rotation_degrees == 180:
        return Box(height - box.top - box.height, width - box.left - box.width, box.height, box.width)
    if rotation_degrees == 270:
        return Box(box.left, width - box.top - box.height, box.width, box.height)
    return box
