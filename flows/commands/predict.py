"""`pixelmill predict`: bulk prediction, through Prefect or directly."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from flows.commands.command import Direct, Outcome, command, store_flag
from models.settings.fields import StoreSettings
from models.settings.predict import PredictSettings

if TYPE_CHECKING:
    from tasks.predict import Summary


@command("predict", PredictSettings, positional="source")
def predict(settings: PredictSettings, store: StoreSettings, *, direct: Direct = False) -> Outcome:
    """Run a model over a folder or bucket of images; one row per image in a table.

    For example:

        pixelmill predict ./photos --model mobilenet --table holiday
        pixelmill predict s3://bucket/photos --model mobilenet@production \\
            --table holiday --store s3://bucket/mill --slots 2
        pixelmill predict s3://bucket/photos --model mobilenet --table holiday \\
            --store s3://bucket/mill --slots 8 --runner ray --cluster ray://head:10001

    Stop it at any moment and run it again: it goes on where it was. The run is
    recorded by Prefect: on the server of PREFECT_API_URL or of the active profile,
    else in a database in PREFECT_HOME, which `prefect server start` shows.
    """
    from tasks.slot_process import warm_up

    if settings.runner == "local":
        warm_up(settings.slots)  # before the imports below, which take as long as the process's own
    from flows import order
    from flows.console import watching

    problem = ""
    with watching() as watch:
        try:
            if direct:
                summary = order.predict_directly(store.store, settings, watch)
            else:
                from flows.embedded import run_recorded

                summary = run_recorded("predict", store.store, settings, watch)
        except order.Incomplete as error:
            summary, problem = error.summary, str(error)
    return Outcome(lambda: asdict(summary), lambda: show_summary(summary, store.store), problem)


def show_summary(summary: "Summary", store: str) -> None:
    """What a run did, and what can be asked next."""
    from flows.console import print_table

    counts = sorted(summary.by_status.items(), key=lambda item: -item[1])
    if counts:
        print_table(("status", "images"), counts, right=("images",))
    for line in describe(summary):
        print(line)
    flag = store_flag(store)
    print("next:")
    print(f'  pixelmill query "select * from {summary.table} limit 10"{flag}')
    print(f"  pixelmill verify {summary.table}{flag}")


def describe(summary: "Summary") -> list[str]:
    """The summary in a few lines for people."""
    ignored = "".join(f", {count:,} {reason} files ignored" for reason, count in summary.ignored.items() if count)
    lines = [
        f"{summary.table} ← {summary.model}: {summary.rows:,} new rows in {summary.shards} shards",
        f"listed {summary.listed:,} images, {summary.planned:,} new, {summary.skipped:,} claimed before{ignored}",
    ]
    if summary.rows:
        stages = " · ".join(f"{stage} {seconds:,.1f} s" for stage, seconds in summary.stages.items())
        lines += [
            f"{summary.seconds:,.1f} s, {summary.images_per_second:,.1f} images/s on {summary.engine}",
            f"busy: {stages}; the limit: {summary.limit}",
        ]
    return lines
