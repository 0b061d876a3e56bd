from typing import Any

import numpy as np
from numpy.typing import NDArray

def gather(
    table: NDArray[np.float64], codes: NDArray[np.unsignedinteger[Any]], totals: NDArray[np.float64]
) -> None: ...
