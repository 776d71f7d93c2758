"""What may differ between two lives of a run, and how the rest is refused."""

from __future__ import annotations

import pytest

from train.config.compatibility import IGNORED_KEYS, check_compatible, differing_keys, unaccepted_changes
from train.config.schema import ConfigError

WAS = {"epochs": 2, "batch_size": 32, "code": "abc", "gone": 1}
IS = {"epochs": 2, "batch_size": 64, "code": "def", "come": 2}


def test_every_change_is_named():
    assert differing_keys(WAS, IS) == ["batch_size", "code", "come", "gone"]
    assert differing_keys(WAS, dict(WAS)) == []


@pytest.mark.parametrize("name", IGNORED_KEYS)
def test_what_changes_no_bit_is_free(name: str):
    assert differing_keys(WAS, WAS | {name: "another"}) == []


def test_changes_are_refused_with_the_words_that_accept_them():
    with pytest.raises(ConfigError) as refused:
        check_compatible(WAS, IS, frozenset({"come", "gone"}))
    assert str(refused.value) == (
        "a run goes on as it was, but batch_size was 32, is 64; code was abc, is def; "
        "put it back, or use make resume accept=batch_size,code,come,gone"
    )
    check_compatible(WAS, IS, frozenset(str(refused.value).partition("accept=")[2].split(",")))
    check_compatible(WAS, dict(WAS), frozenset())


def test_more_epochs_need_no_acceptance_and_are_a_change_all_the_same():
    assert differing_keys(WAS, WAS | {"epochs": 3}) == ["epochs"]
    assert unaccepted_changes(WAS, WAS | {"epochs": 3}, frozenset()) == []
    assert unaccepted_changes(WAS, WAS | {"epochs": 1}, frozenset()) == ["epochs"]


def test_a_name_that_nothing_has_can_not_be_accepted():
    with pytest.raises(ConfigError, match="accept must name what may differ, got cod; use names like code"):
        check_compatible(WAS, IS, frozenset({"cod"}))
