"""`pixelmill promote`: which version is in production."""

from flows.commands.command import Outcome, command
from models.settings.export import PromoteSettings
from models.settings.fields import StoreSettings


@command("promote", PromoteSettings, positional="model")
def promote(settings: PromoteSettings, store: StoreSettings) -> Outcome:
    """Make a version the one that NAME@production means.

    For example:

        pixelmill promote flowers
        pixelmill promote flowers@0123456789ab
    """
    from tasks.promote import promote as set_production

    card = set_production(store.store, settings.model)
    return Outcome(
        lambda: {"model": card.reference, "alias": f"{card.name}@production"},
        lambda: print(f"{card.name}@production is now {card.reference}"),
    )
