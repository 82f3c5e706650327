"""Shots of several tasks as one video: a grid of pictures, each with its task, step, success and active modules."""

import math
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.ImageFont import FreeTypeFont

from d2r_fast.evaluation.film import Shot

INK, BAR, RAN, SOLVED = (255, 255, 255), (24, 28, 36), (108, 178, 247), (72, 187, 120)


def picture_size(n_tasks: int) -> int:
    """Pixels a side of a task's picture in a grid of this many, so that the grid fits a screen."""
    return next(size for most, size in ((1, 480), (4, 320), (12, 240), (25, 192), (50, 160)) if n_tasks <= most)


def grid_shape(n_tasks: int) -> tuple[int, int]:
    """Columns and rows with the fewest places left empty, and no wider or higher than a screen."""
    shapes = [(columns, math.ceil(n_tasks / columns)) for columns in range(1, n_tasks + 1)]
    fitting = [(c, r) for c, r in shapes if 1 <= c / r <= 2.6]
    return min(fitting, key=lambda shape: (shape[0] * shape[1], abs(shape[0] / shape[1] - 1.6)))


def frames(tasks: Sequence[str], shots: Sequence[Shot]) -> Iterator[np.ndarray]:
    """The video's pictures [height,width,3] uint8, both even. Shots are equally long, as those of one `film` are."""
    columns, rows = grid_shape(len(tasks))
    size = shots[0].picture.shape[1]
    high = size + 2 * _bar(size)
    for f in range(len(shots[0].picture)):
        grid = Image.new("RGB", (columns * size + columns * size % 2, rows * high + rows * high % 2), BAR)
        for i, (task, shot) in enumerate(zip(tasks, shots, strict=True)):
            grid.paste(draw_cell(task, shot, f), (i % columns * size, i // columns * high))
        yield np.asarray(grid)


def draw_cell(task: str, shot: Shot, f: int) -> Image.Image:
    """Picture f of a shot, with a bar above it (task, step) and one below (a square a module, filled if it ran)."""
    size = shot.picture.shape[1]
    bar, solved = _bar(size), bool(shot.success[f])
    cell = Image.new("RGB", (size, size + 2 * bar), BAR)
    cell.paste(Image.fromarray(shot.picture[f]), (0, bar))
    draw = ImageDraw.Draw(cell)
    step = f"step {shot.step[f]}"
    room = size - 10 - draw.textlength(step, font=_font(size))
    draw.text((4, bar / 2), _shortened(task, room, size, draw), INK, _font(size), anchor="lm")
    draw.text((size - 4, bar / 2), step, INK, _font(size), anchor="rm")
    draw.rectangle((0, bar, size - 1, size + bar - 1), outline=SOLVED if solved else BAR, width=max(2, size // 80))
    below = size + 1.5 * bar
    if solved:
        draw.text((size - 4, below), "success", SOLVED, _font(size), anchor="rm")
    n = shot.active.shape[1]
    room = size - 12 - draw.textlength("success", font=_font(size))
    side = int(min(0.62 * bar, room / max(1, n) - 2))
    top = int(below - side / 2)
    for j, ran in enumerate(shot.active[f]):
        left = 4 + j * (side + 2)
        draw.rectangle((left, top, left + side - 1, top + side - 1), RAN if ran else None, RAN)
    return cell


def _bar(size: int) -> int:
    return max(16, size // 14)


@cache
def _font(size: int) -> FreeTypeFont:
    font = ImageFont.load_default(max(9, size // 22))
    assert isinstance(font, FreeTypeFont)
    return font


def _shortened(text: str, room: float, size: int, draw: ImageDraw.ImageDraw) -> str:
    while draw.textlength(text, font=_font(size)) > room and len(text) > 2:
        text = text.removesuffix("…")[:-1] + "…"
    return text


def check_encoder(path: Path) -> None:
    """ImportError: `path` is no GIF, and the encoder is missing. ValueError: neither .mp4 nor .gif."""
    if path.suffix not in (".mp4", ".gif"):
        raise ValueError(f"--out: expected a name that ends in .mp4 or .gif, got {path}")
    if path.suffix == ".mp4":
        try:
            import imageio_ffmpeg  # noqa: F401
        except ModuleNotFoundError as error:
            raise ImportError("mp4 needs its encoder: pip install 'd2r_fast[video]'; a .gif does not") from error


def write_video(path: Path, pictures: Iterator[np.ndarray], fps: float) -> None:
    """Write pictures [height,width,3] uint8 to an .mp4 (H.264) or a .gif, whole or not at all. OSError: it cannot."""
    unfinished = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        if path.suffix == ".gif":
            _write_gif(unfinished, pictures, fps)
        else:
            _write_mp4(unfinished, pictures, fps)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _write_mp4(path: Path, pictures: Iterator[np.ndarray], fps: float) -> None:
    import imageio_ffmpeg

    first = next(pictures)
    height, width = first.shape[:2]
    # 20 of 51: text stays sharp. Every player takes yuv420p, and a page can begin to play a file with its index first.
    options = ["-crf", "20", "-movflags", "+faststart"]
    writer = imageio_ffmpeg.write_frames(
        str(path), (width, height), fps=fps, codec="libx264", quality=None, macro_block_size=2, output_params=options
    )
    writer.send(None)
    try:
        writer.send(np.ascontiguousarray(first))
        for picture in pictures:
            writer.send(np.ascontiguousarray(picture))
    finally:
        writer.close()


def _write_gif(path: Path, pictures: Iterator[np.ndarray], fps: float) -> None:
    images = [Image.fromarray(picture) for picture in pictures]
    # One palette for all, of some of them, and no dithering, which would flicker and compress badly.
    some = images[:: max(1, len(images) // 6)]
    strip = Image.new("RGB", (some[0].width, some[0].height * len(some)))
    for i, image in enumerate(some):
        strip.paste(image, (0, i * image.height))
    palette = strip.quantize(96, dither=Image.Dither.NONE)
    first, *others = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    first.save(path, save_all=True, append_images=others, duration=round(1000 / fps), loop=0, optimize=True)
