"""--mode=train: the stages of a config in order, then an evaluation and the report."""

import dataclasses
import functools
import time

import jax

from rae_jax.build import data as build_data
from rae_jax.build import fine_tuning, objectives, part_weights, perceptual_networks, stages
from rae_jax.cli import results
from rae_jax.config import auto, checks, inputs, keys, run_config
from rae_jax.errors import UserError
from rae_jax.inference import image_grid, linear_probes
from rae_jax.inference.evaluator import Evaluator
from rae_jax.profiling import fitting
from rae_jax.runtime import atomic_files, checkpoint_manifest, environment, health, logs, processes, workdir_lock
from rae_jax.runtime.checkpoint_reader import DamagedCheckpoint, latest_step
from rae_jax.training.loop import fit
from rae_jax.ui import report
from rae_jax.weights import safetensors_tree

_EVALUATED = {  # {stage that is evaluated during training: other parts that the evaluation needs}
    "decoder": ("encoder",),
    **dict.fromkeys(keys.GENERATORS, ("encoder", "judge", "decoder", "statistics")),
}


def run(config, workdir, mesh, flags):
    """Run the config's stages in order, each from its newest checkpoint; then evaluate and write the report."""
    in_workdir(config, workdir, mesh, _train_and_evaluate)


def in_workdir(config, workdir, mesh, work):
    """Call `work(config, workdir, mesh, evaluator)` while this run owns the workdir.

    Missing data and networks raise UserError before anything but the index of the data is written. If `work` meets a
    damaged checkpoint of a finished stage, the checkpoint is set aside and `work` is called again.
    """
    if not part_weights.has_checkpoints(config, workdir):
        checks.check_schedules(config)
    build_data.source(config, "heldout")
    data = build_data.identity(build_data.source(config, "train"))
    if config.data.latents:
        data["latents"] = build_data.identity(stages.packed_latents(config, mesh))["names"]
    inputs.compare_data(workdir, data, f"config.data.path={config.data.path!r}")
    perceptual_networks.check_available(config)
    linear_probes.check_available(config)
    evaluator = Evaluator(config, mesh)  # one for all evaluations: it compiles each program once
    with workdir_lock.hold(workdir):
        run_config.save(config, workdir)
        inputs.record(workdir, data=data)
        environment.record(workdir)
        while True:
            try:
                return work(config, workdir, mesh, evaluator)
            except DamagedCheckpoint as error:  # the stage is trained again from the previous checkpoint
                if processes.is_first():
                    aside = checkpoint_manifest.set_aside(error.path)
                    logs.say(f"{error.path} is damaged ({error.reason}): it is set aside as {aside.name}")
                processes.wait_for_all("set aside")


def _train_and_evaluate(config, workdir, mesh, evaluator):
    part_weights.check_available(config, mesh)
    fine_tuning.check(config, workdir, mesh)
    shipped = {}
    if config.evaluate.shipped:
        logs.say("evaluating the shipped weights:")
        shipped = results.measure(evaluator, config, part_weights.load_shipped(config, mesh), workdir, "shipped")
        results.write(workdir, f"{config.name}.json", shipped)
    run_stages(config, workdir, mesh, evaluator)
    if part_weights.has_part(config, "decoder"):
        parts = part_weights.load_all(config, part_weights.parts_of_evaluation(config), workdir, mesh)
        results.measure_trained(evaluator, config, parts, workdir, shipped)
        if "few_step" in config.stages and keys.generator(config) == "dit":
            logs.say("these images are the DiT's; the student's: --mode=evaluate --config.sampler.method=mean_velocity")
    else:
        logs.say("nothing is evaluated: config.decoder.weights='' names no decoder")
    if processes.is_first():
        print(f"pictures: {workdir / 'samples'}")
        print(f"report:   {report.write_report(workdir)}")


def run_stages(config, workdir, mesh, evaluator):
    """Train the config's stages in order; finished ones are skipped, interrupted ones resume."""
    with logs.tracker(config.wandb, workdir, config.to_dict()) as tracker:
        for name in config.stages:
            _run_stage(config, name, workdir, mesh, evaluator, tracker)


def _run_stage(config, name, workdir, mesh, evaluator, tracker):
    stage = stages.stage(config, name, workdir, mesh)
    evaluate_every = config.evaluate.every if name in _EVALUATED else 0
    if latest_step(workdir / "checkpoints" / name) == stage.num_steps:
        last_evaluated = evaluate_every and stage.num_steps % evaluate_every == 0
        if not (last_evaluated and logs.lacks_evaluation(workdir, name, stage.num_steps)):
            logs.say(f"{name}: already finished")
            return
    _record_weights(config, stage, workdir)
    stage = _fitted(config, stage, mesh)
    logs.say(f"{name}: compiling the step, which may take minutes; then {stage.num_steps} steps")
    began = time.monotonic()
    fit(
        stage,
        workdir=workdir,
        mesh=mesh,
        key=jax.random.key(stages.stage_seed(config, name)),
        log_every=config.log_every,
        checkpoint_every=config.checkpoint.every,
        **{key: config.checkpoint[key] for key in ("keep", "keep_every", "on_error")},
        health_settings=health.Settings(**config.health),
        evaluate=evaluate_in_training(config, stage, workdir, mesh, evaluator),
        evaluate_every=evaluate_every,
        scored=bool(config.checkpoint.best),
        tracker=tracker,
    )
    logs.say(f"{name}: {time.monotonic() - began:.0f} s")


def _fitted(config, stage, mesh):
    """Return the stage with a step that fits in the devices' memory, where the config says 'auto'."""
    if not auto.is_open(config) or stage.name not in keys.TRAINED:
        return stage
    config = keys.in_steps(config, stage.name, stage.batches.identity["num_images"])
    init, step = objectives.init_and_step(fitting.fitted(config, stage.name, mesh), stage.name)
    return dataclasses.replace(stage, init=init, step=step)


def _record_weights(config, stage, workdir):
    """Record the frozen weights that this run has not trained. Raises UserError if the run has recorded others."""
    given = {part: params for part, params in stage.frozen.items() if part not in config.stages}
    if given.get("backbone") is stage.frozen.get("encoder"):
        given.pop("backbone", None)
    weights = {part: params and safetensors_tree.digest(params) for part, params in given.items()}
    inputs.compare_weights(workdir, weights, {part: part_weights.weights_in_words(config, part) for part in weights})
    inputs.record(workdir, weights=weights)


def evaluate_in_training(config, stage, workdir, mesh, evaluator):
    """Return the loop's function (state, step) -> metrics of the averaged weights; pictures go to samples/STAGE/.

    Linear probes are left out: they measure the encoder, which does not change.
    """
    if stage.name in keys.GENERATORS and keys.generator(config) != stage.name and config.evaluate.every:
        config = keys.drawing_from(config, stage.name)
        evaluator = Evaluator(config, mesh)

    @functools.cache
    def other_parts():
        names = [name for name in _EVALUATED[stage.name] if part_weights.has_part(config, name)]
        names += perceptual_networks.named(config)
        if stage.name in keys.GENERATORS and "guide" in part_weights.parts_of_sampling(config):
            names.append("guide")
        return {name: stage.frozen.get(name) or part_weights.load(config, name, workdir, mesh) for name in names}

    last = [name for name in config.stages if name in _EVALUATED][-1:] == [stage.name]

    def evaluate(state, step):
        parts = {**other_parts(), stage.name: part_weights.exported(config, stage.name)(state)}
        found, pictures = evaluator.weights(parts)
        for kind, picture in pictures.items() if processes.is_first() else ():
            path = workdir / "samples" / stage.name / f"{step:07d}_{kind}.png"
            try:
                image_grid.save(path, picture)
            except Exception as error:  # a missing picture must not end a run; object stores raise errors of many types
                logs.say(f"cannot write the picture {path} ({atomic_files.reason(error)})")
        return {**found, **score(config.checkpoint, found, must=last)}

    return evaluate


def score(checkpoint, results, *, must):
    """Return {'score': a number, the higher the better} of the metric config.checkpoint.best.

    Return {} without such a metric. Raise UserError if the results lack the metric and `must` have it.
    """
    if not checkpoint.best or (checkpoint.best not in results and not must):
        return {}
    if checkpoint.best not in results:
        raise UserError(f"config.checkpoint.best={checkpoint.best!r} cannot work: choose from {', '.join(results)}")
    return {"score": stages.sign_of_best(checkpoint) * float(results[checkpoint.best])}
