"""``airflow``: the command line that people know, on this platform."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from clinical_orchestration.cli.command import Command, CommandError, Group, build_parser
from clinical_orchestration.cli.groups import connections, dags, pools, secret_key, system, tasks, users, variables

ENTRIES: tuple[Group | Command, ...] = (
    dags.GROUP,
    tasks.GROUP,
    connections.GROUP,
    variables.GROUP,
    pools.GROUP,
    users.USERS,
    users.ROLES,
    system.DB,
    system.JOBS,
    system.INFO,
    system.VERSION,
    secret_key.ROTATE,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status: 0 done, 1 failed (the reason is on standard error), 2 not understood."""
    chosen = build_parser("airflow", ENTRIES).parse_args(arguments)
    from clinical_orchestration.cli.deployment import use_stack
    from clinical_orchestration.cli.permissions import permitted
    from clinical_orchestration.cli.recording import recorded
    from clinical_orchestration.platform.crypto import SecretKeyError
    from clinical_orchestration.platform.store import StoreUnavailableError

    try:
        use_stack()
        words = (chosen.group, getattr(chosen, "command", None))
        with recorded(words, chosen, permitted(words, chosen)):
            chosen.handler(chosen)
        sys.stdout.flush()
    except (CommandError, SecretKeyError, StoreUnavailableError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stderr.close()
        return 141
    return 0


if __name__ == "__main__":
    sys.exit(main())
