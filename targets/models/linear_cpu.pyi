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
    def __init__(self, values: Mapping[str, float], fuses: bool, own_class: bool = False) -> None: ...

def group_names(rows: NDArray[np.void]) -> list[str | None]: ...
