"""Policies: plain, immutable data that survives JSON."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxopt.decisions import POLICY_SCHEMA, Policy
from fxopt.errors import PolicyError

CHOICES = st.one_of(
    st.integers(-(2**40), 2**40),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(),
    st.lists(st.integers(0, 64), min_size=1, max_size=3).map(tuple),
)
KEYS = st.tuples(st.text(min_size=1), st.text())
CONTENTS = st.dictionaries(KEYS, CHOICES, max_size=6)


@given(CONTENTS)
def test_json_round_trip_keeps_values_and_types(content: dict) -> None:
    policy = Policy(content)
    again = Policy.from_json(policy.to_json())
    assert again == policy
    assert {key: type(value) for key, value in again.items()} == {key: type(value) for key, value in policy.items()}
    assert again.to_json() == policy.to_json()


@given(CONTENTS, st.randoms(use_true_random=False))
def test_order_does_not_matter(content: dict, random: object) -> None:
    items = list(content.items())
    random.shuffle(items)  # type: ignore[attr-defined]
    policy, shuffled = Policy(content), Policy(items)
    assert policy == shuffled
    assert hash(policy) == hash(shuffled)
    assert policy.to_json() == shuffled.to_json()
    assert repr(policy) == repr(shuffled)


def test_policies_with_other_choices_differ() -> None:
    policy = Policy({("channels", "conv"): 8})
    assert policy != Policy({("channels", "conv"): 16})
    assert policy != Policy({("channels", "other"): 8})
    assert policy != Policy()
    assert policy == {("channels", "conv"): 8}
    assert policy != "policy"


def test_a_policy_cannot_be_changed() -> None:
    content = {("channels", "conv"): 8}
    policy = Policy(content)
    content["channels", "conv"] = 16
    assert policy["channels", "conv"] == 8
    with pytest.raises(AttributeError, match="merged"):
        policy._choices = {}
    with pytest.raises(TypeError):
        policy["channels", "conv"] = 16  # type: ignore[index]


def test_a_copy_is_equal_and_hashes_equal() -> None:
    policy = Policy({("bits", "conv"): (8, 8)})
    assert copy.deepcopy(policy) == policy
    assert hash(copy.deepcopy(policy)) == hash(policy)


def test_merged_prefers_the_other() -> None:
    policy = Policy({("channels", "a"): 8, ("channels", "b"): 8})
    merged = policy.merged(Policy({("channels", "b"): 16, ("bits", "a"): (8, 8)}))
    assert merged == {("channels", "a"): 8, ("channels", "b"): 16, ("bits", "a"): (8, 8)}
    assert policy["channels", "b"] == 8
    assert merged.of_kind("channels") == {"a": 8, "b": 16}
    assert dict(merged.only({"channels"})) == {("channels", "a"): 8, ("channels", "b"): 16}
    assert merged.only(()) == Policy({})


def test_numpy_values_become_plain() -> None:
    policy = Policy({("channels", "a"): np.int64(8), ("rank", "a"): np.float64(0.5), ("bits", "a"): [4, np.int8(8)]})  # type: ignore[dict-item]
    assert policy == {("channels", "a"): 8, ("rank", "a"): 0.5, ("bits", "a"): (4, 8)}
    assert Policy.from_json(policy.to_json()) == policy


@pytest.mark.parametrize("choice", [True, np.bool_(True), float("nan"), float("inf"), None, (), (1, 2.5), {"a": 1}])
def test_what_is_no_choice_is_refused(choice: object) -> None:
    with pytest.raises(PolicyError, match="conv1"):
        Policy({("channels", "conv1"): choice})  # type: ignore[dict-item]


@pytest.mark.parametrize("key", ["channels", ("channels",), ("channels", 1), ("", "conv"), ("a", "b", "c")])
def test_what_is_no_key_is_refused(key: object) -> None:
    with pytest.raises(PolicyError, match="pairs"):
        Policy({key: 8})  # type: ignore[dict-item]


def test_the_json_is_as_documented() -> None:
    policy = Policy({("channels", "conv1"): 24, ("bits", "conv1"): (8, 8)})
    assert json.loads(policy.to_json()) == {
        "schema": 1,
        "decisions": [
            {"kind": "bits", "site": "conv1", "choice": [8, 8]},
            {"kind": "channels", "site": "conv1", "choice": 24},
        ],
    }
    assert json.loads(Policy().to_json()) == {"schema": 1, "decisions": []}


ENTRY = {"kind": "channels", "site": "conv1", "choice": 8}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ([], "JSON object"),
        ({"decisions": []}, "schema version None"),
        ({"schema": POLICY_SCHEMA + 1, "decisions": []}, "schema version 2"),
        ({"schema": "1", "decisions": []}, "schema version '1'"),
        ({"schema": True, "decisions": []}, "schema version True"),
        ({"schema": 1}, "list of 'decisions'"),
        ({"schema": 1, "decisions": {}}, "list of 'decisions'"),
        ({"schema": 1, "decisions": [], "extra": 1}, "no more"),
        ({"schema": 1, "decisions": [3]}, "Decision 0"),
        ({"schema": 1, "decisions": [{"kind": "channels", "site": "conv1"}]}, "Decision 0"),
        ({"schema": 1, "decisions": [{**ENTRY, "note": ""}]}, "Decision 0"),
        ({"schema": 1, "decisions": [{**ENTRY, "site": 3}]}, "pairs"),
        ({"schema": 1, "decisions": [{**ENTRY, "choice": None}]}, "conv1"),
        ({"schema": 1, "decisions": [ENTRY, {**ENTRY, "choice": 16}]}, "second time"),
    ],
)
def test_malformed_data_is_refused(data: object, reason: str) -> None:
    with pytest.raises(PolicyError, match=reason):
        Policy.from_json(json.dumps(data))


def test_text_that_is_not_json_is_refused() -> None:
    with pytest.raises(PolicyError, match="not valid JSON"):
        Policy.from_json('{"schema": 1, "decisions": [')


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "new" / "policy.json"
    policy = Policy({("bits", "conv"): (8, 8), ("channels", "größe"): 8})
    policy.save(path)
    assert Policy.load(path) == policy


def test_a_file_that_holds_no_policy_is_named(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"missing\.json"):
        Policy.load(tmp_path / "missing.json")
    for content in (b"{}", b"\xff\xfe", b""):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(PolicyError, match=r"bad\.json"):
            Policy.load(tmp_path / "bad.json")


def test_a_policy_that_cannot_be_saved_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PolicyError, match="Cannot write"):
        Policy().save(tmp_path / "file" / "policy.json")
