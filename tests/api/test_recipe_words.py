"""What may be asked for over the wire is what a worker understands: neither side knows a word that the other lacks."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import get_args

import pytest
import typer.main
from pydantic import ValidationError

from lensrack import cli, wire
from server.errors import ServiceError
from server.training.presets import PRESETS
from server.training.recipe import SEARCHES, Recipe, resolve

ASKED = {"search", "budget", "preset", "base_lr"}  # about a recipe, not of it


def words(field: str) -> set[str]:
    """The words of a wire field: Literal[...] | None."""
    literal = get_args(wire.Recipe.model_fields[field].annotation)[0]
    return set(get_args(literal))


def test_both_sides_know_the_same_fields() -> None:
    assert set(wire.Recipe.model_fields) - ASKED == {field.name for field in fields(Recipe)}


def test_both_sides_know_the_same_words() -> None:
    assert words("search") == set(SEARCHES)
    assert words("preset") == set(PRESETS)


def test_both_sides_refuse_two_learning_rates_in_the_same_words() -> None:
    both = {"lr": 1.0, "base_lr": 1.0}
    with pytest.raises(ServiceError) as server:
        resolve({}, both)
    with pytest.raises(ValidationError) as client:
        wire.Recipe.model_validate(both)
    assert client.value.errors()[0]["msg"] == f"Value error, {server.value.detail}"


@pytest.mark.parametrize("field", ["optimizer", "augment", "class_weights", "pool", "init"])
def test_every_word_of_the_wire_is_taken(field: str) -> None:
    for word in words(field):
        assert getattr(resolve({}, {field: word}), field) == word


def test_the_command_line_has_an_option_for_each() -> None:
    command = typer.main.get_command(cli.app).commands["train"]  # type: ignore[attr-defined]
    assert set(wire.Recipe.model_fields) <= {option.name for option in command.params}


@pytest.mark.parametrize(
    "changes", [{}, {"preset": "vpt"}, {"prompts": 0}, {"warmup_epochs": 0.5, "prompt_layers": [2, 3]}]
)
def test_the_recipe_that_a_manifest_tells_can_be_asked_for_again(changes: dict[str, object]) -> None:
    told = json.loads(json.dumps(resolve({}, changes).to_json()))
    asked = wire.Recipe.model_validate(told).model_dump(exclude_none=True)
    assert resolve({"epochs": 7, "lr": 9.0}, asked) == resolve({}, changes)
