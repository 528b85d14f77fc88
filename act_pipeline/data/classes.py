"""Mapping of a model's classes to the categories of an annotation file."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from act_pipeline.core.errors import UserError
from act_pipeline.data.annotations import Annotations

_NAMED = 5
# Names that an export without known class names writes.
_PLACEHOLDER = re.compile(r"class_\d+")


@dataclass(frozen=True)
class ModelClasses:
    """The classes of a model.

    Attributes:
        count: number of classes.
        names: class names by class index; None if only their number is known.
        source: the file (and key) that defines them, for messages.
    """

    count: int
    names: Optional[tuple[str, ...]]
    source: str

    @classmethod
    def named(cls, names: Sequence[str], source: str) -> ModelClasses:
        """Return classes with the given names, or without names if all are placeholders (``class_0``, ...).

        Args:
            names: class names by class index.
            source: the file and key that define them, for messages.
        """
        known = not all(_PLACEHOLDER.fullmatch(name) for name in names)
        return cls(len(names), tuple(names) if known else None, source)


def read_label_list(path: str | os.PathLike[str], named_by: str) -> list[str]:
    """Read class names, one per line; as in PaddleDetection a first line ``background`` is no class.

    Args:
        path: a text file.
        named_by: the file and key that reference it, for messages.

    Raises:
        UserError: the file cannot be read, has no names, or has an empty line between them.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text in UTF-8, expected one class name a line, named by {named_by}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}), named by {named_by}; check the path") from None
    names = lines[1:] if lines[:1] == ["background"] else lines
    if not names:
        raise UserError(f"{path} is empty, expected one class name a line, named by {named_by}; write them in")
    if "" in lines:
        raise UserError(
            f"{path} line {lines.index('') + 1} is empty, expected one class name a line, in the order of the model's "
            f"classes, named by {named_by}; take it out"
        )
    return names


def match_classes(classes: ModelClasses, annotations: Annotations) -> tuple[list[int], list[str]]:
    """Match a model's classes with the categories of an annotation file.

    Categories are matched by name, in any order. If the model's class names are unknown, the order of the file is used,
    as in PaddleDetection. A category that has no box and is not a class of the model is ignored: Roboflow writes such a
    parent category.

    Args:
        classes: the model's classes.
        annotations: the annotation file.

    Returns:
        the category id of every class index, and notes for the user, one line each.

    Raises:
        UserError: a class has no category, or a category with boxes has no class.
    """
    ids, names = annotations.category_ids, annotations.category_names
    if classes.names is None:
        if len(ids) != classes.count:
            raise UserError(f"{_counts(classes, annotations)}{_extra(classes, annotations)}")
        if ids == sorted(ids):
            return list(ids), []
        return list(ids), [
            f"{annotations.path}: its categories are not in the order of their ids, and the model's class names are "
            f"not known ({classes.source}): taken in the file's order, as PaddleDetection does"
        ]
    if list(classes.names) == names:
        return list(ids), []
    used = annotations.used_categories()
    chosen = [_find(name, classes, annotations, used) for name in classes.names]
    missing = [name for name, found in zip(classes.names, chosen) if found is None]
    if missing:
        raise UserError(
            f"{annotations.path} has no category named {_listed(missing)}, which {classes.source} names as a class of "
            f"the model; its categories are {_listed(names)}: correct the names there or here (label_list's order is "
            "the order of the model's classes), or give the data that the model was trained on"
        )
    matched = [found for found in chosen if found is not None]
    if len(set(matched)) != len(matched):
        raise UserError(f"{classes.source} names a class twice ({_listed(classes.names)}), expected each name once")
    others = [index for index in range(len(ids)) if index not in matched]
    strangers = [index for index in others if ids[index] in used]
    if strangers:
        raise UserError(
            f"{_counts(classes, annotations)}: {_categories(annotations, strangers)} has boxes and is none of the "
            f"model's ({_listed(classes.names)}); take it out of the file, or give the data that the model was "
            "trained on"
        )
    notes = []
    if others:
        notes.append(
            f"{annotations.path}: {_categories(annotations, others)} has no box and is none of the model's "
            f"{classes.count} classes; left out"
        )
    if matched != sorted(matched):
        notes.append(f"{annotations.path}: its categories are in another order than {classes.source}; matched by name")
    return [ids[index] for index in matched], notes


def extra_categories(count: int, annotations: Annotations) -> list[int]:
    """Return the indices of the categories without boxes whose removal leaves ``count`` categories; empty if none fit.

    The candidates are all categories without boxes, then those among them that are the ``supercategory`` of others,
    which Roboflow writes.

    Args:
        count: number of classes of the model.
        annotations: the annotation file.
    """
    used = annotations.used_categories()
    unused = [index for index, category_id in enumerate(annotations.category_ids) if category_id not in used]
    above = {str(category.get("supercategory")) for category in annotations.content["categories"]}
    roots = [index for index in unused if annotations.category_names[index] in above]
    left_out = (extra for extra in (unused, roots) if extra and len(annotations.category_ids) - len(extra) == count)
    return next(left_out, [])


def check_count(expected: Optional[int], where: str, annotations: Annotations) -> None:
    """Check that an annotation file has as many categories as the reader file specifies.

    Args:
        expected: ``num_classes``; None if the reader file does not specify it.
        where: the file and key, for messages.
        annotations: the annotation file.

    Raises:
        UserError: the numbers differ; if a category without boxes explains it, the message names it.
    """
    found = len(annotations.category_ids)
    if expected is None or found == expected:
        return
    extra = extra_categories(expected, annotations)
    if extra:
        advice = (
            f"{_categories(annotations, extra)} has no box: take it out of the categories, or set num_classes to "
            f"{found} if the model has a class for it"
        )
    else:
        advice = f"set num_classes to {found}, or name the right annotation file"
    raise UserError(
        f"{where} is {expected}, but {annotations.path} has {found} categories ({_listed(annotations.class_names)}); "
        f"{advice}"
    )


def _find(name: str, classes: ModelClasses, annotations: Annotations, used: set[int]) -> int | None:
    """Return the index of the category with a name, None if there is none; of several, the one with boxes."""
    names = annotations.category_names
    found = [index for index, other in enumerate(names) if other == name]
    found = found or [index for index, other in enumerate(names) if _plain(other) == _plain(name)]
    if len(found) > 1:
        with_boxes = [index for index in found if annotations.category_ids[index] in used]
        if len(with_boxes) > 1:
            raise UserError(
                f"{_categories(annotations, found)} of {annotations.path} have one name, which {classes.source} names "
                "once; join them, or give them names of their own"
            )
        found = with_boxes or found[-1:]
    return found[0] if found else None


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _counts(classes: ModelClasses, annotations: Annotations) -> str:
    return (
        f"the model has {classes.count} classes ({classes.source}), but {annotations.path} has "
        f"{len(annotations.category_ids)} categories ({_listed(annotations.category_names)})"
    )


def _extra(classes: ModelClasses, annotations: Annotations) -> str:
    unused = extra_categories(classes.count, annotations)
    if unused:
        return (
            f": {_categories(annotations, unused)} has no box; take it out of the categories, or name the model's "
            "classes, in their order, in label_list of its infer_cfg.yml"
        )
    return "; give the data that the model was trained on"


def _categories(annotations: Annotations, indices: Sequence[int]) -> str:
    described = [f"'{annotations.category_names[index]}' (id {annotations.category_ids[index]})" for index in indices]
    return f"{'category' if len(described) == 1 else 'categories'} {_listed(described)}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
