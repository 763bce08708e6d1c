"""What a file holds, by its header alone: which modules, of which method and sizes, spelt how."""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache

from lora_ws.adapters.architectures import FLUX_TOP, HUNYUAN_TOP, SD3_TOP
from lora_ws.adapters.fused import Part, is_fused, parts
from lora_ws.adapters.header import Limits, shown
from lora_ws.adapters.keys import DENOISERS, FOREIGN_ROLES, OTHER_ENCODER, parse_key, split_ending
from lora_ws.adapters.methods import Form, ShapeError, form_of
from lora_ws.adapters.model_classes import LANGUAGE_MODEL, has_module, original_model
from lora_ws.errors import AdapterError

Shapes = Mapping[str, tuple[int, ...]]
Place = tuple[str, str]
MAX_RANK = 4096
# Inputs or outputs of a module; vocabularies of language models have as many.
MAX_WIDTH = 1 << 18
# Up to so many tensors are remembered.
REMEMBERED = 4096
# Above this share of modules that nothing here knows, a file is refused: a verdict on the rest
# would be a verdict on another adapter.
MAX_UNMAPPED = 0.1
# Of one core: to read, widen and hash a number; to multiply and add two; to draw the random signs
# of a row or column.
SECONDS_A_NUMBER, SECONDS_A_PRODUCT, SECONDS_A_SIGN = 3e-8, 1e-10, 2e-7
# As FLUX's own repository names its blocks; JoyImageEdit does too, with other names inside.
_FLUX_BLOCK = re.compile(r"(?:double|single)_blocks[._]\d")
_SD3_BLOCK = re.compile(r"joint_blocks[._]\d")
# In names of tensors that no model has of its own.
_LIKE_AN_ADAPTER = re.compile(r"(?i)lora|dora|hada_|lokr|adapter")
BESIDE = ("alpha", "magnitude", "bias", "diff_b", "rescale", "w_norm", "b_norm")


@dataclass(frozen=True)
class Entry:
    """A module of the file.

    Attributes:
        component: ``unet``, ``transformer`` or a text encoder.
        path: dotted, as diffusers spells it; of a fused matrix, that of the file.
        keys: role -> tensor key.
        form: method and sizes.
        parts: modules in a fused matrix; the module itself where it is none.
    """

    component: str
    path: str
    keys: Mapping[str, str]
    form: Form
    parts: tuple[Part, ...]

    @cached_property
    def needed(self) -> tuple[str, ...]:
        """Keys of the tensors that its update is made of."""
        return tuple(key for role, key in self.keys.items() if role in ("alpha", *self.form.roles))

    @property
    def needs_base(self) -> bool:
        """DoRA: the size of the update depends on the base model's weights."""
        return "magnitude" in self.keys


@dataclass(frozen=True, eq=False)
class Structure:
    """A file's modules, and what else it holds; the same object for files of the same tensors.

    Attributes:
        entries: modules in the file's order.
        other_keys: tensors that are no part of an update: embeddings, norms, biases.
        unmapped: tensors that are part of one, of a module or method that is not known.
        other_encoders: tensors that are part of one, of a text encoder that is not read.
    """

    entries: tuple[Entry, ...]
    other_keys: tuple[str, ...]
    unmapped: tuple[str, ...]
    other_encoders: tuple[str, ...] = ()

    @cached_property
    def numbers(self) -> int:
        """How many the factors of all modules hold."""
        return sum(entry.form.numbers for entry in self.entries)

    @cached_property
    def seconds(self) -> float:
        """Of one core, to read the modules and measure their update, about."""
        widths = sum(entry.form.inputs + entry.form.outputs for entry in self.entries)
        work = sum(entry.form.work for entry in self.entries)
        return self.numbers * SECONDS_A_NUMBER + work * SECONDS_A_PRODUCT + widths * SECONDS_A_SIGN

    @cached_property
    def components(self) -> dict[str, int]:
        """Component -> how many modules."""
        return self._count(lambda entry: entry.component)

    @cached_property
    def methods(self) -> dict[str, int]:
        """Method -> how many modules."""
        return self._count(lambda entry: entry.form.method)

    @cached_property
    def ranks(self) -> dict[str, int]:
        """Rank of the factors -> how many modules."""
        return self._count(lambda entry: str(entry.form.factors_rank))

    def _count(self, kind: Callable[[Entry], str]) -> dict[str, int]:
        """How many modules of each kind; a fused matrix holds several."""
        counts: Counter[str] = Counter()
        for entry in self.entries:
            counts[kind(entry)] += len(entry.parts)
        return dict(counts)

    @property
    def unread(self) -> tuple[str, ...]:
        """Tensors that no update, hash or verdict covers, whatever they do."""
        return *self.other_keys, *self.unmapped, *self.other_encoders

    @property
    def modules_unread(self) -> int:
        """How many modules these tensors are of."""
        return len({(split_ending(key) or key.rpartition("."))[0] for key in self.unread})

    @property
    def unmapped_share(self) -> float:
        """Share of the denoiser's modules that are not known."""
        lost = len({(split_ending(key) or (key,))[0] for key in self.unmapped})
        known = sum(entry.component in DENOISERS for entry in self.entries)
        return lost / max(1, lost + known)

    def choose(self, patterns: tuple[str, ...] | None) -> tuple[Entry, ...]:
        """Entries of the denoiser whose path, or a part of it, fits a pattern; None takes all."""
        if patterns is None:
            return self.entries
        if patterns not in self._chosen:
            self._chosen[patterns] = self._choose(patterns)
        return self._chosen[patterns]

    @cached_property
    def _chosen(self) -> dict[tuple[str, ...], tuple[Entry, ...]]:
        return {}

    def _choose(self, patterns: tuple[str, ...]) -> tuple[Entry, ...]:
        return tuple(
            entry
            for entry in self.entries
            if entry.component in DENOISERS
            and any(fnmatchcase(p.path, pattern) for p in entry.parts for pattern in patterns)
        )


def structure_of(shapes: Shapes, file: str) -> Structure:
    """Sort the tensors of a file into modules.

    Args:
        shapes: tensor key -> shape.
        file: what errors call it.

    Raises:
        AdapterError: a module is incomplete, named twice, or its tensors do not fit.

    Example:
        >>> shapes = {"unet.mid_block.attentions.0.proj_in.lora.down.weight": (4, 8)}
        >>> shapes |= {"unet.mid_block.attentions.0.proj_in.lora.up.weight": (8, 4)}
        >>> structure_of(shapes, "f").entries[0].form.rank
        4
    """
    try:
        sort = _sorted_again if len(shapes) <= REMEMBERED else _sorted
        return sort(tuple(shapes.items()))
    except AdapterError as error:
        raise AdapterError(f"{file}: {error}", error.reason) from error.__cause__


def _sorted(items: tuple[tuple[str, tuple[int, ...]], ...]) -> Structure:
    shapes = dict(items)
    modules: dict[Place, dict[str, str]] = {}
    other, unmapped, encoders = [], [], []
    for key in shapes:
        parsed = parse_key(key)
        if parsed is not None and parsed.component == OTHER_ENCODER:
            encoders.append(key)
            continue
        if parsed is None or parsed.role in FOREIGN_ROLES:
            (unmapped if split_ending(key) else other).append(key)
            continue
        roles = modules.setdefault((parsed.component, parsed.path), {})
        if parsed.role in roles:
            raise AdapterError(
                f"{shown(key)} names layer {shown(parsed.path)} a second time", "twice"
            )
        roles[parsed.role] = key
    entries = []
    for (component, path), keys in _of_makers(_of_one_denoiser(modules)):
        entry = _entry(component, path, keys, shapes)
        if entry is None:
            beside = set(keys) <= set(BESIDE)
            (other if beside else unmapped).extend(keys.values())
        else:
            entries.append(entry)
            other += [key for role, key in keys.items() if role in BESIDE[1:]]
    _check_twice(entries)
    return Structure(tuple(entries), tuple(other), tuple(unmapped), tuple(encoders))


def _of_one_denoiser(modules: dict[Place, dict[str, str]]) -> dict[Place, dict[str, str]]:
    """Names that U-Nets and transformers share are of the kind that most of the others are of."""
    counts = Counter(component for component, _ in modules)
    if not all(counts[name] for name in DENOISERS):
        return modules
    most = max(DENOISERS, key=counts.__getitem__)
    moved = {}
    for (component, path), keys in modules.items():
        shared = component in DENOISERS and (most, path) not in modules and has_module(most, path)
        moved[most if shared else component, path] = keys
    return moved


def _of_makers(modules: dict[Place, dict[str, str]]) -> list[tuple[Place, dict[str, str]]]:
    """Names such as `img_in`, which other models have too, are of the model whose blocks are there.

    Of FLUX and HunyuanVideo, or of SD3.
    """
    keyed = [(path, key) for (_, path), keys in modules.items() for key in keys.values()]
    flux = any(
        _FLUX_BLOCK.search(key) and (is_fused(path) or "transformer_blocks." in path)
        for path, key in keyed
    )
    sd3 = not flux and any(_SD3_BLOCK.search(key) for _, key in keyed)
    named = {**HUNYUAN_TOP, **FLUX_TOP} if flux else SD3_TOP if sd3 else {}
    return [((part, named.get(path, path)), keys) for (part, path), keys in modules.items()]


# Files of one trainer and base have the same tensors.
_sorted_again = lru_cache(maxsize=16)(_sorted)


def _entry(component: str, path: str, keys: Mapping[str, str], shapes: Shapes) -> Entry | None:
    try:
        form = form_of({role: shapes[key] for role, key in keys.items()})
    except ShapeError as error:
        joint = " " if str(error).startswith("has ") else ": "
        raise AdapterError(f"layer {shown(path)}{joint}{error}", error.reason) from error
    if form is None:
        return None
    if min(form.rank or 1, form.factors_rank, form.inputs, form.outputs) < 1:
        raise AdapterError(f"layer {shown(path)} has a side of length 0", "shape")
    factors_rank = max(rank for rank, *_ in form.sides or ((form.factors_rank,),))
    if form.rank > MAX_RANK or factors_rank > max(MAX_RANK, form.inputs, form.outputs):
        rank = max(form.rank, factors_rank)
        raise AdapterError(f"rank {rank} of {shown(path)} is above {MAX_RANK}", "too-large")
    if max(form.inputs, form.outputs) > MAX_WIDTH:
        width = max(form.inputs, form.outputs)
        raise AdapterError(f"width {width} of {shown(path)} is above {MAX_WIDTH}", "too-large")
    if not is_fused(path):
        return Entry(component, path, keys, form, (Part(path, (slice(0, form.outputs),)),))
    found = parts(path, form.inputs, form.outputs)
    return Entry(component, path, keys, form, tuple(found)) if found else None


def _check_twice(entries: list[Entry]) -> None:
    """A fused matrix may hold a module that stands alone too."""
    seen: set[tuple[str, str]] = set()
    for entry in entries:
        for part in entry.parts:
            place = (entry.component, part.path)
            if place in seen:
                key = next(iter(entry.keys.values()))
                raise AdapterError(
                    f"{shown(key)} names layer {shown(part.path)} a second time", "twice"
                )
            seen.add(place)


def check_budget(found: Structure, limits: Limits, file: str) -> None:
    """Refuse, by shapes alone, a file whose factors take more than the limits.

    Raises:
        AdapterError: naming what it would take.
    """
    if 4 * found.numbers > limits.factor_bytes or found.seconds > limits.cpu_seconds:
        raise AdapterError(
            f"{file}: expected factors of at most {limits.factor_bytes} bytes, read in at most "
            f"{limits.cpu_seconds:g} CPU seconds; got {4 * found.numbers} bytes and "
            f"{found.seconds:.0f} seconds",
            "too-large",
        )


def check_complete(found: Structure, file: str) -> None:
    """Refuse a file that holds no adapter, or too much that is not known.

    Raises:
        AdapterError: naming the first tensor in question.
    """
    if found.unmapped and found.unmapped_share > MAX_UNMAPPED:
        raise _unmapped(found, file)
    if found.entries:
        return
    if found.other_encoders:
        raise AdapterError(
            f"{file}: expected modules of a denoiser or of CLIP, got only a text encoder of "
            f"another kind, such as {shown(found.other_encoders[0])}",
            "unmapped",
        )
    alike = next((key for key in found.other_keys if _LIKE_AN_ADAPTER.search(key)), "")
    key = alike or next(iter(found.other_keys), "")
    what = f"got names such as {shown(key)}" if key else "none"
    reason = "unmapped" if alike else "not-an-adapter"
    raise AdapterError(f"{file}: expected tensors of a LoRA adapter, {what}", reason)


def _unmapped(found: Structure, file: str) -> AdapterError:
    """Why the modules that are not known are not, as far as their names show."""
    key = found.unmapped[0]
    role = (split_ending(key) or ("", ""))[1]
    share = f"{file}: {100 * found.unmapped_share:.0f} % of its modules are"
    if method := FOREIGN_ROLES.get(role):
        return AdapterError(
            f"{share} of {method}, such as {shown(key)}: its updates are made of the base model's "
            "weights, which are not in the file",
            "needs-base",
        )
    key, model = next(((k, m) for k in found.unmapped if (m := original_model(k))), (key, ""))
    if model == LANGUAGE_MODEL:
        return AdapterError(
            f"{share} of a language model, such as {shown(key)}; expected an adapter of a "
            "diffusion model",
            "foreign",
        )
    whose = f"of {model} by names that are not read" if model else "not known"
    return AdapterError(
        f"{share} {whose}, such as {shown(key)}; a verdict on the rest would be one on another "
        "adapter",
        "unmapped",
    )
