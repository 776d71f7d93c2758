"""What may differ between two attempts of a run, and how other changes are rejected."""

from __future__ import annotations

from pathlib import Path

import pytest

from train.config.compatibility import IGNORED_KEYS, check_compatible, differing_keys, unaccepted_changes
from train.config.schema import ConfigError

WAS = {"epochs": 2, "batch_size": 32, "code": "abc", "gone": 1}
RUN = Path("runs/one")
IS = {"epochs": 2, "batch_size": 64, "code": "def", "come": 2}


def test_every_change_is_named():
    assert differing_keys(WAS, IS) == ["batch_size", "code", "come", "gone"]
    assert differing_keys(WAS, dict(WAS)) == []


@pytest.mark.parametrize("name", IGNORED_KEYS)
def test_key_that_changes_no_bit_may_differ(name: str):
    assert differing_keys(WAS, WAS | {name: "another"}) == []


def test_rejected_changes_name_the_override_that_accepts_them():
    with pytest.raises(ConfigError) as refused:
        check_compatible(WAS, IS, frozenset({"come", "gone"}), RUN)
    assert str(refused.value) == (
        "cannot resume: batch_size changed from 32 to 64; code changed from abc to def; "
        "restore them, or allow the changes: make resume run=runs/one accept=batch_size,code,come,gone"
    )
    check_compatible(WAS, IS, frozenset(str(refused.value).partition("accept=")[2].split(",")), RUN)
    check_compatible(WAS, dict(WAS), frozenset(), RUN)


def test_more_epochs_are_a_change_that_needs_no_acceptance():
    assert differing_keys(WAS, WAS | {"epochs": 3}) == ["epochs"]
    assert unaccepted_changes(WAS, WAS | {"epochs": 3}, frozenset()) == []
    assert unaccepted_changes(WAS, WAS | {"epochs": 1}, frozenset()) == ["epochs"]


def test_unknown_name_cannot_be_accepted():
    with pytest.raises(ConfigError, match='unknown name "cod" in accept; use the names'):
        check_compatible(WAS, IS, frozenset({"cod"}), RUN)
