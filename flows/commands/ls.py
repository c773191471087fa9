"""`pixelmill ls`: what is in the store."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from flows.commands.command import Outcome, command, store_flag
from models.settings.fields import StoreSettings

if TYPE_CHECKING:
    from tasks.inventory import Inventory


@command("ls")
def ls(store: StoreSettings, what: Literal["all", "datasets", "models", "tables"] = "all") -> Outcome:
    """List what is in the store.

    For example:

        pixelmill ls
        pixelmill ls models --json

    The images of a table are its rows once no shard is open: an image counts once
    per version of its content and per model.

    Args:
        what: Only these.
    """
    from tasks import inventory

    found = inventory.Inventory(
        datasets=inventory.list_datasets(store.store) if what in ("all", "datasets") else [],
        models=inventory.list_models(store.store) if what in ("all", "models") else [],
        tables=inventory.list_tables(store.store) if what in ("all", "tables") else [],
    )
    return Outcome(lambda: asdict(found), lambda: _show(found, store.store))


NUMBERS = ("images", "annotations", "classes", "plans", "open shards", "size")


def _show(found: "Inventory", store: str) -> None:
    from flows.console import print_table

    kinds: dict[str, list[Any]] = {"data sets": found.datasets, "models": found.models, "tables": found.tables}
    for title, entries in kinds.items():
        if not entries:
            continue
        rows = [_for_people(asdict(entry)) for entry in entries]
        print_table(list(rows[0]), [list(row.values()) for row in rows], title=title, right=NUMBERS)
    if not any(kinds.values()):
        first = f"pixelmill import torchvision:mobilenet_v2 --name mobilenet{store_flag(store)}"
        print(f"nothing in {store} yet; a first model: {first}")


def _for_people(entry: dict[str, Any]) -> dict[str, object]:
    shown: dict[str, object] = {}
    for key, value in entry.items():
        match key:
            case "bytes":
                shown["size"] = size(value)
            case "splits":
                shown["splits"] = ", ".join(f"{split} {count:,}" for split, count in value.items())
            case "created_at":
                shown["created"] = value[:16].replace("T", " ")
            case _:
                shown[key.replace("_", " ")] = "\n".join(value) if isinstance(value, list) else value
    return shown


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
