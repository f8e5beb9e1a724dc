"""Compare our full-size DINOv2 with registers with transformers' in torch: seconds, peak memory, largest difference.

    python -m launch.bench.encoder [--num_images=64] [--size=base] [--rounds=3]

Needs torch and transformers, but no network: the weights are random. Both encode the same images with the same weights,
in turn, in processes of their own, on the cores that this process may use. The last line printed is one JSON object.
"""

import json
import tempfile
from pathlib import Path

import numpy as np

from configs import encoders, small
from launch.bench import harness
from rae_jax.runtime import host

IMAGE_SIZE = 224


def main():
    """Write the weights, measure both encoders in turn, print the smallest values."""
    parser = harness.parser(__doc__)
    parser.add_argument("--num_images", type=int, default=64, help="images in the batch")
    parser.add_argument("--size", choices=("small", "base", "large"), default="base", help="size of the encoder")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each encoder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        harness.call_in_own_process(_write_weights, args.size, folder)
        runs = {name: [] for name in ENCODERS}
        for _ in range(args.rounds):
            for name in ENCODERS:
                runs[name].append(harness.call_in_own_process(_measure, name, args.size, args.num_images, folder))
                print(name, json.dumps(runs[name][-1]), flush=True)
        ours, theirs = (np.load(Path(folder) / f"{name}.npy") for name in ENCODERS)
    results = {name: {key: min(run[key] for run in runs[name]) for key in runs[name][0]} for name in ENCODERS}
    results["max_difference"] = float(np.abs(ours - theirs).max())
    results["cores"] = host.num_cores()
    harness.print_json({"encoder": f"dinov2-with-registers-{args.size}", "num_images": args.num_images, **results})


def _write_weights(size, folder):
    import torch
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    ours = encoders.dinov2(size)
    torch.manual_seed(0)
    config = Dinov2WithRegistersConfig(
        hidden_size=ours["width"],
        num_hidden_layers=ours["depth"],
        num_attention_heads=ours["num_heads"],
        patch_size=ours["patch_size"],
        image_size=ours["position_size"],
    )
    Dinov2WithRegistersModel(config).save_pretrained(folder)


def _measure(name, size, num_images, folder):
    """Return the seconds of the first call, which compiles, and of the fastest of three more; peak memory."""
    images = np.random.default_rng(0).random((num_images, IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    encode = ENCODERS[name](size, folder)
    tokens, first = harness.timed(encode, images)
    seconds = min(harness.wall_times(lambda: encode(images), 3))
    np.save(Path(folder) / f"{name}.npy", tokens)
    return {"first_seconds": first.wall, "seconds": seconds, "peak_mib": host.peak_memory() / 2**20}


def _our_encoder(size, folder):
    import jax

    from rae_jax.build import models, part_weights
    from rae_jax.runtime import host_allocator, sharding

    host_allocator.keep_freed_memory()
    config = small.get_config()
    config.stages, config.unroll, config.data.image_size = (), False, IMAGE_SIZE
    config.encoder.update({**encoders.dinov2(size), "weights": folder})
    params = part_weights.load(config, "encoder", "", sharding.make_mesh(config.mesh))
    encode = jax.jit(models.autoencoder(config).encode)
    return lambda images: np.asarray(encode(params, images)).reshape(len(images), -1, config.encoder.width)


def _transformers_encoder(size, folder):
    import torch
    from transformers import Dinov2WithRegistersModel

    torch.set_num_threads(host.num_cores())
    model = Dinov2WithRegistersModel.from_pretrained(folder).eval()  # its last norm has the initial scale 1 and bias 0
    ours = encoders.dinov2(size)
    mean, std = (np.asarray(ours[key], np.float32) for key in ("mean", "std"))

    def encode(images):
        pixels = torch.from_numpy((images - mean) / std).permute(0, 3, 1, 2)
        with torch.inference_mode():
            return model(pixels).last_hidden_state[:, 1 + ours["num_registers"] :].numpy()

    return encode


ENCODERS = {"rae_jax": _our_encoder, "transformers": _transformers_encoder}

if __name__ == "__main__":
    main()
