"""`pixelmill export`: ONNX files of a trained model."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from flows.commands.command import Direct, Outcome, command, use_of
from models.settings.export import ExportSettings
from models.settings.fields import StoreSettings

if TYPE_CHECKING:
    from tasks.export import Exported


@command("export", ExportSettings, positional="model")
def export(settings: ExportSettings, store: StoreSettings, *, direct: Direct = False) -> Outcome:
    """Export a model to ONNX, exactly (fp32) or smaller and faster (fp16, int8).

    For example:

        pixelmill export flowers
        pixelmill export flowers@production --precision int8 --tolerance .02

    fp32 is published only when it agrees with PyTorch; fp16 and int8 only when the
    main metric on --split falls by no more than --tolerance. The result has a reference
    of its own, such as flowers@0123456789ab.int8, which predict, evaluate and promote
    take.
    """
    from flows.running import run_step

    exported = run_step("export", store.store, settings, direct)
    return Outcome(lambda: asdict(exported), lambda: _show(exported, store.store))


def _show(exported: "Exported", store: str) -> None:
    from flows.commands.adopt import describe
    from flows.figures import print_metrics

    print_metrics(exported.metrics)
    print(f"{exported.model}: {exported.file}")
    if exported.parity:
        print(describe(exported.parity))
    print("next:")
    print(f"  {use_of(exported.model, 'latents' in exported.parity, store)}")
