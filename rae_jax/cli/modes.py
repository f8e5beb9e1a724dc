"""What the command line can do: train, evaluate, sample, reconstruct, compile, benchmark, demo."""

import functools
import importlib.util
import json
import time

import jax
import numpy as np
from etils import epath

from rae_jax.build import models, perceptual_networks, stages
from rae_jax.build import parts as parts_lib
from rae_jax.config import checks
from rae_jax.config import keys as config_keys
from rae_jax.errors import UserError
from rae_jax.inference import evaluator as evaluator_lib
from rae_jax.inference import image_grid, linear_probes, sample_files
from rae_jax.inference import reconstruct as reconstruct_lib
from rae_jax.profiling import chips, timing
from rae_jax.profiling import compile_ahead as compile_ahead_lib
from rae_jax.runtime import (
    atomic_files,
    checkpoint_manifest,
    environment,
    health,
    logs,
    processes,
    sharding,
    workdir_lock,
)
from rae_jax.runtime.checkpoint import DamagedCheckpoint, latest_step
from rae_jax.training.loop import fit
from rae_jax.ui import demo_model, report
from rae_jax.weights import safetensors_tree


def train(config, workdir, mesh, flags):
    """Run the config's stages in order, each from where it stands; then evaluate and write the report."""
    run(config, workdir, mesh, _train)


def run(config, workdir, mesh, do):
    """Have `do(config, workdir, mesh, evaluator)` train and measure, in a workdir that is this run's alone.

    What can be seen to be missing is said before anything is written. `do` is called again where it met a damaged
    checkpoint of a stage that was done.
    """
    for split in ("train", "heldout"):
        models.source(config, split)  # a mistake in the data shows before anything is written
    if config.data.latents:
        stages.packed_latents(config, mesh)
    perceptual_networks.find(config)  # and so does a network that would be missed when all is trained
    linear_probes.find(config)
    evaluator = evaluator_lib.Evaluator(config, mesh)  # one for all, as it compiles what it needs
    with workdir_lock.hold(workdir):
        config_keys.save(config, workdir)
        environment.record(workdir)
        while True:
            try:
                return do(config, workdir, mesh, evaluator)
            except DamagedCheckpoint as error:  # of a stage that was done: it is made again from the one before
                if processes.is_first():
                    aside = checkpoint_manifest.set_aside(error.path)
                    logs.say(f"{error.path} is damaged ({error.reason}): set aside as {aside.name}")
                processes.wait_for_all("set aside")


def _train(config, workdir, mesh, evaluator):
    parts_lib.find(config, mesh)
    results, name = {}, f"{config.name}.json"
    if config.evaluate.shipped:
        logs.say("the shipped weights, as they are:")
        results = _measure(evaluator, config, parts_lib.shipped(config, mesh), workdir, "shipped")
        _write_results(workdir, name, results)
    run_stages(config, workdir, mesh, evaluator)
    _measure_trained(evaluator, config, parts_lib.load(config, workdir, mesh), workdir, results)
    if processes.is_first():
        print(f"pictures: {workdir / 'samples'}")
        print(f"report:   {report.write_report(workdir)}")


def run_stages(config, workdir, mesh, evaluator):
    """Train the config's stages in order; what is done is skipped, what was interrupted goes on."""
    with logs.tracker(config.wandb, workdir, config.to_dict()) as tracker:
        for name in config.stages:
            _run_stage(config, name, workdir, mesh, evaluator, tracker)


def evaluate(config, workdir, mesh, flags):
    """Metrics of the newest checkpoint, of --step, or of --samples, printed and written to eval/."""
    if flags.samples is not None and flags.step is not None:
        raise UserError(f"--step={flags.step} picks a checkpoint, and --samples brings its own images: leave one out")
    evaluator = evaluator_lib.Evaluator(config, mesh)
    if flags.samples is not None:
        names = ("encoder", *(name for name in ("judge", "inception") if parts_lib.there(config, name)))
        parts = {name: stages.load(config, name, workdir, mesh) for name in names}
        _write_results(workdir, f"{config.name}_samples.json", evaluator.images(parts, flags.samples))
        return
    linear_probes.find(config)
    parts = parts_lib.load(config, workdir, mesh, step=flags.step)
    if flags.step is None:
        _measure_trained(evaluator, config, parts, workdir, _of_shipped(config, workdir))
    else:
        results = _measure(evaluator, config, parts, workdir, str(flags.step))
        _write_results(workdir, f"{config.name}_{flags.step}.json", results)


def sample(config, workdir, mesh, flags):
    """Class-conditional images: a picture of some, single PNGs, and an ADM-style npz."""
    classes = config.data.num_classes
    if flags.num_images < 1:
        raise UserError(f"--num_images={flags.num_images} cannot work: it must be positive")
    if flags.label is not None and not 0 <= flags.label < classes:
        raise UserError(f"--label={flags.label} cannot work: labels are 0 to {classes - 1}")
    labels = sample_files.labels_of(flags.labels, flags.num_images, classes, config.seed)
    if flags.label is not None:
        labels = np.full(flags.num_images, flags.label)
    parts = {
        part: stages.load(config, part, workdir, mesh, step=flags.step) for part in ("decoder", "statistics", "dit")
    }
    parts.update(parts_lib.guide(config, mesh))
    request = {
        "config": {k: v for k, v in config_keys.flatten(json.loads(config.to_json())).items() if not _only_how(k)},
        "weights": {name: safetensors_tree.digest(params) for name, params in parts.items() if params is not None},
    }
    folder = workdir / "samples"
    names = _class_names(config)
    sample_files.draw(config, parts, labels, mesh, folder, request=request, class_names=names)
    if processes.is_first():
        print(f"pictures: {folder / 'sampled.png'}, {folder / 'images'}; for evaluators: {folder / 'samples.npz'}")


def _only_how(key):
    """Whether a key says how samples are computed, rather than which."""
    return key.split(".")[0] in (
        *("name", "log_every", "wandb", "checkpoint", "health", "mesh", "evaluate"),
        *("unroll", "remat", "attention", "compilation_cache"),
    )


def _class_names(config):
    """From the data set; numbers where it is not here."""
    found = _held_out(config)
    return found.class_names if found else [str(c) for c in range(config.data.num_classes)]


def reconstruct(config, workdir, mesh, flags):
    """Encode and decode images from files: pairs as PNG, some of them side by side, and metrics."""
    if flags.images is None:
        raise UserError("--mode=reconstruct needs --images=PATH, an image or a folder of images")
    names = ("encoder", "decoder", *perceptual_networks.named(config))
    parts = {part: stages.load(config, part, workdir, mesh) for part in names}
    folder = workdir / "samples" / "reconstructed"
    results, picture = reconstruct_lib.reconstruct(config, parts, epath.Path(flags.images), mesh, folder)
    _write_results(workdir, "reconstruct.json", results)
    if processes.is_first():
        image_grid.save(workdir / "samples" / "reconstructed.png", picture)
        print(f"picture: {workdir / 'samples' / 'reconstructed.png'}")
        print(f"images:  {folder}")


def benchmark(config, workdir, mesh, flags):
    """Timed steps of what the config describes, as a table and as JSON; nothing is written."""
    timing.report(config, mesh, flags.only, steps=flags.timed_steps, warmup=flags.warmup_steps, profile=flags.profile)


def compile_ahead(config, flags):
    """The run's programs compiled for --topology, with what they need and do; returns whether all fit."""
    if flags.topology is None:
        raise UserError("--mode=compile needs --topology=KIND:SIZES, such as v5e:16x16")
    devices, chip = chips.devices(flags.topology, flags.num_slices)
    mesh = sharding.make_mesh(config.mesh, devices)
    checks.check(config, mesh)
    return compile_ahead_lib.report(config.lock(), mesh, chip, flags.topology, flags.num_slices, flags.program)


def demo(config, workdir, mesh, flags):
    """A page on this machine: samples on their way from noise, reconstructions, what is between two pictures."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError("--mode=demo needs gradio: pip install -e '.[demo]'")
    from rae_jax.ui import demo_page  # and only it needs gradio, whose import takes seconds

    demo_page.refuse_more_processes()
    sampled = parts_lib.there(config, "dit")
    names = ("encoder", "decoder", *(("statistics", "dit") if sampled else ()))
    parts = {part: stages.load(config, part, workdir, mesh) for part in names}
    if sampled:
        parts.update(parts_lib.guide(config, mesh))
    built = demo_page.build_page(
        demo_model.Exhibits(config, parts),
        title=f"rae_jax: {config.name}",
        what=f"weights of {workdir}" if _is_trained(config, workdir) else "weights as the config names them",
        class_names=_class_names(config) if sampled else (),
        held_out=_held_out(config),
        image_size=config.data.image_size,
        scale=config.guidance.scale if config.guidance.method != "none" else 1.0,
    )
    demo_page.serve(built, host=flags.host, port=flags.port)


def _held_out(config):
    """The source of held-out images; None where the data is not here."""
    try:
        return models.source(config, "heldout")
    except UserError:
        return None


def _run_stage(config, name, workdir, mesh, evaluator, tracker):
    stage = stages.stage(config, name, workdir, mesh)
    if latest_step(workdir / "checkpoints" / name) == stage.num_steps:
        logs.say(f"{name}: done before")
        return
    logs.say(f"{name}: its first step is compiled, which may take minutes; then {stage.num_steps} steps")
    began = time.monotonic()
    fit(
        stage,
        workdir=workdir,
        mesh=mesh,
        key=jax.random.key(stages.stage_seed(config, name)),
        log_every=config.log_every,
        checkpoint_every=config.checkpoint.every,
        **{key: config.checkpoint[key] for key in ("keep", "keep_every", "on_error")},
        care=health.Settings(**config.health),
        evaluate=_evaluate_in_training(config, stage, workdir, mesh, evaluator),
        evaluate_every=config.evaluate.every if name in _EVALUATED else 0,
        scored=bool(config.checkpoint.best),
        tracker=tracker,
    )
    logs.say(f"{name}: {time.monotonic() - began:.0f} s")


_EVALUATED = {"decoder": ("encoder",), "dit": ("encoder", "judge", "decoder", "statistics")}  # with what, in training


def _evaluate_in_training(config, stage, workdir, mesh, evaluator):
    """(state, step) -> metrics of the averaged weights, for the loop; pictures go to samples/STAGE/.

    Without probes: they are of the encoder, which stays as it is.
    """

    @functools.cache
    def others():
        names = [name for name in _EVALUATED[stage.name] if parts_lib.there(config, name)] + list(
            perceptual_networks.named(config)
        )
        loaded = {name: stage.frozen.get(name) or stages.load(config, name, workdir, mesh) for name in names}
        return {**loaded, **(parts_lib.guide(config, mesh) if stage.name == "dit" else {})}

    last = [name for name in config.stages if name in _EVALUATED][-1:] == [stage.name]

    def evaluate(state, step):
        parts = {**others(), stage.name: stages.used(config, stage.name)(state)}
        results, shown = evaluator.weights(parts)
        for kind, picture in shown.items() if processes.is_first() else ():
            path = workdir / "samples" / stage.name / f"{step:07d}_{kind}.png"
            try:
                image_grid.save(path, picture)
            except Exception as error:  # training goes on, whatever becomes of a picture; a bucket's are of many kinds
                logs.say(f"cannot write the picture {path} ({atomic_files.reason(error)})")
        return {**results, **_score(config.checkpoint, results, must=last)}

    return evaluate


def _score(checkpoint, results, *, must):
    """{'score': the higher the better} of config.checkpoint.best; without it none, or UserError where it `must` be."""
    if not checkpoint.best or (checkpoint.best not in results and not must):
        return {}
    if checkpoint.best not in results:
        raise UserError(f"config.checkpoint.best={checkpoint.best!r} cannot work: choose from {', '.join(results)}")
    sign = 1.0 if checkpoint.best_is == "highest" else -1.0
    return {"score": sign * float(results[checkpoint.best])}


def _measure_trained(evaluator, config, parts, workdir, results):
    """Measure the run's weights, and write what is found beside `results`, those of the shipped ones."""
    prefix = "trained" if config.evaluate.shipped and _is_trained(config, workdir) else ""
    found = _measure(evaluator, config, parts, workdir, prefix)
    found = {f"{prefix}_{name}" if prefix else name: value for name, value in found.items()}
    _write_results(workdir, f"{config.name}.json", {**results, **found})


def _of_shipped(config, workdir):
    """What the run has found of the shipped weights, beside which it wrote what it found of its own."""
    path = workdir / "eval" / f"{config.name}.json"
    found = json.loads(path.read_text()) if config.evaluate.shipped and path.exists() else {}
    of_shipped = {name: value for name, value in found.items() if not name.startswith("trained_")}
    return of_shipped if len(of_shipped) < len(found) else {}


def _is_trained(config, workdir):
    return any(latest_step(workdir / "checkpoints" / stage) is not None for stage in config.stages)


def _measure(evaluator, config, parts, workdir, name):
    began = time.monotonic()
    results, shown = evaluator.weights(parts, probe=config.evaluate.probe)
    for kind, picture in shown.items() if processes.is_first() else ():
        image_grid.save(workdir / "samples" / (f"{kind}_{name}.png" if name else f"{kind}.png"), picture)
    return {**results, "seconds": time.monotonic() - began}


def _write_results(workdir, name, results):
    if not processes.is_first():
        return
    path = workdir / "eval" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_files.write_text(path, json.dumps(results, indent=2) + "\n")
    width = max(map(len, results))
    for key, value in results.items():
        print(f"{key:{width}}  {value:.4f}")
