"""The recipe's section `tuning`: what is trained, in which group, and what is refused before step 0."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from weftrain.core.config import Recipe
from weftrain.core.errors import RecipeError
from weftrain.core.formats.canonical import sha256_json
from weftrain.core.initialization import draw
from weftrain.core.optim import group_learning_rates, parameter_groups

Tiny = Callable[..., Recipe]
LORA = "tuning.lora={rank: 4, alpha: 8, targets: ['layers.*.attention.q_proj', layers.1.ffn.down_proj]}"


def test_a_recipe_without_the_section_keeps_its_hash_and_its_groups(tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe()
    tree = recipe.model_dump(mode="json")
    assert "tuning" not in tree
    assert sha256_json(tree) == sha256_json(tiny_recipe("crystal", "tuning={}").model_dump(mode="json"))
    assert all(spec.trained for spec in recipe.parameters)
    assert tiny_recipe("crystal", LORA, "tuning.freeze=[]").model_dump(mode="json")["tuning"]["freeze"] == []
    given = tiny_recipe("crystal", "tuning.freeze=[embedding]").model_dump(mode="json")["tuning"]
    assert given == {"freeze": ["embedding"]}


def test_patterns_name_parameters_and_modules(tiny_recipe: Tiny) -> None:
    def frozen(*patterns: str) -> set[str]:
        recipe = tiny_recipe("crystal", f"tuning.freeze=[{', '.join(patterns)}]")
        return {spec.name for spec in recipe.parameters if not spec.trained}

    assert frozen("embedding") == {"embedding.weight"}
    assert frozen("layers.0.attention.q_proj.bias") == {"layers.0.attention.q_proj.bias"}
    assert {name.split(".")[1] for name in frozen("layers.1")} == {"1"}
    modules = {name.rpartition(".")[0].rpartition(".")[2] for name in frozen("'*.q_proj'", "'*_norm'")}
    assert modules == {"q_proj", "attention_norm", "ffn_norm", "final_norm"}


def test_learning_rates_cut_the_groups(tiny_recipe: Tiny) -> None:
    rules = "[{match: layers.1.ffn, multiplier: 0.5}, {match: layers.1, multiplier: 2.0}]"
    recipe = tiny_recipe("crystal", f"tuning.learning_rates={rules}", "tuning.freeze=[layers.1.attention.q_proj]")
    groups = {group.name: group for group in parameter_groups(recipe.model, recipe.optimizer, recipe.tuning)}
    whole = {group.name: group for group in parameter_groups(recipe.model, recipe.optimizer)}
    inner, rest = groups["decoder_matrices.rule_0"], groups["decoder_matrices.rule_1"]
    assert all(name.startswith("layers.1.ffn.") for name in inner.parameters)
    assert {name.split(".")[2] for name in rest.parameters} == {"attention"}
    everything = sorted(name for group in groups.values() for name in group.parameters)
    assert everything == sorted(spec.name for spec in recipe.parameters if spec.trained)
    rates = group_learning_rates(tuple(groups.values()), recipe.schedule, 3)
    assert rates["decoder_matrices.rule_0"] == 0.5 * rates["decoder_matrices"]
    assert rates["norms_and_biases.rule_1"] == 2 * rates["norms_and_biases"]
    assert inner.weight_decay == whole["decoder_matrices"].weight_decay


def test_adapters_stand_behind_their_module_and_all_else_is_frozen(tiny_recipe: Tiny) -> None:
    recipe = tiny_recipe("crystal", LORA)
    names = [spec.name for spec in recipe.parameters]
    at = names.index("layers.0.attention.q_proj.lora_a")
    assert names[at - 1 : at + 2] == [
        "layers.0.attention.q_proj.bias",
        "layers.0.attention.q_proj.lora_a",
        "layers.0.attention.q_proj.lora_b",
    ]
    trained = {spec.name: spec for spec in recipe.parameters if spec.trained}
    assert {name.rpartition(".")[0] for name in trained} == {
        "layers.0.attention.q_proj",
        "layers.1.attention.q_proj",
        "layers.1.ffn.down_proj",
    }
    a, b = (trained[f"layers.1.ffn.down_proj.lora_{letter}"] for letter in "ab")
    assert (a.shape, b.shape) == ((4, recipe.model.intermediate_size), (recipe.model.hidden_size, 4))
    drawn = draw(a, recipe.model, recipe.seed)
    bound = recipe.model.intermediate_size**-0.5
    assert 0.97 * bound < drawn.abs().max() <= bound
    assert drawn.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert not draw(b, recipe.model, recipe.seed).any()
    (group,) = parameter_groups(recipe.model, recipe.optimizer, recipe.tuning)
    assert group.name == "adapters"
    both = tiny_recipe("crystal", LORA, "tuning.freeze=[embedding]")
    assert sum(not spec.trained for spec in both.parameters) == 1


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("tuning.freeze=[embeding]", r"tuning\.freeze\.0: 'embeding' matches no parameter.*e\.g\. embedding"),
        ("tuning.freeze=['*']", "every parameter is frozen"),
        ("tuning.learning_rates=[{match: layers.1, multiplier: 0}]", r"name the parameters in tuning\.freeze"),
        ("tuning.learning_rates=[{match: layer.1, multiplier: 2.0}]", r"rates\.0\.match: 'layer\.1' matches no"),
        ("tuning={freeze: [layers.1], learning_rates: [{match: layers.1, multiplier: 2.0}]}", "is frozen"),
        (
            "tuning.learning_rates=[{match: layers, multiplier: 2.0}, {match: layers.1, multiplier: 3.0}]",
            r"rates\.1\.match: .* has an earlier rule",
        ),
        ("tuning.lora={rank: 4, alpha: 8, targets: [embedding]}", "matches embedding, which takes no adapter"),
        ("tuning.lora={rank: 4, alpha: 8, targets: ['*.q_prj']}", r"'\*\.q_prj' matches no linear module"),
        (
            "tuning.lora={rank: 49, alpha: 8, targets: ['*.q_proj']}",
            r"tuning\.lora\.rank: 49 is above the smaller side",
        ),
        ("tuning.lora={rank: 4, alpha: 8, targets: []}", "targets"),
        ("tuning.lora={rank: 4, alpha: 8, dropout: 1.0, targets: ['*.q_proj']}", "dropout"),
        ("changes=[{step: 2, set: {tuning.freeze: [embedding]}}]", "which parameters are trained"),
    ],
)
def test_what_is_refused_in_one_line(override: str, said: str, tiny_recipe: Tiny) -> None:
    with pytest.raises(RecipeError, match=said) as error:
        tiny_recipe("crystal", override)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("target", ["layers.1.ffn.experts.gate_proj", "layers.*.ffn.experts.*", "*.router"])
def test_experts_and_routers_take_no_adapter(target: str, tiny_recipe: Tiny) -> None:
    found = tiny_recipe("moe", "tuning.lora={rank: 4, alpha: 8, targets: ['layers.*.ffn.shared.*']}").parameters
    assert "layers.1.ffn.shared.up_proj.lora_a" in {spec.name for spec in found}
    with pytest.raises(RecipeError, match=r"targets\.0: .* matches layers\.1\.ffn\.\S+, which takes no adapter"):
        tiny_recipe("moe", f"tuning.lora={{rank: 4, alpha: 8, targets: ['{target}']}}")
