"""DiT^DH or decoder, ours beside PyTorch's on the same weights and cores: equal? and how fast?

    python launch/bench_torch.py [--model=dit] [--size=s] [--batch=4] [--rounds=5] [--authors=FOLDER]

Needs torch (and diffusers for the decoder); no network, the weights are random. Float32. The same batch goes through
either in turn, forward and forward with the gradients of all weights, each side in a process of its own that waits for
the others: in one they would share a heap, and what one keeps of it the other has to have mapped anew. --authors: a
checkout of the code of RAE's authors, whose DiT^DH is then timed as a third side. The last line printed is one JSON
object; `times_as_fast` divides PyTorch's median by ours. The encoder: bench_encoder.py.
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # started by its path: configs/ is used from the checkout
    sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import torch

from configs import dit_b, encoders
from launch.bench.torch_dit import DiTDH
from rae_jax.build import models, published_weights, stages
from rae_jax.config.keys import latent_shape
from rae_jax.runtime import host_allocator
from rae_jax.weights import engine, tables


@dataclasses.dataclass(frozen=True)
class Side:
    """`forward()` -> output as ours is shaped; `backward()` -> (loss, gradients). Both wait for the result."""

    forward: Callable
    backward: Callable


def main():
    """Start all sides, time them in turn, print what they took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("dit", "decoder"), default="dit")
    parser.add_argument("--size", default=None, help="s, b, l or xl; by default S for the DiT, B for the decoder")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--authors", help="a checkout of the authors' code, whose DiT^DH is timed as well")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        _serve(args)
        return
    names = ["rae_jax", "diffusers"] if args.model == "decoder" else ["rae_jax", "torch"]
    names += ["authors"] if args.authors else []
    with tempfile.TemporaryDirectory() as folder:
        files = {name: f"{folder}/{name}.npy" for name in names}
        workers = {name: _start(name, file) for name, file in files.items()}
        outputs = {name: np.load(file) for name, file in files.items()}
    results = {"model": args.model, "batch": args.batch, "cores": len(os.sched_getaffinity(0))}
    results["max_difference"] = _differences(outputs)
    for kind in ("forward", "backward"):
        results[kind] = _alternate(kind, workers, args.rounds)
    print(json.dumps(results))


def _start(name, output):
    """A process that has compiled its side and written its output; it runs it when asked to, see `_serve`."""
    command = [sys.executable, *sys.argv, f"--side={name}", f"--output={output}"]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    if worker.stdout.readline() != "ready\n":
        sys.exit(f"{name} could not be started")
    return worker


def _serve(args):
    """For each line of the input, 'forward' or 'backward', run it and print what it took: seconds, CPU seconds."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever libraries print
    host_allocator.keep_freed_memory()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    side = {"dit": _dits, "decoder": _decoders}[args.model](args)[args.side]()
    np.save(args.output, side.forward())
    side.backward()
    print("ready", file=answers, flush=True)
    for kind in sys.stdin:
        began, cpu_began = time.perf_counter(), time.process_time()
        getattr(side, kind.strip())()
        took = time.perf_counter() - began, time.process_time() - cpu_began
        print(json.dumps(took), file=answers, flush=True)


def _alternate(kind, workers, rounds):
    """{side: {median, min, cpu}} seconds of calls in turn, after one of each; and how many times as fast ours is.

    `cpu`: median of what all threads worked, which other programs on the machine disturb less.
    """
    seconds, worked = ({name: [] for name in workers} for _ in range(2))
    for n in range(rounds + 1):
        for name, worker in workers.items():
            print(kind, file=worker.stdin, flush=True)
            took, cpu = json.loads(worker.stdout.readline())
            if n:
                seconds[name].append(took)
                worked[name].append(cpu)
    found = {
        name: {"median": statistics.median(of), "min": min(of), "cpu": statistics.median(worked[name])}
        for name, of in seconds.items()
    }
    for name, of in found.items():
        print(
            f"{kind:9} {name:12} median {of['median']:.3f} s, fastest {of['min']:.3f} s, CPU {of['cpu']:.3f} s",
            flush=True,
        )
    ours = found["rae_jax"]["median"]
    return {**found, "times_as_fast": {n: of["median"] / ours for n, of in found.items() if n != "rae_jax"}}


def _differences(outputs):
    """{side: largest difference of its output to ours, relative to the largest of ours}."""
    ours = outputs.pop("rae_jax")
    return {name: float(np.abs(found - ours).max() / np.abs(ours).max()) for name, found in outputs.items()}


def _config(args):
    config = dit_b.get_config()
    config.unroll, config.remat = True, "none"  # as for any CPU; PyTorch recomputes nothing either
    config.dit.update(dit_b.DITS[args.size or "s"])
    config.decoder.update(dit_b.DECODERS[(args.size or "b") if args.model == "decoder" else "b"])
    config.encoder.update(encoders.dinov2("base"))
    return config


def _weights(config, part):
    """Random everywhere, that nothing is hidden behind zeros; norms and the like around one."""
    random = np.random.default_rng(0)

    def draw(path, leaf):
        one = 1.0 if path[-1].key in ("scale", "frequencies") else 0.0
        return np.float32(one + 0.02 * random.standard_normal(leaf.shape))

    return jax.tree_util.tree_map_with_path(draw, stages.part_shapes(config, part))


def _ours(function, params, inputs):
    """`function(params, *inputs)` compiled; the loss is the mean square."""
    params = jax.device_put(params)
    forward = jax.jit(function)
    backward = jax.jit(jax.value_and_grad(lambda params, *inputs: jnp.square(function(params, *inputs)).mean()))
    return Side(
        lambda: np.asarray(forward(params, *inputs)),
        lambda: jax.block_until_ready(backward(params, *inputs)),
    )


def _loaded(module, tensors):
    """The module with these arrays as its weights; of what they lack it keeps its own."""
    module.load_state_dict({**module.state_dict(), **{name: torch.tensor(array) for name, array in tensors.items()}})
    return module.eval()


def _theirs(module, inputs, output):
    """A torch module; `output` brings what it returns into our shape."""

    def forward():
        with torch.inference_mode():
            return output(module(*inputs)).numpy()

    def backward():
        module.zero_grad(set_to_none=True)
        loss = output(module(*inputs)).square().mean()
        loss.backward()

    return Side(forward, backward)


def _dits(args):
    """{side: function that makes it}."""
    config = _config(args)
    params = _weights(config, "dit")
    random = np.random.default_rng(1)
    x = random.standard_normal((args.batch, *latent_shape(config)), np.float32)
    t, labels = np.linspace(0.1, 0.9, args.batch, dtype=np.float32), np.arange(args.batch) % config.data.num_classes
    model = models.dit(config)
    sides = {"rae_jax": lambda: _ours(lambda p, *inputs: model.apply({"params": p}, *inputs), params, (x, t, labels))}
    inputs = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(t), torch.from_numpy(labels)
    tensors = published_weights.tensors_of(config, "dit", params)
    c, (grid, _, channels) = config.dit, latent_shape(config)
    widths, depths, heads = (c.width, c.head_width), (c.depth, c.head_depth), (c.num_heads, c.head_num_heads)
    trunk, head = zip(widths, depths, heads, strict=True)
    sizes = {"channels": channels, "grid": grid, "num_classes": config.data.num_classes}

    def authors():
        sys.path.insert(0, str(Path(args.authors) / "src"))
        from stage2.models.DDT import DiTwDDTHead

        their_sizes = {"input_size": grid, "in_channels": channels, "num_classes": config.data.num_classes}
        return DiTwDDTHead(**their_sizes, hidden_size=widths, depth=depths, num_heads=list(heads))

    for name, module in {"torch": lambda: DiTDH(trunk=trunk, head=head, **sizes), "authors": authors}.items():
        sides[name] = functools.partial(_their_dit, module, tensors, inputs)
    return sides


def _their_dit(module, tensors, inputs):
    return _theirs(_loaded(module(), tensors), inputs, lambda v: v.permute(0, 2, 3, 1))


def _decoders(args):
    from diffusers.models.autoencoders.autoencoder_rae import RAEDecoder

    config = _config(args)
    params, d = _weights(config, "decoder"), config.decoder
    latents = np.random.default_rng(1).standard_normal((args.batch, *latent_shape(config)), np.float32)
    decoder = models.autoencoder(config).decoder
    module = functools.partial(
        RAEDecoder,
        hidden_size=config.encoder.width,
        decoder_hidden_size=d.width,
        decoder_num_hidden_layers=d.depth,
        decoder_num_attention_heads=d.num_heads,
        decoder_intermediate_size=d.hidden,
        patch_size=d.patch_size,
        image_size=config.data.image_size,
    )
    tensors = engine.unload(params, tables.DIFFUSERS_DECODER)
    tokens = torch.from_numpy(latents).flatten(1, 2)
    side, p = latents.shape[1], d.patch_size

    def image(found):
        patches = found.logits.unflatten(-1, (p, p, 3)).unflatten(1, (side, side))
        return patches.permute(0, 1, 3, 2, 4, 5).reshape(-1, side * p, side * p, 3)

    return {
        "rae_jax": lambda: _ours(lambda p, x: decoder.apply({"params": p}, x), params, (latents,)),
        "diffusers": lambda: _theirs(_loaded(module(), tensors), (tokens,), image),
    }


if __name__ == "__main__":
    main()
