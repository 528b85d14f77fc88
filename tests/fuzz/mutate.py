"""Files that are nearly right: strategies that start from a valid one and break it, in its structure or its bytes."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

_LONG = 300  # more than a file name may have
_HUGE = 10**400  # more than a float holds
_DEEP = 3000  # more than Python's stack takes

_ODD_TEXT = (
    "",
    " ",
    "\0",
    "a\nb",
    "\ud800",
    "\u202e\u2028",
    "é" * _LONG,
    "a" * 5000,
    "../../../etc/passwd",
    "/",
    "/dev/null",
    ".",
    "..",
    "~",
    "~nobody/x",
    "~root",
    "file:///etc/passwd",
    "{0}{x}",
    "%s%n",
    "$HOME",
    "true",
    "1e5",
    "9" * 5000,
    "-",
    "*",
    "?",
    "[",
    "__class__",
    "__init__",
    "os.system('x')",
)
ODD_NUMBERS = (
    0,
    -1,
    1,
    2,
    255,
    2**31 - 1,
    2**31,
    2**32,
    2**63 - 1,
    2**63,
    -(2**63),
    2**64,
    10**30,
    _HUGE,
    -_HUGE,
    0.0,
    -0.0,
    0.5,
    1e-320,
    1e308,
    -1e308,
    float("inf"),
    float("-inf"),
    float("nan"),
)


def odd_values() -> st.SearchStrategy[Any]:
    """Values of every kind that JSON and YAML have, those at the limits first."""
    scalars = st.one_of(
        st.sampled_from(ODD_NUMBERS),
        st.sampled_from(_ODD_TEXT),
        st.sampled_from([None, True, False]),
        st.integers(),
        st.floats(),
        st.text(max_size=20),
    )
    return st.one_of(
        scalars,
        st.lists(scalars, max_size=5),
        st.dictionaries(st.sampled_from(["a", "id", "type", "name"]), scalars, max_size=3),
    )


@st.composite
def trees(draw: st.DrawFn, seeds: Sequence[Any], keys: Sequence[str] = ()) -> Any:
    """One of ``seeds``, plain data, with up to four parts dropped, retyped, nested, renamed, doubled or exchanged.

    ``keys`` are names that are put in beside those that are there.
    """
    root = [copy.deepcopy(draw(st.sampled_from(list(seeds))))]
    for _ in range(draw(st.integers(0, 4))):
        places = _places(root)
        holder, name = places[draw(st.integers(0, len(places) - 1))]
        kind = draw(st.sampled_from(["retype", "drop", "nest", "rename", "double", "exchange", "add"]))
        value = holder[name]
        if kind == "retype":
            holder[name] = draw(odd_values())
        elif kind == "nest":
            for _ in range(draw(st.sampled_from([1, 2, 60]))):
                value = [value] if draw(st.booleans()) else {"a": value}
            holder[name] = value
        elif kind == "exchange":
            other, its = places[draw(st.integers(0, len(places) - 1))]
            holder[name] = copy.deepcopy(other[its])
        elif holder is root:
            continue
        elif kind == "drop":
            del holder[name]
        elif kind == "add" and isinstance(holder, dict):
            holder[draw(st.sampled_from([*keys, "a"]))] = draw(odd_values())
        elif kind == "rename" and isinstance(holder, dict):
            known = [key for place in places if isinstance(place[0], dict) for key in [place[1]]]
            holder[draw(st.one_of(st.sampled_from([*known, *keys]), st.sampled_from(_ODD_TEXT)))] = holder.pop(name)
        elif isinstance(holder, list):
            holder.insert(name, copy.deepcopy(value))
    return root[0]


def _places(root: list[Any]) -> list[tuple[Any, Any]]:
    """Return (holder, key or index) of every part, the whole first."""
    found: list[tuple[Any, Any]] = []
    waiting: list[Any] = [root]
    while waiting and len(found) < 2000:
        holder = waiting.pop(0)
        for name in list(holder) if isinstance(holder, dict) else range(len(holder)):
            found.append((holder, name))
            if isinstance(holder[name], (dict, list)):
                waiting.append(holder[name])
    return found


def json_files(seeds: Sequence[Any], keys: Sequence[str] = ()) -> st.SearchStrategy[bytes]:
    """JSON files: broken in structure, in their bytes, or nested beyond any use."""
    texts = trees(seeds, keys).map(lambda tree: json.dumps(tree).encode())
    valid = [json.dumps(seed).encode() for seed in seeds]
    deep = st.sampled_from(
        [b"[" * 100_000, b'{"a":' * _DEEP + b"1" + b"}" * _DEEP, b"9" * 10_000, b'{"a": 1, "a": 2}', b"", b"null"]
    )
    return st.one_of(texts, raw(valid), texts.flatmap(lambda text: raw([text])), deep)


_YAML_PARTS = (
    "&a [*a]",
    "*nothing",
    "&a {b: *a}",
    "!!python/object/apply:os.system ['touch fuzzed']",
    "!!python/name:os.system",
    "!!python/object/new:type {args: [x, [], {}]}",
    "!!python/module:os",
    "!COCODataSet",
    "!COCODataSet {a: 1}",
    "!Unknown {}",
    "!!binary aGk=",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "!!timestamp 2024-13-45",
    "2024-13-45",
    "2001-01-01",
    "{<<: {a: 1}}",
    "{<<: [1, 2]}",
    "{<<: *x}",
    "? [a]\n: b",
    "{[a]: b}",
    "{1: 2, 1: 3}",
    "'",
    '"\\ud800"',
    '"\\x00"',
    "\t",
    "|\n  a\n b",
    "---",
    "...",
    "%YAML 9.9",
    "0x",
    "0b2",
    "1:60:60",
    ".inf",
    "-.inf",
    ".nan",
    "1e400",
    "9" * 5000,
    "0o7",
    "=",
    "<<",
    "~",
    "null",
    "{}",
    "[]",
    "''",
    "[" * 60,
    "{a: " * 200,
    "!!float ''",
    "!!int ''",
    "!!int 0x",
    "!!bool maybe",
    "!!null x",
    "!!str {}",
    "!!map []",
    "-",
    "? ",
    ": ",
    "&x",
    "@",
    "`",
    "_BASE_: [.]",
    "_BASE_",
    "!!merge x",
    "!!value x",
    "!<tag:yaml.org,2002:python/name:os.system> ''",
)


def _bomb(levels: int, width: int) -> str:
    lines = ["l0: &l0 [x, x]"]
    for level in range(1, levels):
        lines.append(f"l{level}: &l{level} [{', '.join([f'*l{level - 1}'] * width)}]")
    return "\n".join(lines)


@st.composite
def yaml_files(draw: st.DrawFn, seeds: Sequence[str]) -> bytes:
    """YAML files: one of ``seeds`` with lines dropped, doubled, indented, exchanged, or with other values in them."""
    lines = draw(st.sampled_from(list(seeds))).splitlines()
    for _ in range(draw(st.integers(0, 4))):
        if not lines:
            break
        index = draw(st.integers(0, len(lines) - 1))
        line = lines[index]
        kind = draw(
            st.sampled_from(["value", "value", "drop", "double", "indent", "exchange", "insert", "key", "bomb"])
        )
        part = draw(st.one_of(st.sampled_from(_YAML_PARTS), odd_values().map(_flow)))
        if kind == "value":
            lines[index] = f"{line.split(':', 1)[0]}: {part}" if ":" in line else f"{line} {part}"
        elif kind == "drop":
            del lines[index]
        elif kind == "double":
            lines.insert(index, line)
        elif kind == "indent":
            lines[index] = " " * draw(st.integers(1, 4)) + line if draw(st.booleans()) else line.lstrip()
        elif kind == "exchange":
            other = draw(st.integers(0, len(lines) - 1))
            lines[index], lines[other] = lines[other], line
        elif kind == "insert":
            lines.insert(index, part)
        elif kind == "key":
            lines[index] = f"{part}: {line.split(':', 1)[-1]}"
        else:
            lines.insert(0, _bomb(draw(st.sampled_from([3, 10, 40])), draw(st.sampled_from([2, 10]))))
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    return draw(raw([content])) if draw(st.integers(0, 9)) == 0 else content


def _flow(value: Any) -> str:
    """Write a value as YAML's flow style, which is JSON but for a few numbers."""
    return json.dumps(value).replace("NaN", ".nan").replace("Infinity", ".inf")


@st.composite
def raw(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    """The bytes of one of ``seeds``: cut off, flipped, overwritten, put in, taken out, or doubled; or any bytes."""
    if draw(st.integers(0, 19)) == 0:
        return draw(st.binary(max_size=200))
    content = bytearray(draw(st.sampled_from(list(seeds))))
    for _ in range(draw(st.integers(1, 5))):
        if not content:
            break
        at = draw(st.integers(0, len(content) - 1))
        kind = draw(st.sampled_from(["flip", "set", "cut", "insert", "remove", "double"]))
        if kind == "flip":
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set":
            count = draw(st.sampled_from([1, 2, 4, 8]))
            content[at : at + count] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF])).to_bytes(1, "little") * count
        elif kind == "cut":
            del content[at:]
        elif kind == "insert":
            content[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif kind == "remove":
            del content[at : at + draw(st.integers(1, 64))]
        else:
            content[at:at] = content[at : at + draw(st.integers(1, 64))]
    return bytes(content)
