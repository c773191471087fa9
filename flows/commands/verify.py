"""`pixelmill verify`: is every claimed image in the table, once?"""

from dataclasses import asdict

from flows.commands.command import Outcome, command
from models.settings.fields import StoreSettings


@command("verify")
def verify(store: StoreSettings, table: str) -> Outcome:
    """Check a table: counts, checksums, one row per claimed image.

    For example:

        pixelmill verify holiday

    Reads every plan and every part. Exit code 1 when there are problems, each of
    them one line on stdout; open shards are a problem too.

    Args:
        table: The table's name.
    """
    from tasks.verify import verify as verify_table

    found = verify_table(store.store, table)

    def show() -> None:
        print(f"{found.table}: {found.rows:,} rows in {found.parts:,} parts, {found.plans:,} plans")
        for problem in found.problems:
            print(f"  {problem}")
        if not found.problems:
            print("no problem found: one row per claimed image, all checksums right")

    count = len(found.problems)
    problem = f"{count} {'problem' if count == 1 else 'problems'} in table {table}" if count else ""
    return Outcome(lambda: asdict(found), show, problem)
