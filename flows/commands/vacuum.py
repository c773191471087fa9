"""`pixelmill vacuum`: what nothing names any more goes."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from flows.commands.command import Direct, Outcome, command
from models.settings.fields import StoreSettings
from models.settings.vacuum import VacuumSettings

if TYPE_CHECKING:
    from tasks.vacuum import Vacuumed


@command("vacuum", VacuumSettings)
def vacuum(settings: VacuumSettings, store: StoreSettings, *, direct: Direct = False) -> Outcome:
    """Remove what killed runs and old model versions left behind.

    For example:

        pixelmill vacuum
        pixelmill vacuum --older-than 30d --keep-versions 5 --delete

    Without --delete nothing is removed, only shown. Temporary files, uploads that were
    never completed, model and data set versions that were never published, and, of
    this machine, scratch folders of killed commands and checkpoints of trainings. Rows,
    plans, cards and what an alias or a table names are never touched, and it may run
    beside anything else.
    """
    from flows.running import run_step

    done = run_step("vacuum", store.store, settings, direct)
    in_use = sum(not entry["removed"] for entry in done.found) if done.deleted else 0
    problem = f"{in_use} could not be removed, or are in use by now: run it again" if in_use else ""
    return Outcome(lambda: asdict(done), lambda: _show(done), problem)


def _show(done: "Vacuumed") -> None:
    from flows.commands.ls import size
    from flows.console import print_table

    if not done.found:
        print(f"nothing to remove in {done.store}")
        return
    rows = [(e["kind"], e["uri"], size(int(e["bytes"])), f"{int(e['age_s']) / 86400:.1f}") for e in done.found]
    print_table(("kind", "where", "size", "days old"), rows, right=("size", "days old"))
    what = f"{len(done.found)}, {size(done.bytes)}"
    print(f"removed: {what}" if done.deleted else f"to be removed: {what}; the same with --delete removes it")
