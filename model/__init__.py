"""The network: tensors in, tensors out, scriptable and exportable."""

from .config import PRESETS, Config
from .inference import inference
from .network import DMMNet
from .state import Affinity, Candidates, Output, Proposals, State
from .weights import PACKAGED, digest, load_weights, packaged, read_config, read_weights, save_weights

__all__ = [
    "PACKAGED",
    "PRESETS",
    "Affinity",
    "Candidates",
    "Config",
    "DMMNet",
    "Output",
    "Proposals",
    "State",
    "digest",
    "inference",
    "load_weights",
    "packaged",
    "read_config",
    "read_weights",
    "save_weights",
]
