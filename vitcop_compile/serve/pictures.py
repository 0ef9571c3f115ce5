"""Pictures of a request, from data URLs or from hosts that are allowed, within limits that hold before a pixel is decoded."""

from __future__ import annotations

import base64
import binascii
import io
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image, ImageOps

from ..errors import ConfigError, InputError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
# Longer to shorter side: a processor that makes the shorter side what the encoder takes would make the other as many times
# that. Qwen2-VL's refuses more as well.
MOST_ASPECT = 200
# Scans of a JPEG, each of which may be a few bytes and goes over all pixels: encoders write 10 or so. And the pixels of all
# scans together, as so many times the pixels that a request may have.
MOST_SCANS, MOST_PASSES = 100, 16
_SCAN = b"\xff\xda"  # within the data of a scan, no marker stands
_PORTS = {"http": 80, "https": 443}
_CHUNK = 1 << 16
_SHOWN = 80  # characters of a URL in a message


@dataclass(frozen=True)
class Pictures:
    """What pictures may be. hosts: that pictures are fetched from, as "name" or "name:port", none by default; pixels: of all
    pictures of a request together; size: bytes of a fetched picture; seconds: in which it has to be there; count: of a
    request.

    Raises ConfigError for values that allow nothing.
    """

    hosts: tuple[str, ...] = ()
    pixels: int = 40_000_000
    size: int = 20 << 20
    seconds: float = 10.0
    count: int = 16

    def __post_init__(self) -> None:
        for name in ("pixels", "size", "seconds", "count"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"pictures: {name}={getattr(self, name)} is not above 0")
        for host in self.hosts:
            found = urlsplit(f"//{host}")
            if not host or found.netloc != host or found.path or found.username is not None or not _port_is_well(found):
                raise ConfigError(f"pictures: hosts={host!r} is not a name such as images.example.org, or name:port")

    def load(self, urls: Sequence[str]) -> list[Image.Image]:
        """Pictures in RGB, upright as their EXIF says. Raises InputError for what is not one, too large or not allowed.

        The sizes of all are known from their headers before the first is decoded.
        """
        return self.decode(self.read(urls))

    def read(self, urls: Sequence[str]) -> list[bytes]:
        """Pictures as they were sent, or fetched. Raises InputError for what is not allowed, or not there."""
        if len(urls) > self.count:
            raise InputError(f"{len(urls)} pictures in a request, the limit is {self.count}: send fewer")
        return [self._read(url, number) for number, url in enumerate(urls)]

    def decode(self, files: Sequence[bytes]) -> list[Image.Image]:
        """Of files, what `load` gives of URLs."""
        opened = [(_opened(data, number), number) for number, data in enumerate(files)]
        left, passes = self.pixels, MOST_PASSES * self.pixels
        for picture, number in opened:
            width, height = picture.size
            left -= width * height
            if left < 0:
                raise InputError(
                    f"picture {number} is {width} x {height}: the pictures of a request may have {self.pixels} pixels in all; "
                    "make it smaller"
                )
            if max(width, height) > MOST_ASPECT * min(width, height):
                raise InputError(f"picture {number} is {width} x {height}: one side is over {MOST_ASPECT} times the other")
            if picture.format in ("JPEG", "MPO"):
                scans = files[number].count(_SCAN)
                passes -= scans * width * height
                if scans > MOST_SCANS or passes < 0:
                    raise InputError(
                        f"picture {number} is a JPEG of {scans} scans: {MOST_SCANS} may be, and {MOST_PASSES * self.pixels} "
                        "pixels of all scans in a request; save it again, not progressive"
                    )
        return [_decoded(picture, number) for picture, number in opened]

    def _read(self, url: str, number: int) -> bytes:
        if url[:5].lower() == "data:":
            return _of_data_url(url, number)
        self._check_allowed(url, number)
        return self._fetched(url, number)

    def _check_allowed(self, url: str, number: int) -> None:
        """Raises InputError unless the host of `url` is one of `hosts`; what parsers read differently is never asked."""
        shown = url[:_SHOWN]
        try:
            found = urlsplit(url)
            name, port = (found.hostname or "").lower(), found.port or _PORTS.get(found.scheme)
        except ValueError:
            raise InputError(f"picture {number}: {shown!r} is not a URL") from None
        if found.scheme not in _PORTS:
            raise InputError(f"picture {number}: {shown!r} is neither a data URL nor http or https")
        odd = any(not 33 <= ord(letter) < 127 or letter in '\\"<>' for letter in url)
        allowed = [urlsplit(f"//{host}") for host in self.hosts]
        there = any(name == host.hostname and port == (host.port or _PORTS[found.scheme]) for host in allowed)
        if odd or found.username is not None or not there:
            known = ", ".join(self.hosts) or "none"
            raise InputError(
                f"picture {number}: {shown!r} is not of a host that pictures are fetched from ({known}): send a data URL, or "
                "start the server with --image-hosts"
            )

    def _fetched(self, url: str, number: int) -> bytes:
        end, opener = time.monotonic() + self.seconds, urllib.request.build_opener(_SameHost)
        parts: list[bytes] = []
        size = 0
        try:
            with opener.open(urllib.request.Request(url, headers={"Accept": "image/*"}), timeout=self.seconds) as answer:
                while part := answer.read1(_CHUNK):
                    size += len(part)
                    parts.append(part)
                    if size > self.size:
                        raise InputError(f"picture {number} has over {self.size} bytes: make it smaller")
                    if time.monotonic() > end:
                        raise TimeoutError
        except InputError:
            raise
        except TimeoutError:
            raise InputError(f"picture {number} was not there within {self.seconds:g} s: send a data URL") from None
        except urllib.error.HTTPError as error:
            error.close()
            raise InputError(f"picture {number} was answered with {error.code} {error.reason}") from None
        except Exception as error:  # what a foreign server says may break any part of a client
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise InputError(f"picture {number} was not there within {self.seconds:g} s: send a data URL") from None
            raise InputError(f"picture {number} cannot be fetched: {reason}") from None
        return b"".join(parts)


class _SameHost(urllib.request.HTTPRedirectHandler):
    """Follows a redirect within a host and port alone: others were not asked whether they are allowed."""

    max_redirections = 3

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if (old.scheme, old.netloc) != (new.scheme, new.netloc):
            raise InputError(f"{req.full_url[:_SHOWN]!r} redirects to {newurl[:_SHOWN]!r}, of another host: give its own URL")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _port_is_well(found: Any) -> bool:
    try:
        return bool(found.hostname) and (found.port is None or found.port > 0)
    except ValueError:
        return False


def _of_data_url(url: str, number: int) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise InputError(f"picture {number} is not a data URL such as data:image/png;base64,...")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"picture {number} is not base64: {error}") from None


def _opened(data: bytes, number: int) -> Image.Image:
    """A picture of which the header alone was read."""
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"picture {number} is too large: {error}") from None
    except Exception:  # bytes that anybody sent
        raise InputError(f"picture {number} is none of {', '.join(FORMATS)}") from None
    return picture


def _decoded(picture: Image.Image, number: int) -> Image.Image:
    try:
        # What cameras add to a JPEG is a preview or another view, after the picture itself.
        if picture.format != "MPO" and getattr(picture, "is_animated", False):
            raise InputError(f"picture {number} is animated: send one frame")
        picture.load()
        return _in_colour(ImageOps.exif_transpose(picture), number)
    except InputError:
        raise
    except Exception as error:  # bytes that anybody sent
        raise InputError(
            f"picture {number} cannot be decoded: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from None


def _in_colour(picture: Image.Image, number: int) -> Image.Image:
    """In RGB; of 16 bits the upper 8, as of pictures of 16 bits a channel. Pillow's own conversion makes them white."""
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise InputError(f"picture {number} has pixels of mode {picture.mode}, of no known white: save it with 8 bits")
    return picture.convert("RGB")
