"""Tables of the published files of VGG16, of LPIPS' weights and of FID's Inception."""

from rae_jax.weights.sd_vae_tables import CONV
from rae_jax.weights.tables import LINEAR, SAME, Layout, Table

# {our level and place in it: the number of the layer in torchvision's and timm's files}.
_VGG_LAYERS = {
    **{"1_1": 0, "1_2": 2, "2_1": 5, "2_2": 7, "3_1": 10, "3_2": 12, "3_3": 14},
    **{"4_1": 17, "4_2": 19, "4_3": 21, "5_1": 24, "5_2": 26, "5_3": 28},
}
_WEIGHT = Layout(  # a 1x1 convolution to one channel
    lambda shape: (1, *shape, 1, 1),
    lambda array: array.reshape(-1),
    lambda array: array.reshape(1, -1, 1, 1),
)

VGG16 = Table(
    {
        f"conv{place}/{ours}": (layout, f"features.{number}.{theirs}")
        for place, number in _VGG_LAYERS.items()
        for ours, theirs, layout in (("kernel", "weight", CONV), ("bias", "bias", SAME))
    },
    ignored=("classifier.", "pre_logits.", "head."),  # the classifier, as torchvision and as timm name it
)
LPIPS = Table({f"lin{level}/scale": (_WEIGHT, f"lin{level}.model.1.weight") for level in range(5)})

_NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def inception(paths):
    """Return the table for the paths of our parameters, whose modules have the file's names."""
    leaves, layers = {}, {path.removesuffix("/conv/kernel") for path in paths if path.endswith("/conv/kernel")}
    names = {layer: layer.replace("/", ".") for layer in sorted(layers)}
    for layer, name in names.items():
        leaves[f"{layer}/conv/kernel"] = (CONV, f"{name}.conv.weight")
        leaves |= {f"{layer}/bn/{ours}": (SAME, f"{name}.bn.{theirs}") for ours, theirs in _NORM.items()}
    leaves["fc/kernel"] = (LINEAR, "fc.weight")
    counts = (f"{name}.bn.num_batches_tracked" for name in names.values())
    return Table(leaves, ignored=("fc.bias", *counts))
