"""Drawing of detections into an image."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from act_pipeline.core.errors import UserError
from act_pipeline.core.output_folders import making

_DPI = 100
# Matplotlib's limit is 65,535, and it needs about 25 bytes per pixel.
_MAX_SIDE = 8192
_COLORS = (
    "#e6194b",
    "#3cb44b",
    "#4363d8",
    "#f58231",
    "#911eb4",
    "#008080",
    "#9a6324",
    "#808000",
    "#800000",
    "#000075",
)
# Fallbacks, in this order, for characters missing in matplotlib's default font, mainly Chinese class names.
_FALLBACK_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans CN",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "SimHei",
    "Microsoft YaHei",
    "PingFang SC",
    "Arial Unicode MS",
)


def read_image(image_file: str | os.PathLike[str]) -> np.ndarray:
    """Return an image as uint8 [H, W, 3] RGB, rotated by its EXIF orientation, as in the readers.

    Raises:
        UserError: the file is missing or not an image.
    """
    import cv2

    path = Path(image_file)
    if not path.is_file():
        raise UserError(f"image {path} does not exist; give --image_file the path of a picture")
    # On Windows cv2.imread cannot open names outside the system's code page; np.fromfile can.
    raw = np.fromfile(path, np.uint8)
    try:
        image = cv2.imdecode(raw, cv2.IMREAD_COLOR) if raw.size else None
    except cv2.error:
        raise UserError(
            f"image {path} cannot be decoded: OpenCV takes up to 2^30 pixels, 2^20 on a side; make it smaller"
        ) from None
    if image is None:
        raise UserError(f"image {path} cannot be decoded, expected JPEG or PNG; check the file")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def draw_detections(
    image_file: str | os.PathLike[str],
    bbox: np.ndarray,
    class_names: Sequence[str],
    output_file: str | os.PathLike[str],
    threshold: float = 0.5,
) -> int:
    """Draw boxes with class names and scores into a copy of an image.

    Args:
        image_file: the image; it is not changed.
        bbox: [K, 6]: class index, score, x1, y1, x2, y2 in pixels of the image.
        class_names: names by class index; an index without a name is written as a number.
        output_file: the file to write, of the same width and height (images of more than 8,192 pixels per side are
            reduced); the extension selects JPEG, PNG, BMP or WebP.
        threshold: boxes with a lower score are not drawn.

    Returns:
        the number of drawn boxes.

    Example:
        >>> draw_detections("in.jpg", engine.run(batch)["bbox"], ["cat"], "out.jpg")  # doctest: +SKIP
    """
    image, scale_x, scale_y = _reduced(read_image(image_file))
    height, width = image.shape[:2]
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.imshow(image, interpolation="nearest", aspect="auto")
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)
    line_width = max(1.0, min(height, width) / 300)
    font: dict[str, Any] = {"fontsize": max(6.0, min(height, width) / 60), "fontfamily": _font_families()}
    rows = np.asarray(bbox, np.float64).reshape(-1, 6) * [1, 1, scale_x, scale_y, scale_x, scale_y]
    drawn = [row for row in rows if row[1] >= threshold and row[0] >= 0]
    for class_index, score, x1, y1, x2, y2 in sorted(drawn, key=lambda row: row[1]):  # the highest scores on top
        color = _COLORS[int(class_index) % len(_COLORS)]
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=line_width))
        axes.text(
            min(max(x1, 0), width - 1),
            max(y1, 0),
            detection_label(class_index, score, class_names),
            color="white",
            verticalalignment="bottom" if y1 > height / 20 else "top",
            clip_on=True,
            parse_math=False,
            bbox={"facecolor": color, "edgecolor": "none", "pad": 1.0, "alpha": 0.8},
            **font,
        )
    with warnings.catch_warnings():  # characters without a font are drawn as empty boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing from current font")
        canvas.draw()
    # The canvas may be a pixel larger or smaller than requested, since inches are rounded.
    pixels = np.asarray(canvas.buffer_rgba())[:height, :width, :3]
    _write_image(pixels, Path(output_file))
    return len(drawn)


def _reduced(image: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Return an image small enough to draw on, and the scale factors of x and y."""
    import cv2

    height, width = image.shape[:2]
    if max(height, width) <= _MAX_SIDE:
        return image, 1.0, 1.0
    scale = _MAX_SIDE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA), size[0] / width, size[1] / height


def detection_label(class_index: float, score: float, class_names: Sequence[str]) -> str:
    """Return the label of a box: class name and score, e.g. ``cat 0.87``."""
    index = int(class_index)
    return f"{class_names[index] if 0 <= index < len(class_names) else f'class {index}'} {score:.2f}"


def _font_families() -> list[str]:
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in _FALLBACK_FONTS if name in installed)]


def _write_image(pixels: np.ndarray, path: Path) -> None:
    import cv2

    with making(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    suffix = path.suffix.lower() if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".bmp", ".webp") else ".jpg"
    options: list[Any] = [cv2.IMWRITE_JPEG_QUALITY, 95] if suffix in (".jpg", ".jpeg") else []
    ok, encoded = cv2.imencode(suffix, cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2BGR), options)
    if not ok:
        raise UserError(f"{path}: the picture cannot be written as {suffix}; choose another --output_dir")
    partial = path.with_name(f".{path.name}.part")
    try:
        partial.write_bytes(encoded.tobytes())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
