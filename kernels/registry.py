"""Who implements which op for which module: chosen once, when the model is built, and written down.

There is no dispatch. `select` runs before the first step and hands out plain callables; a *preference* may fall through
to the next source (the manifest says why), a *pin* never does. Nothing here reads the environment or patches a module.

Implementations are found in three places: kernels/reference.py, every module of every `kernels/*_ops/` folder (each
defines `IMPLEMENTATION`, one or a list of variants tried in order; those that begin with an underscore are helpers),
and the entry points of group `weftrain.kernels`. The ops that other packages add are those of group `weftrain.ops`
(kernels/ops/).
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from weftrain.kernels.contract import Implementation, KernelError, Op, Spec
from weftrain.kernels.cuda_devices import absence
from weftrain.kernels.ops import OPS
from weftrain.kernels.plugins import guarded, load_plugins
from weftrain.kernels.source_files import defined, hash_files, module_of

ENTRY_POINT_GROUP = "weftrain.kernels"
# Sources that are deterministic by contract, in the order in which they are asked; core.config repeats it, and a test
# compares the two. Where preferences are these, the order is that of `default_preferences`.
DEFAULT_PREFERENCES = ("flash_attn", "cpp", "torch", "triton", "reference")
# On a GPU: one fused kernel before a composition of several, and before one launch a tensor.
GPU_PREFERENCES = ("flash_attn", "triton", "cpp", "torch", "reference")
# What torch.compile fuses with its neighbours where it compiles the model. The other ops are kernels of their own there
# too, or are called outside of the graph.
FUSED_BY_COMPILE = frozenset(
    ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm", "rope", "swiglu", "cross_entropy")
)
# Where torch has one kernel for a product too, and no GPU has shown ours to be faster. Of newton_schulz the reference
# is torch's products already, with the bits of torch.optim.Muon, which the docs promise: others are named choices.
OWN_PREFERENCES = {
    "grouped_gemm": ("flash_attn", "cpp", "torch", "triton", "reference"),
    "newton_schulz": ("flash_attn", "torch", "reference", "cpp", "triton"),
}


def default_preferences(op: str, device: str, compiled: bool) -> tuple[str, ...]:
    """The order of sources of one op on a torch device type. compiled: torch.compile compiles the model."""
    if op in OWN_PREFERENCES:
        return OWN_PREFERENCES[op]
    if device == "cpu" or (compiled and op in FUSED_BY_COMPILE):
        return DEFAULT_PREFERENCES
    return GPU_PREFERENCES


@dataclass(frozen=True)
class Selection:
    """The callables of one model, and the JSON-able record of how they were chosen."""

    functions: Mapping[tuple[str, str], Callable[..., Any]]  # (op, module)
    manifest: dict[str, Any]
    of_each: Mapping[tuple[str, str], Callable[[Sequence[torch.Tensor]], torch.Tensor]] = field(default_factory=dict)

    def function(self, op: str, module: str) -> Callable[..., Any]:
        """The plain callable for that use. Raises KernelError for a use that `select` was not asked for."""
        try:
            return self.functions[op, module]
        except KeyError:
            modules = [known for known_op, known in self.functions if known_op == op]
            raise KernelError(
                f"no kernel was selected for {op} in module '{module}'; {_nearest(module, modules)}"
            ) from None


@dataclass(frozen=True)
class TableRow:
    """One line of `op x source`: usable, or why not."""

    op: str
    source: str
    version: str
    reason: str | None  # None: available


class Catalog(dict[str, dict[str, list[Implementation]]]):
    """op -> source -> variants in the order they are tried. broken_plugins: entry point -> why it is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.broken_plugins: dict[str, str] = {}


def load_catalog() -> Catalog:
    """Every implementation that can be found; plugins that fail are named in `broken_plugins`."""
    catalog = Catalog()
    OPS.look_again()
    catalog.broken_plugins |= OPS.broken_plugins
    _add(catalog, [Implementation(op.name, "reference", op.function) for op in OPS.values()], "kernels/reference.py")
    package = importlib.import_module(__package__ or "weftrain.kernels")
    for folder in pkgutil.iter_modules(package.__path__):
        if not (folder.ispkg and folder.name.endswith("_ops")):
            continue
        subpackage = importlib.import_module(f"{package.__name__}.{folder.name}")
        reason = subpackage.why_not() if hasattr(subpackage, "why_not") else None
        for module in pkgutil.iter_modules(subpackage.__path__):
            if module.name.startswith("_"):
                continue  # a helper of its folder
            if reason is not None:
                offered: Any = _not_usable(module.name, folder.name.removesuffix("_ops"), reason)
            else:
                loaded = importlib.import_module(f"{subpackage.__name__}.{module.name}")
                offered = loaded.IMPLEMENTATION
            _add(catalog, offered, f"kernels/{folder.name}/{module.name}.py")
    for plugin in load_plugins(ENTRY_POINT_GROUP):
        reason = plugin.broken
        if reason is None:
            try:
                _add(catalog, _guarded(plugin.loaded), plugin.origin)
            except KernelError as error:
                reason = str(error)
        if reason is not None:
            catalog.broken_plugins[plugin.origin] = reason
    return catalog


def _not_usable(op: str, source: str, reason: str) -> Implementation:
    """The row of an op file (named after its op) of a folder whose package is missing or too old."""

    def function(*_: Any, **__: Any) -> Any:
        raise KernelError(f"{op} of source '{source}' was called: {reason}")

    return Implementation(op, source, function, lambda spec: reason, "not usable")


def _guarded(offered: Any) -> list[Any]:
    """What a plugin gave, with questions that cannot fail."""
    several = offered if isinstance(offered, (list, tuple)) else [offered]
    return [
        replace(item, unavailable=guarded(item.unavailable)) if isinstance(item, Implementation) else item
        for item in several
    ]


def _add(catalog: Catalog, offered: Any, origin: str) -> None:
    """Enter an Implementation, or a list or tuple of them: all or, with KernelError, nothing."""
    fresh: dict[str, dict[str, list[Implementation]]] = {}
    for implementation in offered if isinstance(offered, (list, tuple)) else [offered]:
        if not isinstance(implementation, Implementation):
            raise KernelError(
                f"{origin} gives a {type(implementation).__name__}; it must give an Implementation or a list of them"
                + (
                    "; an Op belongs to the entry points of group weftrain.ops"
                    if isinstance(implementation, Op)
                    else ""
                )
            )
        if fault := _fault(implementation):
            raise KernelError(f"{origin}: {fault}")
        fresh.setdefault(implementation.op, {}).setdefault(implementation.source, []).append(implementation)
    for op, sources in fresh.items():
        if catalog and op not in catalog and origin != "kernels/reference.py":
            raise KernelError(f"{origin} implements the unknown op '{op}'; {_nearest(op, catalog)}")
        for source in sources:
            if source in catalog.get(op, {}):
                raise KernelError(
                    f"{origin} provides {op} under the source name '{source}', which is taken; give it a name of its "
                    "own"
                )
    for op, sources in fresh.items():
        catalog.setdefault(op, {}).update(sources)


def _fault(implementation: Implementation) -> str | None:
    """What would fail later, in a run that only reads the list."""
    for name, value in (
        ("op", implementation.op),
        ("source", implementation.source),
        ("version", implementation.version),
    ):
        if not isinstance(value, str) or not value:
            return f"its {name} is {value!r}; it must be a text"
    if not callable(implementation.function):
        return (
            f"the function of {implementation.op} is a {type(implementation.function).__name__}, which cannot be called"
        )
    missing = [str(file) for file in implementation.files if not Path(file).is_file()]
    return f"{implementation.op} names the file {missing[0]}, which is not there" if missing else None


def select(
    specs: Sequence[Spec],
    preferences: Sequence[str] = DEFAULT_PREFERENCES,
    pins: Mapping[str, str] | None = None,
    *,
    compiled: bool = False,
) -> Selection:
    """Choose one implementation for every use.

    preferences: sources in order; the first that is available for a use is taken. DEFAULT_PREFERENCES, and no other
    list, stand for the order of each use's op and device (`default_preferences`, which is given `compiled`). pins: `op`
    or `op@module-glob` (fnmatch: `attention@layers.[0-3].*`) -> source. A glob overrides a plain `op`. Raises
    KernelError: an unknown op or source, a pin that matches no use or whose source is unavailable, two globs that
    disagree about one module, or a use for which no preference is available.
    """
    by_default = tuple(preferences) == DEFAULT_PREFERENCES
    catalog = load_catalog()
    pins = dict(pins or {})
    _check_names(catalog, specs, preferences, pins)
    functions: dict[tuple[str, str], Callable[..., Any]] = {}
    of_each: dict[tuple[str, str], Callable[[Sequence[torch.Tensor]], torch.Tensor]] = {}
    ops: dict[str, list[dict[str, Any]]] = {}
    hashes: dict[Callable[..., Any], tuple[str | None, dict[str, str]]] = {}
    for spec in specs:
        pin = _pin_for(spec, pins)
        order = default_preferences(spec.op, spec.device, compiled) if by_default else preferences
        chosen, passed_over = _choose(catalog[spec.op], spec, order, pin)
        function = functions[spec.op, spec.module] = _observed(chosen.function, spec)
        if chosen.of_each is not None and function is chosen.function:  # whoever observes calls wants to see each
            of_each[spec.op, spec.module] = chosen.of_each
        if chosen.function not in hashes:
            hashes[chosen.function] = hash_files(chosen.function, chosen.files)
        entry = _entry(chosen, spec, pin, passed_over, hashes[chosen.function])
        groups = ops.setdefault(spec.op, [])
        same = next((group for group in groups if {**group, "modules": None} == {**entry, "modules": None}), None)
        if same is None:
            groups.append(entry)
        else:
            same["modules"].append(spec.module)
    return Selection(
        functions,
        {"preferences": list(preferences), "pins": pins, "ops": ops, "broken_plugins": catalog.broken_plugins},
        of_each,
    )


def table(device: str, dtype: torch.dtype) -> list[TableRow]:
    """Every op x source with its state on `device` for `dtype`, at each op's example attributes. An implementation
    whose device torch does not see is not usable.
    """
    absent = found.reason if device == "cuda" and (found := absence()) else None
    rows = []
    for op, sources in load_catalog().items():
        spec = Spec(op, "example", device, dtype, OPS[op].attributes)
        for source, variants in sources.items():
            usable, reason = _first_usable(variants, spec)
            rows.append(TableRow(op, source, (usable or variants[0]).version, reason or absent))
    return rows


Observer = Callable[[Spec, dict[str, Any]], None]
_OBSERVER: ContextVar[Observer | None] = ContextVar("_OBSERVER", default=None)


@contextmanager
def observed_by(observer: Observer) -> Iterator[None]:
    """What `select` gives within tells `observer` the use and the arguments by name, before each call. For recording;
    anywhere else the callables are the plain ones.
    """
    token = _OBSERVER.set(observer)
    try:
        yield
    finally:
        _OBSERVER.reset(token)


def _observed(function: Callable[..., Any], spec: Spec) -> Callable[..., Any]:
    observer = _OBSERVER.get()
    if observer is None:
        return function
    signature = inspect.signature(OPS[spec.op].function)

    def observed(*arguments: Any, **by_name: Any) -> Any:
        observer(spec, dict(signature.bind(*arguments, **by_name).arguments))
        return function(*arguments, **by_name)

    return observed


def _check_names(catalog: Catalog, specs: Sequence[Spec], preferences: Sequence[str], pins: Mapping[str, str]) -> None:
    sources = sorted({source for by_source in catalog.values() for source in by_source})
    for spec in specs:
        if spec.op not in catalog:
            raise KernelError(f"module '{spec.module}' uses the unknown op '{spec.op}'; {_nearest(spec.op, catalog)}")
    for source in preferences:
        if source not in sources:
            raise KernelError(
                f"kernels.preferences names the unknown source '{source}'; "
                f"{_nearest(source, sources)}{_broken(catalog)}"
            )
    for key, source in pins.items():
        op, _, glob = key.partition("@")
        if op not in catalog:
            raise KernelError(f"kernels.pins '{key}' names the unknown op '{op}'; {_nearest(op, catalog)}")
        if source not in catalog[op]:
            nearest = _nearest(source, catalog[op])
            raise KernelError(f"kernels.pins '{key}' names the unknown source '{source}'; {nearest}{_broken(catalog)}")
        modules = [spec.module for spec in specs if spec.op == op]
        if not modules:
            raise KernelError(
                f"kernels.pins '{key}': this model does not use {op}; it uses "
                f"{', '.join(sorted({s.op for s in specs}))}"
            )
        if glob and not any(fnmatchcase(module, glob) for module in modules):
            raise KernelError(f"kernels.pins '{key}' matches no module that uses {op}; {_nearest(glob, modules)}")


def _broken(catalog: Catalog) -> str:
    """For messages about an unknown source: the plugins that were passed over, of which one may provide it."""
    return "".join(f"; {origin} was passed over: {reason}" for origin, reason in catalog.broken_plugins.items())


def _pin_for(spec: Spec, pins: Mapping[str, str]) -> tuple[str, str] | None:
    """The (key, source) that pins this use, or None."""
    globs = [(key, source) for key, source in pins.items() if "@" in key and _matches(key, spec)]
    for key, source in globs[1:]:
        if source != globs[0][1]:
            raise KernelError(
                f"kernels.pins '{globs[0][0]}' and '{key}' both match '{spec.module}' with different sources "
                f"('{globs[0][1]}', '{source}'); narrow one of them"
            )
    if globs:
        return globs[0]
    return (spec.op, pins[spec.op]) if spec.op in pins else None


def _matches(key: str, spec: Spec) -> bool:
    op, _, glob = key.partition("@")
    return op == spec.op and fnmatchcase(spec.module, glob)


def _choose(
    by_source: Mapping[str, list[Implementation]], spec: Spec, preferences: Sequence[str], pin: tuple[str, str] | None
) -> tuple[Implementation, dict[str, str]]:
    """The implementation for one use, and for every other source the reason that it was passed over."""
    if pin is not None:
        key, source = pin
        usable, reason = _first_usable(by_source[source], spec)
        if usable is None:
            others = [other for other, variants in by_source.items() if _first_usable(variants, spec)[0]]
            raise KernelError(
                f"kernels.pins '{key}' = '{source}' cannot be used for '{spec.module}' on {spec.device}: {reason}; "
                f"available there: {', '.join(others) or 'none'}"
            )
        return usable, {other: f"pinned to '{source}' by '{key}'" for other in by_source if other != source}
    passed_over: dict[str, str] = {}
    for source in preferences:
        if source not in by_source:
            passed_over[source] = f"does not implement {spec.op}"
            continue
        usable, reason = _first_usable(by_source[source], spec)
        if usable is None:
            passed_over[source] = str(reason)
            continue
        for other in by_source:
            if other != source and other not in passed_over:
                passed_over[other] = (
                    f"'{source}' is preferred" if other in preferences else "not among kernels.preferences"
                )
        return usable, passed_over
    reasons = "; ".join(f"{source}: {reason}" for source, reason in passed_over.items())
    raise KernelError(
        f"no preferred kernel for {spec.op} in '{spec.module}' on {spec.device} ({reasons}); add one of "
        f"{', '.join(source for source in by_source if source not in preferences) or 'reference'} to "
        "kernels.preferences"
    )


def _first_usable(variants: Sequence[Implementation], spec: Spec) -> tuple[Implementation | None, str | None]:
    reasons = []
    for implementation in variants:
        reason = implementation.unavailable(spec)
        if reason is None:
            return implementation, None
        reasons.append(reason)
    return None, " / ".join(dict.fromkeys(reasons))


def _entry(
    chosen: Implementation,
    spec: Spec,
    pin: tuple[str, str] | None,
    passed_over: Mapping[str, str],
    hashes: tuple[str | None, dict[str, str]],
) -> dict[str, Any]:
    sha256, files = hashes
    written = defined(chosen.function)
    name = getattr(written, "__qualname__", type(written).__name__)
    return {
        "modules": [spec.module],
        "source": chosen.source,
        "function": f"{module_of(chosen.function)}:{name}",
        "sha256": sha256,
        "files": files,
        "version": chosen.version,
        "device": spec.device,
        "dtype": str(spec.dtype).removeprefix("torch."),
        "pin": pin[0] if pin else None,
        "passed_over": dict(passed_over),
    }


def _nearest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """'did you mean ...?' where something is close, else the list of what there is."""
    names = sorted(set(known))
    close = get_close_matches(name, names, n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(repr(match) for match in close)}?"
    shown = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    return f"there is: {shown or 'nothing'}"
