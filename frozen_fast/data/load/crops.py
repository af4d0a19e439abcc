"""Clips of one batch in one tensor, and the resize of crops on the device.

A loader process copies the crop of a clip's frames and nothing else; one antialiased resize per batch follows on the
device. Axis letters: B clips, T frames, H and W pixels of the largest crop, C channels (RGB), R resolution.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from frozen_fast.data.decode.types import Decoded

Video = Tensor | dict[str, Tensor]

CROPS, SIZES, FLIPS = "crops", "crop_sizes", "crop_flips"


def stacked(clips: Sequence[Decoded], num_frames: int | None) -> Video:
    """Clips of one batch as tensors whose first axis is the clip.

    Args:
        clips: of one T where num_frames is None.
        num_frames: pad every clip with zeros to this number of frames, and tell which are real.

    Returns:
        uint8 [B, T, 3, R, R]; where a clip is a crop that is still to be resized, {"crops" [B, T, H, W, 3],
        "crop_sizes" [B, 2] (height, width), "crop_flips" [B]}, values beyond a crop's size unset. With num_frames also
        "frame_mask" [B, num_frames], 1 on real frames, beside "video" or "crops".
    """
    frames = [clip.frames_TCHW for clip in clips]
    device = next((one.device for one in frames if one.is_cuda), frames[0].device)
    frames = [one.to(device) for one in frames]
    mask = {} if num_frames is None else {"frame_mask": _frame_mask(frames, num_frames)}
    if all(clip.flip is None for clip in clips):
        video = torch.stack(frames) if num_frames is None else torch.cat([_padded(one, num_frames) for one in frames])
        return {"video": video, **mask} if mask else video
    length = num_frames or len(frames[0])
    height, width = (max(one.shape[axis] for one in frames) for axis in (2, 3))
    crops = torch.empty(len(clips), length, height, width, 3, dtype=torch.uint8, device=device)
    for row, one in enumerate(frames):
        crops[row, : len(one), : one.shape[2], : one.shape[3]] = one.permute(0, 2, 3, 1)
        crops[row, len(one) :] = 0
    sizes = torch.tensor([one.shape[2:] for one in frames], dtype=torch.int32, device=device)
    flips = torch.tensor([bool(clip.flip) for clip in clips], device=device)
    return {CROPS: crops, SIZES: sizes, FLIPS: flips, **mask}


def _padded(frames_TCHW: Tensor, num_frames: int) -> Tensor:
    """[1, num_frames, C, H, W], zeros behind the last frame."""
    padded = frames_TCHW.new_zeros(1, num_frames, *frames_TCHW.shape[1:])
    padded[0, : len(frames_TCHW)] = frames_TCHW
    return padded


def _frame_mask(frames: Sequence[Tensor], num_frames: int) -> Tensor:
    counts = torch.tensor([len(one) for one in frames], device=frames[0].device)
    return (torch.arange(num_frames, device=counts.device) < counts[:, None]).float()


def joined(parts: Sequence[Tensor], *, pin: bool = False) -> Tensor:
    """Tensors one after the other along the first axis.

    Args:
        parts: other axes may differ in length; the result has the longest, its values beyond a part's unset.
        pin: the result is in page-locked memory, of PyTorch's caching allocator.
    """
    rows = [len(part) for part in parts]
    longest = [max(part.shape[axis] for part in parts) for axis in range(1, parts[0].dim())]
    whole = torch.empty(sum(rows), *longest, dtype=parts[0].dtype, device=parts[0].device, pin_memory=pin)
    for part, place in zip(parts, whole.split(rows), strict=True):
        inside = (slice(length) for length in part.shape)
        place[tuple(inside)] = part
    return whole


def joined_videos(parts: Sequence[Video], *, pin: bool = False) -> Video:
    """What stacked() gave for the parts of a batch, as one."""
    if not isinstance(parts[0], dict):
        return joined([part for part in parts if isinstance(part, Tensor)], pin=pin)
    dicts = [part for part in parts if isinstance(part, dict)]
    return {name: joined([part[name] for part in dicts], pin=pin) for name in dicts[0]}


def finished(video: Video, resolution: int | None) -> Video:
    """Crops resized where they are; anything else as it is.

    Args:
        video: of a batch, on the device.
        resolution: R; not needed where no clip is a crop.
    """
    if not isinstance(video, Mapping) or CROPS not in video:
        return video
    if resolution is None:
        raise ValueError("resolution: got None for a batch of crops; allowed: the side of the model's frames")
    frames = resize_crops(video[CROPS], video[SIZES], video[FLIPS], resolution)
    return {"video": frames, "frame_mask": video["frame_mask"]} if "frame_mask" in video else frames


def resize_crops(crops_BTHWC: Tensor, sizes_B2: Tensor, flips_B: Tensor, resolution: int) -> Tensor:
    """Resize every clip's crop and mirror it where asked, by two batched matrix products.

    The same bilinear interpolation with antialiasing as ViewTransform's, within 1 of 255: that one rounds to 8 bits
    between its two passes. On a GPU the products are in float16, which holds the pixels exactly.

    Args:
        crops_BTHWC: uint8, a clip's crop in its upper left corner; other values are not read.
        sizes_B2: height and width of each crop.
        flips_B: true: mirror.
        resolution: R.

    Returns:
        uint8 [B, T, 3, R, R].
    """
    batch, frames, height, width, channels = crops_BTHWC.shape
    dtype = torch.float16 if crops_BTHWC.is_cuda else torch.float32
    rows_BRH = _resize_weights(sizes_B2[:, 0], height, resolution)
    columns_BRW = _resize_weights(sizes_B2[:, 1], width, resolution)
    columns_BRW = torch.where(flips_B[:, None, None], columns_BRW.flip(1), columns_BRW)
    lines = rows_BRH.to(dtype)[:, None] @ crops_BTHWC.to(dtype).flatten(3)
    planes = lines.unflatten(-1, (width, channels)).permute(0, 1, 4, 2, 3).flatten(2, 3)
    pixels = planes @ columns_BRW.to(dtype).transpose(1, 2)[:, None]
    return pixels.round_().clamp_(0, 255).to(torch.uint8).view(batch, frames, channels, resolution, resolution)


def _resize_weights(sizes_B: Tensor, length: int, resolution: int) -> Tensor:
    """The share of each of `length` places in each of R resized ones, [B, R, length]: a triangle filter (Pillow's)."""
    ratio_B11 = sizes_B[:, None, None] / resolution
    centre_BR1 = ratio_B11 * (torch.arange(resolution, device=sizes_B.device) + 0.5)[:, None]
    place_L = torch.arange(length, device=sizes_B.device) + 0.5
    weight_BRL = (1 - (place_L - centre_BR1).abs() / ratio_B11.clamp(min=1)).clamp(min=0)
    weight_BRL = weight_BRL * (place_L < sizes_B[:, None, None])
    return weight_BRL / weight_BRL.sum(-1, keepdim=True)


def mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A function of every tensor of a tensor or of a dict of tensors."""
    return {name: function(one) for name, one in value.items()} if isinstance(value, dict) else function(value)


def pinned(tensor: Tensor) -> Tensor:
    """A CPU tensor in page-locked memory; a CUDA tensor as it is."""
    return tensor if tensor.is_cuda else tensor.pin_memory()
