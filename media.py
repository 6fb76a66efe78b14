"""Pictures and clips from files: every frame upright, RGB, of bounded size; whatever is wrong with a file is one line that names it.

A clip is a video file, an animation, a folder of frames or a list of them; a frame of a file is named as a file of its own, "clip.gif#3of8"."""

import functools
import os
import re
import struct
from pathlib import Path

from PIL import Image, ImageOps, ImageSequence

import config

limits = config.Data()  # pixels and frames of what is shown in this process; stages.run_stages puts the run's own here
MAX_FRAMES, VIDEO_FILES = 10_000, (".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v")  # five minutes at 30 a second; read by PyAV
MAX_PIXELS, FORMATS = 2**26, ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")  # others may start programs (EPS: Ghostscript)
FRAME = re.compile("(.+)#([0-9]{1,5})of([0-9]{1,5})", re.DOTALL)  # FILE, number, count
BROKEN = (OSError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, SyntaxError, EOFError, struct.error,
          Image.DecompressionBombError)


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright by its EXIF orientation, 8 bits a channel, on white where it is transparent, at most limits.max_pixels."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits; Pillow would show everything above 255 as white
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    scale = min(1.0, (limits.max_pixels / (image.width * image.height)) ** 0.5)
    size = [int(side * scale) or 1 for side in image.size]
    if max(size) > 200 * min(size):  # image processors refuse it
        raise ValueError(f"{size[0]} x {size[1]} pixels once scaled down; no side may be over 200 times the other")
    return image.convert("RGB").resize(size, Image.Resampling.BICUBIC)


def frames_of(path: str, wanted=()):
    """For each frame of an image, animation or video file: the picture if its number is `wanted`, else None. Any fault is one line."""
    video, broken = path.lower().endswith(VIDEO_FILES), BROKEN
    try:
        if video:
            import av
            broken += (av.FFmpegError,)
        if not Path(path).is_file():  # a device or a pipe would be read for ever
            raise ValueError("there is no such file")
        with av.open(path) if video else Image.open(path, formats=FORMATS) as file:
            size = (file.streams.video[0].width, file.streams.video[0].height) if video else file.size
            if size[0] * size[1] > MAX_PIXELS or max(size) > 200 * min(size) or not video and file.mode == "F":  # image processors refuse such sides
                raise ValueError(f"{size[0]} x {size[1]} pixels; at most {MAX_PIXELS}, no side over 200 times the other, and no floats as pixels")
            for k, frame in enumerate(file.decode(video=0) if video else ImageSequence.Iterator(file)):
                if k == MAX_FRAMES or not video and k * size[0] * size[1] > 100 * MAX_PIXELS:
                    raise ValueError(f"more than {MAX_FRAMES} frames, or too many pixels in them; cut it, or give a list of frames")
                yield None if k not in wanted else to_rgb(frame.to_image() if video else frame)
    except ImportError:
        raise config.UserError(f"{path}: video files need PyAV (pip install av); folders of frames and animated GIF, WebP and PNG do not")
    except broken as error:
        raise config.UserError(f"cannot read {path}: {error}")


def version(path: str) -> tuple:
    """Part of every cache's key: another one when the file, or that which a frame is of, was written anew, and under another limit."""
    file = frame[1] if (frame := FRAME.fullmatch(path)) else path
    return limits.max_pixels, os.path.exists(file) and os.stat(file).st_mtime_ns


@functools.lru_cache(maxsize=4)
def read_clip(path: str, count: int, version: tuple) -> tuple:
    """(`count` frames spread evenly over a file, how many it has); kept, since its frames are asked for one by one (`version`
    is there for the cache alone)."""
    length = sum(1 for _ in frames_of(path))
    wanted = spread(length, count) if length else []
    made = dict(zip(range(max(wanted, default=-1) + 1), frames_of(path, wanted)))
    return [made[k] for k in wanted], length


def read_image(path: str) -> Image.Image:
    """An image file, or a frame of a clip: "clip.gif#3of8" is the third of eight spread evenly over it. RGB; UserError says what is wrong."""
    frame = (found := FRAME.fullmatch(path)) and 0 < int(found[2]) <= int(found[3]) and found
    if not frame and path.lower().endswith(VIDEO_FILES):
        raise config.UserError(f"{path} is a video where an image belongs")
    return read_clip(frame[1], int(frame[3]), version(frame[1]))[0][int(frame[2]) - 1].copy() if frame else next(frames_of(path, (0,)))


def spread(length: int, count: int) -> list:
    """Which of `length` frames stand for a clip: the one in the middle of each of `count` equal parts. A short clip repeats some."""
    return [(2 * k + 1) * length // (2 * count) for k in range(count)]


def fit_clips(clips: list, frames: int = 0, pair_frames: int = 0) -> list:
    """Videos (a file, a folder or a list of frames) -> lists of equally many frames, at most `frames` each and `pair_frames` together (0: those of
    `limits`). Equally many: official files keep a pair apart by halves, and no candidate should be known by its length."""
    frames, pair_frames = frames or limits.frames, pair_frames or limits.pair_frames
    single = lambda clip: type(clip) is list and len(clip) == 1 and not FRAME.fullmatch(clip[0])  # official rows list all files
    given = [clip[0] if single(clip) else clip for clip in clips]
    number = lambda file: [piece.zfill(20) for piece in re.split(r"([0-9]+)", file.name)]  # frame_2 comes before frame_10
    files = lambda folder: [str(file) for file in sorted(Path(folder).glob("[!.]*"), key=number)]
    clips = [files(clip) if isinstance(clip, str) and Path(clip).is_dir() else clip for clip in given]
    most = max(1, min(frames, pair_frames // len(clips)) if len(clips) > 1 else frames)
    lengths = [read_clip(clip, most, version(clip))[1] if isinstance(clip, str) else len(clip) for clip in clips]
    if not all(lengths):
        raise config.UserError(f"video {lengths.index(0) + 1}, {given[lengths.index(0)]}, has no frames")
    count = min(most, max(lengths))
    shown = lambda clip: [f"{clip}#{k + 1}of{count}" for k in range(count)] if isinstance(clip, str) else [clip[k] for k in spread(len(clip), count)]
    return [shown(clip) for clip in clips]
