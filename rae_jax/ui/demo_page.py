"""The web page of --mode=demo: sampling trajectories, reconstructions, interpolations between two pictures.

The page is served from this machine with everything that it needs; nothing is sent to another machine.
"""

import os
import signal
import socket
import threading
import time

import gradio as gr
import jax
import numpy as np
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from rae_jax.errors import UserError, one_line
from rae_jax.inference import image_grid
from rae_jax.ui import demo_model

STEPS = (5, 10, 25, 50, 100)
FEW_STEPS = (1, 2, 4)
MAX_UPLOAD = 20_000_000  # bytes of a picture
MAX_REQUEST = 200_000  # bytes of any other request
MAX_WAITING = 32  # requests in the queue; a further request is refused with a message
ENLARGED_TO = 256  # pixels a side, about, to which small pictures are enlarged
MAX_SEED = 2**31 - 1
_CSS = """
.gradio-container { max-width: 1100px !important; margin: 0 auto !important; }
.picture img { image-rendering: pixelated; padding-top: 28px; }
"""
_HEAD = """
**{name}**: {weights}. Requests are computed one at a time, in order. The first request of each kind also compiles.
"""


def serve(page, *, host, port):
    """Serve the page of `build_page` until SIGINT or SIGTERM. Raises UserError if the address cannot be listened on."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise UserError(
            f"cannot listen on --host={host} --port={port} ({one_line(error)}): "
            f"choose another port, or an address of this machine"
        ) from error
    page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        inbrowser=False,
        max_file_size=MAX_UPLOAD,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        app_kwargs={"middleware": [Middleware(BoundedBodies)]},
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=_CSS,
    )
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    print(f"demo: http://{host}:{port}/ (Ctrl-C stops it)", flush=True)
    ended.wait()
    page.close(verbose=False)


def build_page(model, *, title, weights, class_names, held_out, image_size, scale):
    """Return the page of a `demo_model.DemoModel` as Gradio's Blocks.

    `weights` says in words which weights these are. `class_names` is not used if the model cannot sample; `held_out` is
    a source of example pictures, or None; `scale` is the first value of the guidance scale.
    """
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(_HEAD.format(name=title, weights=weights))
        if model.has("few_step"):
            with gr.Tab("Few steps"):
                _few_step_tab(page, model, class_names)
        if model.has("dit"):
            with gr.Tab("Sample"):
                _sample_tab(model, class_names, scale)
        with gr.Tab("Reconstruct"):
            _reconstruct_tab(model, held_out, image_size)
        with gr.Tab("Interpolate"):
            _interpolate_tab(model, held_out, image_size)
    return page.queue(max_size=MAX_WAITING, default_concurrency_limit=1)


_EVENT = {"concurrency_id": "devices", "api_visibility": "private", "show_progress": "minimal"}


def _sample_tab(model, class_names, scale):
    with gr.Row():
        with gr.Column(scale=1, min_width=240):
            label = gr.Dropdown([(name, i) for i, name in enumerate(class_names)], value=0, label="Class")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
            guidance = gr.Slider(
                0.0, max(8.0, 2 * scale), scale, step=0.1, label="Guidance scale", visible=model.guided
            )
            steps = gr.Radio(STEPS, value=STEPS[len(STEPS) // 2], label="Steps", elem_id="steps")
            button = gr.Button("Sample", variant="primary", elem_id="sample")
        with gr.Column(scale=3):
            current = _picture("Data that the DiT predicts", "sample-now")
            message = gr.Markdown(elem_id="sample-message")
    strip = _picture("From noise (left) to data (right)", "sample-strip")

    def run(label, seed, guidance, steps):
        if seed is None or not 0 <= seed <= MAX_SEED:
            yield None, None, f"Seed: choose a whole number from 0 to {MAX_SEED}."
            return
        yield None, None, "Computing. The first request also compiles."
        columns = []
        for t, images in model.trajectory(int(label), int(seed), float(guidance), int(steps)):
            columns.append(images)
            rows = np.stack(columns, 1).reshape(-1, *images.shape[1:])
            pictures = _row(images), _enlarged(image_grid.grid(rows, len(columns)), ENLARGED_TO * 4)
            yield *pictures, f"t = {t:.3f}"
        yield *pictures, f"Done, at t = {t:.3f}."

    button.click(run, [label, seed, guidance, steps], [current, strip, message], **_EVENT)


def _few_step_tab(page, model, class_names):
    """The student's images are there when the page is opened, and follow the slider."""
    with gr.Row():
        label = gr.Dropdown([(name, i) for i, name in enumerate(class_names)], value=0, label="Class", elem_id="class")
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
        steps = gr.Radio(FEW_STEPS, value=FEW_STEPS[0], label="Steps", elem_id="student-steps")
    angle = gr.Slider(0, 360, 0, step=1, label="Turn the noise, degrees", elem_id="angle")
    message = gr.Markdown(elem_id="student-message")
    strip = _picture("Drawn by the student", "student-strip")

    def run(label, seed, angle, steps):
        if seed is None or not 0 <= seed <= MAX_SEED:
            return None, f"Seed: choose a whole number from 0 to {MAX_SEED}."
        began = time.monotonic()
        images = model.draw(int(label), int(seed), float(angle), int(steps))
        return _row(images), f"{len(images)} images in {1e3 * (time.monotonic() - began):.0f} ms."

    changes = [page.load, label.change, seed.change, angle.input, steps.change]
    how = {**_EVENT, "show_progress": "hidden", "trigger_mode": "always_last"}
    gr.on(changes, run, [label, seed, angle, steps], [strip, message], **how)


def _reconstruct_tab(model, held_out, size):
    with gr.Row():
        with gr.Column(scale=1, min_width=240):
            file = _file("A picture", "reconstruct-file")
            button = _held_out_button(held_out, "A held-out picture")
            message = gr.Markdown(elem_id="reconstruct-message")
        with gr.Column(scale=3):
            with gr.Row():
                given = _picture("Input of the encoder", "reconstruct-given")
                decoded = _picture("Decoded", "reconstruct-decoded")
            with gr.Row():
                latents = _picture("Latents: three principal components", "reconstruct-latents")
                errors = _picture(f"Error: white means {demo_model.LARGEST_ERROR:.0%} or more", "reconstruct-errors")
    outputs = [given, decoded, latents, errors, message]

    def show(image):
        reconstruction, z, scores = model.reconstruct(image)
        words = f"PSNR {scores['psnr']:.1f} dB, SSIM {scores['ssim']:.3f}; latents {' x '.join(map(str, z.shape))}"
        pictures = image, reconstruction, image_grid.latent_colours(z), demo_model.error_map(image, reconstruction)
        return *map(_enlarged, pictures), words

    def show_file(path):
        if path is None:
            return None, None, None, None, ""
        try:
            return show(demo_model.read_upload(path, size))
        except UserError as error:
            return None, None, None, None, f"**{error}.**"

    file.change(show_file, file, outputs, **_EVENT)
    if held_out:
        button.click(lambda: show(_random_image(held_out)), None, outputs, **_EVENT)


def _interpolate_tab(model, held_out, size):
    with gr.Row():
        one, other = _file("From this picture", "interpolate-one"), _file("to this picture", "interpolate-other")
    button = _held_out_button(held_out, "Two held-out pictures")
    message = gr.Markdown(elem_id="interpolate-message")
    strip = _picture("Decoded latents on the straight line between both pictures", "interpolate-strip")

    def show(first, second):
        return _row(model.between(first, second)), ""

    def show_files(*paths):
        if None in paths:
            return None, "Choose the other picture as well." if any(paths) else ""
        try:
            return show(*(demo_model.read_upload(path, size) for path in paths))
        except UserError as error:
            return None, f"**{error}.**"

    for file in (one, other):
        file.change(show_files, [one, other], [strip, message], **_EVENT)
    if held_out:
        button.click(lambda: show(_random_image(held_out), _random_image(held_out)), None, [strip, message], **_EVENT)


def _file(label, name):
    return gr.File(label=label, file_count="single", type="filepath", height=140, elem_id=name)


def _picture(label, name):
    return gr.Image(
        label=label, interactive=False, format="png", buttons=["download"], elem_id=name, elem_classes="picture"
    )


def _held_out_button(held_out, words):
    return gr.Button(words, elem_id=words.lower().replace(" ", "-"), visible=held_out is not None)


def _random_image(source):
    return source[int(np.random.default_rng().integers(len(source)))]["image"]


def _row(images):
    return _enlarged(image_grid.grid(images, len(images)), ENLARGED_TO * 4)


def _enlarged(image, side=ENLARGED_TO):
    return image_grid.enlarged(image, side)


class BoundedBodies:
    """ASGI middleware: refuses requests whose bodies are too large, or cuts them off if no length is declared."""

    def __init__(self, app):
        self._app = app

    async def __call__(self, scope, receive, send):
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # An upload's form holds a little more than the file.
        limit = MAX_UPLOAD + MAX_REQUEST if scope["path"].endswith("/upload") else MAX_REQUEST
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > limit:
            await PlainTextResponse("The request is too large.", 413)(scope, receive, send)
            return
        count = 0

        async def bounded():
            nonlocal count
            message = await receive()
            count += len(message.get("body", b""))
            return message if count <= limit else {"type": "http.disconnect"}

        await self._app(scope, bounded, send)


def refuse_more_processes():
    """Raise UserError in a run of several processes: only one serves the page, and the devices of the others wait."""
    if jax.process_count() > 1:
        raise UserError("--mode=demo runs in one process: start it on a single host")
