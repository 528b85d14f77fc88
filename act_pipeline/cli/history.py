"""List what happened to the versions of a repository, and why."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from act_pipeline.cli.flags import Parser, at_least


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print."""
    parser = Parser(description=__doc__)
    parser.add_argument("--repository", required=True, help="folder of the repository")
    parser.add_argument("--last", type=at_least(1), metavar="N", help="only the last N entries")
    parser.add_argument("--json", action="store_true", help="print the entries as they are in the log, one a line")
    arguments = parser.parse(argv)

    from act_pipeline.serving import Repository

    repository = Repository.open(arguments.repository)
    entries = repository.audit.entries()
    for entry in entries[-arguments.last :] if arguments.last else entries:
        print(json.dumps(entry, ensure_ascii=False) if arguments.json else _line(entry))
    if not arguments.json:
        state = repository.state()
        shares = [f"version {version} has {share}%" for version, share in state.shares().items()]
        print(f"now: {', '.join(shares) or 'nothing is live'}")
    return 0


def _line(entry: Mapping[str, Any]) -> str:
    words = [str(entry.get("time", "?"))[:19], str(entry.get("event", "?")), f"version {entry.get('version', '?')}"]
    if "share" in entry:
        now = f"live {entry.get('live')}"
        words.append(now if entry.get("candidate") is None else f"{now}, {entry['share']}% to {entry['candidate']}")
    if entry.get("metric") is not None:
        words.append(f"{entry['metric']} {_number(entry.get('value'))}, {entry.get('bound')}")
    if entry.get("verdict"):
        words.append(f"{'forced: ' if entry.get('forced') else ''}{entry['verdict']}")
    if entry.get("reason"):
        words.append(f"instead of {entry.get('instead_of')}: {entry['reason']}")
    return "  ".join(words)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else str(value)
