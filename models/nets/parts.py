"""Which modules of a network are which, for transfer learning."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Parts:
    """Which modules of a network are its new head, and the backbone in order; names as in named_modules().

    Together they hold every parameter once.
    """

    # They learn in every mode; weights of another number of classes leave them out. The first gives the answer, others
    # are the last layers of auxiliary heads.
    head: tuple[str, ...]
    stages: tuple[tuple[str, ...], ...]  # the backbone from the input on
    # What stands between backbone and head, and asks nothing of the classes, such as a feature pyramid. It learns in
    # every mode; it is taken over from the weights of a whole detector, and is new on the backbone of a classifier.
    neck: tuple[str, ...] = ()
