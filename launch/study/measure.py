"""Measure a run: metrics by name, and by step for its checkpoints.

One encoder and one judge, those of the main foundation, evaluate the images of all runs.

    loss            loss: mean of the last tenth of the last stage's training
    bounds          width, bound, eigenvalue_bound: lower bounds of the loss on one image, by the paper's theorem
    reconstruction  psnr, ssim; rfd: fd of the reconstructed held-out images
    probe           probe_pooled, probe_whole: accuracy of a linear probe on mean tokens, and on whole latents
    generation      fd, agreement, fd_real, for each checkpoint that config.checkpoint.keep_every keeps
    flops           forward_gflops of the DiT for one image, training_gflops by step, sampling_gflops for one image
    speed           seconds_per_image: CPU time of sampling, without compilation
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from launch.study import verdict, work
from rae_jax.build import data as build_data
from rae_jax.build import models, part_weights, sampler
from rae_jax.config import keys as config_keys
from rae_jax.inference import batched, generate, linear_probes, metrics, reconstruct, sample_files
from rae_jax.inference.evaluator import Evaluator
from rae_jax.models.autoencoder import normalise, to_float
from rae_jax.profiling import jaxpr_flops
from rae_jax.runtime import checkpoint_reader, logs, sharding

PROBE_IMAGES = 2_000  # number of images that a probe is fitted to


def rows(job, config, mesh):
    """Return [{'step', 'metric', 'value'}] of a trained run; step 0 means the end of the run."""
    found = []
    for kind in job.measure:
        logs.say(f"{job.name}: measuring {kind}")
        for prefix, changes in job.generators.items():
            changed = work.configured({**job.config, **changes}).lock()
            if prefix and kind not in ("generation", "speed"):
                continue
            values = _MEASURES[kind](changed, epath.Path(job.workdir), mesh, job)
            found += [
                {"step": step, "metric": verdict.metric_of(prefix, metric), "value": value}
                for step, metric, value in values
            ]
    keys = [key for key, value in job.config.items() if isinstance(value, int | float) and key not in ("seed",)]
    return found + [{"step": 0, "metric": key, "value": float(job.config[key])} for key in keys]


def _loss(config, workdir, mesh, job):
    found = logs.read(workdir / "metrics" / f"{config.stages[-1]}.jsonl")
    losses = [row["loss"] for row in found if "loss" in row]
    yield 0, "loss", float(np.mean(losses[-max(1, len(losses) // 10) :]))


def _bounds(config, workdir, mesh, job):
    """Compute lower bounds of the loss on the first training image, by theorem 1 of the paper.

    The output of a DiT of width d has d dimensions, which cannot represent the smaller eigenvalues of Cov(noise - x).
    """
    image = to_float(build_data.source(config, "train")[0]["image"][None])
    latents = models.autoencoder(config).encode(part_weights.load(config, "encoder", workdir, mesh), image)
    tokens = normalise(latents, part_weights.load(config, "statistics", workdir, mesh))
    tokens = np.asarray(tokens, np.float64).reshape(-1, tokens.shape[-1])
    dim, width = tokens.shape[-1], config.dit.width
    eigenvalues = np.linalg.eigvalsh(np.cov(tokens.T, bias=True) + np.eye(dim))[::-1]
    yield 0, "width", width
    yield 0, "bound", max(0.0, (dim - width) / dim)
    yield 0, "eigenvalue_bound", float(eigenvalues[width:].sum() / dim)


def _reconstruction(config, workdir, mesh, job):
    parts = {part: part_weights.load(config, part, workdir, mesh) for part in ("encoder", "decoder")}
    reconstruct_images = reconstruct.make(config)

    def view(parts, batch):
        _, outputs = reconstruct_images(parts, batch["image"])
        return {"label": batch["label"], **outputs}

    source = build_data.source(config, "heldout")
    reading = {
        "batch_size": config.evaluate.batch_size,
        "num_threads": config.data.num_threads,
        "name": "reconstruction",
    }
    found = list(batched.outputs(batched.compiled(view, mesh), parts, batched.batches(source, mesh, **reading)))
    found = {key: np.concatenate([out[key] for out in found]) for key in found[0]}
    yield from ((0, name, float(found[name].mean())) for name in ("psnr", "ssim"))
    measured = _metrics_of(job, mesh, workdir / "samples" / "reconstructions.npz", found["decoded"], found["label"])
    yield 0, "rfd", measured["fd"]


def _metrics_of(job, mesh, path, images, labels):
    """Write images [N, H, W, 3] to `path`; return {metric: number} of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.savez(file, arr_0=images, arr_1=labels)
    evaluator, parts = _evaluator(tuple(job.judge.items()), mesh)
    return evaluator.images(parts, path)


@functools.cache  # the images of all generators are compared with one reference
def _evaluator(judge, mesh):
    """Return (Evaluator, its weights) of a job's `judge`, as items."""
    config = work.configured(dict(judge)).lock()
    return Evaluator(config, mesh), {name: part_weights.load(config, name, "", mesh) for name in ("encoder", "judge")}


def _probe(config, workdir, mesh, job):
    encode, params = models.autoencoder(config).encode, part_weights.load(config, "encoder", workdir, mesh)
    view = batched.compiled(
        lambda params, batch: {"latent": encode(params, to_float(batch["image"])), "label": batch["label"]}, mesh
    )
    sets = []
    for split in ("train", "heldout"):
        source = build_data.source(config, split)
        chosen = np.random.default_rng(config.seed).permutation(len(source))[:PROBE_IMAGES]
        reading = {"batch_size": 100, "num_threads": config.data.num_threads, "name": f"probe: {split}"}
        found = list(
            batched.outputs(view, params, batched.batches(linear_probes.Subset(source, chosen), mesh, **reading))
        )
        sets.append([np.concatenate([out[key] for out in found]) for key in ("latent", "label")])
    for name, features in (("pooled", lambda z: z.mean((1, 2))), ("whole", lambda z: z.reshape(len(z), -1))):
        (train, train_labels), (test, test_labels) = ((features(latents), labels) for latents, labels in sets)
        how = {"num_classes": config.data.num_classes}
        yield 0, f"probe_{name}", metrics.linear_probe(train, train_labels, test, test_labels, **how)


def _generation(config, workdir, mesh, job):
    """Evaluate images with equally many of each class, from the last checkpoint and from all kept ones."""
    every = config.checkpoint.keep_every if "dit" in config.stages else 0
    steps = checkpoint_reader.steps(workdir / "checkpoints" / "dit")
    kept = [step for step in steps if step % every == 0] if every else []
    last = kept[-1] if kept and kept[-1] == config.dit.train.num_steps else None
    sample = generate.make_sampler(config, mesh)
    count = config.evaluate.num_images
    labels = sample_files.labels_of("balanced", count, config.data.num_classes, config.seed)
    batch_size = sharding.even_batch(count, config.evaluate.batch_size, mesh)
    how = {"batch_size": batch_size, "seed": config.seed}
    for step in dict.fromkeys([*kept, last]):
        parts = _generator(config, workdir, mesh, step)
        batches = [images for _, images in generate.batches(sample, parts, labels, mesh, **how)]
        path = workdir / "samples" / f"{step or 'last'}.npz"
        for name, value in _metrics_of(job, mesh, path, np.concatenate(batches), labels).items():
            if step is not None:
                yield step, name, value
            if step == last:
                yield 0, name, value


def _generator(config, workdir, mesh, step=None):
    last = {"step": step} if config.stages and config.stages[-1] == "dit" else {}
    return part_weights.load_all(config, part_weights.parts_of_sampling(config), workdir, mesh, **last)


def _flops(config, workdir, mesh, job):
    trunk, rest = _forward_flops(config, config.dit)
    yield 0, "forward_gflops", (trunk + rest) / 1e9
    if "dit" in config.stages:
        train, every = config.dit.train, config.checkpoint.keep_every
        steps = range(every, train.num_steps + 1, every) if every else ()
        for step in (*steps, 0):  # a backward pass costs as much as two forward passes
            yield step, "training_gflops", 3 * (trunk + rest) * train.batch_size * (step or train.num_steps) / 1e9
    refreshed = sampler.refreshed(config).sum()
    per_image = trunk * refreshed + rest * config.sampler.num_steps
    match config.guidance.method:
        case "cfg" | "internal_cfg":
            per_image *= 2
        case "autoguidance":
            guide_trunk, guide_rest = _forward_flops(config, config.guidance.dit)
            per_image += guide_trunk * refreshed + guide_rest * config.sampler.num_steps
    yield 0, "sampling_gflops", float(per_image) / 1e9


def _forward_flops(config, sizes):
    """Return (FLOPs of the trunk, FLOPs of the rest) for one image; a plain DiT has no separate trunk."""
    module = models.dit(config, sizes)
    x = jax.ShapeDtypeStruct((1, *config_keys.latent_shape(config)), jnp.float32)
    t, label = jax.ShapeDtypeStruct((1,), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    params = jax.eval_shape(module.init, jax.random.key(0), x, t, label)

    def of(**method):
        return jaxpr_flops.count(lambda params, *inputs: module.apply(params, *inputs, **method), params, x, t, label)

    trunk = of(method="trunk") if sizes.head_depth else 0
    return trunk, of() - trunk


def _speed(config, workdir, mesh, job):
    sample, parts = generate.make_sampler(config, mesh), _generator(config, workdir, mesh)
    size = sharding.round_up(config.evaluate.batch_size, mesh)
    labels = np.arange(size) % config.data.num_classes
    batch = sharding.put_global({"indices": np.arange(size, dtype=np.uint32), "labels": labels}, mesh)
    arguments = (parts, jax.random.key(config.seed), batch["indices"], batch["labels"])
    compiled = sample.lower(*arguments).compile()
    began = time.process_time()
    jax.block_until_ready(compiled(*arguments))
    yield 0, "seconds_per_image", (time.process_time() - began) / size


_MEASURES = {
    **{"loss": _loss, "bounds": _bounds, "reconstruction": _reconstruction, "probe": _probe},
    **{"generation": _generation, "flops": _flops, "speed": _speed},
}
