"""``airflow pools``: Dagster's pools, with the descriptions that Airflow's have."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from clinical_orchestration.cli import deployment
from clinical_orchestration.cli.command import OUTPUT, VERBOSE, Arg, Command, CommandError, Group
from clinical_orchestration.cli.output import export, say, show

NAME = Arg("pool", metavar="NAME", help="Pool name")
SLOTS = Arg("slots", type=int, help="Pool slots; -1: without a limit, which here is 1000")
DESCRIPTION = Arg("description", help="Pool description")
DEFERRED = Arg("--include-deferred", help="Include deferred tasks in calculations for Pool", action="store_true")
IMPORT = Arg("file", metavar="FILEPATH", help="Import pools from a JSON or YAML file")
EXPORT = Arg("file", metavar="FILEPATH", help="Export all pools to JSON file")


def _pools() -> dict[str, dict[str, Any]]:
    from clinical_orchestration.instance import pool_slots
    from clinical_orchestration.platform.store import PoolInfo

    with deployment.instance() as instance:
        slots = pool_slots(instance)
    known = deployment.store().pools()
    nothing = PoolInfo("", include_deferred=False)
    return {
        name: {
            "slots": count,
            "description": known.get(name, nothing).description,
            "include_deferred": known.get(name, nothing).include_deferred,
        }
        for name, count in sorted(slots.items())
    }


def _list(args: argparse.Namespace) -> None:
    show([{"pool": name, **pool} for name, pool in _pools().items()], args.output)


def _get(args: argparse.Namespace) -> None:
    found = _pools().get(args.pool)
    if found is None:
        raise CommandError(f"Pool {args.pool} does not exist")
    show([{"pool": args.pool, **found}], args.output)


def _set(args: argparse.Namespace) -> None:
    from clinical_orchestration.instance import set_pool
    from clinical_orchestration.platform.connection import ConnectionFormatError, validate_key
    from clinical_orchestration.platform.store import PoolInfo

    try:
        validate_key(args.pool, 256)
        with deployment.instance() as instance:
            set_pool(instance, args.pool, args.slots)
    except (ConnectionFormatError, ValueError) as error:
        raise CommandError(str(error)) from None
    deployment.store().put_pool(args.pool, PoolInfo(args.description, args.include_deferred))
    say(f"Pool {args.pool} created")


def _delete(args: argparse.Namespace) -> None:
    from clinical_orchestration.instance import delete_pool

    with deployment.instance() as instance:
        there = delete_pool(instance, args.pool)
    if not there:
        raise CommandError(f"Pool {args.pool} does not exist")
    deployment.store().delete_pool(args.pool)
    say(f"Pool {args.pool} deleted")


def _import(args: argparse.Namespace) -> None:
    from clinical_orchestration.instance import set_pool
    from clinical_orchestration.platform.files import ImportFileError, read_pools

    path = Path(args.file)
    if not path.exists():
        raise CommandError(f"Missing pools file {args.file}")
    try:
        pools, failed = read_pools(path)
    except ImportFileError as error:
        raise CommandError(str(error)) from None
    store = deployment.store()
    with deployment.instance() as instance:
        for pool in pools:
            try:
                set_pool(instance, pool.name, pool.slots)
            except ValueError:
                failed.append(pool.name)
                continue
            store.put_pool(pool.name, pool.info)
    if failed:
        raise CommandError(f"Failed to update pool(s): {', '.join(failed)}")
    say(f"Uploaded {len(pools)} pool(s)")


def _export(args: argparse.Namespace) -> None:
    pools = _pools()
    text = json.dumps(pools, sort_keys=True, indent=4)
    if args.file == "-":
        export(text, args.file, len(pools), "Pools")
        return
    try:
        Path(args.file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise CommandError(f"{args.file} cannot be written: {error.strerror}") from None
    say(f"Exported {len(pools)} pools to {args.file}")


GROUP = Group(
    "pools",
    "Manage pools",
    (
        Command("list", "List pools", _list, (OUTPUT, VERBOSE)),
        Command("get", "Get pool size", _get, (NAME, OUTPUT, VERBOSE)),
        Command("set", "Configure pool", _set, (NAME, SLOTS, DESCRIPTION, DEFERRED, OUTPUT, VERBOSE)),
        Command("delete", "Delete pool", _delete, (NAME, OUTPUT, VERBOSE)),
        Command("import", "Import pools", _import, (IMPORT, VERBOSE)),
        Command("export", "Export all pools", _export, (EXPORT, VERBOSE)),
    ),
)
