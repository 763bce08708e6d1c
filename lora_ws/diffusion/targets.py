"""Which modules of an adapter a bank applies, and which modules of a model they belong to."""

from collections.abc import Iterable
from math import prod

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lora_ws.adapters.adapter import Adapter, Module
from lora_ws.adapters.keys import DENOISERS
from lora_ws.adapters.layout import LayerSpec
from lora_ws.config import nearest
from lora_ws.errors import AdapterError, LayoutError

# What diffusers computes from one joint matrix after `fuse_qkv_projections`.
_FUSED = ("to_q", "to_k", "to_v")


def can_apply(module: Module) -> bool:
    """Whether a bank applies it: plain factors of a linear module or a 2-D convolution.

    Example:
        >>> import numpy as np
        >>> factors = np.ones((1, 18)), np.ones((3, 1))
        >>> can_apply(Module("unet", "conv_in", "locon", *factors, 1.0, "alpha", kernel=(3, 3)))
        True
    """
    return len(module.kernel) in (0, 2) and not module.needs_base


def adapted_modules(adapter: Adapter) -> dict[str, Module]:
    """Modules of an adapter's denoiser that a bank applies."""
    return {
        name: module
        for name, module in adapter.modules.items()
        if module.component in DENOISERS and can_apply(module)
    }


def check_whole(adapter: Adapter, names: Iterable[str]) -> None:
    """Refuse an adapter of which a part would be left out in silence.

    Args:
        adapter: read from a file.
        names: of modules that are applied.

    Raises:
        AdapterError: it has more.
    """
    held = set(names)
    beyond = [name for name in (*adapter.modules, *adapter.other_keys) if name not in held]
    if not beyond:
        return
    module = adapter.modules.get(beyond[0])
    kind = "is no linear module or 2-D convolution that is adapted here"
    if module is not None and module.needs_base:
        kind = "is of DoRA, whose size depends on the base model"
    elif module is not None and not can_apply(module):
        kind = f"is a {len(module.kernel)}-D convolution; only 2-D ones can be adapted"
    raise AdapterError(
        f"{adapter.source}: `{beyond[0]}` (of {len(beyond)}) {kind}; the adapter would act without "
        "it; pass ignore_other=True to leave such tensors out"
    )


def find_module(model: nn.Module, layer: LayerSpec, kernel: tuple[int, ...] = ()) -> nn.Module:
    """Find the linear module or convolution that a layer names; of one that peft wraps, its base.

    Args:
        model: holds it.
        layer: its name and widths.
        kernel: of a convolution; without one, and for one of size 1, widths alone are compared.

    Raises:
        LayoutError: the model has no such module, or it does not fit.
    """
    name = layer.name
    try:
        module = model.get_submodule(name)
    except AttributeError:
        known = [key for key, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        raise LayoutError(
            f"{type(model).__name__} has no module `{name}`{nearest(name, known)}"
        ) from None
    module = getattr(module, "base_layer", module)
    if isinstance(module, nn.Conv2d) and module.groups == 1:
        sizes = module.in_channels * prod(module.kernel_size), module.out_channels
    elif isinstance(module, nn.Linear):
        sizes = module.in_features, module.out_features
        _check_called(model, name, module)
    else:
        groups = f" in {module.groups} groups" if isinstance(module, nn.Conv2d) else ""
        raise LayoutError(
            f"`{name}` is a {type(module).__name__}{groups}; only nn.Linear and nn.Conv2d modules "
            "without groups can be adapted"
        )
    if sizes != (layer.in_features, layer.out_features):
        counted = " (channels times kernel)" if isinstance(module, nn.Conv2d) else ""
        raise LayoutError(
            f"`{name}` maps {sizes[0]} to {sizes[1]}{counted} in this model, but "
            f"{layer.in_features} to {layer.out_features} in the adapters: is this their base?"
        )
    own = module.kernel_size if isinstance(module, nn.Conv2d) else ()
    # Some files write a kernel of 1x1 as a matrix, or a matrix as one.
    if prod(kernel) > 1 and kernel != own:
        raise LayoutError(
            f"`{name}` has {_kernel(own)} in this model, but {_kernel(kernel)} in the adapters: is "
            "this their base?"
        )
    return module


def _kernel(sizes: tuple[int, ...]) -> str:
    return f"a kernel of {'x'.join(map(str, sizes))}" if sizes else "no kernel"


def _check_called(model: nn.Module, name: str, module: nn.Linear) -> None:
    """Refuse a linear module whose weights are read without a call."""
    stem, _, last = name.rpartition(".")
    # Unfusing only puts the processor back, so that alone tells.
    processor = type(getattr(model.get_submodule(stem), "processor", None)).__name__
    fused = processor.startswith("Fused") and last in _FUSED
    if isinstance(module, NonDynamicallyQuantizableLinear) or fused:
        raise LayoutError(
            f"the model reads the weights of `{name}` without calling it, so nothing can be added; "
            "undo with model.unfuse_qkv_projections() where projections were fused"
        )
