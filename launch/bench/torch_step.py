"""Compare DiT^DH or decoder with PyTorch's on the same weights and cores: largest difference of the output, seconds.

    python -m launch.bench.torch_step [--model=dit] [--size=s] [--batch=4] [--rounds=5] [--authors=FOLDER]

Needs torch (and diffusers for the decoder), but no network: the weights are random. Float32. All sides compute the same
batch in turn, forward, and forward with the gradients of all weights. Each side waits in a process of its own, because
one process would share its heap between them. --authors: a checkout of the code of RAE's authors, whose DiT^DH is timed
as a third side. The last line printed is one JSON object; `times_as_fast` is PyTorch's median divided by ours. The
encoder: launch.bench.encoder.
"""

import contextlib
import functools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

from configs import dit_b, encoders
from launch.bench import harness
from launch.bench.torch_dit import DiTDH
from rae_jax.build import models, part_weights, published_weights
from rae_jax.config.keys import latent_shape
from rae_jax.runtime import host, host_allocator
from rae_jax.weights import engine, tables


class Settings(NamedTuple):
    """Values of the command line."""

    model: str
    size: str | None
    batch: int
    authors: str | None


class Side(NamedTuple):
    """`forward()` -> output in our layout; `backward()` -> (loss, gradients). Both wait for the result."""

    forward: Callable
    backward: Callable


def main():
    """Compile each side in its process, time them in turn, print the results."""
    parser = harness.parser(__doc__)
    parser.add_argument("--model", choices=("dit", "decoder"), default="dit", help="network to compare")
    parser.add_argument("--size", default=None, help="s, b, l or xl; default: s for the DiT, b for the decoder")
    parser.add_argument("--batch", type=int, default=4, help="images in the batch")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each side")
    parser.add_argument("--authors", help="a checkout of the authors' code, to time their DiT^DH too")
    args = parser.parse_args()
    settings = Settings(args.model, args.size, args.batch, args.authors)
    names = ["rae_jax", "diffusers"] if args.model == "decoder" else ["rae_jax", "torch"]
    names += ["authors"] if args.authors else []
    results = {"model": args.model, "batch": args.batch, "cores": host.num_cores()}
    with contextlib.ExitStack() as stack:
        processes = {name: stack.enter_context(harness.own_process()) for name in names}
        outputs = {name: process.submit(_compile, settings, name).result() for name, process in processes.items()}
        results["max_difference"] = _differences(outputs)
        for kind in ("forward", "backward"):
            results[kind] = _alternate(kind, processes, settings, args.rounds)
    harness.print_json(results)


def _compile(settings, name):
    """Compile a side; return its output."""
    host_allocator.keep_freed_memory()
    torch.set_num_threads(host.num_cores())
    side = _side(settings, name)
    output = side.forward()
    side.backward()
    return output


def _time(settings, name, kind):
    """Return the Seconds of 'forward' or 'backward'."""
    return harness.timed(getattr(_side(settings, name), kind))[1]


@functools.cache  # the process of a side keeps it
def _side(settings, name):
    sides = {"dit": _dit_sides, "decoder": _decoder_sides}[settings.model](settings)
    return sides[name]()


def _alternate(kind, processes, settings, rounds):
    """Time the sides in turn, after one untimed call of each.

    Returns {side: {'median', 'min', 'cpu'}} in seconds (`cpu`: median over all threads), and `times_as_fast`.
    """
    seconds = {name: [] for name in processes}
    for number in range(rounds + 1):
        for name, process in processes.items():
            took = process.submit(_time, settings, name, kind).result()
            if number:
                seconds[name].append(took)
    found = {}
    for name, of in seconds.items():
        wall, cpu = zip(*of, strict=True)
        found[name] = {"median": statistics.median(wall), "min": min(wall), "cpu": statistics.median(cpu)}
        times = "median {median:.3f} s, fastest {min:.3f} s, CPU {cpu:.3f} s".format(**found[name])
        print(f"{kind:9} {name:12} {times}", flush=True)
    ours = found["rae_jax"]["median"]
    return {**found, "times_as_fast": {n: of["median"] / ours for n, of in found.items() if n != "rae_jax"}}


def _differences(outputs):
    """Return {side: largest difference to our output, divided by our largest value}."""
    ours = outputs.pop("rae_jax")
    return {name: float(np.abs(found - ours).max() / np.abs(ours).max()) for name, found in outputs.items()}


def _config(settings):
    config = dit_b.get_config()
    config.unroll, config.remat = True, "none"  # PyTorch recomputes nothing either
    config.dit.update(dit_b.DITS[settings.size or "s"])
    config.decoder.update(dit_b.DECODERS[(settings.size or "b") if settings.model == "decoder" else "b"])
    config.encoder.update(encoders.dinov2("base"))
    return config


def _weights(config, part):
    """Return random weights without zeros, which would hide faults; scales and frequencies are around one."""
    random = np.random.default_rng(0)

    def draw(path, leaf):
        one = 1.0 if path[-1].key in ("scale", "frequencies") else 0.0
        return np.float32(one + 0.02 * random.standard_normal(leaf.shape))

    return jax.tree_util.tree_map_with_path(draw, part_weights.shapes(config, part))


def _jax_side(function, params, inputs):
    """Return the side of `function(params, *inputs)`; the loss is the mean square of the output."""
    params = jax.device_put(params)
    forward = jax.jit(function)
    backward = jax.jit(jax.value_and_grad(lambda params, *inputs: jnp.square(function(params, *inputs)).mean()))
    return Side(
        lambda: np.asarray(forward(params, *inputs)),
        lambda: jax.block_until_ready(backward(params, *inputs)),
    )


def _loaded(module, tensors):
    """Load {name: array} into the module, which keeps its other weights."""
    module.load_state_dict({**module.state_dict(), **{name: torch.tensor(array) for name, array in tensors.items()}})
    return module.eval()


def _torch_side(module, inputs, output):
    """Return the side of a torch module; `output` converts its result to our layout."""

    def forward():
        with torch.inference_mode():
            return output(module(*inputs)).numpy()

    def backward():
        module.zero_grad(set_to_none=True)
        loss = output(module(*inputs)).square().mean()
        loss.backward()

    return Side(forward, backward)


def _dit_sides(settings):
    """Return {side: function that makes it}."""
    config = _config(settings)
    params = _weights(config, "dit")
    random = np.random.default_rng(1)
    x = random.standard_normal((settings.batch, *latent_shape(config)), np.float32)
    t = np.linspace(0.1, 0.9, settings.batch, dtype=np.float32)
    labels = np.arange(settings.batch) % config.data.num_classes
    model = models.dit(config)
    sides = {
        "rae_jax": lambda: _jax_side(lambda p, *inputs: model.apply({"params": p}, *inputs), params, (x, t, labels))
    }
    inputs = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(t), torch.from_numpy(labels)
    tensors = published_weights.tensors_of(config, "dit", params)
    c, (grid, _, channels) = config.dit, latent_shape(config)
    widths, depths, heads = (c.width, c.head_width), (c.depth, c.head_depth), (c.num_heads, c.head_num_heads)
    trunk, head = zip(widths, depths, heads, strict=True)
    sizes = {"channels": channels, "grid": grid, "num_classes": config.data.num_classes}

    def authors():
        sys.path.insert(0, str(Path(settings.authors) / "src"))
        from stage2.models.DDT import DiTwDDTHead

        authors_sizes = {"input_size": grid, "in_channels": channels, "num_classes": config.data.num_classes}
        return DiTwDDTHead(**authors_sizes, hidden_size=widths, depth=depths, num_heads=list(heads))

    for name, module in {"torch": lambda: DiTDH(trunk=trunk, head=head, **sizes), "authors": authors}.items():
        sides[name] = functools.partial(_torch_dit, module, tensors, inputs)
    return sides


def _torch_dit(module, tensors, inputs):
    return _torch_side(_loaded(module(), tensors), inputs, lambda v: v.permute(0, 2, 3, 1))


def _decoder_sides(settings):
    from diffusers.models.autoencoders.autoencoder_rae import RAEDecoder

    config = _config(settings)
    params, d = _weights(config, "decoder"), config.decoder
    latents = np.random.default_rng(1).standard_normal((settings.batch, *latent_shape(config)), np.float32)
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

    def image(output):
        patches = output.logits.unflatten(-1, (p, p, 3)).unflatten(1, (side, side))
        return patches.permute(0, 1, 3, 2, 4, 5).reshape(-1, side * p, side * p, 3)

    return {
        "rae_jax": lambda: _jax_side(lambda p, x: decoder.apply({"params": p}, x), params, (latents,)),
        "diffusers": lambda: _torch_side(_loaded(module(), tensors), (tokens,), image),
    }


if __name__ == "__main__":
    main()
