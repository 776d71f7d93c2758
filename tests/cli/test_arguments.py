"""`key=value` arguments: how they are parsed, and what is said about wrong ones."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from support.commands import message
from train.cli.arguments import Override, check_keys, parse, parse_known, split_docstring, typed_keys
from train.cli.fields import setting


@dataclass
class Keys:
    run: str = setting("runs/latest", "folder of the run")
    top: int = setting(5, "number of classes", unit="classes", ge=1, le=10)
    drop: float = setting(0.5, "accuracy that may be lost", ge=0, lt=1, word="export.drop")
    output: str = setting("table", "format of the output", choices=("table", "jsonl"))


def test_values_are_converted_to_the_types_of_their_keys():
    assert parse(Keys, []) == Keys("runs/latest", 5, 0.5, "table")
    assert parse(Keys, ["top=3", "export.drop=1e-2", "run=a=b c"]) == Keys("a=b c", 3, 0.01, "table")
    assert parse(Keys, ["top=3", "top=4"]).top == 4


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("lab", "arguments must be key=value, got lab; --help lists the keys"),
        ("--top=3", "arguments must be key=value, got --top=3; --help lists the keys"),
        ("colour=red", 'unknown key "colour"; valid keys: run, top, export.drop, output'),
        ("ouput=jsonl", 'unknown key "ouput"; did you mean output?'),
        ("export.dorp=0.1", 'unknown key "export.dorp"; did you mean export.drop?'),
        ("top=many", "top must be a whole number, got many; use e.g. top=5"),
        ("top=3.0", "top must be a whole number, got 3.0; use e.g. top=5"),
        ("top=0", "top must be at least 1 and at most 10, got 0; use e.g. top=5"),
        ("export.drop=little", "export.drop must be a number, got little; use e.g. export.drop=0.5"),
        ("export.drop=nan", "export.drop must be a finite number, got nan; use e.g. export.drop=0.5"),
        ("export.drop=1", "export.drop must be at least 0 and below 1, got 1.0; use e.g. export.drop=0.5"),
        ("output=json", "output must be one of table, jsonl, got json; did you mean output=jsonl?"),
        ("output=html", "output must be one of table, jsonl, got html"),
    ],
)
def test_wrong_argument_is_named_with_what_is_allowed(argument: str, expected: str):
    assert message(parse, Keys, [argument]) == expected


def test_other_keys_are_returned_in_order():
    keys, others = parse_known(Keys, ["epochs=3", "top=2", "+model.width=1", "data="])
    assert keys == Keys(top=2)
    assert others == [Override("epochs", "3"), Override("model.width", "1"), Override("data", "")]
    assert list(map(str, others)) == ["epochs=3", "model.width=1", "data="]
    check_keys(others, ["epochs", "model.width", "data"])
    assert message(check_keys, others, ["epochs", "data"]) == 'unknown key "model.width"; valid keys: epochs, data'


def test_keys_are_found_in_every_form_of_an_override():
    assert typed_keys(["a=1", "++b=2", "c=d=e", "~augment"]) == {"a", "b", "c", "~augment"}


def test_docstring_is_split_into_description_and_examples():
    text = """`make show run=<folder>`: shows `one` run.

    make show run=a  # the first
    make show

It needs no
network.
"""
    description, examples = split_docstring(text)
    assert description == "Shows one run.\n\nIt needs no network."
    assert examples == ["make show run=a  # the first", "make show"]
