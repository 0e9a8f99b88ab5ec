"""What another fingerprint allows: what the kinds of entries that differ were measured to cause, nothing for what
computes nothing, and where the table ends neither acceptance nor more than any rounding explains.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forgery import Tensors, forge
from record_runs import done, trainer, weftrain
from release_cases import verdicts

from weftrain.backends.common.device import cuda_numerics, device_fingerprint
from weftrain.core import checkpoint
from weftrain.core.config import Recipe
from weftrain.core.run.metrics import effective_records
from weftrain.exchange.release import replay, tolerance
from weftrain.exchange.release.distance import MOVEMENT, STATE_KINDS, movement, state_distances
from weftrain.exchange.release.tolerance import CAP, REFUSED, ROWS, WIDEST, Chain, Room, allowance, rows_of, table

Tiny = Callable[..., Recipe]
SLOW = 0.01  # of the weights' norm: less than in any measured run


def test_every_entry_of_a_fingerprint_has_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(multi_processor_count=1))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    found = device_fingerprint("local", torch.device("cpu"), {"a": 1}, {}, ranks=2, recomputes="none").as_json()
    known = {key for keys in ROWS.values() for key in keys}
    assert (found.keys() | cuda_numerics(torch.device("cuda")).keys()) - known == set()
    assert sum(len(keys) for keys in ROWS.values()) == len(known)


@pytest.mark.parametrize(
    ("keys", "rows"),
    [
        (["kernels.ops.rope.0.source", "threads"], ["threads", "kernels"]),
        (["code", "python"], ["nothing"]),
        (["of a backend of tomorrow"], ["device"]),
        (["reduction"], ["layout"]),
        ([], []),
    ],
)
def test_rows_follow_from_what_differs(keys: list[str], rows: list[str]) -> None:
    assert rows_of((key, "in order", "in a tree") for key in keys) == rows
    assert rows_of([("reduction", "by the collective library, bfloat16", "in order")]) == ["precision"]


def test_the_table_is_whole() -> None:
    """Each pace and dtype has every plane and number, of every row that a difference was measured of."""
    known = table()
    assert list(known.steps) == sorted(set(known.steps))
    assert known.measured.keys() <= set(ROWS) - {"nothing"}
    assert list(known.moved) == sorted(known.moved, key=lambda pace: known.moved[pace][-1]), "the slowest first"
    for pace, dtypes in known.distances.items():
        assert len(known.moved[pace]) == len(known.steps)
        assert set(dtypes) == {"float32", "bfloat16"}
        for rows in dtypes.values():
            assert rows.keys() <= known.measured.keys()
            kinds_there = {kind for kinds in rows.values() for kind in kinds}
            assert kinds_there | {MOVEMENT} == WIDEST.keys() - {"held-out loss"}
            assert {len(there) for kinds in rows.values() for there in kinds.values()} == {len(known.steps)}
            for kinds in rows.values():
                assert all(max(there) < CAP[kind] for kind, there in kinds.items()), "a cap would refuse honest runs"


def room(recipe: Recipe, rows: Sequence[str], chain: Chain, **fingerprint: str) -> Callable[[str], Room]:
    return allowance(recipe, fingerprint, rows, chain, None).room


def test_what_computes_nothing_allows_nothing(tiny_recipe: Tiny) -> None:
    recipe, one = tiny_recipe("crystal"), {"weights": 1e-9, "router_entropy": 1e-9, "loss": 0.0}
    for rows in ([], ["nothing"]):
        for given in (None, 0.5):
            found = allowance(recipe, {}, rows, Chain(2, SLOW), given)
            assert (found.beyond(one), found.not_covered(one)) == (["weights", "router_entropy"], {})
    assert allowance(recipe, {}, ["threads"], Chain(2, SLOW), 0.0).beyond({"loss": 1e-9}) == ["loss"]


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_bounds_follow_from_dtype_steps_and_pace_and_not_from_the_claim(compute: str, tiny_recipe: Tiny) -> None:
    recipe, known = tiny_recipe("crystal", f"precision.compute={compute}"), table()
    slow, fast = known.moved["slow"][0], known.moved["full"][0]

    def far(kind: str, steps: int, *rows: str, moved: float = slow) -> float:
        return room(recipe, rows, Chain(steps, moved))(kind).far

    there = max(kinds["weights"][0] for kinds in known.distances["slow"][compute].values())
    assert far("weights", 1, "kernels") == pytest.approx(min(REFUSED[compute] * there, CAP["weights"]))
    for kind in WIDEST:
        ends, between = [far(kind, steps, "kernels") for steps in (8, 16)], far(kind, 12, "kernels")
        assert min(ends) * 0.999 <= between <= max(ends) * 1.001
        assert far(kind, 3, "device") == far(kind, 3, "libraries", "threads") == far(kind, 3, "kernels")
        assert far(kind, 1, "kernels", moved=fast) >= far(kind, 1, "kernels")
        assert room(recipe, ["kernels"], Chain(3, slow))(kind).near <= WIDEST[kind]
    assert "not measured" in allowance(recipe, {}, ["device"], Chain(2, slow), None).basis


def test_other_rounding_of_products_is_refused_later_and_accepted_no_sooner(tiny_recipe: Tiny) -> None:
    fp32, bf16 = (tiny_recipe("crystal", f"precision.compute={name}") for name in ("float32", "bfloat16"))
    chain = Chain(4, table().moved["slow"][2])
    plain, claimed = (room(fp32, rows, chain)("weights") for rows in (["threads"], ["precision", "threads"]))
    assert plain.near == claimed.near < plain.far < claimed.far == room(bf16, ["threads"], chain)("weights").far


def test_a_rate_that_moves_weights_by_little_more_than_a_rounding_is_not_refused(tiny_recipe: Tiny) -> None:
    """fp32 weights round to 6e-8 of themselves at each step, however little they move, and so do moments."""
    recipe = tiny_recipe("crystal", "precision.compute=float32", "optimizer.beta2=0.9999")
    found = room(recipe, ["threads"], Chain(1, 1e-6))
    assert found("weights").near > 2**-24 / 1e-6
    assert found("exp_avg_sq").near > 2**-24 / 1e-4
    still = room(recipe, ["threads"], Chain(1, 0.0))("weights")
    assert (still.near, still.far) == (WIDEST["weights"], CAP["weights"]), "then any distance is infinite"


def test_deeper_models_may_be_further_apart_in_proportion(tiny_recipe: Tiny) -> None:
    chain = Chain(8, table().moved["slow"][3])
    two, eight = (
        room(tiny_recipe("crystal", "precision.compute=float32", f"model.num_layers={layers}"), ["threads"], chain)
        for layers in (2, 8)
    )
    for kind in ("weights", "exp_avg", "grad_norm"):
        assert eight(kind).near == pytest.approx(4 * two(kind).near)
        assert eight(kind).far == pytest.approx(4 * two(kind).far)


def test_the_length_of_a_movement_is_held_to_less_the_more_weights_there_are(tiny_recipe: Tiny) -> None:
    chain, bound = Chain(4, table().moved["slow"][2]), []
    for width in (48, 96):
        recipe = tiny_recipe("crystal", f"model.hidden_size={width}", "precision.compute=bfloat16")
        found = room(recipe, ["threads"], chain)
        weights = sum(math.prod(spec.shape) for spec in recipe.parameters)
        measured = table().distance("slow", "bfloat16", "weights", 4)
        assert found(MOVEMENT).near == pytest.approx(4 * measured / math.sqrt(weights))
        assert found(MOVEMENT).far == found("weights").far, "it refuses nothing that the weights do not"
        bound.append(found(MOVEMENT).near)
    assert 0.01 > bound[0] > bound[1]


def test_a_distance_that_says_nothing_is_not_covered(tiny_recipe: Tiny) -> None:
    """bf16 at full pace: rounding grows to the size of the training itself."""
    known = table()
    steps, fast = known.steps[-1], known.moved["full"][-1]
    found = allowance(tiny_recipe("crystal", "precision.compute=bfloat16"), {}, ["device"], Chain(steps, fast), None)
    near, far = found.room("weights").near, found.room("weights").far
    assert near == WIDEST["weights"] < far <= CAP["weights"]
    assert found.not_covered({"weights": near}) == {}, "so near is near, whatever others do"
    inside = {"weights": (near + far) / 2}
    assert found.beyond(inside) == []
    assert "would pass what was not trained so" in found.not_covered(inside)["weights"]
    assert "--link" in found.not_covered(inside)["weights"]
    assert found.beyond({"weights": far * 1.01}) == ["weights"], "beyond it is refused all the same"
    fp32 = room(tiny_recipe("crystal", "precision.compute=float32"), ["device"], Chain(steps, known.moved["slow"][-1]))
    assert all(fp32(kind).near < WIDEST[kind] / 10 for kind in WIDEST), "fp32 at a low rate is held to far less"


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("steps", "moved", "change", "fingerprint", "words"),
    [
        (33, SLOW, (), {}, "33 steps in one piece, and differences were measured to 32"),
        (2, 1e3, (), {}, "faster than in any measured run"),
        (2, math.inf, (), {}, "faster than in any measured run"),
        (2, SLOW, ("optimizer.name=muon", "optimizer.muon={scale: spectral}"), {}, "of the optimizer muon"),
        (2, SLOW, ("model.hidden_size=4800", "model.num_heads=300"), {}, "is 4,800 wide"),
        (2, SLOW, (), {"state_format": "int8_moments"}, "fewer bits"),
        (2, SLOW, (), {"float8": True}, "fewer bits"),
    ],
)
def test_where_the_table_ends_nothing_is_accepted_for_it_and_what_no_rounding_explains_is_refused(
    compute: str, steps: int, moved: float, change: tuple[str, ...], fingerprint: Any, words: str, tiny_recipe: Tiny
) -> None:
    recipe = tiny_recipe("crystal", f"precision.compute={compute}", *change)
    found = allowance(recipe, fingerprint, ["threads"], Chain(steps, moved), None)
    between = {kind: (WIDEST[kind] + cap) / 2 for kind, cap in CAP.items()}
    assert found.beyond(between) == []
    assert found.not_covered(between).keys() == CAP.keys()
    assert all(words in why for why in found.not_covered(between).values())
    assert found.beyond({kind: cap * 1.01 for kind, cap in CAP.items()}) == list(CAP)
    assert found.beyond({"weights": math.inf, "loss": math.nan, "margin": 1.5}) == ["weights", "loss", "margin"]
    inside = allowance(tiny_recipe("crystal", f"precision.compute={compute}"), {}, ["threads"], Chain(32, 1e3), None)
    assert all(found.room(kind).near <= inside.room(kind).near for kind in CAP), "no claim lets more be accepted"
    given = allowance(recipe, fingerprint, ["threads"], Chain(steps, moved), 0.1)
    assert set(given.beyond(between)) == set(STATE_KINDS), "a reader's own bound is used"
    assert "weights" not in given.not_covered({"weights": 0.05})


def test_weights_that_were_not_trained_are_beyond_every_cap(tiny_recipe: Tiny) -> None:
    """A release whose checkpoint is the one before it, whatever it claims."""
    origin = {"weights/a": torch.ones(4)}
    apart = state_distances(origin, origin, {"weights/a": torch.full((4,), 1.5)})
    for recipe in (tiny_recipe("crystal"), tiny_recipe("crystal", "precision.compute=float32")):
        for steps in (1, 32, 1000):
            for moved in (0.0, SLOW, 0.3, math.inf):
                found = allowance(recipe, {}, ["device", "precision"], Chain(steps, moved), None)
                assert found.beyond(apart) == ["weights", "movement"]


def test_a_number_that_nobody_measured_is_not_covered(tiny_recipe: Tiny) -> None:
    found = allowance(tiny_recipe("crystal"), {}, ["threads"], Chain(2, SLOW), None)
    assert list(found.not_covered({"loss": 0.0, "margin": 0.05, "entropy": 0.0})) == ["margin"]
    assert found.beyond({"loss": 0.9, "margin": 0.9}) == ["loss"]


def as_here(monkeypatch: pytest.MonkeyPatch, *, threads: int, kernels: tuple[str, ...] | None = None) -> None:
    """Links are trained again with these threads and kernels, whatever the record says."""
    real = replay._train

    def train(line: Any, link: Any, start: Any, wanted: Any, sources: Any, prepare: Any, progress: Any) -> Any:
        def other(recipe: Recipe, plan: Any, fingerprint: Any) -> Any:
            if kernels is not None:
                chosen = recipe.kernels.model_copy(update={"preferences": kernels})
                recipe = recipe.model_copy(update={"kernels": chosen})
            return prepare(recipe, plan, {**fingerprint, "threads": threads})

        return real(line, link, start, wanted, sources, other, progress)

    monkeypatch.setattr(replay, "_train", train)


@pytest.fixture(scope="module")
def in_fp32(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release as that of the other tests, which computes in bf16."""
    folder = tmp_path_factory.mktemp("fp32")
    (folder / "datasets").symlink_to(made / "datasets")
    done(trainer(folder)("precision.compute=float32"))
    done(weftrain("release", folder / "runs" / "crystal_demo", "--to", folder / "release", "--licence", "Apache-2.0"))
    return folder / "release"


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_an_honest_release_passes_with_other_threads_and_kernels(
    compute: str, in_fp32: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = in_fp32 if compute == "float32" else made / "release"
    as_here(monkeypatch, threads=2, kernels=("reference",))
    output = done(weftrain("replay", release))
    assert verdicts(weftrain("replay", release, "--link", "1")) == ["tolerance"]
    assert "link 1: fingerprint: threads: released 1, here 2" in output
    assert len(re.findall(r"fingerprint: kernels\.ops\.adamw", output)) == 1, "one line an op"
    assert re.search(
        r"kernels\.ops\.adamw: released \S+cpp_ops.adamw:adamw, here \S+reference:adamw \(and \d+ more", output
    )
    assert output.count("fingerprint: differs as that of link 1") == 2
    words = re.sub(r"\s+", " ", output)
    assert "losses, gradient norms, skipped steps replay 3 of 3 links, 3 within tolerance: 6 lines" in words, output
    assert re.search(r"link 3: weights \S+ apart, \S+ x the \S+ allowed\n", output), output
    assert f"allowed is 4 x the largest measured, {compute}, 6 steps" in output


class Swapped:
    """Rows of a source, the two halves of which come in each other's place: another batch at every step."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def rows(self, step: int, first: int, count: int) -> Any:
        return self._source.rows(step ^ 1, first, count)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("forgery", ["a learning rate", "batches"])
def test_what_was_trained_otherwise_is_never_within_tolerance(
    compute: str, forgery: str, in_fp32: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rate that is 1 % higher than the record says, and two batches in each other's place. It is the replay that
    trains so here: between the two nothing else would differ.
    """
    release = in_fp32 if compute == "float32" else made / "release"
    as_here(monkeypatch, threads=2)
    real = replay._train

    def train(line: Any, link: Any, start: Any, wanted: Any, sources: Any, prepare: Any, progress: Any) -> Any:
        def faster(recipe: Recipe, plan: Any, fingerprint: Any) -> Any:
            rates = [
                one.model_copy(
                    update={key: 1.01 * value for key in ("start", "end") if (value := getattr(one, key, None))}
                )
                for one in recipe.schedule.learning_rate
            ]
            schedule = recipe.schedule.model_copy(update={"learning_rate": tuple(rates)})
            return prepare(recipe.model_copy(update={"schedule": schedule}), plan, fingerprint)

        if forgery == "batches":
            sources = sources._replace(training=lambda recipe, given=sources.training: Swapped(given(recipe)))
            return real(line, link, start, wanted, sources, prepare, progress)
        state, fingerprint, measured = real(line, link, start, wanted, sources, faster, progress)
        for told in effective_records(release, kinds=("step",)):
            measured.get(("step", told["step"], ""), {})["learning_rate"] = told["learning_rate"]
        return state, fingerprint, measured

    monkeypatch.setattr(replay, "_train", train)
    result = weftrain("replay", release, "--link", "2")
    assert verdicts(result)[0] in ("covered", "different"), result.output
    assert result.exit_code in (3, 4)


def further(release: Path, factor: float, step: int = 4) -> Callable[[int, Tensors], None]:
    """The weights of this step go on by this share of their movement since step 2."""
    origin = weights_of_step_2(release)

    def edit(at: int, tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if at == step and name in origin:
                tensor.add_(tensor - origin[name], alpha=factor)

    return edit


def aside(release: Path, factor: float, step: int = 4) -> Callable[[int, Tensors], None]:
    """The weights of this step lie about this share of their movement since step 2 away, and as far from there."""
    origin, generator = weights_of_step_2(release), torch.Generator().manual_seed(1)

    def edit(at: int, tensors: Tensors) -> None:
        for name in origin if at == step else ():
            moved = (tensors[name] - origin[name]).double()
            across = torch.randn(moved.shape, generator=generator, dtype=torch.float64)
            across -= moved * (across * moved).sum() / moved.square().sum()
            across *= factor * moved.norm() / across.norm()
            tensors[name].copy_(origin[name] + (moved + across) / math.sqrt(1 + factor**2))

    return edit


def weights_of_step_2(release: Path) -> Tensors:
    before, _ = checkpoint.load(release / "checkpoints" / "step_00000002")
    return {name: before.tensors[name].clone() for name in before.tensors if name.startswith("weights/")}


def bound_of_link_2(release: Path) -> float:
    states = [checkpoint.load(release / "checkpoints" / f"step_0000000{step}") for step in (2, 4)]
    recipe = Recipe.from_record(states[1][1]["recipe"])
    chain = Chain(2, movement(states[0][0].tensors, states[1][0].tensors))
    return room(recipe, ["device"], chain)("weights").near


def other_machine(manifest: dict[str, Any]) -> None:
    manifest["fingerprint"]["device"] = "another processor"


def test_a_forger_gets_as_much_room_as_was_measured_and_no_more(release: Path, in_fp32: Path, tmp_path: Path) -> None:
    import shutil

    for source, edit, factor, verdict in (
        (in_fp32, aside, 40, "different"),
        (in_fp32, aside, 3, "covered"),
        (in_fp32, aside, 0.5, "tolerance"),
        (in_fp32, further, 0.5, "covered"),
        (release, aside, 10, "different"),
        (release, further, 0.1, "covered"),
    ):
        target = Path(shutil.copytree(source, tmp_path / f"{source.parent.name}-{edit.__name__}-{factor}"))
        bound = bound_of_link_2(target)
        forge(target, manifest=other_machine, tensors=edit(target, factor * bound))
        result = weftrain("replay", target, "--link", "2")
        assert verdicts(result) == [verdict], result.output
        assert result.exit_code == {"different": 3, "covered": 4, "tolerance": 0}[verdict]


def test_what_a_bound_does_not_cover_is_said_by_name_and_is_no_success(
    release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forge(release, manifest=other_machine, tensors=aside(release, 0.1 * bound_of_link_2(release)))
    monkeypatch.setattr(tolerance, "WIDEST", {**WIDEST, "weights": 1e-9})
    result = weftrain("replay", release, "--link", "2", "--link", "3")
    assert result.exit_code == 4, result.output
    assert verdicts(result) == ["covered", "equal"], "the second goes on from the replay of the first"
    assert "link 3: trained in one piece with the 1 links before it" in result.output
    output = re.sub(r"\s+", " ", result.output)
    assert (
        "weights and moments of the checkpoints replay 1 of 3 links; link 2 not covered: weights: honest runs" in output
    )
    assert "losses, gradient norms, skipped steps replay 2 of 3 links, 1 within tolerance: 4 lines" in output


def test_a_link_of_this_machine_after_one_of_another_is_judged_as_their_chain(release: Path) -> None:
    """Its replay does not begin in the released state, so its bits may differ although its own fingerprint does not."""

    def at_step_4(manifest: dict[str, Any]) -> None:
        if manifest["step"] == 4:
            other_machine(manifest)

    def slightly(step: int, tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if step > 2 and name.startswith("weights/"):
                tensor.mul_(1 + 1e-6)

    forge(release, manifest=at_step_4, tensors=slightly)
    result = weftrain("replay", release)
    assert verdicts(result) == ["equal", "tolerance", "tolerance"], result.output
    assert "link 3: fingerprint: differs as that of link 2" in result.output
    assert verdicts(weftrain("replay", release, "--link", "3")) == ["different"], "alone every bit must be equal"


def test_a_chain_that_is_longer_than_the_table_is_not_covered_from_there_on(
    release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a forger could walk on from where the table ends. What is as near as shorter runs is within tolerance."""
    short = replace(table(), steps=table().steps[:3])
    assert short.steps == (1, 2, 4)
    monkeypatch.setattr(tolerance, "table", lambda: short)
    far = further(release, 0.4, step=6)

    def slightly(step: int, tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if name.startswith("weights/"):
                tensor.mul_(1 + 1e-6 * step)

    forge(release, manifest=other_machine, tensors=slightly)
    assert verdicts(weftrain("replay", release)) == ["tolerance"] * 3
    forge(release, tensors=far)
    result = weftrain("replay", release)
    assert verdicts(result) == ["tolerance", "tolerance", "covered"], result.output
    assert result.exit_code == 4
    output = re.sub(r"\s+", " ", result.output)
    assert "2 of 3 links, 2 within tolerance; link 3 not covered: weights: 6 steps in one piece" in output
    alone = weftrain("replay", release, "--link", "3")
    assert (verdicts(alone), alone.exit_code) == (["different"], 3), "shorter pieces decide more"
