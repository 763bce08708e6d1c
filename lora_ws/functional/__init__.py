"""Pure numeric functions on arrays: statistics, products of factors, principal components."""

from lora_ws.functional.delta_gram import delta_gram
from lora_ws.functional.gram_pca import PcaResult, pca, project
from lora_ws.functional.kernel_pca import KernelPcaResult, kernel_pca
from lora_ws.functional.moments import STATISTICS, summary_statistics
from lora_ws.functional.outer import outer_statistics
from lora_ws.functional.standardize import column_moments, safe_scale, standardize

__all__ = [
    "STATISTICS",
    "KernelPcaResult",
    "PcaResult",
    "column_moments",
    "delta_gram",
    "kernel_pca",
    "outer_statistics",
    "pca",
    "project",
    "safe_scale",
    "standardize",
    "summary_statistics",
]
