"""What happens in the demo's clips: things, motions, their captions, and where everything is in every frame."""

from __future__ import annotations

import itertools
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
RADII: dict[str, float] = {"small": 0.11, "large": 0.19}  # share of the frame's side
POLYGONS: dict[str, tuple[tuple[float, float], ...]] = {
    "square": ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)),
    "triangle": ((0.0, -1.05), (1.0, 0.8), (-1.0, 0.8)),
    "cross": (
        (-0.33, -1.0), (0.33, -1.0), (0.33, -0.33), (1.0, -0.33), (1.0, 0.33), (0.33, 0.33),
        (0.33, 1.0), (-0.33, 1.0), (-0.33, 0.33), (-1.0, 0.33), (-1.0, -0.33), (-0.33, -0.33),
    ),
}  # fmt: skip
SHAPES = ("circle", *POLYGONS)

# Captions of a motion and of its reverse. {a}: "small red circle"; {b}: the second thing. The words that tell the two
# apart are words that a sentence encoder tells apart: it sets "from left to right" and "from right to left" ten times
# closer to each other than "moves right" and "moves left".
MOTIONS: dict[str, tuple[str, str]] = {
    "right": ("a {a} moves right", "a {a} moves left"),
    "right_stop": ("a {a} moves from left to right, then stops", "a {a} waits, then moves from right to left"),
    "left_stop": ("a {a} moves from right to left, then stops", "a {a} waits, then moves from left to right"),
    "down": ("a {a} falls", "a {a} rises"),
    "down_stop": ("a {a} falls from top to bottom, then stops", "a {a} waits, then rises from bottom to top"),
    "up_stop": ("a {a} rises from bottom to top, then stops", "a {a} waits, then falls from top to bottom"),
    "grow": ("a {a} grows", "a {a} shrinks"),
    "appear": ("a {a} appears", "a {a} disappears"),
    "join": ("a {a} is joined by a {b}", "a {b} leaves a {a}"),
    "approach": ("a {a} approaches a {b}", "a {a} moves away from a {b}"),
}
MOTIONS_OF_TWO = ("join", "approach")
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
    train_pairs: int = 220
    test_pairs: int = 50
    stills: int = 240
    version: int = 1


@dataclass(frozen=True, kw_only=True)
class Thing:
    """A shape in words: what a caption calls "small red circle"."""

    shape: str
    colour: str = ""
    size: str = ""

    @property
    def words(self) -> str:
        """The words of the caption."""
        return " ".join(word for word in (self.size, self.colour, self.shape) if word)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What happens in a pair of clips: a motion and the things that take part in it."""

    motion: str
    first: Thing
    second: Thing

    def captions(self) -> tuple[str, str]:
        """The caption of the clip and that of its reverse."""
        words = {"a": self.first.words, "b": self.second.words}
        forward, backward = MOTIONS[self.motion]
        return forward.format(**words), backward.format(**words)


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


def all_scenes(motion: str) -> list[Scene]:
    """Every scene of a motion: what can take part in it."""
    if motion in MOTIONS_OF_TWO:
        things = [Thing(shape=shape, colour=colour) for shape, colour in itertools.product(SHAPES, COLOURS)]
        pairs = itertools.permutations(things, 2)
        return [Scene(motion=motion, first=one, second=other) for one, other in pairs if one.colour != other.colour]
    sizes = ("",) if motion == "grow" else tuple(RADII)
    products = itertools.product(SHAPES, COLOURS, sizes)
    things = [Thing(shape=shape, colour=colour, size=size) for shape, colour, size in products]
    return [Scene(motion=motion, first=thing, second=thing) for thing in things]


def draw_scenes(recipe: Recipe) -> tuple[list[Scene], list[Scene]]:
    """Draw the scenes of the training and of the test pairs, or raise a UserError for counts that cannot be.

    Motions come in turn. No scene, hence no caption, of the test set is in the training set or twice in the test
    set, while every colour, shape, size and motion of the test set has been seen in training.
    """
    rng = random.Random(f"scenes:{recipe.seed}")
    decks = {motion: all_scenes(motion) for motion in MOTIONS}
    for deck in decks.values():
        rng.shuffle(deck)
    turns = list(MOTIONS)
    most = len(turns) * (min(len(deck) for deck in decks.values()) // 2)
    if not 1 <= recipe.test_pairs <= most:
        raise UserError(
            f"--test-pairs: got {recipe.test_pairs}; allowed: 1 to {most}, which leaves scenes for training"
        )
    if recipe.train_pairs < 1:
        raise UserError(f"--train-pairs: got {recipe.train_pairs}; allowed: from 1")
    test = [decks[turns[index % len(turns)]].pop() for index in range(recipe.test_pairs)]
    train = []
    for index in range(recipe.train_pairs):
        deck = decks[turns[index % len(turns)]]
        train.append(deck[(index // len(turns)) % len(deck)])
    return train, test


def progress(time: float, start: float, end: float) -> float:
    """How far a motion between two times has come, from 0 to 1, all times as shares of the clip."""
    return min(1.0, max(0.0, (time - start) / (end - start)))


def plan(scene: Scene, rng: random.Random) -> list[list[Spot]]:
    """Where everything is in every frame of a clip: CLIP_FRAMES lists of spots. Draws place, speed and timing."""
    radius = RADII.get(scene.first.size, 0.14) * rng.uniform(0.92, 1.08)
    near, far = rng.uniform(0.14, 0.22), rng.uniform(0.78, 0.86)
    across, along = rng.uniform(0.25, 0.75), rng.uniform(0.3, 0.7)
    start = rng.uniform(0.0, 0.08)
    end = rng.uniform(0.5, 0.62) if scene.motion.endswith("_stop") else rng.uniform(0.92, 1.0)
    switch = rng.uniform(0.4, 0.6)
    smallest, largest = rng.uniform(0.05, 0.08), rng.uniform(0.26, 0.34)
    mirrored = rng.random() < 0.5
    apart = rng.uniform(-0.12, 0.12)
    kind = scene.motion.split("_")[0]

    def side(x: float) -> float:
        return 1.0 - x if mirrored else x

    def spots(time: float) -> list[Spot]:
        done = progress(time, start, end)
        place = near + (far - near) * done
        still = partial(spot_of, scene.first, x=along, y=across, radius=radius)
        other = partial(spot_of, scene.second, x=side(0.78), y=across + apart, radius=radius)
        if kind in ("right", "left"):
            return [still(x=place if kind == "right" else 1.0 - place)]
        if kind in ("down", "up"):
            return [still(x=across, y=place if kind == "down" else 1.0 - place)]
        if kind == "grow":
            return [still(radius=smallest + (largest - smallest) * done)]
        shown = progress(time, switch - 0.15, switch + 0.15)
        if kind == "appear":
            return [still(opacity=shown)]
        if kind == "join":
            return [still(x=side(0.25)), other(opacity=shown)]
        assert kind == "approach", kind
        return [still(x=side(0.12 + 0.36 * done)), other()]

    return [spots(index / (CLIP_FRAMES - 1)) for index in range(CLIP_FRAMES)]
