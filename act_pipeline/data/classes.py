"""Which category of an annotation file each class of a model is."""

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
# What an export writes that found no names.
_PLACEHOLDER = re.compile(r"class_\d+")


@dataclass(frozen=True)
class ModelClasses:
    """The classes that a model tells apart.

    Attributes:
        count: how many.
        names: by class index; None: only their number is known.
        source: the file (and key) that says so, for messages.
    """

    count: int
    names: Optional[tuple[str, ...]]
    source: str

    @classmethod
    def named(cls, names: Sequence[str], source: str) -> ModelClasses:
        """Return classes of these names; ``class_0``, ``class_1``, ... stand for names that nobody knew."""
        known = not all(_PLACEHOLDER.fullmatch(name) for name in names)
        return cls(len(names), tuple(names) if known else None, source)


def read_label_list(path: str | os.PathLike[str], named_by: str) -> list[str]:
    """Read class names, one a line, as PaddleDetection does: a first line ``background`` is no class.

    Args:
        path: a text file.
        named_by: the file and key that name it, for messages.

    Raises:
        UserError: the file cannot be read, has no names, or an empty line between them.
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
    """Return the category id of every class index, and what a user should know about it, in a line each.

    Categories are known by their names, whatever their order; where the model's names are not known, the order of the
    file counts, as in PaddleDetection. A category that has no box and is none of the model's is left out: Roboflow
    writes one, which stands for all the others.

    Raises:
        UserError: a class has no category, or a category with boxes no class.
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
    """Return the indices of categories without a box that leave ``count`` if they are left out; empty: there are none.

    All without a box are; else those among them that are the ``supercategory`` of others, as Roboflow writes one.
    """
    used = annotations.used_categories()
    unused = [index for index, category_id in enumerate(annotations.category_ids) if category_id not in used]
    above = {str(category.get("supercategory")) for category in annotations.content["categories"]}
    roots = [index for index in unused if annotations.category_names[index] in above]
    left_out = (extra for extra in (unused, roots) if extra and len(annotations.category_ids) - len(extra) == count)
    return next(left_out, [])


def check_count(expected: Optional[int], where: str, annotations: Annotations) -> None:
    """Check that an annotation file has as many categories as a reader file says; None: it does not say.

    Args:
        expected: ``num_classes``.
        where: the file and key, for messages.

    Raises:
        UserError: it has more or fewer; a category without a box, which may stand for the others, is named.
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
    """Return the index of the category of a name; of several, the one that has boxes."""
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
