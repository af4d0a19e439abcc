"""Where the scenes of a video change, by PySceneDetect."""

from __future__ import annotations

from frozen_fast.data.decode.types import ClipError
from frozen_fast.data.shards.layout import parse_address
from frozen_fast.errors import UserError

SHORTEST_SCENE_SECONDS = 1.0


def scene_cuts(path: str, start_seconds: float, end_seconds: float) -> list[float]:
    """Decode a stretch of a video and find where its scenes change (PySceneDetect's AdaptiveDetector).

    Args:
        path: the file.
        start_seconds: where the stretch begins, seconds after the first frame.
        end_seconds: where it ends.

    Returns:
        Seconds after the first frame, ascending, between start and end.

    Raises:
        UserError: PySceneDetect is missing, or the clip is packed: its shard holds single frames.
        ClipError: the file cannot be read.
    """
    try:
        from scenedetect import AdaptiveDetector, SceneManager, VideoOpenFailure
        from scenedetect.backends.pyav import VideoStreamAv
    except ImportError as error:
        missing = f"got scenes, but {error.name} is missing"
        raise UserError(f"--span: {missing}; allowed: seconds, or pip install 'frozen-fast[search]'") from None
    if parse_address(path) is not None:
        raise UserError(f"--span: got scenes for the packed clip {path}; allowed: seconds, or a source of video files")
    manager = SceneManager()
    manager.add_detector(AdaptiveDetector(min_scene_len=SHORTEST_SCENE_SECONDS))
    try:
        video = VideoStreamAv(path)
        if start_seconds > 0:
            video.seek(start_seconds)
        manager.detect_scenes(video, end_time=end_seconds)
    except (OSError, ValueError, VideoOpenFailure) as error:
        raise ClipError("decode_failed", f"scenes cannot be found ({error})", path) from error
    starts = [float(first.seconds) for first, _ in manager.get_scene_list(start_in_scene=True)]
    return [start for start in starts if start_seconds < start < end_seconds]
