"""Full-size DINOv2 with registers, ours beside transformers' in torch: seconds, peak memory, largest difference.

    python launch/bench_encoder.py [--num_images=64] [--size=base] [--rounds=3]

Needs torch and transformers, no network: the weights are random. Either encodes the same images with the same weights
in processes of its own, in turn, on the cores that this one may use. The last line printed is one JSON object.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # started by its path: configs/ is used from the checkout
    sys.path.insert(0, str(Path(__file__).parents[2]))

from configs import encoders, small

SIDE = 224


def main():
    """Make the weights, run both sides in turn, print what they took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_images", type=int, default=64)
    parser.add_argument("--size", choices=("small", "base", "large"), default="base")
    parser.add_argument("--rounds", type=int, default=3, help="processes of either side")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(_measure(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        _write_weights(args.size, folder)
        runs = {side: [] for side in SIDES}
        for _ in range(args.rounds):
            for side in SIDES:
                runs[side].append(_in_own_process(side, args, folder))
                print(side, json.dumps(runs[side][-1]), flush=True)
        ours, theirs = (np.load(Path(folder) / f"{side}.npy") for side in SIDES)
    results = {side: {key: min(run[key] for run in runs[side]) for key in runs[side][0]} for side in SIDES}
    results["max_difference"] = float(np.abs(ours - theirs).max())
    results["cores"] = len(os.sched_getaffinity(0))
    print(json.dumps({"encoder": f"dinov2-with-registers-{args.size}", "num_images": args.num_images, **results}))


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


def _in_own_process(side, args, folder):
    command = [sys.executable, __file__, f"--side={side}", f"--folder={folder}"]
    command += [f"--num_images={args.num_images}", f"--size={args.size}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _measure(args):
    """Seconds of the first encode, with compiling, and of the quickest of three more; peak memory of the process."""
    images = np.random.default_rng(0).random((args.num_images, SIDE, SIDE, 3), np.float32)
    encode = SIDES[args.side](args)
    began = time.perf_counter()
    tokens = encode(images)
    first = time.perf_counter() - began
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        encode(images)
        seconds.append(time.perf_counter() - began)
    np.save(Path(args.folder) / f"{args.side}.npy", tokens)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"first_seconds": first, "seconds": min(seconds), "peak_mib": peak}


def _ours(args):
    import jax

    from rae_jax.build import models, stages
    from rae_jax.runtime import host_allocator, sharding

    host_allocator.keep_freed_memory()
    config = small.get_config()
    config.stages, config.unroll, config.data.image_size = (), False, SIDE
    config.encoder.update({**encoders.dinov2(args.size), "weights": args.folder})
    params = stages.load(config, "encoder", "", sharding.make_mesh(config.mesh))
    encode = jax.jit(models.autoencoder(config).encode)
    return lambda images: np.asarray(encode(params, images)).reshape(len(images), -1, config.encoder.width)


def _theirs(args):
    import torch
    from transformers import Dinov2WithRegistersModel

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = Dinov2WithRegistersModel.from_pretrained(args.folder).eval()  # its norm starts as one without affine
    ours = encoders.dinov2(args.size)
    mean, std = (np.asarray(ours[key], np.float32) for key in ("mean", "std"))

    def encode(images):
        pixels = torch.from_numpy((images - mean) / std).permute(0, 3, 1, 2)
        with torch.inference_mode():
            return model(pixels).last_hidden_state[:, 1 + ours["num_registers"] :].numpy()

    return encode


SIDES = {"rae_jax": _ours, "transformers": _theirs}

if __name__ == "__main__":
    main()
