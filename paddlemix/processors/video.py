# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Video files: their frames one by one, and back, by PyAV (pip install av==17.1.0)."""

import os
from pathlib import Path

from PIL import Image

from paddlemix.utils import InputError

from .image_processing_emu3 import over_white


def pyav(path):
    """PyAV. InputError, about a path: it is not installed."""
    try:
        import av
    except ModuleNotFoundError:
        raise InputError(f"{path}: to read and write video needs PyAV: pip install av==17.1.0") from None
    return av


def open_video(path):
    """PyAV's container of a file, to be closed. InputError: PyAV is not installed, or the file holds no video."""
    av = pyav(path)
    av.logging.set_level(av.logging.PANIC)
    if not os.path.isfile(path):
        raise InputError(f"{path}: there is no such file")
    try:
        container = av.open(str(path))
    except (av.FFmpegError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a video that FFmpeg can read ({error}): check the file") from None
    if not container.streams.video:
        container.close()
        raise InputError(f"{path} holds no video: check the file")
    return container


def read_frames(path):
    """The frames of a video file, upright PIL pictures, each decoded when it is asked for. InputError as `open_video`
    raises it, when the first one is asked for; or where the file is damaged."""
    with open_video(path) as container:
        import av

        stream = container.streams.video[0]
        try:
            for frame in container.decode(stream):
                yield _picture(frame).rotate(frame.rotation, expand=True)
        except (av.FFmpegError, OSError, ValueError) as error:
            raise InputError(f"{path} is damaged or cut short ({error}): check the file") from None


def _picture(frame):
    """PyAV's frame in mode RGB, over white where it is transparent, as pictures are."""
    if not any(component.is_alpha for component in frame.format.components):
        return frame.to_image()
    return over_white(Image.fromarray(frame.to_ndarray(format="rgba")))[0]


def frame_rate(path):
    """(frames a second, a fraction; how many there are, 0 where the file does not say). InputError as `open_video`."""
    with open_video(path) as container:
        stream = container.streams.video[0]
        return stream.average_rate or 25, stream.frames


class VideoFile:
    """`with VideoFile(path, rate) as video:` then `video.add(picture)` for each frame, in H.264. Sides are even.
    InputError: PyAV is not installed."""

    def __init__(self, path, rate):
        self.path, self.rate, self.stream = path, rate, None

    def __enter__(self):
        self.container = pyav(Path(self.path).name).open(str(self.path), "w", format="mp4")
        return self

    def add(self, picture):
        import av

        if self.stream is None:
            options = {"crf": "16", "mbtree": "0"}  # x264's mbtree gives small frames other bytes now and then
            self.stream = self.container.add_stream("libx264", rate=self.rate, options=options)
            self.stream.width, self.stream.height, self.stream.pix_fmt = picture.width, picture.height, "yuv420p"
        self.container.mux(self.stream.encode(av.VideoFrame.from_image(picture)))

    def __exit__(self, *exception):
        if self.stream is not None:
            self.container.mux(self.stream.encode(None))
        self.container.close()
