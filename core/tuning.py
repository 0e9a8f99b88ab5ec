"""The recipe's `tuning` section: which parameters are trained, with which share of the learning rate, and adapters.

    tuning:
      freeze: [embedding, "layers.*.attention_norm"]          # patterns of parameters or of the modules they belong to
      lora: {rank: 16, alpha: 32, targets: ["layers.*.attention.q_proj"]}
      learning_rates: [{match: head, multiplier: 0.1}]

`tuned_specs` decides once what is trained; models, optimizer groups, states and checkpoints read
`ParameterSpec.trained` and `.planes` of it. In a pattern `*` stands for any characters, dots among them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Annotated, Any

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer

from weftrain.core.formats.strict_model import NonNegative, Positive, StrictModel
from weftrain.core.model_config import ModelConfig
from weftrain.core.parameters import ParameterSpec, Role, parameter_specs

Pattern = Annotated[str, Field(min_length=1, max_length=256)]
Patterns = Annotated[tuple[Pattern, ...], Field(max_length=256, strict=False)]
_MAX_NEAR = 3  # names that are alike, in a message


class LoraConfig(StrictModel):
    """Low-rank adapters (arXiv 2106.09685): a target computes W x + (alpha / rank) B A dropout(x), A [rank, in] drawn
    from the seed and B [out, rank] zero. targets: patterns of the blocks' linear modules.
    """

    rank: Annotated[int, Field(gt=0, le=1 << 16)]
    alpha: Positive
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Annotated[Patterns, Field(min_length=1)]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class LearningRateRule(StrictModel):
    """Parameters that learn at `multiplier` times their group's learning rate. The first rule that matches counts."""

    match: Pattern
    multiplier: NonNegative

    @field_validator("multiplier")
    @classmethod
    def _check(cls, multiplier: float) -> float:
        if multiplier == 0:
            raise ValueError("0 trains nothing and keeps gradients and moments: name the parameters in tuning.freeze")
        return multiplier


class TuningConfig(StrictModel):
    """freeze: what is not trained. null: nothing, or with `lora` everything but the adapters; a list, an empty one too,
    is taken as it stands.
    """

    freeze: Patterns | None = None
    lora: LoraConfig | None = None
    learning_rates: Annotated[tuple[LearningRateRule, ...], Field(max_length=64, strict=False)] = ()

    @model_serializer(mode="wrap")
    def _dump(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what is not given, so that a recipe without this section has the hash it had before."""
        tree: dict[str, Any] = handler(self)
        return {key: value for key, value in tree.items() if value is not None and (key == "freeze" or value)}


def tuned_specs(model: ModelConfig, tuning: TuningConfig) -> tuple[ParameterSpec, ...]:
    """Every parameter of a run's state in execution order, adapters after the module that they belong to.

    Raises ValueError for a pattern that matches nothing, and where nothing would be trained.
    """
    base = parameter_specs(model)
    if tuning == TuningConfig():
        return base
    adapters = {} if tuning.lora is None else _adapters(base, tuning.lora)
    names = [spec.name for spec in base]
    frozen: set[str] = set(names) if tuning.freeze is None and tuning.lora is not None else set()
    for number, pattern in enumerate(tuning.freeze or ()):
        frozen |= matched(pattern, names, f"tuning.freeze.{number}")
    found: list[ParameterSpec] = []
    last_of_module = {spec.name.rpartition(".")[0]: spec.name for spec in base}
    for spec in base:
        found.append(replace(spec, trained=spec.trained and spec.name not in frozen))
        module = spec.name.rpartition(".")[0]
        if last_of_module[module] == spec.name:
            found += adapters.get(module, ())
    if not any(spec.trained for spec in found):
        raise ValueError("tuning.freeze: every parameter is frozen, so nothing is trained: leave one out")
    return tuple(found)


def rule_of_each(specs: Sequence[ParameterSpec], rules: Sequence[LearningRateRule]) -> dict[str, int]:
    """Trained parameter -> number of its rule in `tuning.learning_rates`, if it has one. Raises ValueError for a rule
    that changes nothing.
    """
    found: dict[str, int] = {}
    trained = [spec.name for spec in specs if spec.trained]
    for number, rule in enumerate(rules):
        where = f"tuning.learning_rates.{number}.match"
        mine = matched(rule.match, [spec.name for spec in specs], where) & set(trained)
        if not mine - found.keys():
            why = "is frozen" if not mine else "has an earlier rule"
            raise ValueError(f"{where}: every parameter that '{rule.match}' matches {why}: remove the rule")
        found = dict.fromkeys(mine, number) | found
    return found


def matched(pattern: str, names: Iterable[str], where: str) -> set[str]:
    """Names of parameters that a pattern matches, or whose module it matches. Raises ValueError if there is none."""
    names = list(names)
    known = {name: list(accumulate(name.split("."), lambda above, part: f"{above}.{part}")) for name in names}
    found = {name for name, above in known.items() if any(fnmatchcase(one, pattern) for one in above)}
    if not found:
        every = list(dict.fromkeys(one for above in known.values() for one in reversed(above)))
        near = difflib.get_close_matches(pattern, every, _MAX_NEAR, 0.5) or every[:_MAX_NEAR]
        raise ValueError(f"{where}: '{pattern}' matches no parameter and no module: there are e.g. {', '.join(near)}")
    return found


def _adapters(base: Sequence[ParameterSpec], lora: LoraConfig) -> dict[str, tuple[ParameterSpec, ParameterSpec]]:
    """Linear module -> its A and B."""
    linear = {
        spec.name.removesuffix(".weight"): spec
        for spec in base
        if spec.role in (Role.MATRIX, Role.OUTPUT_MATRIX) and spec.name.endswith(".weight") and len(spec.shape) == 2
    }
    others = {spec.name.rpartition(".")[0] for spec in base} - linear.keys()
    found: dict[str, tuple[ParameterSpec, ParameterSpec]] = {}
    for number, pattern in enumerate(lora.targets):
        modules = {module for module in linear if fnmatchcase(module, pattern)}
        where = f"tuning.lora.targets.{number}"
        if not modules and (no_target := next((name for name in sorted(others) if fnmatchcase(name, pattern)), None)):
            raise ValueError(
                f"{where}: '{pattern}' matches {no_target}, which takes no adapter: name linear modules of the blocks, "
                "e.g. layers.*.attention.q_proj; what lies outside is trained as a whole by giving tuning.freeze"
            )
        if not modules:
            near = difflib.get_close_matches(pattern, linear, _MAX_NEAR, 0.5) or list(linear)[:_MAX_NEAR]
            raise ValueError(f"{where}: '{pattern}' matches no linear module: there are e.g. {', '.join(near)}")
        for module in modules:
            out, into = linear[module].shape
            if lora.rank > min(out, into):
                raise ValueError(
                    f"tuning.lora.rank: {lora.rank} is above the smaller side of {module}.weight [{out}, {into}]: at "
                    f"most {min(out, into)} is of use"
                )
            a = ParameterSpec(f"{module}.lora_a", (lora.rank, into), Role.LORA_A)
            found[module] = a, ParameterSpec(f"{module}.lora_b", (out, lora.rank), Role.LORA_B)
    return found
