import numpy as np
from numpy.typing import NDArray

def resize(
    source: NDArray[np.uint8],
    size_hw: tuple[int, int],
    y_span: tuple[int, int, int],
    x_span: tuple[int, int, int],
    bicubic: bool,
    rows_first: bool,
    out: NDArray[np.uint8],
    /,
) -> None: ...
