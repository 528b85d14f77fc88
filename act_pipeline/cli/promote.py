"""Put an INT8 model into a repository of versions, and give it a share of the requests."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from act_pipeline.cli.flags import Parser
from act_pipeline.core.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print."""
    parser = Parser(description=__doc__)
    parser.add_argument("--repository", required=True, help="folder of the repository; made if it is missing")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model_path", help="folder that compress wrote, with its act.json; it is copied")
    model.add_argument("--version", type=int, metavar="N", help="a version that the repository has already")
    parser.add_argument(
        "--share",
        type=int,
        default=100,
        help="percent of the requests: 1, 10, 50, or 100, which makes it live; default: %(default)s",
    )
    parser.add_argument("--force", action="store_true", help="promote a model whose act.json does not let it pass")
    parser.add_argument(
        "--spare", action="store_true", help="keep it as the lighter model that a rule may switch to; no requests yet"
    )
    parser.add_argument(
        "--reader_config", help="reader that names the classes, for figures by class; default: that of act.json"
    )
    parser.add_argument(
        "--float_model", help="folder of the float model for shadow requests; default: that of act.json"
    )
    parser.add_argument(
        "--plan", metavar="FILE", help="TensorRT plan of the model, as its bundle builds it: loaded where TensorRT is"
    )
    arguments = parser.parse(argv)
    if arguments.plan is not None and arguments.version is not None:
        raise UserError(
            f"--plan={arguments.plan} comes with a new version, and --version={arguments.version} is there already; "
            "give --model_path"
        )

    from act_pipeline.serving import Repository, promote
    from act_pipeline.serving.state import check_share

    check_share(arguments.share)
    repository = Repository.open(arguments.repository, create=arguments.model_path is not None)
    if arguments.version is not None:
        model_path = repository.version(arguments.version).folder
    else:
        model_path = Path(arguments.model_path)
    named = _global(model_path)
    version, entry = promote(
        repository,
        model_path,
        arguments.share,
        force=arguments.force,
        spare=arguments.spare,
        category_ids=_category_ids(arguments.reader_config, named.get("reader_config")),
        float_model=_float_model(arguments.float_model, named.get("model_dir")),
        plan=arguments.plan,
    )
    if arguments.spare:
        use = "spare, answers no requests"
    elif entry["candidate"] is None:
        use = "live"
    else:
        use = f"{entry['share']}% of the requests; version {entry['live']} has the rest"
    print(f"version {version.number}: {use}")
    print(f"verdict: {'' if entry['passed'] else 'forced: '}{entry['verdict']}")
    return 0


def _global(model_path: Path) -> dict[str, Any]:
    """Return the section ``Global`` of the config in a model's ``act.json``; empty if there is none."""
    from act_pipeline.core.records import ACT_FILENAME, ACT_SCHEMA, read_record

    try:
        found: Any = (read_record(model_path / ACT_FILENAME, ACT_SCHEMA).get("config") or {}).get("Global")
    except (UserError, AttributeError):
        return {}
    return found if isinstance(found, dict) else {}


def _category_ids(given: Optional[str], named: Any) -> Optional[list[int]]:
    """Return the COCO category id of every class index; None if no reader that was not asked for can be read."""
    from act_pipeline.data import Reader

    if given is None and not isinstance(named, str):
        return None
    try:
        reader = Reader.load(given if given is not None else named)
        return reader.class_ids(reader.annotations("eval"))
    except UserError as error:
        if given is not None:
            raise
        print(f"note: no figures by class: {error}; give --reader_config", file=sys.stderr)
        return None


def _float_model(given: Optional[str], named: Any) -> Optional[Path]:
    if given is not None:
        return Path(given)
    found = Path(named) if isinstance(named, str) else None
    return found if found is not None and found.is_dir() else None
