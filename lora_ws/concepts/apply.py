"""`apply_edit`: a kept edit as an edited base model, or as an adapter that does the same."""

from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from lora_ws.adapters.adapter import Adapter, Module
from lora_ws.adapters.merging import Merged
from lora_ws.adapters.writer import write_adapter
from lora_ws.concepts.edit import SparseEdit
from lora_ws.concepts.spec import ApplySpec
from lora_ws.diffusion.families import denoiser_of, family_of
from lora_ws.diffusion.pipeline import load_pipeline
from lora_ws.errors import ConfigError
from lora_ws.functional.factors import cut_to_rank


def apply_edit(file: Path, spec: ApplySpec) -> tuple[Path, float]:
    """Apply an edit to its base, and write the edited pipeline or the edit as an adapter.

    Args:
        file: ``edit.safetensors`` of `lora_ws.concepts.run`.
        spec: which base, and what to write.

    Returns:
        What was written, and the share of the edit's squared norm in it: 1 but for an adapter of
        low rank.

    Raises:
        DataError: the file is no edit.
        ConfigError: it is of another base, or the folder holds something.
    """
    edit = SparseEdit.load(file)
    if spec.out.exists() and any(spec.out.iterdir()):
        raise ConfigError(f"{spec.out} is not empty; choose another --out")
    pipeline = load_pipeline(spec.base)
    edit.apply(denoiser_of(pipeline))
    if spec.to == "pipeline":
        pipeline.save_pretrained(spec.out)
        return spec.out, 1.0
    made = edit_adapter(edit, pipeline, spec.rank)
    return write_adapter(made.adapter, spec.out, "diffusers"), made.energy


def edit_adapter(edit: SparseEdit, pipeline: Any, rank: int | None = None) -> Merged:
    """An edit as an adapter: the update of each matrix is minus the weights that are set to zero.

    Args:
        edit: of the pipeline's U-Net or transformer.
        pipeline: says what shape the weights have.
        rank: of the adapter; None is exact, at the full rank of each matrix. Where weights are few
            and scattered, as in an edit, a low rank holds little of them.

    Returns:
        The adapter, and the share of the edit's squared norm that it holds.
    """
    family, modules = family_of(pipeline), dict[str, Module]()
    kept = whole = 0.0
    for name, at in edit.indices.items():
        shape = family.denoiser.get_parameter(name).shape
        update = np.zeros(prod(shape))
        update[at.numpy()] = -edit.before[name].double().numpy()
        update = update.reshape(shape[0], -1)
        square = min(update.shape)
        down, up = np.eye(update.shape[1]), update
        if len(update) < update.shape[1]:
            down, up = update, np.eye(len(update))
        energy = float((update**2).sum())
        whole, held = whole + energy, energy
        if rank is not None and rank < square:
            cut = cut_to_rank(down, up, rank)
            down, up, held = cut.down, cut.up, cut.kept
        kept += held
        path, kernel = name.removesuffix(".weight"), tuple(shape[2:])
        factors = down.astype(np.float32), up.astype(np.float32)
        modules[path] = Module(family.component, path, "lora", *factors, 1.0, "edit", kernel)
    return Merged(Adapter(modules, "edit.safetensors", ""), kept / whole if whole else 1.0)
