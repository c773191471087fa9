"""`pixelmill neighbours`: the most similar images of a table."""

from dataclasses import asdict

from flows.commands.command import Outcome, command
from models.settings.fields import StoreSettings
from models.settings.neighbours import NeighboursSettings


@command("neighbours", NeighboursSettings, positional="image")
def neighbours(settings: NeighboursSettings, store: StoreSettings) -> Outcome:
    """The images of a table that are most like one, by embedding.

    For example:

        pixelmill neighbours ./photos/cat.jpg --table vectors
        pixelmill neighbours s3://bucket/photos/cat.jpg --table vectors --count 50 --by l2

    An image of the table is found by its URI; any other is shown to the table's model
    first. All rows are compared, none is skipped.
    """
    from tasks.neighbours import find_neighbours

    found = find_neighbours(store.store, settings)

    def show() -> None:
        from flows.console import print_table

        rows = [(round(each.distance, 6), each.image) for each in found.neighbours]
        print_table(("distance", "image"), rows, right=("distance",), cell=200)
        origin = "in the table" if found.in_table else f"embedded by {found.model}"
        print(f"{found.image} ({origin}) against {found.compared:,} images of {found.table}, {found.by} distance")

    return Outcome(lambda: asdict(found), show)
