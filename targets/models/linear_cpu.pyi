from collections.abc import Mapping

from fxopt.targets._core import CostModel
from fxopt.targets.parameters import Parameter

CLASS_NAMES: tuple[str, ...]
GROUP_NAMES: tuple[str, ...]
COEFFICIENTS: Mapping[str, str]
PARAMETERS: Mapping[str, Parameter]

class Model(CostModel):
    def __init__(self, values: Mapping[str, float], fuses: bool) -> None: ...
