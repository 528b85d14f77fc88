"""Take back the version that has a share of the requests; without one, the version before is live again."""

from __future__ import annotations

from collections.abc import Sequence

from act_pipeline.cli.flags import Parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print."""
    parser = Parser(description=__doc__)
    parser.add_argument("--repository", required=True, help="folder of the repository")
    arguments = parser.parse(argv)

    from act_pipeline.serving import Repository, roll_back

    entry = roll_back(Repository.open(arguments.repository))
    print(f"version {entry['version']} is taken back; version {entry['live']} is live")
    return 0
