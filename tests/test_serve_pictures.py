"""Pictures of requests: what is loaded, and what is refused before a pixel is decoded."""

from __future__ import annotations

import io
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from unittest import mock

import doors
import numpy as np
import pytest
from PIL import Image

from vitcop_compile import ConfigError, InputError
from vitcop_compile.serve.pictures import Pictures


def refusal(urls: list[str] | str, **settings: Any) -> str:
    with pytest.raises(InputError) as caught:
        Pictures(**settings).load([urls] if isinstance(urls, str) else urls)
    return str(caught.value)


def test_pictures_are_loaded_in_order_upright_and_in_colour() -> None:
    side = Image.new("L", (6, 4))
    side.putpixel((0, 0), 255)
    exif = Image.Exif()
    exif[0x112] = 6  # held on its side
    out = io.BytesIO()
    side.save(out, "PNG", exif=exif)
    plain = doors.data_url(doors.picture(kind="WEBP", lossless=True), "image/webp")
    first, second = Pictures().load([doors.data_url(out.getvalue()), plain])
    assert (first.size, first.mode) == ((4, 6), "RGB") and first.getpixel((3, 0)) == (255, 255, 255)
    assert second.size == (60, 40) and np.asarray(second).reshape(-1, 3).tolist() == [[200, 30, 90]] * 2400
    assert Pictures().load([]) == []
    # Upper case, and parameters, as the standard has them.
    Pictures().load(["DATA:image/gif;charset=x;base64," + doors.data_url(doors.picture(kind="GIF")).partition(",")[2]])


def truncated(kind: str) -> str:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    out = io.BytesIO()
    noise.save(out, kind)
    return doors.data_url(out.getvalue()[: len(out.getvalue()) // 2])


def test_what_is_no_picture_is_refused() -> None:
    for kind in ("JPEG", "PNG"):
        assert "picture 0 cannot be decoded: " in refusal(truncated(kind))
    assert "is none of JPEG, PNG, WEBP, GIF" in refusal(truncated("WEBP"))
    assert "is none of JPEG, PNG, WEBP, GIF" in refusal(doors.data_url(b"<svg/>"))
    assert "is none of JPEG, PNG, WEBP, GIF" in refusal(doors.data_url(doors.picture(kind="BMP")))
    assert "is none of" in refusal(doors.data_url(b""))
    assert "is not base64" in refusal("data:image/png;base64,@@@@")
    assert "is not base64" in refusal("data:image/png;base64,é")
    for url in ("data:image/png,abc", "data:image/png;base64", "data:"):
        assert "not a data URL such as data:image/png;base64" in refusal(url)
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    out = io.BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    assert "picture 1 is animated: send one frame" in refusal(
        [doors.data_url(doors.picture()), doors.data_url(out.getvalue())]
    )


def broken(picture: bytes, *changes: tuple[int, bytes]) -> bytes:
    data = bytearray(picture)
    for at, new in changes:
        data[at : at + len(new)] = new
    return bytes(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_sizes_are_known_before_anything_is_decoded() -> None:
    bomb = doors.huge_png(10_000, 10_000)
    assert len(bomb) < 20_000
    webp = broken(doors.picture(kind="WEBP"), (26, struct.pack("<HH", 16_383, 16_383)))
    small, flat = doors.data_url(doors.picture(10, 10)), doors.data_url(doors.picture(201, 1))
    with mock.patch.object(Image.Image, "load", side_effect=AssertionError("decoded")):
        assert "picture 0 is 10000 x 10000: the pictures of a request may have 40000000 pixels" in refusal(
            doors.data_url(bomb)
        )
        # Beyond what Pillow itself opens.
        assert "picture 0 is too large" in refusal(doors.data_url(doors.huge_png(60_000, 60_000, 1)))
        assert "picture 0 is too large" in refusal(doors.data_url(webp))
        assert "picture 2 is 10 x 10: the pictures of a request may have 250 pixels" in refusal([small] * 3, pixels=250)
        assert "picture 0 is 201 x 1: one side is over 200 times the other" in refusal(flat)
    assert "3 pictures in a request, the limit is 2" in refusal([small] * 3, count=2)
    assert [picture.size for picture in Pictures(pixels=300, count=3).load([small] * 3)] == [(10, 10)] * 3
    assert Pictures().load([doors.data_url(doors.picture(1, 200))])[0].size == (1, 200)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A host of pictures on loopback, which notes what it is asked for."""
    monkeypatch.setenv("no_proxy", "*")
    release = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.asked.append(self.path)  # type: ignore[attr-defined]
            elsewhere = {"/away": "http://localhost:1/x.png", "/file": "file:///etc/passwd", "/loop": "/loop"}
            moved = {"/moved": "/a.png"} | elsewhere
            if self.path in moved:
                self.send_response(302)
                self.send_header("Location", moved[self.path])
                self.end_headers()
                return
            if self.path == "/a.png":
                body = doors.picture()
            elif self.path == "/large":
                body = bytes(3_000)
            elif self.path == "/slow":
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"x")
                self.wfile.flush()
                release.wait(30)
                return
            else:
                self.send_error(404)
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    release.set()
    server.shutdown()
    server.server_close()
    thread.join()


def test_pictures_of_hosts_that_are_allowed(host: Any) -> None:
    port = host.server_port
    at, allowed = f"http://127.0.0.1:{port}", {"hosts": (f"127.0.0.1:{port}",)}
    loaded = Pictures(**allowed).load([f"{at}/a.png", f"{at}/moved"])
    assert [picture.size for picture in loaded] == [(60, 40)] * 2
    assert host.asked == ["/a.png", "/moved", "/a.png"]
    assert "redirects to 'http://localhost:1/x.png', of another host" in refusal(f"{at}/away", **allowed)
    assert "picture 0 was answered with 302" in refusal(f"{at}/file", **allowed)
    assert "picture 0 was answered with 302" in refusal(f"{at}/loop", **allowed)
    assert "picture 0 was answered with 404 Not Found" in refusal(f"{at}/none", **allowed)
    assert "picture 0 has over 2000 bytes" in refusal(f"{at}/large", size=2_000, **allowed)
    assert "was not there within 0.2 s" in refusal(f"{at}/slow", seconds=0.2, **allowed)
    assert "cannot be fetched: " in refusal("http://127.0.0.1:9/x", hosts=("127.0.0.1:9",))


def test_other_hosts_are_never_asked(host: Any) -> None:
    port, allowed = host.server_port, ("images.example.org", "127.0.0.1:1")
    for url in (
        f"http://127.0.0.1:{port}/a.png", f"http://images.example.org@127.0.0.1:{port}/a.png",
        f"http://127.0.0.1:{port}\\@images.example.org/a.png", f"http://images.example.org:{port}/a.png",
        f"http://images.example.org.:{port}/", f"http://user@images.example.org/{port}", "http://[::1", "http://",
        f"http://images.example.org/a b?http://127.0.0.1:{port}", "https://images.example.org:80/", "http://a.images.example.org/",
        f"http://127.0.0.1:{port}/a.png#images.example.org", "http://images.example.org\n.evil/",
    ):  # fmt: skip
        said = refusal(url, hosts=allowed)
        assert "not of a host that pictures are fetched from" in said or "is not a URL" in said, url
    for url in ("file:///etc/passwd", "ftp://images.example.org/a.png", "/etc/passwd", "a.png", ""):
        assert "neither a data URL nor http or https" in refusal(url, hosts=allowed), url
    assert "(none)" in refusal(f"http://127.0.0.1:{port}/a.png")
    assert host.asked == []


def test_hosts_that_are_none_are_refused() -> None:
    for wrong in ("http://a.org", "a.org/b", "", "me@a.org", "a.org:x", "a.org:70000"):
        with pytest.raises(ConfigError, match="is not a name such as"):
            Pictures(hosts=(wrong,))


def scanned(picture: bytes, more: int) -> bytes:
    """A progressive JPEG whose last scan is there so many times more."""
    end = picture.rindex(b"\xff\xd9")
    return picture[:end] + picture[picture.rindex(b"\xff\xda") : end] * more + picture[end:]


def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded() -> None:
    jpeg = doors.picture(kind="JPEG", progressive=True)
    once = jpeg.count(b"\xff\xda")
    assert 1 < once < 16
    at_most = doors.data_url(scanned(jpeg, 100 - once))
    assert Pictures().load([at_most])[0].size == (60, 40)
    with mock.patch.object(Image.Image, "load", side_effect=AssertionError("decoded")):
        assert "picture 0 is a JPEG of 101 scans: 100 may be" in refusal(doors.data_url(scanned(jpeg, 101 - once)))
        # 100 scans of 2,400 pixels are 240,000.
        assert "picture 0 is a JPEG of 100 scans: 100 may be, and 160000 pixels of all" in refusal(at_most, pixels=10_000)
        two = doors.data_url(scanned(jpeg, 20 - once))  # 48,000 each
        assert "picture 1 is a JPEG of 20 scans" in refusal([two, two], pixels=5_000)
    assert len(Pictures(pixels=6_000).load([two, two])) == 2


def test_a_picture_with_a_preview_is_its_first() -> None:
    first, preview = Image.new("RGB", (60, 40), (200, 30, 90)), Image.new("RGB", (30, 20), (0, 0, 0))
    out = io.BytesIO()
    first.save(out, "MPO", save_all=True, append_images=[preview])
    (loaded,) = Pictures().load([doors.data_url(out.getvalue(), "image/jpeg")])
    assert loaded.size == (60, 40) and np.abs(np.asarray(loaded).astype(int) - [200, 30, 90]).max() < 8
    with pytest.raises(AttributeError):
        loaded.n_frames  # noqa: B018


def test_pictures_of_16_bits_keep_their_greys() -> None:
    ramp = np.array([[0, 255, 256, 0x7FFF], [0x8000, 0xABCD, 0xFEFF, 0xFFFF]], dtype=np.uint16)
    exif = Image.Exif()
    exif[0x112] = 3  # upside down
    out = io.BytesIO()
    Image.fromarray(ramp).save(out, "PNG", exif=exif)
    (loaded,) = Pictures().load([doors.data_url(out.getvalue())])
    assert loaded.mode == "RGB"
    assert np.asarray(loaded)[::-1, ::-1].tolist() == [
        [[0] * 3, [0] * 3, [1] * 3, [0x7F] * 3],
        [[0x80] * 3, [0xAB] * 3, [0xFE] * 3, [0xFF] * 3],
    ]
    for mode in ("I", "F"):
        with mock.patch("PIL.Image.open", return_value=Image.new(mode, (4, 4))):
            assert f"picture 0 has pixels of mode {mode}, of no known white: save it with 8 bits" in refusal("data:;base64,")


def test_hosts_by_address() -> None:
    for hosts, url in (
        ("[::1]:8123", "http://[::1]:8123/a.png"),
        ("[::1]", "http://[::1]/a.png"),
        ("[FE80::a]", "https://[fe80::A]/a.png"),
        ("Name:443", "https://name/a.png"),
    ):
        Pictures(hosts=(hosts,))._check_allowed(url, 0)
    for url in ("http://[::1]:8124/a.png", "http://[::2]:8123/a.png", "http://::1:8123/a.png", "http://[::1]/a.png"):
        assert "not of a host" in (said := refusal(url, hosts=("[::1]:8123",))) or "is not a URL" in said, url
