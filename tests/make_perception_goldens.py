"""Writes tests/goldens/perception.npz, with torch and torch-fidelity.

PYTHONPATH=. python tests/make_perception_goldens.py
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from perception_cases import GOLDENS, SIZES, arrays_of, image, pair, torch_lpips
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


def main():
    """LPIPS of a pair and its gradient; Inception's features of two images."""
    vgg, linear = ({k: torch.from_numpy(v) for k, v in arrays_of(name).items()} for name in ("vgg", "linear"))
    a, b = map(torch.from_numpy, pair())
    a.requires_grad_()
    distances = torch_lpips(vgg, linear, a, b)
    distances.sum().backward()
    outputs = {"lpips": distances.detach().numpy(), "lpips_gradient": a.grad.numpy()}

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inception.pth"
        torch.save({k: torch.from_numpy(v) for k, v in arrays_of("inception").items()}, path)
        network = FeatureExtractorInceptionV3("fid", ["2048", "logits_unbiased"], feature_extractor_weights_path=path)
    spatial = []
    network.Mixed_6d.register_forward_hook(lambda module, given, out: spatial.append(out[:, :7]))
    for size in SIZES:
        pool, logits = network(torch.from_numpy(image(*size)).permute(2, 0, 1)[None])
        outputs |= {f"pool{size[0]}": pool.numpy()[0], f"logits{size[0]}": logits.numpy()[0]}
        outputs[f"spatial{size[0]}"] = spatial.pop()[0].permute(1, 2, 0).numpy().ravel()
    np.savez_compressed(GOLDENS, **outputs)


if __name__ == "__main__":
    main()
