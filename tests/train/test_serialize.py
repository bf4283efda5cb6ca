import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import pytest

from slm_jax.data import DataConfig
from slm_jax.errors import UserError
from slm_jax.models.lm import LMConfig
from slm_jax.models.presets import PRESETS
from slm_jax.nn.mlp import MLPConfig
from slm_jax.nn.norm import NormConfig
from slm_jax.parallel import MeshConfig
from slm_jax.train.experiment import Experiment
from slm_jax.train.loop import LoopConfig
from slm_jax.train.optimizer import OptimizerConfig
from slm_jax.train.serialize import differences, from_json, to_json
from slm_jax.train.tasks.lm import LMLossConfig
from tests.train import tiny


def through_text(value: Any) -> Any:
    return json.loads(json.dumps(to_json(value)))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_come_back(name: str) -> None:
    assert from_json(LMConfig, through_text(PRESETS[name])) == PRESETS[name]


def test_experiments_come_back() -> None:
    """Unions (mixers, `channel` or nothing), optional numbers, nested tuples, paths."""
    plain = Experiment(tiny.model("mamba"), tail_average=8.0, loop=LoopConfig(eval_steps=(10, 25)))
    full = Experiment(
        tiny.model("hybrid"),
        DataConfig(mixture=(("a.txt", 0.25), ("b c/d.jsonl", 3)), cache_dir="e"),
        OptimizerConfig("muon", clip_norm=None),
        objective=LMLossConfig(chunk=8, load_balance=0),
        ema_decay=0.1 + 0.2,
        eval_tokens=5,
        mesh=MeshConfig(2, -1),
        out=Path("f") / "g h",
        overwrite=True,
    )
    for config in (plain, full):
        back = from_json(Experiment, through_text(config))
        assert back == config
        assert isinstance(back.out, Path)
        assert isinstance(back.data.mixture, tuple)
        assert hash(back) == hash(config)


@dataclasses.dataclass(frozen=True)
class Leaf:
    width: int = 1


@dataclasses.dataclass(frozen=True)
class Other:
    width: int = 2


@dataclasses.dataclass(frozen=True)
class Tree:
    leaf: Leaf
    either: Leaf | Other | None = None
    many: tuple[Leaf | Other, ...] = ()
    pair: tuple[int, Leaf | None] = (1, None)
    path: Path | None = None
    word: typing.Literal["a", "b"] | None = None


@pytest.mark.parametrize(
    "tree",
    [
        Tree(Leaf()),
        Tree(Leaf(2), Other(3), (Leaf(4), Other(5)), (6, Leaf(7)), Path("8"), "b"),
        Tree(Leaf(), Leaf(2)),
    ],
)
def test_every_kind_of_field_comes_back(tree: Tree) -> None:
    assert from_json(Tree, through_text(tree)) == tree


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"depth": 3}, ["Tree:", "'depth'", "unknown", "another version"]),
        ({"leaf": {"type": "Leaf", "colour": 1}}, ["Tree.leaf:", "'colour'", "Leaf"]),
        ({"leaf": {"type": "Other"}}, ["Tree.leaf:", "is not a Leaf"]),
        ({"leaf": 5}, ["Tree.leaf:", "5 is not a Leaf"]),
        ({"either": {"type": "Tree"}}, ["Tree.either:", "type='Tree'", "Leaf, Other"]),
        ({"many": [{"type": "Leaf"}, {"type": "X"}]}, ["Tree.many[1]:", "type='X'"]),
        ({"leaf": None}, ["Tree.leaf:", "None is not a Leaf"]),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(UserError) as error:
        from_json(Tree, to_json(Tree(Leaf())) | change)
    assert "\n" not in str(error.value)
    for part in says:
        assert part in str(error.value)


def test_missing_field_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="'leaf' of Tree is missing"):
        from_json(Tree, {"type": "Tree"})
    # One with a default is filled in: the file is of an older version.
    assert from_json(Tree, {"type": "Tree", "leaf": {"type": "Leaf"}}) == Tree(Leaf())


def test_only_classes_in_annotations_are_made() -> None:
    with pytest.raises(UserError, match="type='system'"):
        from_json(Tree, {"type": "Tree", "leaf": {"type": "Leaf"}, "either": {"type": "system"}})


def test_differences_name_field_and_both_values() -> None:
    one = tiny.model("hybrid")
    layers = list(one.pattern)
    layers[1] = dataclasses.replace(layers[1], channel=MLPConfig(48))
    two = dataclasses.replace(one, pattern=tuple(layers), norm=NormConfig(eps=1e-6), d_model=32)
    found = differences(to_json(one), to_json(two))
    assert found[0] == "d_model: saved 16, given 32"
    assert "pattern.1.channel.type: saved MoEConfig, given MLPConfig" in found
    assert "pattern.1.channel.n_experts: saved 4, given None" in found
    assert found[-1] == "norm.eps: saved 1e-05, given 1e-06"
    assert differences(to_json(one), through_text(one)) == []


def test_differences_of_length() -> None:
    assert differences({"a": [1, 2]}, {"a": [1]}) == ["a: saved [1, 2], given [1]"]
    assert differences({"a": {"b": 1}}, {"a": 2}) == ["a: saved {'b': 1}, given 2"]
