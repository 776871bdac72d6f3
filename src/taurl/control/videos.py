"""Frames as a file: a GIF, or an H.264 video."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from taurl.control.environments import Array
from taurl.runtime.files import writing

GIF_RATE = 25  # frames a second at most: browsers slow down what is much faster
LAST_FRAME = 1.0  # seconds that a GIF rests on its end before it begins again
COLOURS = 128  # of a GIF; without dithering, so that what does not move costs nothing


def stride(rate: int) -> int:
    """Every how many of so many frames a second a GIF takes one."""
    return -(-rate // GIF_RATE)


def gif(frames: Sequence[Array], rate: float, *, width: int | None = None) -> bytes:
    """An endless GIF.

    Args:
        frames: uint8 [height, width, 3] each.
        rate: of them a second.
        width: make it no wider than so many pixels.
    """
    from PIL import Image

    height, wide = frames[0].shape[:2]
    size = (wide, height) if width is None or wide <= width else (width, round(height * width / wide))
    images = [Image.fromarray(frame) for frame in frames]
    if size != (wide, height):
        images = [image.resize(size, Image.Resampling.BOX) for image in images]
    sheet = Image.new("RGB", (4 * size[0], size[1]))  # some of the frames, for colours that serve all of them
    for place in range(4):
        sheet.paste(images[place * (len(images) - 1) // 3], (place * size[0], 0))
    palette = sheet.quantize(COLOURS, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    first, *others = (image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images)
    durations = [round(1000 / rate)] * len(others) + [round(1000 * LAST_FRAME)]
    content = io.BytesIO()
    first.save(content, "GIF", save_all=True, append_images=others, duration=durations, loop=0)
    return content.getvalue()


def write_mp4(frames: Iterator[Array], path: Path, rate: int) -> None:
    """A video of so many frames a second, written as they come. Raises: RunError when it cannot be written."""
    import imageio.v2 as imageio

    with writing(path):
        video: Any = imageio.get_writer(path, fps=rate, codec="libx264", macro_block_size=2)
        with video:
            for frame in frames:  # the codec takes even sizes only
                video.append_data(frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2])
