"""How the tensors of a module become two factors whose product is its update, for every method.

No update is ever formed: LoHa's product of products is a product of Khatri-Rao factors, LoKr's
Kronecker product one of Kronecker factors; both stay products themselves where they are large.
Shapes: A ``[rank, inputs]``, B ``[outputs, rank]``; of a convolution, inputs are channels times
kernel, as `torch.nn.functional.unfold` counts them.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from lora_ws.functional.hadamard import PairProducts
from lora_ws.functional.kronecker import KroneckerProduct
from lora_ws.functional.sketch import SIDE
from lora_ws.functional.update_modules import Factor

Tensors = Mapping[str, np.ndarray]
# Of a matrix, and of convolutions over one to three axes.
DIMENSIONS = (2, 3, 4, 5)
Shapes = Mapping[str, tuple[int, ...]]
# Numbers of both factors up to which a product of products is formed: four MiB.
FORMED = 1 << 20


class Factors(NamedTuple):
    """Two factors of an update, before its scale."""

    down: Factor
    up: Factor


class Plain(NamedTuple):
    """Two factors that are matrices."""

    down: Float[np.ndarray, "rank inputs"]
    up: Float[np.ndarray, "outputs rank"]


class Form(NamedTuple):
    """What shapes alone show about a module.

    Attributes:
        method: ``lora``, ``adalora``, ``locon``, ``tucker``, ``loha``, ``lokr`` or ``full``.
        rank: by which alpha is divided; 0 where the method has no scale.
        factors_rank: columns of B after conversion.
        inputs: columns of A.
        outputs: rows of B.
        kernel: of a convolution.
        roles: of the tensors that `factors` takes; others of the module need not be read.
        sides: ``(rank, inputs, outputs)`` of the two matrices of a product, Kronecker's or
            elementwise, that is not formed; none of others.
    """

    method: str
    rank: int
    factors_rank: int
    inputs: int
    outputs: int
    kernel: tuple[int, ...] = ()
    roles: tuple[str, ...] = ()
    sides: tuple[tuple[int, int, int], ...] = ()

    @property
    def numbers(self) -> int:
        """How many the factors hold."""
        sides = self.sides or ((self.factors_rank, self.inputs, self.outputs),)
        return sum(rank * (inputs + outputs) for rank, inputs, outputs in sides)

    @property
    def work(self) -> int:
        """Multiplications that measuring the update takes, about."""
        if self.sides and self.method == "loha":
            # Its entries, some rows after the others, and sums over them with random signs.
            (rank, inputs, outputs), _ = self.sides
            return 2 * rank * inputs * outputs + SIDE * rank**2 * (inputs + outputs)
        sides = self.sides or ((self.factors_rank, self.inputs, self.outputs),)
        return sum(r * min(r * (i + o), i * o) for r, i, o in sides)


class ShapeError(ValueError):
    """Tensors of a module are missing, or do not fit each other."""

    def __init__(self, message: str, reason: str = "shape") -> None:
        super().__init__(message)
        self.reason = reason


def form_of(shapes: Shapes) -> Form | None:
    """Method and sizes of a module by the shapes of its tensors; None where it holds no update.

    Raises:
        ShapeError: a tensor is missing, or does not fit the others.

    Example:
        >>> form = form_of({"down": (4, 320), "up": (640, 4), "magnitude": (640,)})
        >>> form.method, form.rank, form.inputs, form.outputs, form.roles
        ('lora', 4, 320, 640, ('down', 'up'))
    """
    if shapes.keys() & {"down", "up", "values"}:
        return _lora_form(shapes)
    if any(role.startswith("hada_w") for role in shapes):
        return _loha_form(shapes)
    if any(role.startswith("lokr_w") for role in shapes):
        return _lokr_form(shapes)
    if "diff" in shapes:
        outputs, inputs, kernel = _flat(shapes["diff"])
        return Form("full", 0, min(inputs, outputs), inputs, outputs, kernel, ("diff",))
    return None


def factors(form: Form, tensors: Tensors) -> Factors:
    """The two factors of a module's update.

    Args:
        form: what `form_of` said of its shapes.
        tensors: by role, float32.
    """
    if form.method == "loha":
        return _loha(tensors, bool(form.sides))
    if form.method == "lokr":
        return _lokr(tensors, bool(form.sides))
    if form.method == "full":
        return Factors(*_dense(tensors["diff"].reshape(form.outputs, form.inputs)))
    down, up = tensors["down"], tensors["up"]
    if form.method == "tucker":
        mixed = np.einsum("mnkl,ni->mikl", tensors["mid"], down.reshape(len(down), -1))
        return Factors(mixed.reshape(len(mixed), -1), up.reshape(len(up), -1))
    if form.method == "adalora":
        down = down.reshape(len(down), -1) * tensors["values"].reshape(-1, 1)
    return Factors(down.reshape(len(down), -1), up.reshape(len(up), -1))


def _lora_form(shapes: Shapes) -> Form:
    _need(shapes, "down", "up")
    down, up = shapes["down"], shapes["up"]
    for role in ("down", "up"):
        if len(shapes[role]) not in DIMENSIONS:
            raise ShapeError(
                f"expected `{role}` to be a matrix or a convolution, got shape {shapes[role]}"
            )
    rank, inputs, outputs = down[0], math.prod(down[1:]), up[0]
    if math.prod(up[1:]) != rank:
        raise ShapeError(
            f"down has rank {rank} (shape {down}) but up has rank {math.prod(up[1:])} (shape "
            f"{up}); the two must agree" + _groups(down, up)
        )
    kernel = tuple(down[2:])
    if "mid" in shapes:
        mid = shapes["mid"]
        if len(mid) != 4 or mid[:2] != (rank, rank):
            raise ShapeError(f"expected `mid` of shape ({rank}, {rank}, k, k), got {mid}")
        kernel = tuple(mid[2:])
        roles = ("down", "up", "mid")
        return Form("tucker", rank, rank, inputs * math.prod(kernel), outputs, kernel, roles)
    method = "locon" if kernel else "lora"
    if "values" in shapes:
        # AdaLoRA: a number between each row of A and column of B.
        if math.prod(shapes["values"]) != rank:
            raise ShapeError(f"expected {rank} numbers in `lora_E`, got {shapes['values']}")
        roles = ("down", "up", "values")
        return Form("adalora", rank, rank, inputs, outputs, kernel, roles)
    return Form(method, rank, rank, inputs, outputs, kernel, ("down", "up"))


def _groups(down: tuple[int, ...], up: tuple[int, ...]) -> str:
    """What two such tensors are where they fit a convolution in groups, as PEFT writes it."""
    rank, groups = math.prod(up[1:]), 0
    if len(down) > 2 and rank and not down[0] % rank:
        groups = down[0] // rank
    of_groups = groups > 1 and not up[0] % groups
    return "; they fit a convolution in groups, which is not read" if of_groups else ""


def _loha_form(shapes: Shapes) -> Form:
    _need(shapes, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    (a, b), (c, d) = ((shapes[f"hada_w{k}_a"], shapes[f"hada_w{k}_b"]) for k in (1, 2))
    kernel = shapes["hada_t1"][2:] if "hada_t1" in shapes else ()
    if any(len(shape) != 2 for shape in (a, b, c, d)):
        raise ShapeError("expected the four matrices of LoHa to have two dimensions each")
    outputs, inner = (a[1], a[0]) if kernel else (a[0], a[1])
    rank, fits = b[0], inner == b[0] and (a, b) == (c, d)
    if kernel:
        fits = fits and shapes["hada_t1"][:2] == (rank, rank)
        fits = fits and shapes.get("hada_t2") == shapes["hada_t1"]
    if not fits:
        raise ShapeError(f"the matrices of LoHa do not fit each other: {dict(shapes)}")
    roles = tuple(role for role in shapes if role.startswith("hada_"))
    inputs = b[1] * math.prod(kernel)
    form = Form("loha", rank, rank * rank, inputs, outputs, kernel, roles)
    return form if form.numbers <= FORMED else form._replace(sides=((rank, inputs, outputs),) * 2)


def _lokr_form(shapes: Shapes) -> Form:
    first, second, rank = _lokr_side(shapes, 1), _lokr_side(shapes, 2), 0
    for k in (2, 1):
        if not rank and f"lokr_w{k}_b" in shapes:
            rank = shapes[f"lokr_w{k}_b"][0]
    (o1, i1, _, r1), (o2, i2, kernel, r2) = first, second
    roles = tuple(role for role in shapes if role.startswith("lokr_"))
    form = Form("lokr", rank, r1 * r2, i1 * i2, o1 * o2, kernel, roles)
    if form.numbers <= FORMED:
        return form
    return form._replace(sides=((r1, i1, o1), (r2, i2, o2)))


def _lokr_side(shapes: Shapes, k: int) -> tuple[int, int, tuple[int, ...], int]:
    """Height, width, kernel and rank of one of LoKr's two matrices."""
    name = f"lokr_w{k}"
    if name in shapes:
        outputs, inputs, kernel = _flat(shapes[name])
        return outputs, inputs, kernel, min(outputs, inputs)
    _need(shapes, f"{name}_a", f"{name}_b")
    a, b, core = shapes[f"{name}_a"], shapes[f"{name}_b"], shapes.get(f"lokr_t{k}")
    if core is not None:
        if len(core) != 4 or len(a) != 2 or len(b) != 2 or core[:2] != (a[0], b[0]):
            raise ShapeError(f"the matrices of LoKr do not fit each other: {dict(shapes)}")
        return a[1], b[1] * math.prod(core[2:]), tuple(core[2:]), a[0]
    if len(a) != 2 or len(b) not in (2, 4) or a[1] != b[0]:
        raise ShapeError(f"the matrices of LoKr do not fit each other: {dict(shapes)}")
    return a[0], math.prod(b[1:]), tuple(b[2:]), a[1]


def _loha(tensors: Tensors, large: bool) -> Factors:
    sides = []
    for k in (1, 2):
        up, down = tensors[f"hada_w{k}_a"], tensors[f"hada_w{k}_b"]
        if f"hada_t{k}" in tensors:
            core = tensors[f"hada_t{k}"]
            down, up = np.einsum("ijkl,jr->irkl", core, down).reshape(len(core), -1), up.T
        sides.append((up, down))
    (up, down), (other_up, other_down) = sides
    pair = PairProducts(down, other_down), PairProducts(up.T, other_up.T, columns=True)
    return Factors(*(pair if large else (np.ascontiguousarray(one.form()) for one in pair)))


def _lokr(tensors: Tensors, large: bool) -> Factors:
    first, second = (_lokr_factors(tensors, k) for k in (1, 2))
    pairs = KroneckerProduct(first.down, second.down), KroneckerProduct(first.up, second.up)
    return Factors(*(pairs if large else (product.form() for product in pairs)))


def _lokr_factors(tensors: Tensors, k: int) -> Plain:
    name = f"lokr_w{k}"
    if name in tensors:
        whole = tensors[name]
        return _dense(whole.reshape(len(whole), -1))
    up, down = tensors[f"{name}_a"], tensors[f"{name}_b"]
    if f"lokr_t{k}" in tensors:
        core = tensors[f"lokr_t{k}"]
        return Plain(np.einsum("ijkl,jr->irkl", core, down).reshape(len(core), -1), up.T)
    return Plain(down.reshape(len(down), -1), up)


def _dense(matrix: np.ndarray) -> Plain:
    """A matrix as a product with the identity on its shorter side."""
    outputs, inputs = matrix.shape
    if inputs <= outputs:
        return Plain(np.eye(inputs, dtype=matrix.dtype), matrix)
    return Plain(matrix, np.eye(outputs, dtype=matrix.dtype))


def _flat(shape: tuple[int, ...]) -> tuple[int, int, tuple[int, ...]]:
    if len(shape) not in DIMENSIONS:
        raise ShapeError(f"expected a matrix or a convolution, got shape {shape}")
    return shape[0], math.prod(shape[1:]), tuple(shape[2:])


def _need(shapes: Shapes, *roles: str) -> None:
    for role in roles:
        if role not in shapes:
            raise ShapeError(f"has no `{role}` matrix: the file is incomplete", "incomplete")
