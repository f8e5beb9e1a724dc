"""Random damage to files, and the tally of what happens to damaged inputs."""

import contextlib
import io
import signal
import traceback
from pathlib import Path

import numpy as np
from PIL import Image

from rae_jax.errors import UserError

LIMIT = 20  # CPU seconds for one input


class Tally:
    """Count of accepted and rejected inputs; `wrong` describes the others."""

    def __init__(self):
        self.accepted, self.rejected, self.wrong = 0, 0, []

    def attempt(self, name, function, *arguments):
        """Call the function, which may return, or raise UserError, or exit with status 2."""
        for number in (signal.SIGPROF, signal.SIGALRM):
            signal.signal(number, _raise_too_long)
        signal.setitimer(signal.ITIMER_PROF, LIMIT)  # CPU time: other programs may use the machine
        signal.alarm(20 * LIMIT)  # wall-clock time, for an endless wait
        stderr = io.StringIO()
        try:
            with contextlib.redirect_stderr(stderr):
                function(*arguments)
            self.accepted += 1
        except UserError as error:
            self._reject(name, f"error: {error}\n")
        except SystemExit as status:
            self._reject(name, stderr.getvalue() if status.code == 2 else f"exit status {status.code}")
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            frame = traceback.extract_tb(error.__traceback__)[-2 if isinstance(error, TooLong) else -1]
            line = f"{Path(frame.filename).name}:{frame.lineno}"
            self.wrong.append(f"{name}: {type(error).__name__} {str(error)[:300]} ({line})")
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)

    def _reject(self, name, message):
        self.rejected += 1
        if not message.startswith("error: ") or message.count("\n") != 1:
            self.wrong.append(f"{name}: not one line: {message[:300]!r}")

    def __str__(self):
        return f"{self.accepted} accepted, {self.rejected} rejected in one line, {len(self.wrong)} wrong"


class TooLong(BaseException):
    """An input takes too much time."""


def _raise_too_long(number, frame):
    raise TooLong(f"takes more than {LIMIT} s")


def mutate(rng, data):
    """Return data with random damage."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place, length = rng.randrange(max(len(data), 1)), rng.choice((1, 1, 2, 4, 8, 64))
        if rng.random() < 0.5:
            place = min(place, rng.randrange(64))  # damages the header
        match rng.randrange(6):
            case 0:
                data[place : place + length] = rng.randbytes(length)
            case 1:
                data[place : place + length] = rng.choice((b"\xff", b"\x00", b"\x7f")) * length
            case 2:
                del data[place : len(data) if rng.random() < 0.3 else place + length]
            case 3:
                data[place:place] = rng.randbytes(length)
            case 4:
                data[place:place] = data[place : place + 64]
            case 5:
                if place < len(data):
                    data[place] ^= 1 << rng.randrange(8)
    return bytes(data)


def pictures(rng):
    """Return images in all formats and modes that are read, as bytes."""
    pixels = rng.integers(0, 256, (20, 28, 3), np.uint8)
    found = []
    kinds = {
        **{"JPEG": ("RGB", "L", "CMYK"), "PNG": ("RGB", "P", "RGBA", "1"), "WEBP": ("RGB", "RGBA")},
        **{"GIF": ("P",), "BMP": ("RGB", "P"), "TIFF": ("RGB", "CMYK")},
    }
    for form, mode in ((form, mode) for form, modes in kinds.items() for mode in modes):
        buffer = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(buffer, form)
        found.append(buffer.getvalue())
    for form in ("PNG", "TIFF"):
        buffer = io.BytesIO()
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(buffer, form)
        found.append(buffer.getvalue())
    return found
