"""Named sizes of the space-time transformer; no torch."""

from __future__ import annotations

from dataclasses import dataclass

from frozen_fast.errors import UserError, unknown_name


@dataclass(frozen=True, kw_only=True)
class VideoSize:
    """The sizes of a video tower; frames are square."""

    resolution: int
    patch: int
    width: int
    depth: int
    heads: int
    mlp_ratio: int = 4

    def __post_init__(self) -> None:
        """Check that the sizes are consistent."""
        for name in ("resolution", "patch", "width", "depth", "heads", "mlp_ratio"):
            if getattr(self, name) < 1:
                raise UserError(f"model.video.{name}: got {getattr(self, name)}; allowed: 1 or more")
        if self.resolution % self.patch:
            raise UserError(f"model.video.resolution: got {self.resolution}; allowed: multiples of patch {self.patch}")
        if self.width % self.heads:
            raise UserError(f"model.video.width: got {self.width}; allowed: multiples of heads {self.heads}")

    @property
    def patches_per_frame(self) -> int:
        """P."""
        return (self.resolution // self.patch) ** 2


VIDEO_SIZES: dict[str, VideoSize] = {
    "base_patch16_224": VideoSize(resolution=224, patch=16, width=768, depth=12, heads=12),
    "base_patch32_224": VideoSize(resolution=224, patch=32, width=768, depth=12, heads=12),
    "small_patch16_224": VideoSize(resolution=224, patch=16, width=384, depth=12, heads=6),
    "small_patch14_224": VideoSize(resolution=224, patch=14, width=384, depth=12, heads=6),
    "small_patch14_112": VideoSize(resolution=112, patch=14, width=384, depth=12, heads=6),
    "tiny_patch16_224": VideoSize(resolution=224, patch=16, width=192, depth=12, heads=3),
    "mini_patch16_96": VideoSize(resolution=96, patch=16, width=192, depth=6, heads=3),
    "mini_patch8_64": VideoSize(resolution=64, patch=8, width=192, depth=6, heads=3),
    "mini_patch16_64": VideoSize(resolution=64, patch=16, width=192, depth=6, heads=3),
    "nano_patch16_96": VideoSize(resolution=96, patch=16, width=128, depth=4, heads=2),
    "nano_patch16_64": VideoSize(resolution=64, patch=16, width=128, depth=4, heads=2),
    "nano_patch8_64": VideoSize(resolution=64, patch=8, width=128, depth=4, heads=2),
    "pico_patch16_32": VideoSize(resolution=32, patch=16, width=64, depth=2, heads=2),
}
"""Named sizes: base, small and tiny are ViT's; mini, nano and pico are for demonstrations and tests on a CPU."""


def named_size(name: str | None) -> VideoSize:
    """The sizes that model.video.size names.

    Raises:
        UserError: an unknown name.
    """
    if name not in VIDEO_SIZES:
        raise unknown_name("model.video.size", str(name), VIDEO_SIZES)
    return VIDEO_SIZES[name]
