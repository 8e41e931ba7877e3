"""The description of a dialect, and reading and writing by it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

from ...config import ModelConfig
from .rules import DialectError, Rule, State, translate
from .windows import Windows, shrinks, sides

BUFFERS = r"(.*\.)?(relative_position_index|relative_coords_table|attn_mask)"


class Translation(NamedTuple):
    """A state dict in our names.

    Attributes:
        state: our name -> tensor.
        sources: our name -> the file's names of the tensors that it was made from.
        dropped: known buffers and parts that our models lack, by the file's names.
        unknown: names in the file without a rule.
    """

    state: State
    sources: dict[str, tuple[str, ...]]
    dropped: State
    unknown: list[str]


class Images(NamedTuple):
    """Preparation of images: ``data.mean``, ``data.std`` and ``augment.eval_crop``.

    The defaults are ImageNet's.
    """

    mean: list[float] = [0.485, 0.456, 0.406]  # noqa: RUF012 - never changed
    std: list[float] = [0.229, 0.224, 0.225]  # noqa: RUF012
    crop: float = 0.875


class Kind(NamedTuple):
    """The properties of a model that decide its names: cosine attention (V2), and the stages."""

    v2: bool
    stages: int


def _nothing(*_: Any) -> Any:
    return {}


class Dialect(NamedTuple):
    """One implementation's names.

    Attributes:
        name: of the dialect.
        example: a typical name, for messages.
        looks_like: whether names, without their prefix, can be this dialect's.
        rules: of a kind of model; if several give the same name of ours, the first one writes.
        only: family -> options of ModelConfig that have only one value in this implementation,
            which lacks the other families. Empty: everything that we have.
        windows: family -> the windows that it builds.
        prefix: pattern of an optional prefix of every name.
        body: family -> prefix to write before every name that does not start with ``outside``.
        outside: see ``body``.
        dropped: pattern of names that no rule takes and nobody needs.
        spare: names in a given state that are not read.
        extras: further tensors of a written state, e.g. buffers.
        moe: whether it has mixtures of experts, in the family ``swin_moe``.
    """

    name: str
    example: str
    looks_like: Callable[[Collection[str]], bool]
    rules: Callable[[Kind], list[Rule]]
    only: Mapping[str, Mapping[str, object]] = {}
    windows: Mapping[str, Callable[[ModelConfig, int], Windows]] = {}
    prefix: str = r"(module\.)?"
    body: Mapping[str, str] = {}
    outside: str = "head."
    dropped: str = BUFFERS
    spare: Callable[[State], Iterable[str]] = _nothing
    extras: Callable[[ModelConfig, State], State] = _nothing
    moe: bool = False

    def plain(self, names: Iterable[str]) -> dict[str, str]:
        """Map names without prefix to names; if two would be equal, the second keeps its prefix."""
        plain: dict[str, str] = {}
        for name in names:
            short = re.sub(f"^{self.prefix}", "", name)
            plain[name if short in plain else short] = name
        return plain

    def recognises(self, names: Iterable[str]) -> bool:
        return self.looks_like(self.plain(names))


def read(dialect: Dialect, state: State) -> Translation:
    plain = dialect.plain(state)
    theirs = {short: state[name] for short, name in plain.items()}
    spare = set(dialect.spare(theirs))
    wanted = {name: tensor for name, tensor in theirs.items() if name not in spare}
    stages = [re.match(r".*?\b(?:layers|stages)\.(\d+)\.blocks\.", name) for name in wanted]
    kind = Kind(
        v2=any(name.endswith("logit_scale") for name in wanted),
        stages=1 + max((int(found[1]) for found in stages if found), default=-1),
    )
    made = translate(dialect.rules(kind), wanted)
    known = {name for name in made.left if re.fullmatch(dialect.dropped, name)}
    return Translation(
        made.state,
        {name: tuple(plain[source] for source in names) for name, names in made.sources.items()},
        {plain[name]: theirs[name] for name in theirs if name in spare | known},
        [plain[name] for name in made.left if name not in known],
    )


def write(dialect: Dialect, state: State, model: ModelConfig) -> State:
    if dialect.only:
        check(dialect, model, moe=any(".mlp.experts." in name for name in state))
    kind = Kind(v2=model.family == "swinv2", stages=len(model.depths))
    made = translate(dialect.rules(kind), state, write=True)
    if made.left:
        raise DialectError(
            f"{made.left[0]!r} ({len(made.left)} such names) has no counterpart in {dialect.name}"
        )
    out = {**made.state, **dialect.extras(model, made.state)}
    prefix = dialect.body.get(model.family, "")
    return {
        name if name.startswith(dialect.outside) else prefix + name: tensor
        for name, tensor in out.items()
    }


def check(dialect: Dialect, model: ModelConfig, *, moe: bool = False) -> None:
    """Raise :class:`DialectError` if the other implementation cannot compute the same function.

    Args:
        moe: whether the model has mixtures of experts.
    """
    if model.family not in dialect.only:
        families = ", ".join(dialect.only)
        raise DialectError(f"{dialect.name} has no family {model.family}; it has {families}")
    if moe and not (dialect.moe and model.family == "swin_moe"):
        what = f"of family {model.family}" if dialect.moe else "at all"
        raise DialectError(f"{dialect.name} has no mixtures of experts {what}; use swin_moe names")
    for option, value in dialect.only[model.family].items():
        if getattr(model, option) != value:
            raise DialectError(
                f"{dialect.name} has no {option}={getattr(model, option)} (always {value}) "
                f"in family {model.family}"
            )
    check_sizes(dialect, model)


def check_sizes(dialect: Dialect, model: ModelConfig) -> None:
    """Raise :class:`DialectError` if padding or clipping differ at the image size."""
    if any(side % model.patch_size for side in model.image_sides):
        raise DialectError(
            f"{dialect.name} may not pad images: img_size={model.img_size} must be a multiple of "
            f"patch_size={model.patch_size}"
        )
    for stage in range(len(model.depths)):
        ours, theirs = shrinks(model, stage), dialect.windows[model.family](model, stage)
        where = f"{dialect.name} at img_size={model.img_size} would compute something else: stage"
        if ours != theirs:
            raise DialectError(f"{where} {stage} has {_text(theirs)} there, {_text(ours)} here")
        window, (height, width) = ours[0][0], sides(model, stage)
        if height % window or width % window:  # padding takes part in the other's attention
            raise DialectError(
                f"{where} {stage} has {height}×{width} tokens, which windows of {window} do not "
                "divide; give an img_size that they divide"
            )


def _text(windows: Windows) -> str:
    size = "×".join(str(window) for window, _ in windows)
    shifted = "/".join("shifted" if shift else "unshifted" for _, shift in windows)
    return f"windows of {size} ({shifted})"
