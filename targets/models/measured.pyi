from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fxopt.targets._core import CostModel
from fxopt.targets.parameters import Parameter

CLASS_NAMES: tuple[str, ...]
GROUP_NAMES: tuple[str, ...]
COEFFICIENTS: Mapping[str, str]
PARAMETERS: Mapping[str, Parameter]

class Model(CostModel):
    def __init__(
        self,
        values: Mapping[str, float],
        fuses: bool,
        keys: NDArray[np.uint64] | None = None,
        factors: NDArray[np.float64] | None = None,
    ) -> None: ...

def terms_of(rows: NDArray[np.void]) -> NDArray[np.float64]: ...
def group_names(rows: NDArray[np.void]) -> list[tuple[str, str] | None]: ...
def family_keys(rows: NDArray[np.void], keys: NDArray[np.uint64]) -> None: ...
