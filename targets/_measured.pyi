from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fxopt.targets.models.linear_cpu import Model

class MeasuredModel(Model):
    def __init__(
        self, values: Mapping[str, float], fuses: bool, keys: NDArray[np.uint64], factors: NDArray[np.float64]
    ) -> None: ...

def family_keys(rows: NDArray[np.void], keys: NDArray[np.uint64]) -> None: ...
