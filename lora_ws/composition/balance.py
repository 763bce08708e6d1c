"""How large the updates of a stack are beside each other: one that is ten times another wins."""

import torch
from jaxtyping import Float
from torch import Tensor

from lora_ws.diffusion.stack import AdapterStack
from lora_ws.report.heat import Heat


def block_norms(stack: AdapterStack) -> dict[str, Float[Tensor, " k"]]:
    """Frobenius norms ``|scale_i| * ||B_i A_i||`` by block of the U-Net, without forming products.

    Returns:
        Block -> norms, one per adapter; an update that is spread over modules counts as one vector.
    """
    rows, squares = stack.bank.rows(), dict[str, Tensor]()
    for layer, down, up in stack.bank.layout.pairs():
        a = rows[:, down].reshape(len(stack), *layer.down_shape)
        b = rows[:, up].reshape(len(stack), *layer.up_shape)
        # tr((B A)(B A)^T) from two matrices of rank by rank.
        square = ((a @ a.mT) * (b.mT @ b)).sum(dim=(1, 2)).clamp(min=0)
        block = ".".join(layer.name.split(".")[: 1 if layer.name.startswith("mid") else 2])
        squares[block] = squares.get(block, torch.zeros(len(stack))) + square
    scales = torch.tensor(stack.scales).abs()
    return {block: scales * square.sqrt() for block, square in squares.items()}


def norm_balance(stack: AdapterStack) -> Heat:
    """Norms of the updates, one row per block and one column per adapter."""
    norms = block_norms(stack)
    whole = torch.stack(list(norms.values())).square().sum(dim=0).sqrt()
    rows = {**norms, "all blocks": whole}
    largest, smallest = float(whole.max()), float(whole.min())
    ratio = f"{largest / smallest:.1f} times" if smallest else "infinitely many times"
    return Heat(
        stack.names,
        tuple(rows),
        tuple(tuple(values.tolist()) for values in rows.values()),
        "Frobenius norm of each adapter's update, times its scale; the deepest colour is the "
        f"largest of a row. The largest update is {ratio} the smallest; where that is much, lower "
        "its scale or take merge-normalised, switch or composite.",
    )
