"""Settings as users give them: each that can't be used is named, with what may have been meant."""

from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from rho.config import RunConfig
from rho.errors import ConfigError
from rho.selection import Selector
from rho.settings import assignments, validated


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Source(Section):
    place: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None


class Whole(Section):
    sources: list[str | Source] = []
    named: dict[str, Source] = {}
    selector: Selector | None = None
    kind: Literal["a", "b"] = "a"


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"kimd": 3}, "  kimd: no such setting, found 3; did you mean kind?"),
        ({"selectr": {"ratio": 1}}, "  selectr: no such setting; did you mean selector?"),
        ({"zzz": 3}, "  zzz: no such setting, found 3; there are kind, named, selector, sources"),
        (
            {"named": {"x": {"place": "a", "max_token": 1}}},
            "  named.x.max_token: no such setting, found 1; did you mean",
        ),
        (
            {"sources": ["a", {"place": "a", "plaec": "b"}]},
            "Source.plaec: no such setting, found 'b'; did you mean place",
        ),
        ({"selector": {"second": {"ratoi": 0.5}}}, "  selector.second.ratoi: no such setting, found 0.5; did you mean"),
        ({"selector": {"second": {"ratio": 5}}}, "  selector.second: ratio must be in (0, 1], found 5.0"),
        ({"named": {"x": {"place": "a", "max_tokens": "x"}}}, "  named.x.max_tokens: Input should be a valid integer"),
    ],
)
def test_a_setting_that_can_not_be_used_is_named_with_the_nearest(tree, message):
    with pytest.raises(ConfigError) as caught:
        validated(Whole, tree, "here")
    assert str(caught.value).startswith("here: ")
    assert message in str(caught.value)


def test_the_short_form_of_a_setting_is_known_too():
    with pytest.raises(ConfigError, match=r"  refernce: no such setting; did you mean reference\?"):
        validated(RunConfig, {"refernce": {"corpus": "a"}}, "here")


def test_a_date_that_is_none_is_no_value():
    with pytest.raises(ConfigError, match=r"--set a=2024-13-45: the value is not YAML \(month must be in 1"):
        assignments(["a=2024-13-45"])


def test_a_problem_of_the_whole_has_no_key():
    tree = {"reference": {"corpus": "a"}, "references": {"a": {"corpus": "a"}}}
    with pytest.raises(ConfigError, match=r"^here: 1 .*\n  give either 'reference' \(one\) or 'references'"):
        validated(RunConfig, tree, "here")


def test_assignments_make_a_tree_of_yaml_values():
    assert assignments(["a=1", "b.c=1.0e-3", "b.d=[x]", "e=no"]) == {"a": 1, "b": {"c": 0.001, "d": ["x"]}, "e": False}
