"""`pixelmill backfill`: bulk prediction, partition by partition."""

from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from flows.commands.command import Direct, Outcome, command, store_flag
from models.settings.backfill import BackfillSettings
from models.settings.fields import StoreSettings

if TYPE_CHECKING:
    from flows.partitions import Backfilled
    from tasks.backfill import Survey


@command("backfill", BackfillSettings, positional="source")
def backfill(settings: BackfillSettings, store: StoreSettings, *, direct: Direct = False) -> Outcome:
    """Predict partition by partition, each in a flow run of its own; what is complete is passed over.

    For example:

        pixelmill backfill s3://bucket/photos --model pets@production --table history \\
            --partitions "date=2026-01-*" --plan-only
        pixelmill backfill s3://bucket/photos --model pets@production --table history \\
            --partitions 2026-01-01..2026-03-31 --deployment predict/backfill --concurrency 4

    Stop it at any moment and run it again: it goes on where it was. A partition whose run
    failed or crashed is run again. A new version of the model over an old table computes
    exactly what that version lacks.
    """
    from flows import partitions
    from flows.console import watching
    from tasks.backfill import survey

    problem = ""
    with watching() as watch:
        if settings.plan_only:
            found = survey(store.store, settings, watch.step)
            return Outcome(lambda: _plan(found), lambda: _show_plan(found))
        try:
            if not direct:
                from flows.embedded import run_recorded

                done = run_recorded("backfill", store.store, settings, watch)
            else:
                done = partitions.backfill(
                    store.store,
                    settings,
                    lambda store, settings: survey(store, settings, watch.step),
                    _runner(settings, watch),
                    watch.step,
                )
        except partitions.Unfinished as error:
            done, problem = error.done, str(error)
    return Outcome(lambda: asdict(done), lambda: _show(done, store.store), problem)


def _runner(settings: BackfillSettings, watch: Any) -> Any:
    """How partitions run when this command is not recorded itself."""
    from flows import partitions

    if settings.deployment:
        from flows.deployed import check_server, run_on_deployment

        check_server(settings.deployment)
        return run_on_deployment
    from flows.order import predict_directly

    return partitions.run_here(lambda store, settings: predict_directly(store, settings, watch))


def _plan(found: "Survey") -> dict[str, Any]:
    return {
        "table": found.table,
        "model": found.model,
        "partitions": [
            {"partition": one.name, "images": one.images, "bytes": one.bytes, "new": one.new, "open": one.open}
            for one in found.partitions
        ],
        "rows": 0,
        "images_per_second": found.images_per_second and round(found.images_per_second, 2),
        "seconds": found.seconds and round(found.seconds, 1),
    }


def _show_plan(found: "Survey") -> None:
    from flows.commands.ls import size
    from flows.console import print_table

    columns = ("partition", "images", "size", "new", "open")
    rows = [(one.name, one.images, size(one.bytes), one.new, one.open) for one in found.partitions]
    print_table(columns, rows, right=columns[1:])
    left = sum(one.left for one in found.partitions)
    images = sum(one.images for one in found.partitions)
    print(f"{found.table} ← {found.model}: {left:,} of {images:,} images have no row")
    if found.seconds is None:
        print("how long they take is not known: the table has no rows yet")
    else:
        took = timedelta(seconds=round(found.seconds))
        print(f"about {took} for one run at a time, at the {found.images_per_second:,.1f} images/s of the table's past")


def _show(done: "Backfilled", store: str) -> None:
    from flows.console import print_table

    columns = ("partition", "images", "rows", "state")
    rows = [(one.partition, one.images, one.rows, one.state) for one in done.partitions]
    print_table(columns, rows, right=columns[1:3])
    print(f"{done.table} ← {done.model}: {done.rows:,} new rows in {done.seconds:,.1f} s")
    print("next:")
    print(f"  pixelmill verify {done.table}{store_flag(store)}")
