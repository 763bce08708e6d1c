"""The representations of an adapter: scikit-learn transformers over rows of weights."""

from lora_ws.featurizers.base import Featurizer
from lora_ws.featurizers.delta_pca import DeltaPCA
from lora_ws.featurizers.flat_vec import FlatVec
from lora_ws.featurizers.norms import Norms
from lora_ws.featurizers.pca import FlatVecPCA
from lora_ws.featurizers.stats_flat_vec import StatsFlatVec
from lora_ws.featurizers.stats_layer import StatsLayer
from lora_ws.featurizers.stats_layer_dense import StatsLayerDense
from lora_ws.featurizers.update_kernel import UpdateKernel

PAPER = (FlatVec, FlatVecPCA, StatsFlatVec, StatsLayer, StatsLayerDense)

__all__ = [
    "PAPER",
    "DeltaPCA",
    "Featurizer",
    "FlatVec",
    "FlatVecPCA",
    "Norms",
    "StatsFlatVec",
    "StatsLayer",
    "StatsLayerDense",
    "UpdateKernel",
]
