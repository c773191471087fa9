"""`pixelmill generate`: images from a generator."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from flows.commands.command import Direct, Outcome, command, store_flag
from models.settings.fields import StoreSettings
from models.settings.generate import GenerateSettings

if TYPE_CHECKING:
    from tasks.generate import Generated


@command("generate", GenerateSettings, positional="model")
def generate(settings: GenerateSettings, store: StoreSettings, *, direct: Direct = False) -> Outcome:
    """Make images with a generator; as a data set, too.

    For example:

        pixelmill generate faces --count 1000 --out ./faces
        pixelmill generate digits --count 500 --out s3://bucket/digits --classes 3,8 \\
            --as-dataset more-digits

    Image number k depends on the model, the seed and k alone. Stop it at any moment
    and run it again: it makes what is missing. manifest.parquet beside the images is
    written last, and says of each its class, its number and its SHA-256.
    """
    from flows.running import run_step

    generated = run_step("generate", store.store, settings, direct)
    return Outcome(lambda: asdict(generated), lambda: _show(generated, store.store))


def _show(generated: "Generated", store: str) -> None:
    print(f"{generated.images:,} images of {generated.model}, seed {generated.seed}, in {generated.out}")
    for name, count in generated.classes.items():
        print(f"  {name}: {count:,}")
    if generated.new:
        rate = f"{generated.images_per_second:,.1f} images/s on {generated.engine}"
        print(f"{generated.new:,} made now in {generated.seconds:,.1f} s, {rate}")
    else:
        print("all of them were there: nothing to do")
    if generated.dataset:
        name = generated.dataset.partition("@")[0]
        print(f"data set {generated.dataset}")
        learner = "resnet18" if generated.classes else "dcgan"  # without labels there is nothing to classify
        print("next:")
        print(f"  pixelmill train DATASET --extra-data {name} --model {learner} --name NAME{store_flag(store)}")
