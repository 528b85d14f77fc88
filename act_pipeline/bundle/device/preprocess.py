"""Pictures to inputs of the network, as the package that made this bundle prepares them: bit for bit, with OpenCV."""

import io

import numpy as np

try:
    import cv2
except ImportError:
    cv2 = None


class Refused(Exception):
    """What the user can mend, in one line."""


def read_picture(path):
    """Return a picture file as RGB, uint8 [H, W, 3]; its EXIF orientation is applied, its transparency dropped."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise Refused("%s is no picture that can be read: %s" % (path, one_line(error))) from None
    return decode_picture(data, path)


def decode_picture(data, name):
    """Return the content of a picture file as ``read_picture`` does; ``name`` is for the message."""
    try:
        if cv2 is not None:
            found = cv2.imdecode(np.frombuffer(data, np.uint8), 1) if data else None
            if found is None:
                raise ValueError("OpenCV cannot decode it")
            return cv2.cvtColor(found, cv2.COLOR_BGR2RGB)
        from PIL import Image, ImageOps

        return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    except Exception as error:  # both libraries raise exceptions of many types
        raise Refused("%s is no picture that can be read: %s" % (name, one_line(error))) from None


def preprocess(image, steps):
    """Return what the network is given for one picture, by the steps of bundle.json.

    Returns:
        ``image`` float32 [3, H, W]; ``im_shape`` (height and width of the resized picture), ``scale_factor`` (resized /
        original, y then x) and ``pad_offset`` (padding above and on the left), float32 [2] each.
    """
    sample = {"im_shape": np.array(image.shape[:2], np.float32), "scale_factor": np.ones(2, np.float32)}
    offset, resized = np.zeros(2, np.float32), False
    for step in steps:
        kind, before = step["type"], image.shape[:2]
        if kind == "Resize":
            height, width = _pair(step["target_size"])
            if step["keep_ratio"]:
                small, large = min(height, width), max(height, width)
                scale_y = scale_x = min(small / min(before), large / max(before))
                height, width = scale_y * before[0], scale_x * before[1]
            else:
                scale_y, scale_x = height / before[0], width / before[1]
            if resized:  # a second one is given float32, as by the reader
                image = image.astype(np.float32)
            image, resized = resize(image, scale_x, scale_y, step.get("interp", 1)), True
            sample["im_shape"] = np.asarray([height, width], np.float32)
            factors = [float(sample["scale_factor"][0]) * scale_y, float(sample["scale_factor"][1]) * scale_x]
            sample["scale_factor"] = np.asarray(factors, np.float32)
        elif kind == "LetterBoxResize":
            height, width = _pair(step["target_size"])
            ratio = min(height / before[0], width / before[1])
            inner = round(before[1] * ratio), round(before[0] * ratio)
            pad_x, pad_y = (width - inner[0]) / 2, (height - inner[1]) / 2
            if cv2 is None or min(inner) < 1:
                why = "LetterBoxResize needs OpenCV" if cv2 is None else "nothing is left of %d x %d pixels" % before
                raise Refused(why)
            sides = round(pad_y - 0.1), round(pad_y + 0.1), round(pad_x - 0.1), round(pad_x + 0.1)
            image = cv2.resize(image, inner, interpolation=cv2.INTER_AREA)
            image = cv2.copyMakeBorder(image, *sides, cv2.BORDER_CONSTANT, value=(127.5, 127.5, 127.5))
            real = [float(edge) for edge in sample["im_shape"]]
            sample["im_shape"] = np.asarray([round(edge * ratio) for edge in real], np.float32)
            sample["scale_factor"] = np.asarray([ratio, ratio], np.float32)
        elif kind == "Pad":
            divisor, size = step.get("size_divisor", 32), step.get("size")
            size = _pair(size) if size else [int(np.ceil(edge / divisor) * divisor) for edge in before]
            if size[0] < before[0] or size[1] < before[1]:
                raise Refused("Pad to %s: the picture has %d x %d pixels" % (size, before[0], before[1]))
            mode, image = step.get("pad_mode", 0), image.astype(np.float32)
            if tuple(size) != tuple(before):
                spare = size[0] - before[0], size[1] - before[1]
                top, left = {-1: (step.get("offsets") or (0, 0))[::-1], 0: (0, 0), 2: spare}.get(
                    mode, (spare[0] // 2, spare[1] // 2)
                )
                canvas = np.ones((size[0], size[1], 3), np.float32)
                canvas *= np.array(step.get("fill_value", (127.5, 127.5, 127.5)), np.float32)
                canvas[top : top + before[0], left : left + before[1]] = image
                image = canvas
        elif kind == "NormalizeImage":
            image = normalize(image, step)
        if kind in ("LetterBoxResize", "Pad"):  # where the picture lies on the canvas
            added = np.array(image.shape[:2], np.float64) - np.rint(sample["im_shape"].astype(np.float64))
            mode = 1 if kind == "LetterBoxResize" else step.get("pad_mode", 0)
            moved = {-1: np.array((step.get("offsets") or (0, 0))[::-1]), 1: added // 2, 2: added}.get(mode, added * 0)
            offset += (np.rint(added / 2 - 0.1) if kind == "LetterBoxResize" else moved).astype(np.float32)
    sample.update(image=np.ascontiguousarray(image.transpose(2, 0, 1), np.float32), pad_offset=offset)
    return sample


def normalize(image, step):
    """Return float32 [H, W, 3]; pixels of 8 bits are looked up among the 256 results for each channel."""
    if cv2 is not None and image.dtype == np.uint8:
        values = np.repeat(np.arange(256, dtype=np.float32), 3).reshape(256, 1, 3)
        table, planes = normalize(values, step), np.empty((3,) + image.shape[:2], np.float32)
        for channel, pixels in enumerate(cv2.split(image)):
            cv2.LUT(pixels, np.ascontiguousarray(table[:, :, channel]), planes[channel])
        return planes.transpose(1, 2, 0)
    image = image.astype(np.float32)
    if step.get("is_scale", True):
        image *= 1.0 / 255.0
    if step.get("norm_type", "mean_std") == "mean_std":
        image -= np.array(step.get("mean", [0.485, 0.456, 0.406]))[np.newaxis, np.newaxis, :]
        image /= np.array(step.get("std", [0.229, 0.224, 0.225]))[np.newaxis, np.newaxis, :]
    return image


def resize(image, scale_x, scale_y, interp):
    """Resize as the model's own reader does: with OpenCV, or with a filter of Pillow where ``interp`` names one."""
    if isinstance(interp, str):
        from PIL import Image

        size = round(image.shape[1] * scale_x), round(image.shape[0] * scale_y)
        return np.asarray(Image.fromarray(image).resize(size, getattr(Image, interp.split("_")[1].upper())))
    if min(round(image.shape[1] * scale_x), round(image.shape[0] * scale_y)) < 1:
        raise Refused("nothing is left of %d x %d pixels" % image.shape[:2])
    if cv2 is not None:
        return cv2.resize(image, None, None, fx=scale_x, fy=scale_y, interpolation=interp)
    if interp not in (1, 2):
        raise Refused("interp %s needs OpenCV" % interp)
    for axis, scale in ((0, scale_y), (1, scale_x)):  # OpenCV's bilinear and bicubic, but for its rounding
        count = image.shape[axis]
        places = (np.arange(round(count * scale)) + 0.5) / scale - 0.5
        first = np.floor(places).astype(int)
        total = 0
        for tap in (0, 1) if interp == 1 else (-1, 0, 1, 2):
            far = np.abs(places - first - tap)
            near = 1.25 * far**3 - 2.25 * far**2 + 1
            weight = 1 - far if interp == 1 else np.where(far <= 1, near, -0.75 * (far - 1) * (far - 2) ** 2)
            taken = np.take(image, np.clip(first + tap, 0, count - 1), axis)
            total = total + taken * weight.reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        image = total
    return np.clip(np.rint(image), 0, 255)


def one_line(error):
    return " ".join(str(error).split())[:300] or type(error).__name__


def _pair(size):
    return [size, size] if isinstance(size, int) else list(size)
