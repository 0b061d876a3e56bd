"""Search spaces: validation, restriction, encoding."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxopt.decisions import Capabilities, Decision, Policy, SearchSpace
from fxopt.errors import PolicyError, SearchError
from tests.decisions.strategies import policies, spaces

CONV1 = Decision("channels", "block.conv1", (8, 16, 24, 32), 32)
CONV2 = Decision("channels", "block.conv2", (8, 16), 16)
BITS1 = Decision("bits", "block.conv1", ((32, 32), (8, 8), (4, 8)), (32, 32), operator="conv")
SPACE = SearchSpace([CONV1, CONV2, BITS1])


def test_it_is_a_sequence_with_keys() -> None:
    assert list(SPACE) == [CONV1, CONV2, BITS1]
    assert SPACE[1] is CONV2
    assert SPACE[:2] == SearchSpace([CONV1, CONV2])
    assert SPACE.by_key["bits", "block.conv1"] is BITS1
    assert SPACE.policies == 4 * 2 * 3
    assert SPACE.sizes.tolist() == [4, 2, 3]
    assert copy.deepcopy(SPACE) == SPACE
    assert hash(copy.deepcopy(SPACE)) == hash(SPACE)


def test_a_site_is_decided_once_per_kind() -> None:
    with pytest.raises(SearchError, match=r"block\.conv1"):
        SearchSpace([CONV1, CONV2, CONV1])


def test_what_fits_is_valid() -> None:
    SPACE.validate(Policy())
    SPACE.validate(Policy({("channels", "block.conv1"): 16}))
    SPACE.validate(SPACE.default())


@pytest.mark.parametrize(
    ("key", "choice", "reason"),
    [
        (("channels", "block.conv3"), 8, "Did you mean 'block.conv[12]'"),
        (("channels", "zzz"), 8, "no decision of kind 'channels' at 'zzz'.$"),
        (("bits", "block.conv2"), (8, 8), "it has 'channels'"),
        (("rank", "blok.conv2"), 4, "Did you mean 'block.conv2'"),
        (("channels", "block.conv1"), 12, "its choices are 8, 16, 24, 32"),
        (("bits", "block.conv1"), (8, 4), r"its choices are \(32, 32\), \(8, 8\)"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(key: tuple[str, str], choice: object, reason: str) -> None:
    policy = Policy({key: choice})  # type: ignore[dict-item]
    for check in (SPACE.validate, SPACE.complete, SPACE.encode):
        with pytest.raises(PolicyError, match=reason) as failure:
            check(policy)
        assert key[1] in str(failure.value)


def test_long_lists_of_choices_are_cut_in_messages() -> None:
    space = SearchSpace([Decision("channels", "wide", tuple(range(1, 513)), 512)])
    with pytest.raises(PolicyError, match="and 500 more"):
        space.validate(Policy({("channels", "wide"): 513}))


@given(st.data())
def test_encode_and_decode_are_inverse(data: st.DataObject) -> None:
    space = data.draw(spaces())
    policy = data.draw(policies(space))
    assert space.decode(space.encode(policy)) == policy
    assert space.complete(policy) == policy
    space.validate(policy)
    partial = Policy({key: choice for i, (key, choice) in enumerate(policy.items()) if i % 2})
    expected = space.default().merged(partial)
    assert space.complete(partial) == expected
    assert space.decode(space.encode(partial)) == expected
    assert space.decode_all(np.stack([space.encode(policy), space.encode(partial)])) == [policy, expected]


@pytest.mark.parametrize(
    ("indices", "reason"),
    [([0, 0], "shape"), ([0, 2, 0], "out of range .* 'block.conv2'"), ([0, 0, -1], "range"), ([0.0, 0, 0], "integers")],
)
def test_indices_outside_are_refused(indices: list, reason: str) -> None:
    with pytest.raises(PolicyError, match=reason):
        SPACE.decode(indices)


def test_completing_gives_the_choice_as_declared() -> None:
    completed = SPACE.complete({("channels", "block.conv1"): 16.0})
    assert type(completed["channels", "block.conv1"]) is int


@given(st.integers(0, 2**32))
def test_samples_are_valid_and_repeat_under_a_seed(seed: int) -> None:
    policy = SPACE.sample(np.random.default_rng(seed))
    SPACE.validate(policy)
    assert len(policy) == len(SPACE)
    assert policy == SPACE.sample(np.random.default_rng(seed))


def test_every_choice_is_sampled() -> None:
    rng = np.random.default_rng(0)
    assert len({SPACE.sample(rng) for _ in range(500)}) == SPACE.policies


def test_uniform_takes_the_nearest_count() -> None:
    assert SPACE.uniform(1.0) == SPACE.default()
    half = SPACE.uniform(0.5)
    assert half == {("channels", "block.conv1"): 16, ("channels", "block.conv2"): 8, ("bits", "block.conv1"): (32, 32)}
    assert SPACE.uniform(0.01) == half.merged({("channels", "block.conv1"): 8})
    # 20 of 32 is as near to 16 as to 24: the smaller one.
    assert SPACE.uniform(0.625)["channels", "block.conv1"] == 16
    assert SPACE.uniform(0.5, bits=(8, 8)) == half.merged({("bits", "block.conv1"): (8, 8)})
    assert SPACE.uniform(1.0, bits=(2, 8))["bits", "block.conv1"] == (4, 8)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, float("nan")])
def test_uniform_refuses_other_fractions(fraction: float) -> None:
    with pytest.raises(SearchError, match="fraction"):
        SPACE.uniform(fraction)


def restricted(decision: Decision, **capabilities: object) -> Decision:
    (result,) = SearchSpace([decision]).restrict(Capabilities(**capabilities))  # type: ignore[arg-type]
    return result


def test_bits_that_a_target_has_not_are_dropped() -> None:
    assert restricted(BITS1, bits={"conv": ((32, 32), (4, 8))}).choices == ((32, 32), (4, 8))
    assert restricted(BITS1, bits={"linear": ((8, 8),), "*": ((32, 32),)}).choices == ((32, 32),)
    assert restricted(BITS1).choices == ((32, 32),)


def test_without_its_default_a_site_gets_the_widest_bits() -> None:
    narrowed = restricted(BITS1, bits={"conv": ((4, 8), (8, 8))})
    assert narrowed.choices == ((8, 8), (4, 8))
    assert narrowed.default == (8, 8)


def test_without_common_bits_a_site_is_left_as_it_is() -> None:
    left = restricted(BITS1, bits={"conv": ((2, 2),)})
    assert left.choices == ((32, 32),)
    assert left.default == (32, 32)


@pytest.mark.parametrize(
    ("choices", "default", "tile", "multiple", "expected"),
    [
        ((5, 10, 15, 20), 20, 1, 1, (5, 10, 15, 20)),
        ((5, 10, 15, 20), 20, 8, 1, (8, 16, 20)),
        ((1, 2, 3), 3, 8, 1, (3,)),
        ((8, 16, 24, 32), 32, 8, 1, (8, 16, 24, 32)),
        ((12, 20, 28), 28, 8, 1, (16, 24, 28)),
        ((27, 28), 28, 8, 1, (24, 28)),
        ((6, 12, 18, 24), 24, 4, 6, (12, 24)),
    ],
)
def test_channel_counts_move_to_tiles(
    choices: tuple[int, ...], default: int, tile: int, multiple: int, expected: tuple[int, ...]
) -> None:
    decision = Decision("channels", "conv", choices, default, {"macs": 1.0}, "conv", multiple)
    snapped = restricted(decision, channel_tile=tile)
    assert snapped.choices == expected
    assert snapped.default == default
    assert (snapped.features, snapped.operator, snapped.multiple) == ({"macs": 1.0}, "conv", multiple)


@given(st.sets(st.integers(1, 200), min_size=1), st.integers(1, 64), st.data())
def test_snapping_keeps_the_default_and_multiples(counts: set[int], tile: int, data: st.DataObject) -> None:
    choices = tuple(sorted(counts))
    default = data.draw(st.sampled_from(choices))
    snapped = restricted(Decision("channels", "conv", choices, default), channel_tile=tile)
    assert snapped.default == default
    assert all(count % tile == 0 for count in snapped.choices if count != default)  # type: ignore[operator]
    assert snapped.choices[-1] <= max(counts)  # type: ignore[operator]
    again = restricted(snapped, channel_tile=tile)
    assert again == snapped


def test_operators_that_a_target_has_not_are_dropped() -> None:
    decision = Decision("operator", "block", ("conv3", "conv5", "skip"), "conv5")
    assert restricted(decision, operators=("conv3",)).choices == ("conv3", "conv5")
    assert restricted(decision).choices == ("conv3", "conv5", "skip")


def test_other_kinds_are_left_alone() -> None:
    decision = Decision("rank", "fc", (1, 2, 3), 3)
    assert restricted(decision, channel_tile=8) == decision


def test_the_fingerprint_names_the_choices_and_not_the_features() -> None:
    described = SearchSpace([Decision("channels", "block.conv1", (8, 16, 24, 32), 32, {"macs": 1.0}), CONV2, BITS1])
    assert described.fingerprint == SPACE.fingerprint
    others = [SPACE[:2], SearchSpace([CONV2, CONV1, BITS1]), SPACE.restrict(Capabilities({"*": ((32, 32),)}))]
    assert len({space.fingerprint for space in [SPACE, *others]}) == 4
