"""COCO annotation files, read and checked once."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from act_pipeline.core.errors import UserError
from act_pipeline.core.records import as_number

if TYPE_CHECKING:
    from pycocotools.coco import COCO

_logger = logging.getLogger(__name__)
_EPSILON = 1e-5


@dataclass(frozen=True)
class Annotations:
    """A checked annotation file.

    Ids written as floats, such as ``3.0``, are converted to int.

    Attributes:
        path: the file.
        images: COCO's ``images`` entries, sorted by id; each has at least ``id`` and ``file_name``.
        category_ids: the COCO category id of every class index, in the order of the file (``COCO.getCatIds()``), by
            which ppdet numbers classes.
        category_names: the categories' names in this order, unchanged.
        boxes: COCO's ``annotations`` entries that have a box, numbered from 1, with missing ``area`` and ``iscrowd``
            filled in; None if the file has no ``annotations``. Boxes without width or height are dropped with a
            warning, since no detection can overlap them. Boxes outside their picture are kept, with a warning.
        content: the whole file.
    """

    path: Path
    images: list[dict[str, Any]]
    category_ids: list[int]
    category_names: list[str]
    boxes: list[dict[str, Any]] | None
    content: dict[str, Any]

    @classmethod
    def load(cls, path: str | os.PathLike[str], named_by: str) -> Annotations:
        """Read and check a file.

        Args:
            path: the file.
            named_by: the file and key that reference it, for messages.

        Raises:
            UserError: the file is missing, is not JSON, or lacks required COCO entries.
        """
        source = Path(path)
        content = _read_json(source, named_by)
        if not isinstance(content, dict):
            raise UserError(f"{source} holds no JSON object, expected COCO's images, annotations and categories")
        images = _entries(content, "images", ("id", "file_name"), source)
        categories = _entries(content, "categories", ("id", "name"), source)
        for index, category in enumerate(categories):
            if abs(category["id"]) >= 2**53:  # the category id must fit a float64 row of detections
                raise UserError(
                    f"{source}: categories[{index}].id is {category['id']}, expected one below 2^53; number the classes"
                )
        for image in images:
            if not isinstance(image["file_name"], str) or not image["file_name"]:
                raise UserError(f"{source}: images: file_name of image {image['id']} is no text, expected a name")
        boxes = _boxes(
            content, source, {image["id"]: image for image in images}, {category["id"] for category in categories}
        )
        return cls(
            path=source,
            images=sorted(images, key=lambda image: image["id"]),
            category_ids=[category["id"] for category in categories],
            category_names=[str(category["name"]) for category in categories],
            boxes=boxes,
            content=content,
        )

    @classmethod
    def of_folder(cls, path: Path, images: Sequence[tuple[int, str]], names: Sequence[str]) -> Annotations:
        """Return the entries of images without an annotation file, which have no boxes.

        Args:
            path: the folder of the images.
            images: id and file name of each.
            names: class names by class index, which is the category id too.
        """
        entries = [{"id": number, "file_name": name} for number, name in images]
        categories = [{"id": number, "name": name} for number, name in enumerate(names)]
        content: dict[str, Any] = {"images": entries, "categories": categories}
        return cls(path, entries, list(range(len(names))), list(names), None, content)

    def without_boxes(self) -> Annotations:
        """Return a copy without boxes, as of images that have no labels."""
        return dataclasses.replace(self, boxes=None, content={**self.content, "annotations": []})

    @property
    def class_names(self) -> list[str]:
        """The categories' names; the id is appended to names that occur more than once."""
        return distinct_names(self.category_names, self.category_ids)

    def used_categories(self) -> set[int]:
        """Return the ids of the categories that have a box."""
        return {box["category_id"] for box in self.boxes or ()}

    def images_with_boxes(self, load_crowd: bool = False) -> set[int]:
        """Return the ids of the images in which ppdet's ``COCODataSet`` would find a box.

        Args:
            load_crowd: whether crowd boxes count.
        """
        return {
            box["image_id"]
            for box in self.boxes or ()
            if (load_crowd or not box["iscrowd"])
            and not box.get("ignore", False)
            and box["area"] > 0
            and min(box["bbox"][2:]) > _EPSILON
        }

    def ground_truth(self) -> COCO:
        """Return the file as a pycocotools ``COCO`` for ``COCOeval``, without the output that pycocotools prints."""
        from pycocotools.coco import COCO

        ground_truth = COCO()
        ground_truth.dataset = {**self.content, "annotations": self.boxes or []}
        with contextlib.redirect_stdout(io.StringIO()):
            ground_truth.createIndex()
        return ground_truth


def distinct_names(names: Sequence[str], ids: Sequence[int]) -> list[str]:
    """Return the names, with the id appended to those that occur more than once."""
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name} (id {number})" for name, number in zip(names, ids)]


def image_path(folder: Path, file_name: str) -> Path:
    """Return the path of an image of an annotation file.

    Some tools write backslashes, or the absolute path on the machine that they ran on. If there is no file of this
    name, the longest trailing part of it that exists in ``folder`` is used.

    Args:
        folder: the folder of the images.
        file_name: ``file_name`` in the annotation file.
    """
    path = folder / file_name
    absolute = file_name.startswith("/") or PureWindowsPath(file_name).is_absolute()
    if ("\\" not in file_name and not absolute) or os.path.isfile(path):
        return path
    parts = [part for part in file_name.replace("\\", "/").split("/") if part and not part.endswith(":")]
    ends = [folder.joinpath(*parts[start:]) for start in range(len(parts) if absolute else 1)]
    return next((end for end in ends if os.path.isfile(end)), path if absolute or not ends else ends[0])


def _read_json(source: Path, named_by: str) -> Any:
    try:
        with open(source, "rb") as file:
            return json.loads(file.read())
    except FileNotFoundError:
        raise UserError(
            f"annotation file {source} does not exist, named by {named_by}; check anno_path and dataset_dir"
        ) from None
    except (IsADirectoryError, NotADirectoryError):
        raise UserError(
            f"annotation file {source} is a folder or lies in a file, named by {named_by}; name a file"
        ) from None
    except PermissionError:
        raise UserError(f"annotation file {source} cannot be read: no permission; make it readable") from None
    except OSError as error:  # e.g. the name is too long, or symbolic links form a loop
        raise UserError(
            f"annotation file {source} cannot be read ({error.strerror}), named by {named_by}; check anno_path"
        ) from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise UserError(
            f"annotation file {source} is no JSON ({place}: {error.msg}), expected COCO's form, named by {named_by}; "
            "copy or export it again"
        ) from None
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"annotation file {source} is no JSON ({reason}), named by {named_by}; export it again"
        ) from None


def _entries(content: dict[str, Any], name: str, needed: tuple[str, ...], source: Path) -> list[dict[str, Any]]:
    entries = content.get(name)
    if not isinstance(entries, list) or not entries:
        found = "has no" if entries is None else "has an empty list of" if entries == [] else "has no list of"
        raise UserError(f"{source} {found} {name}, expected COCO's form with '{name}': [{{...}}]; export it again")
    ids: set[int] = set()
    for index, entry in enumerate(entries):
        for key in needed:
            if not isinstance(entry, dict) or key not in entry:
                raise UserError(f"{source}: {name}[{index}] has no '{key}', expected COCO's form; export it again")
        number = _whole(entry["id"])
        if number is None:
            raise UserError(
                f"{source}: {name}[{index}].id is {entry['id']!r}, expected a whole number of less than 64 bits; "
                "export it again"
            )
        entry["id"] = number
        if number in ids:
            raise UserError(f"{source}: {name}[{index}].id is {number}, which another has; expected each id once")
        ids.add(number)
    return entries


def _boxes(
    content: dict[str, Any], source: Path, images: Mapping[int, dict[str, Any]], classes: set[int]
) -> list[dict[str, Any]] | None:
    annotations = content.get("annotations")
    if annotations is None:
        return None
    if not isinstance(annotations, list):
        raise UserError(f"{source}: annotations is no list, expected COCO's form; export it again")
    boxes: list[dict[str, Any]] = []
    flat, outside = [], []
    for index, annotation in enumerate(annotations):
        where = f"{source}: annotations[{index}]"
        if not isinstance(annotation, dict):
            raise UserError(f"{where} is no object, expected image_id, category_id and bbox; export it again")
        if annotation.get("bbox") in (None, []):
            continue
        for key, known, kind in (("image_id", images, "image"), ("category_id", classes, "category")):
            number = _whole(annotation.get(key))
            if number not in known:
                raise UserError(f"{where}.{key} is {annotation.get(key)!r}, which no {kind} has; export it again")
            annotation[key] = number
        bbox = annotation["bbox"]
        if not (isinstance(bbox, list) and len(bbox) == 4 and all(as_number(side) is not None for side in bbox)):
            raise UserError(f"{where}.bbox is {str(bbox)[:60]}, expected four numbers: x, y, width, height in pixels")
        if bbox[2] <= 0 or bbox[3] <= 0:
            flat.append(index)
            continue
        if _is_outside(bbox, images[annotation["image_id"]]):
            outside.append(index)
        # Modified in place: COCO's train2017 has 860,000 annotations.
        if annotation.get("area") is None:
            annotation["area"] = bbox[2] * bbox[3]
        if annotation.get("iscrowd") is None:
            annotation["iscrowd"] = 0
        if as_number(annotation["area"]) is None or annotation["iscrowd"] not in (0, 1):
            raise UserError(
                f"{where}: area is {annotation['area']!r} and iscrowd {annotation['iscrowd']!r}, expected a number, "
                "and 0 or 1; export it again"
            )
        # COCOeval needs distinct ids and reads the id 0 as "not matched"; the ids have no other use.
        annotation["id"] = len(boxes) + 1
        boxes.append(annotation)
    for places, found in (
        (flat, "have no width or height ({first}); left out"),
        (outside, "lie wholly outside their picture ({first}), where no detection can match them; correct bbox, or the "
         "picture's width and height"),
    ):  # fmt: skip
        if places:
            first = f"the first is annotations[{places[0]}]: {annotations[places[0]]['bbox']}"
            _logger.warning("%s: %d of %d boxes %s", source, len(places), len(annotations), found.format(first=first))
    return boxes


def _is_outside(bbox: Sequence[float], image: Mapping[str, Any]) -> bool:
    """Return whether a box shares no pixel with its picture, whose size the file may leave out."""
    width, height = (as_number(image.get(side)) or math.inf for side in ("width", "height"))
    return bbox[0] >= width or bbox[1] >= height or bbox[0] + bbox[2] <= 0 or bbox[1] + bbox[3] <= 0


def _whole(value: Any) -> int | None:
    """Return an id as int, also if written as ``3.0``; None if it is not a whole number."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63 else None
