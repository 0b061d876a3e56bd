def hold(
    x: int, y: int, outer: int, channels: int, inner: int, scales: int, zeros: int, least: int, largest: int
) -> None: ...
def pass_gradient(
    x: int,
    gradient: int,
    passed: int,
    outer: int,
    channels: int,
    inner: int,
    scales: int,
    zeros: int,
    least: int,
    largest: int,
) -> None: ...
def pass_and_learn(
    x: int,
    gradient: int,
    passed: int,
    sums: int,
    outer: int,
    channels: int,
    inner: int,
    scales: int,
    zeros: int,
    least: int,
    largest: int,
    factor: float,
    rounding: bool,
) -> None: ...
def follow(x: int, channels: int, inner: int, scales: int, steps: float, least_scale: float) -> None: ...
