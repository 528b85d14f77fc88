"""What the flags of several commands have in common."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from act_pipeline.core.command_names import name_commands
from act_pipeline.core.defaults import DEFAULT_CONFIG, find_shipped
from act_pipeline.core.errors import UserError, suggest
from act_pipeline.core.yaml_files import describe_search

if TYPE_CHECKING:
    from act_pipeline.config import Config

_TRUE = ("true", "1", "yes", "y", "on")
_FALSE = ("false", "0", "no", "n", "off")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message[:1].lower() + message[1:] + "; see --help")

    def format_help(self) -> str:
        return name_commands(super().format_help())

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Return the flags' values; None: of the process's command line.

        Raises:
            UserError: a flag is unknown or its value is not what it takes.
            SystemExit: ``--help``, after printing it.
        """
        namespace, unknown = self.parse_known_args(argv)
        if unknown:
            name = unknown[0].split("=", 1)[0]
            known = [option for action in self._actions for option in action.option_strings]
            raise UserError(f"unknown flag {unknown[0]!r}{suggest(name, known)}; see --help")
        return namespace


def parse_bool(text: str) -> bool:
    """Return what ``text`` means; ``False`` means False.

    Raises:
        argparse.ArgumentTypeError: it means neither.
    """
    if text.strip().lower() in _TRUE:
        return True
    if text.strip().lower() in _FALSE:
        return False
    raise argparse.ArgumentTypeError(f"found {text!r}, expected True or False")


def device(text: str) -> str:
    """Return ``CPU``, ``GPU`` or ``auto``, in whichever case it is written."""
    for name in ("CPU", "GPU", "auto"):
        if text.lower() == name.lower():
            return name
    raise argparse.ArgumentTypeError(f"found {text!r}, expected CPU, GPU or auto")


def at_least(least: int) -> Callable[[str], int]:
    """Return what reads a whole number that is not below ``least``."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number of at least {least}")
        return value

    return number


def add_config(parser: argparse.ArgumentParser, help: str, *aliases: str) -> None:
    """Add ``-c FILE``, a compression config, which :func:`load_config_of` reads."""
    parser.add_argument("-c", "--config", *aliases, help=f"{help}; default: {DEFAULT_CONFIG}, of the built-in sample")


def load_config_of(arguments: argparse.Namespace, announce: bool = True) -> Config:
    """Return the compression config that ``-c`` and ``-o`` describe.

    Args:
        arguments: the flags of :func:`add_config` and :func:`add_opt`.
        announce: write a line to stderr if the config is the default one.

    Raises:
        UserError: the config is invalid, or its model folder or its reader does not exist.
    """
    from act_pipeline.config import load_config

    config = load_config(arguments.config or find_shipped(DEFAULT_CONFIG), arguments.opt)
    is_default = arguments.config is None
    named_by = f"named by {'the default config, ' if is_default else ''}{config.path}"
    folder, reader = config.global_.model_dir, config.global_.reader_config
    if not folder.exists():
        remedy = (
            "give yours with -c FILE, or run `make demo`, which makes the sample's model"
            if is_default
            else "export a model with tools/export_model.py first, or correct it"
        )
        searched = describe_search(folder, config.path)
        raise UserError(f"model folder {folder} does not exist, {named_by}: Global.model_dir{searched}; {remedy}")
    if not reader.exists():
        searched = describe_search(reader, config.path)
        raise UserError(f"reader {reader} does not exist, {named_by}: Global.reader_config{searched}; correct it")
    if is_default and announce:
        print(f"config: {config.path}, the default; -c FILE gives another", file=sys.stderr)
    return config


def add_devices(parser: argparse.ArgumentParser, help: str) -> None:
    """Add ``--devices``."""
    parser.add_argument(
        "--devices", default="auto", choices=["auto", "cpu", "gpu"], help=f"{help}; default: %(default)s"
    )


def add_opt(parser: argparse.ArgumentParser, help: str, metavar: str = "SECTION.KEY=VALUE") -> None:
    """Add ``-o KEY=VALUE ...``."""
    parser.add_argument("-o", "--opt", action="extend", nargs="*", default=[], metavar=metavar, help=help)
