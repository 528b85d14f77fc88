"""Reading of YAML files of PaddleSlim and PaddleDetection as plain data.

A file cannot run code: the only accepted tags are names of PaddleDetection's data sets and learning rate schedules,
and they become :class:`Tagged`, never an object of that class.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from act_pipeline.core.defaults import CONFIGS, INSTALLED, find_shipped
from act_pipeline.core.errors import UserError, suggest

# Tags in the YAML files of ppdet 2.6: data sets (ppdet/data/source) and learning rate schedules (ppdet/optimizer).
KNOWN_TAGS = (
    "COCODataSet",
    "SlicedCOCODataSet",
    "SemiCOCODataSet",
    "SniperCOCODataSet",
    "VOCDataSet",
    "WIDERFaceDataSet",
    "ImageFolder",
    "MOTDataSet",
    "MCMOTDataSet",
    "MOTImageFolder",
    "KeypointTopDownCocoDataset",
    "KeypointBottomUpCocoDataset",
    "PiecewiseDecay",
    "CosineDecay",
    "LinearWarmup",
    "ExpWarmup",
    "BurninWarmup",
    "StepDecay",
    "OneCycleLR",
)
BASE_KEY = "_BASE_"
# A config has a few hundred nodes and a few anchors. The limits prevent nested aliases from filling the memory, and a
# wrong file (such as annotations) from being parsed for minutes.
MAX_BYTES = 512 << 10
MAX_NODES = 100_000
MAX_DEPTH = 50

_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}


@dataclass(frozen=True)
class Tagged:
    """A tagged mapping: ``!COCODataSet {image_dir: val2017}`` is ``Tagged("COCODataSet", {"image_dir": "val2017"})``.

    Attributes:
        name: the tag without ``!``.
        fields: the mapping.
    """

    name: str
    fields: dict[str, Any] = field(default_factory=dict)


class _DataLoader(yaml.SafeLoader):
    """PyYAML's safe loader without dates, and with YAML 1.2's ``1e-5`` as a float (a string in YAML 1.1)."""


# Configs need no dates, and an invalid one (2024-13-45) would raise an exception of datetime: dates stay strings.
_DataLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":value"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_DataLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def _construct_tagged(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> Tagged:
    if isinstance(node, yaml.ScalarNode) and not node.value:
        return Tagged(suffix)
    return Tagged(suffix, loader.construct_mapping(node, deep=True))


_DataLoader.add_multi_constructor("!", _construct_tagged)


def load_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a YAML file and the files in its ``_BASE_`` list.

    As in PaddleDetection, each base overrides the ones before it, and the file overrides its bases. Mappings are merged
    key by key, other values are replaced. Paths in ``_BASE_`` are relative to the file, or ``configs/...`` of this
    package.

    Args:
        path: the file.

    Returns:
        The mapping, of plain Python values and :class:`Tagged`.

    Raises:
        UserError: the file is missing or too large, is not a YAML mapping, has a duplicate key or two nodes under
            one key, uses an unknown tag, or includes itself.
    """
    return _load_with_bases(Path(path), ())


def parse_override(text: str) -> tuple[list[str], Any]:
    """Split ``Section.key=value`` into the keys and the value, parsed as YAML.

    >>> parse_override("TrainConfig.train_iter=100")
    (['TrainConfig', 'train_iter'], 100)

    Args:
        text: the override.

    Returns:
        The keys from the outermost to the innermost, and the value.

    Raises:
        UserError: there is no ``=``, a key is empty, or the value is not valid YAML.
    """
    name, equals, value = text.partition("=")
    keys = [key.strip() for key in name.split(".")]
    if not equals or not all(keys):
        raise UserError(f"-o {text}: expected Section.key=value, for example TrainConfig.train_iter=100")
    return keys, _parse(value, f"-o {text}")


def apply_overrides(config: Mapping[str, Any], overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Return a copy of a config with overrides applied.

    Missing sections are created. A key below a :class:`Tagged` node sets one of its fields; a number selects an entry
    of an existing list.

    Args:
        config: the config, unchanged.
        overrides: texts ``Section.key=value``, applied in order.

    Raises:
        UserError: an override is malformed or contains a key of a value that has no keys.
    """
    changed = copy.deepcopy(dict(config))
    for override in overrides:
        keys, value = parse_override(override)
        place: Any = changed
        for depth, key in enumerate(keys):
            last = depth == len(keys) - 1
            if isinstance(place, Tagged):
                place = place.fields
            if isinstance(place, dict):
                if last:
                    place[key] = value
                elif place.get(key) is None:
                    place[key] = {}
                place = place[key]
            elif isinstance(place, list) and key.isdigit() and int(key) < len(place):
                if last:
                    place[int(key)] = value
                place = place[int(key)]
            else:
                parent = ".".join(keys[:depth])
                held = f"a list of {len(place)}" if isinstance(place, list) else repr(place)
                raise UserError(f"-o {override}: {parent} is {held}, it has no key '{key}'; set {parent} itself")
    return changed


def resolve_path(value: str, named_in: str | os.PathLike[str]) -> Path:
    """Resolve a path in a config file.

    A relative path is tried relative to the current folder, to the file's folder, to its parent folder (PaddleSlim's
    examples have their configs in ``configs/``) and to what comes with this package (:func:`find_shipped`), in this
    order.

    Args:
        value: the path; ``~`` is expanded.
        named_in: the config file that contains it.

    Returns:
        The first path that exists, otherwise the given path.
    """
    # os.path, because pathlib raises on impossible names: an unknown user, too long, with a NUL.
    given = Path(os.path.expanduser(value))
    if given.is_absolute():
        return given
    for root in _search_folders(named_in):
        if os.path.exists(root / given):
            return root / given
    return find_shipped(given)


def describe_search(path: str | os.PathLike[str], named_in: str | os.PathLike[str]) -> str:
    """Return where a relative path that :func:`resolve_path` did not find was looked for, to be added to a message.

    Args:
        path: the path that :func:`resolve_path` returned.
        named_in: the config file that contains it.

    Returns:
        ``, looked for in /data, /data/configs and /``; empty for an absolute path and for one that exists.
    """
    if Path(path).is_absolute() or os.path.exists(path):
        return ""
    folders = [*map(str, _search_folders(named_in)), *([] if INSTALLED else [str(CONFIGS.parent)])]
    folders[0] = os.getcwd()
    *others, last = dict.fromkeys(folders)
    return f", looked for in {', '.join(others)} and {last}" if others else f", looked for in {last}"


def _search_folders(named_in: str | os.PathLike[str]) -> tuple[Path, Path, Path]:
    folder = Path(os.path.realpath(named_in)).parent
    return Path(), folder, folder.parent


def _load_with_bases(path: Path, including: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in including:
        raise UserError(f"{including[-1]}: {BASE_KEY} includes {path}, which includes it in turn; take one of them out")
    named_by = f" (named by {BASE_KEY} of {including[-1]})" if including else ""
    content = _parse(_read(path, named_by), str(path))
    if not isinstance(content, dict):
        found = "nothing" if content is None else _kind(content)
        raise UserError(f"{path} holds {found}, expected a YAML mapping of 'key: value' lines")
    bases = content.pop(BASE_KEY, [])
    if isinstance(bases, str):
        bases = [bases]
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"{path}: {BASE_KEY} is {_kind(bases)}, expected a list of YAML files")
    merged: dict[str, Any] = {}
    for base in bases:
        base_path = path.parent / Path(base).expanduser()
        if not os.path.exists(base_path) and os.path.exists(find_shipped(base)):
            base_path = find_shipped(base)
        _merge(merged, _load_with_bases(base_path, (*including, path.resolve())))
    _merge(merged, content)
    return merged


def _merge(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(into.get(key), dict) and isinstance(value, dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _read(path: Path, named_by: str) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path} is {path.stat().st_size} bytes, too large for a YAML config; give the config file")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist{named_by}, expected a YAML file; check the path") from None
    except NotADirectoryError:
        raise UserError(f"{path} does not exist{named_by}: a part of it is a file; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder{named_by}, expected a YAML file; name the file in it") from None
    except PermissionError:
        raise UserError(f"{path} cannot be read{named_by}: no permission; make it readable") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read{named_by}: {error.strerror}; check the path") from None
    except UnicodeDecodeError as error:
        place = f"byte {error.start}"
        raise UserError(f"{path} is no text in UTF-8 ({place}), expected a YAML file; save it as UTF-8") from None


def _parse(text: str, source: str) -> Any:
    loader = None
    try:
        loader = _DataLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_nodes(node, source)
        return _unshare(loader.construct_document(node))
    except yaml.MarkedYAMLError as error:
        raise UserError(_describe(error, text, source)) from None
    except yaml.reader.ReaderError as error:
        raise UserError(f"{source}: character {error.position} is not allowed in YAML; save it as plain text") from None
    except RecursionError:
        raise UserError(f"{source}: nested more than {MAX_DEPTH} deep, too deep for a config; write it flat") from None
    except (ValueError, OverflowError, LookupError) as error:
        # PyYAML's constructors raise these for a number of thousands of digits, `!!float ''` and `!!bool maybe`.
        raise UserError(f"{source} holds a value that is no YAML: {' '.join(str(error).split())}") from None
    finally:
        if loader is not None:
            loader.dispose()


def _unshare(value: Any) -> Any:
    """Copy values that aliases share, so that a change in one place does not affect the other."""
    if isinstance(value, Tagged):
        return Tagged(value.name, _unshare(value.fields))
    if isinstance(value, dict):
        return {key: _unshare(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_unshare(part) for part in value]
    return value


def _check_nodes(root: yaml.Node, source: str) -> None:
    """Raise for unknown tags, duplicate keys, too deep nesting, and too many nodes after expansion of aliases."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            return sizes[id(node)]
        where = f"{source} line {node.start_mark.line + 1}"
        if id(node) in open_nodes:
            raise UserError(f"{where}: the anchor holds itself, expected plain data; write the value out")
        open_nodes.add(id(node))
        if len(open_nodes) > MAX_DEPTH:
            raise UserError(f"{where}: nested more than {MAX_DEPTH} deep, too deep for a config; write it flat")
        _check_tag(node, where)
        total = 1
        if isinstance(node, yaml.MappingNode):
            _check_keys(node, source)
            total += sum(size(part) for pair in node.value for part in pair)
        elif isinstance(node, yaml.SequenceNode):
            total += sum(size(part) for part in node.value)
        if total > MAX_NODES:
            raise UserError(f"{where}: aliases make it more than {MAX_NODES} values; write out what is needed")
        open_nodes.discard(id(node))
        sizes[id(node)] = total
        return total

    size(root)


def _check_tag(node: yaml.Node, where: str) -> None:
    if node.tag in _PLAIN_TAGS:
        return
    name = node.tag[1:] if node.tag.startswith("!") else node.tag.replace("tag:yaml.org,2002:", "!")
    if name not in KNOWN_TAGS:
        raise UserError(
            f"{where}: tag '!{name}' is not known, expected plain data or a data set such as !COCODataSet"
            f"{suggest(name, KNOWN_TAGS)}"
        )
    if not isinstance(node, yaml.MappingNode) and not (isinstance(node, yaml.ScalarNode) and not node.value):
        raise UserError(f"{where}: !{name} holds no 'key: value' lines, expected its fields, indented below it")


def _check_keys(node: yaml.MappingNode, source: str) -> None:
    first_lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{source} line {line}: a key is a list or a mapping, expected a name")
        if key.tag == "tag:yaml.org,2002:merge":
            continue
        if key.value in first_lines:
            raise UserError(
                f"{source} line {line}: key '{key.value}' is given a second time (first on line "
                f"{first_lines[key.value]}), expected once; delete one of them"
            )
        first_lines[key.value] = line


def _describe(error: yaml.MarkedYAMLError, text: str, source: str) -> str:
    mark = error.problem_mark or error.context_mark
    if mark is None:
        return f"{source} is no YAML: {error.problem}"
    two_nodes = _describe_two_nodes(text.splitlines(), mark.line, source)
    if two_nodes:
        return two_nodes
    problem = "; ".join(part for part in (error.context, error.problem) if part)
    hint = "; use spaces, not tabs, to indent" if "'\\t'" in problem else ""
    return f"{source} line {mark.line + 1}, column {mark.column + 1} is no YAML: {problem}{hint}"


def _describe_two_nodes(lines: list[str], index: int, source: str) -> str | None:
    """Return the error for a second ``!Tag`` node under one key, as in PaddleSlim's rtdetr_reader.yml, or None."""
    tag_line = re.compile(r"^(\s*)!(\w+)")
    second = tag_line.match(lines[index]) if index < len(lines) else None
    if second is None:
        return None
    first_line = None
    for above in range(index - 1, -1, -1):
        line = lines[above]
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        indent = len(line) - len(line.lstrip())
        match = tag_line.match(line)
        if match and match.group(1) == second.group(1):
            first_line = above
        elif indent < len(second.group(1)):
            key = re.match(r"^\s*(?:- )?['\"]?([^:'\"]+)['\"]?\s*:\s*(?:#.*)?$", line)
            if first_line is None or key is None:
                return None
            return (
                f"{source} line {index + 1}: key '{key.group(1)}' has a second !{second.group(2)} node (the first is "
                f"on line {first_line + 1}), expected one; delete one of the two, or join their annotation files into "
                "one and name that in anno_path"
            )
    return None


def _kind(value: Any) -> str:
    """Return a description of a value's type for messages."""
    if isinstance(value, Tagged):
        return f"a !{value.name} node"
    names = {dict: "a mapping", list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)
