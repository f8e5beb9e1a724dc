"""The page of --mode=demo: samples on their way from noise, pictures and their reconstructions, what is between two.

Served from this machine, with everything it needs; nothing is sent anywhere.
"""

import os
import signal
import socket
import threading

import gradio as gr
import jax
import numpy as np
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from rae_jax.errors import UserError
from rae_jax.inference import image_grid
from rae_jax.ui import demo_model

STEPS = (5, 10, 25, 50, 100)
MAX_UPLOAD = 20_000_000  # bytes of a picture
MAX_REQUEST = 200_000  # bytes of any other request
MAX_WAITING = 32  # requests in the queue; whoever comes then is told so
SHOWN = 256  # pixels a side, about, to which small pictures are enlarged
MAX_SEED = 2**31 - 1
_CSS = """
.gradio-container { max-width: 1100px !important; margin: 0 auto !important; }
.picture img { image-rendering: pixelated; padding-top: 28px; }
"""
_HEAD = """
**{name}**: {what}. One request is computed at a time, others wait their turn; the first of each kind also compiles.
"""


def serve(page, *, host, port):
    """Serve what `build_page` made until a signal ends it. Raises UserError where nobody may listen there."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise UserError(f"cannot listen on --host={host} --port={port}: it is taken, or not of this machine") from error
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
    print(f"demo: http://{host}:{port}/ (Ctrl-C ends it)", flush=True)
    ended.wait()
    page.close(verbose=False)


def build_page(shown, *, title, what, class_names, held_out, image_size, scale):
    """The page of an `demo_model.Exhibits` as Gradio's Blocks.

    `class_names` is empty where nothing can be sampled; `held_out` is a source of example pictures, or None; `scale` of
    the guidance is where its slider begins.
    """
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(_HEAD.format(name=title, what=what))
        if class_names:
            with gr.Tab("Sample"):
                _sample_tab(shown, class_names, scale)
        with gr.Tab("Reconstruct"):
            _reconstruct_tab(shown, held_out, image_size)
        with gr.Tab("Interpolate"):
            _interpolate_tab(shown, held_out, image_size)
    return page.queue(max_size=MAX_WAITING, default_concurrency_limit=1)


_EVENT = {"concurrency_id": "devices", "api_visibility": "private", "show_progress": "minimal"}


def _sample_tab(shown, class_names, scale):
    with gr.Row():
        with gr.Column(scale=1, min_width=240):
            label = gr.Dropdown([(name, i) for i, name in enumerate(class_names)], value=0, label="Class")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
            guidance = gr.Slider(
                0.0, max(8.0, 2 * scale), scale, step=0.1, label="Guidance scale", visible=shown.guided
            )
            steps = gr.Radio(STEPS, value=25, label="Steps", elem_id="steps")
            button = gr.Button("Sample", variant="primary", elem_id="sample")
        with gr.Column(scale=3):
            now = _picture("What the DiT takes for data", "sample-now")
            said = gr.Markdown(elem_id="sample-said")
    strip = _picture("From noise (left) to data (right)", "sample-strip")

    def run(label, seed, guidance, steps):
        if seed is None or not 0 <= seed <= MAX_SEED:
            yield None, None, f"The seed must be a whole number from 0 to {MAX_SEED}."
            return
        yield None, None, "Computing; the first time also compiles."
        columns = []
        for t, images in shown.trajectory(int(label), int(seed), float(guidance), int(steps)):
            columns.append(images)
            rows = np.stack(columns, 1).reshape(-1, *images.shape[1:])
            shown_now = _row(images), _enlarged(image_grid.grid(rows, len(columns)), SHOWN * 4)
            yield *shown_now, f"t = {t:.3f}"
        yield *shown_now, f"Done, at t = {t:.3f}."

    button.click(run, [label, seed, guidance, steps], [now, strip, said], **_EVENT)


def _reconstruct_tab(shown, held_out, size):
    with gr.Row():
        with gr.Column(scale=1, min_width=240):
            file = _file("A picture", "reconstruct-file")
            button = _held_out_button(held_out, "A held-out picture")
            said = gr.Markdown(elem_id="reconstruct-said")
        with gr.Column(scale=3):
            with gr.Row():
                given = _picture("As the encoder sees it", "reconstruct-given")
                decoded = _picture("Decoded", "reconstruct-decoded")
            with gr.Row():
                latents = _picture("Latents: three principal components", "reconstruct-latents")
                errors = _picture(f"Error: white from {demo_model.LARGEST_ERROR:.0%} on", "reconstruct-errors")
    outputs = [given, decoded, latents, errors, said]

    def show(image):
        again, z, scores = shown.reconstruct(image)
        words = f"PSNR {scores['psnr']:.1f} dB, SSIM {scores['ssim']:.3f}; latents {' x '.join(map(str, z.shape))}"
        shown_latents = image_grid.latent_colours(z)
        return *map(_enlarged, (image, again, shown_latents, demo_model.error_map(image, again))), words

    def of_file(path):
        if path is None:
            return None, None, None, None, ""
        try:
            return show(demo_model.read_upload(path, size))
        except UserError as error:
            return None, None, None, None, f"**{error}.**"

    file.change(of_file, file, outputs, **_EVENT)
    if held_out:
        button.click(lambda: show(_any(held_out)), None, outputs, **_EVENT)


def _interpolate_tab(shown, held_out, size):
    with gr.Row():
        one, other = _file("From this picture", "interpolate-one"), _file("to this", "interpolate-other")
    button = _held_out_button(held_out, "Two held-out pictures")
    said = gr.Markdown(elem_id="interpolate-said")
    strip = _picture("Decoded from the straight line between their latents", "interpolate-strip")

    def show(first, second):
        return _row(shown.between(first, second)), ""

    def of_files(*paths):
        if None in paths:
            return None, "Choose the other picture as well." if any(paths) else ""
        try:
            return show(*(demo_model.read_upload(path, size) for path in paths))
        except UserError as error:
            return None, f"**{error}.**"

    for file in (one, other):
        file.change(of_files, [one, other], [strip, said], **_EVENT)
    if held_out:
        button.click(lambda: show(_any(held_out), _any(held_out)), None, [strip, said], **_EVENT)


def _file(label, name):
    return gr.File(label=label, file_count="single", type="filepath", height=140, elem_id=name)


def _picture(label, name):
    return gr.Image(
        label=label, interactive=False, format="png", buttons=["download"], elem_id=name, elem_classes="picture"
    )


def _held_out_button(held_out, words):
    return gr.Button(words, elem_id=words.lower().replace(" ", "-"), visible=held_out is not None)


def _any(source):
    return source[int(np.random.default_rng().integers(len(source)))]["image"]


def _row(images):
    return _enlarged(image_grid.grid(images, len(images)), SHOWN * 4)


def _enlarged(image, side=SHOWN):
    return image_grid.enlarged(image, side)


class BoundedBodies:
    """ASGI middleware: requests whose bodies are too large are refused, or cut off where they did not say so."""

    def __init__(self, app):
        self._app = app

    async def __call__(self, scope, receive, send):
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # A form holds a little more than its file.
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
    """Raise UserError where devices of other processes take part: they would wait for a page that is only here."""
    if jax.process_count() > 1:
        raise UserError("--mode=demo runs in one process: start it on a single host")
