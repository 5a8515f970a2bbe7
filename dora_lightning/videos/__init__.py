"""Videos: measured, checked, read at given times, and written. Decoded by PyAV (FFmpeg), which is imported when needed.

Times are seconds from the beginning of the file, where its container's clock starts, as players and FFmpeg count them;
the frame of a time is the one that is on the screen at that moment. Whatever is wrong with a file is a ValueError that
names it.
"""

from dora_lightning.videos.decoding import VideoInfo
from dora_lightning.videos.frames import VideoFrame, video_frames
from dora_lightning.videos.reading import VIDEO_SUFFIXES, check_video, read_frames, sample_times, video_info
from dora_lightning.videos.writing import encode_video, write_video

__all__ = [
    "VIDEO_SUFFIXES",
    "VideoFrame",
    "VideoInfo",
    "check_video",
    "encode_video",
    "read_frames",
    "sample_times",
    "video_frames",
    "video_info",
    "write_video",
]
