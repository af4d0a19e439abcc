"""Scenes of the demo's clips: objects, motions, captions, and positions in every frame."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial

from frozen_fast.errors import UserError

CLIP_FRAMES = 32

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 40, 40),
    "green": (50, 190, 70),
    "blue": (55, 90, 235),
    "yellow": (240, 215, 50),
    "white": (245, 245, 245),
    "purple": (170, 60, 200),
}
RADIUS = 0.16  # share of the frame's side
POLYGONS: dict[str, tuple[tuple[float, float], ...]] = {
    "square": ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)),
    "triangle": ((0.0, -1.05), (1.0, 0.8), (-1.0, 0.8)),
    "cross": (
        (-0.33, -1.0),
        (0.33, -1.0),
        (0.33, -0.33),
        (1.0, -0.33),
        (1.0, 0.33),
        (0.33, 0.33),
        (0.33, 1.0),
        (-0.33, 1.0),
        (-0.33, 0.33),
        (-1.0, 0.33),
        (-1.0, -0.33),
        (-0.33, -0.33),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Thing:
    """A shape of a colour: what a caption calls "red circle"."""

    shape: str
    colour: str

    @property
    def words(self) -> str:
        """The words of the caption."""
        return f"{self.colour} {self.shape}"


# One shape of each colour: at 64 pixels a small model tells colours apart at once, a circle from a square much later.
THINGS = (
    Thing(colour="red", shape="circle"),
    Thing(colour="green", shape="square"),
    Thing(colour="blue", shape="triangle"),
    Thing(colour="yellow", shape="cross"),
    Thing(colour="white", shape="circle"),
    Thing(colour="purple", shape="square"),
)

# Captions of a motion and of its reverse. What tells the two apart must be words that a sentence encoder tells apart:
# "from left to right" and "from right to left" are a tenth as far from each other as two colours; "stops" and "waits",
# "falls" and "rises" are nearly as far.
MOTIONS: dict[str, tuple[str, str]] = {
    "right_stop": ("a {} moves from left to right, then stops", "a {} waits, then moves from right to left"),
    "left_stop": ("a {} moves from right to left, then stops", "a {} waits, then moves from left to right"),
    "down": ("a {} falls", "a {} rises"),
    "grow": ("a {} grows", "a {} shrinks"),
    "appear": ("a {} appears", "a {} disappears"),
}
STILL_PLACES: dict[str, tuple[float, float]] = {
    "on the left": (0.22, 0.5),
    "on the right": (0.78, 0.5),
    "at the top": (0.5, 0.22),
    "at the bottom": (0.5, 0.78),
    "in the middle": (0.5, 0.5),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a set holds; two runs with the same recipe give the same bytes."""

    seed: int = 0
    train_pairs: int = 120
    test_pairs: int = 30
    stills: int = 120
    version: int = 4


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What happens in a pair of clips: a motion, and the thing that takes part in it."""

    motion: str
    thing: Thing

    def captions(self) -> tuple[str, str]:
        """The caption of the clip and that of its reverse."""
        forward, backward = MOTIONS[self.motion]
        return forward.format(self.thing.words), backward.format(self.thing.words)


@dataclass(frozen=True, kw_only=True)
class Spot:
    """One thing as it is drawn in one frame: centre and radius as shares of the side, opacity from 0 to 1."""

    shape: str
    rgb: tuple[float, ...]
    x: float
    y: float
    radius: float
    opacity: float = 1.0


def spot_of(thing: Thing, *, x: float, y: float, radius: float, opacity: float = 1.0) -> Spot:
    """A thing at a place."""
    return Spot(shape=thing.shape, rgb=COLOURS[thing.colour], x=x, y=y, radius=radius, opacity=opacity)


def all_scenes(seed: int) -> list[Scene]:
    """Every scene, motions in turn, things shuffled within a motion."""
    rng = random.Random(f"scenes:{seed}")
    decks = []
    for motion in MOTIONS:
        deck = [Scene(motion=motion, thing=thing) for thing in THINGS]
        rng.shuffle(deck)
        decks.append(deck)
    return [scene for turn in zip(*decks, strict=True) for scene in turn]


def draw_scenes(recipe: Recipe) -> tuple[list[Scene], list[Scene]]:
    """The scenes of the training and of the test pairs.

    Training goes through all scenes again and again, the test set has a scene at most once, so that no two of its
    clips share a caption. A clip of the test set is new in its place, speed, timing and background; its caption is
    not. Few captions with several clips each are what lets a few hundred steps show the order of frames.

    Raises:
        UserError: for invalid counts.
    """
    scenes = all_scenes(recipe.seed)
    if not 1 <= recipe.test_pairs <= len(scenes):
        raise UserError(f"--test-pairs: got {recipe.test_pairs}; allowed: 1 to {len(scenes)}, one of each scene")
    if recipe.train_pairs < 1:
        raise UserError(f"--train-pairs: got {recipe.train_pairs}; allowed: from 1")
    return [scenes[index % len(scenes)] for index in range(recipe.train_pairs)], scenes[: recipe.test_pairs]


def progress(time: float, start: float, end: float) -> float:
    """How far a motion between two times has come, from 0 to 1, all times as shares of the clip."""
    return min(1.0, max(0.0, (time - start) / (end - start)))


def plan(scene: Scene, rng: random.Random) -> list[list[Spot]]:
    """Where everything is in every frame of a clip: CLIP_FRAMES lists of spots. Draws place, speed and timing."""
    radius = RADIUS * rng.uniform(0.9, 1.1)
    near, far = rng.uniform(0.14, 0.22), rng.uniform(0.78, 0.86)
    across, along = rng.uniform(0.25, 0.75), rng.uniform(0.3, 0.7)
    start = rng.uniform(0.0, 0.08)
    end = rng.uniform(0.5, 0.62) if scene.motion.endswith("_stop") else rng.uniform(0.92, 1.0)
    switch = rng.uniform(0.4, 0.6)
    smallest, largest = rng.uniform(0.05, 0.08), rng.uniform(0.26, 0.34)
    kind = scene.motion.split("_")[0]

    def spots(time: float) -> list[Spot]:
        done = progress(time, start, end)
        place = near + (far - near) * done
        still = partial(spot_of, scene.thing, x=along, y=across, radius=radius)
        if kind in ("right", "left"):
            return [still(x=place if kind == "right" else 1.0 - place)]
        if kind in ("down", "up"):
            return [still(x=across, y=place if kind == "down" else 1.0 - place)]
        if kind == "grow":
            return [still(radius=smallest + (largest - smallest) * done)]
        shown = progress(time, switch - 0.15, switch + 0.15)
        assert kind == "appear", kind
        return [still(opacity=shown)]

    return [spots(index / (CLIP_FRAMES - 1)) for index in range(CLIP_FRAMES)]
