"""What a request may name as a picture or video, and every refusal, with a real HTTP server and real files."""

from __future__ import annotations

import asyncio
import base64
import os
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trustme
from PIL import Image
from test_media import write_video

from mmdist.serving import pictures
from mmdist.serving.errors import ServeError
from mmdist.serving.fetch import Fetcher, PublicNetwork, is_public, read_url
from mmdist.serving.pictures import Media
from mmdist.task_config import ServerConfig

HOST = "pictures.test"
MAX_BYTES = 200_000


def noise(width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def saved(kind: str = "PNG", image: Image.Image | None = None, **options: Any) -> bytes:
    file = BytesIO()
    (image or noise()).save(file, kind, **options)
    return file.getvalue()


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64_of(data)}"


def media(**settings: Any) -> Media:
    return Media(ServerConfig(**{"max_media_mb": MAX_BYTES / 1e6, "max_image_pixels": 10_000, **settings}), 4)


def read(source: str, **settings: Any) -> Image.Image:
    return asyncio.run(media(**settings).image(source))


def refused(source: str, **settings: Any) -> tuple[int, str]:
    with pytest.raises(ServeError) as error:
        read(source, **settings)
    return error.value.status, error.value.message


@pytest.mark.parametrize("kind", ("PNG", "JPEG", "WEBP", "BMP", "GIF"))
def test_data_urls_and_base64(kind: str) -> None:
    data = saved(kind)
    want = np.asarray(Image.open(BytesIO(data)).convert("RGB"))
    for source in (data_url(data), base64_of(data), f"DATA:image/x;name=a;BASE64,{base64_of(data)}"):
        assert (np.asarray(read(source)) == want).all()
    lines = base64.encodebytes(data).decode()
    assert (np.asarray(read(lines)) == want).all()


def test_pictures_are_turned_and_rgb() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a phone held upright
    assert read(data_url(saved("JPEG", exif=exif))).size == (30, 40)
    assert read(data_url(saved("PNG", noise().convert("LA")))).mode == "RGB"


def test_a_phone_jpeg_with_a_second_picture_is_one_picture() -> None:
    data = saved("MPO", save_all=True, append_images=[noise(20, 20)])
    assert Image.open(BytesIO(data)).n_frames == 2
    assert read(data_url(data)).size == (40, 30)


def animation(kind: str) -> bytes:
    return saved(kind, save_all=True, append_images=[noise().rotate(180)], duration=100)


def many_scans() -> bytes:
    """A progressive JPEG whose last scan is repeated: few bytes, many passes."""
    data = saved("JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * 100 + data[-2:]


BAD_PICTURES = {
    "text": (b"no picture at all", 422, "not a picture (PNG, JPEG, WEBP, BMP, GIF)"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 422, "not a picture"),
    "empty": (b"", 422, "not a picture"),
    "tiff": (saved("TIFF"), 422, "not a picture"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 422, "not a picture"),
    "gif film": (animation("GIF"), 422, "an animation of 2 pictures"),
    "apng": (animation("PNG"), 422, "an animation of 2 pictures"),
    "webp film": (animation("WEBP"), 422, "an animation of 2 pictures"),
    "scans": (many_scans(), 422, "more than 100 scans"),
    "bomb": (saved("PNG", Image.new("1", (20_000, 20_000))), 413, "too large"),
    "pixels": (saved("PNG", Image.new("1", (101, 100))), 413, "101 x 100 pixels are more than 10000"),
    "file size": (saved("BMP", Image.new("RGB", (300, 300))), 413, "larger than 0.2 MB (server.max_media_mb)"),
    **{f"cut {kind}": (saved(kind)[:-300], 422, "damaged picture") for kind in ("PNG", "JPEG", "BMP", "GIF")},
    "cut WEBP": (saved("WEBP")[:-300], 422, ": "),
}


@pytest.mark.parametrize("case", BAD_PICTURES)
def test_bad_pictures(case: str) -> None:
    data, status, words = BAD_PICTURES[case]
    found = refused(data_url(data))
    assert found[0] == status and words in found[1] and found[1].startswith("picture: ")


def test_pixels_are_counted_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    assert refused(data_url(saved("PNG", Image.new("1", (3000, 3000)))))[0] == 413


def test_damaged_files_are_refused_or_read_but_never_fail_otherwise() -> None:
    random = np.random.default_rng(1)
    settings = media()
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF"):
        whole = np.frombuffer(saved(kind), np.uint8)
        for _ in range(60):
            data = whole.copy()
            data[random.integers(0, len(data), 4)] = random.integers(0, 256, 4)
            try:
                asyncio.run(settings.image(base64_of(data.tobytes())))
            except ServeError as error:
                assert error.status in (413, 422)


@pytest.mark.parametrize(
    ("source", "words"),
    (
        ("data:image/png,abc", "expected data:TYPE;base64"),
        ("data:image/png;base64", "expected data:TYPE;base64"),
        ("data:image/png;base64,%%%", "not base64"),
        ("a red cat", "expected data:TYPE;base64,..., base64, http(s)://... or file://"),
        ("", "not a picture"),
        ("/etc/hosts.png", "this server reads no files"),
        ("file:///etc/hosts", "this server reads no files"),
        ("file://elsewhere/etc/hosts", "a file of another host"),
        ("ftp://host.test/a.png", "expected data:TYPE;base64"),
        ("https://host.test/a.png", "host.test is not among server.allowed_media_domains"),
    ),
)
def test_sources_that_are_none(source: str, words: str) -> None:
    status, message = refused(source)
    assert status == 422 and words in message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "media"
    (root / "deep").mkdir(parents=True)
    (root / "deep" / "a b.png").write_bytes(saved())
    (root / "large.bmp").write_bytes(saved("BMP", Image.new("RGB", (300, 300))))
    (tmp_path / "secret.png").write_bytes(saved())
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "inner.png").symlink_to(root / "deep" / "a b.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    os.mkfifo(root / "pipe.png")
    return root


def test_files_below_the_allowed_folder(folder: Path) -> None:
    for source in (
        "deep/a b.png",
        f"{folder}/deep/a b.png",
        f"file://{folder}/deep/a%20b.png",
        "deep/../inner.png",
        f"file://localhost{folder}/inner.png",
    ):
        assert read(source, allowed_media_path=str(folder)).size == (40, 30)


@pytest.mark.parametrize(
    ("source", "status", "words"),
    (
        ("../secret.png", 422, "not below"),
        ("/etc/hosts.png", 422, "not below"),
        ("file:///etc/hostname", 422, "not below"),
        ("file:///%2e%2e/etc/hostname", 422, "not below"),
        ("link.png", 422, "not below"),
        ("loop.png", 422, "no such file"),
        ("none.png", 422, "no such file"),
        ("a\0.png", 422, "no such file"),
        ("x." + "n" * 5000, 422, "no such file"),
        ("./deep", 422, "no such file"),
        ("pipe.png", 422, "not a picture"),
        ("large.bmp", 413, "larger than 0.2 MB"),
    ),
)
def test_other_files_are_not_read(folder: Path, source: str, status: int, words: str) -> None:
    found = refused(source, allowed_media_path=str(folder))
    assert found[0] == status and words in found[1] and len(found[1]) < 250


class Web(BaseHTTPRequestHandler):
    """A server of pictures with bad habits; `seen` is what it was asked."""

    seen: list[dict[str, str]] = []

    def do_GET(self) -> None:
        type(self).seen.append({"path": self.path, **{name.lower(): value for name, value in self.headers.items()}})
        getattr(self, self.path[1:].partition("?")[0].partition("/")[0])()

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def picture(self) -> None:
        self.reply(200, saved(), **{"Content-Type": "image/png"})

    def moved(self) -> None:
        self.reply(302, Location="/picture")

    def missing(self) -> None:
        self.reply(404)

    def large(self) -> None:
        self.reply(200, b"x" * (MAX_BYTES + 1))

    def endless(self) -> None:
        self.reply(200)
        try:
            while True:
                self.wfile.write(b"x" * 10_000)
        except OSError:
            type(self).seen.append({"path": "closed"})

    def slow(self) -> None:
        self.reply(200, b"x")
        time.sleep(3)

    def trickle(self) -> None:
        self.reply(200)
        for _ in range(30):
            self.wfile.write(b"x")
            self.wfile.flush()
            time.sleep(0.1)

    def cut(self) -> None:
        self.reply(200, b"x", **{"Content-Length": "100"})

    def log_message(self, *_: Any) -> None:
        pass


class Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        pass


@pytest.fixture
def web() -> Iterator[ThreadingHTTPServer]:
    Web.seen = []
    server = Quiet(("127.0.0.1", 0), Web)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


async def to_loopback(host: str, port: int) -> list[str]:
    return ["127.0.0.1"]


def fetch(port: int, path: str = "/picture", *, scheme: str = "http", check: Any = None, **options: Any) -> Image.Image:
    """From the server at `port`, which is called pictures.test here. check: True lets loopback pass."""
    network = PublicNetwork(to_loopback, **({} if check is None else {"is_allowed": check}))
    names = options.pop("names", [f"{HOST}:{port}"])
    url = options.pop("url", f"{scheme}://{HOST}:{port}{path}")
    fetcher = Fetcher(names, timeout_s=1, max_bytes=MAX_BYTES, network=network, **options)
    return asyncio.run(Media(ServerConfig(), 4, fetcher).image(url))


def anywhere(address: str) -> bool:
    return True


def test_an_allowed_host(web: ThreadingHTTPServer) -> None:
    port = web.server_address[1]
    assert fetch(port, "/picture/ä b?c=d e&f=%20#g", check=anywhere).size == (40, 30)
    assert Web.seen[0]["path"] == "/picture/%C3%A4%20b?c=d%20e&f=%20"
    assert Web.seen[0]["host"] == f"{HOST}:{port}"
    assert fetch(port, check=anywhere, url=f"HTTP://Pictures.TEST:{port}/picture").size == (40, 30)


@pytest.mark.parametrize(
    ("path", "status", "words"),
    (
        ("/moved", 422, "answered 302; redirects are not followed"),
        ("/missing", 422, "answered 404"),
        ("/large", 413, "larger than 0.2 MB"),
        ("/endless", 413, "larger than 0.2 MB"),
        ("/slow", 422, "did not arrive within 1 s"),
        ("/trickle", 422, "did not arrive within 1 s"),
        ("/cut", 422, "could not be fetched"),
    ),
)
def test_bad_servers(web: ThreadingHTTPServer, path: str, status: int, words: str) -> None:
    with pytest.raises(ServeError, match=HOST) as error:
        fetch(web.server_address[1], path, check=anywhere)
    assert error.value.status == status and words in error.value.message
    asked = [entry["path"] for entry in Web.seen if entry["path"] != "closed"]
    assert asked == [path]


def test_a_loopback_address_is_refused_without_a_connection(web: ThreadingHTTPServer) -> None:
    with pytest.raises(ServeError, match=r"pictures\.test is not at a public address"):
        fetch(web.server_address[1])
    assert Web.seen == []


@pytest.mark.parametrize(
    ("names", "url", "words"),
    (
        ([HOST], f"http://{HOST}:8000/a.png", "not among server.allowed_media_domains"),
        ([f"{HOST}:8000"], f"http://{HOST}/a.png", "not among"),
        ([HOST], f"http://a.{HOST}/a.png", "not among"),
        ([HOST], f"http://{HOST}./a.png", "not among"),
        ([HOST], f"http://{HOST}@127.0.0.1/a.png", "a user in it"),
        ([HOST], f"http://127.0.0.1\\@{HOST}/a.png", "a user in it"),
        ([HOST], f"http://user:word@{HOST}/a.png", "a user in it"),
        ([HOST], f"http://{HOST}:99999/a.png", "ut of range"),
        ([HOST], "http:///a.png", "expected http://HOST/PATH"),
        ([HOST], "http:a.png", "expected http://HOST/PATH"),
        ([HOST], "http://[::1/a.png", "nvalid IPv6"),
        ([HOST], "http://2130706433/a.png", "not among"),
        ([HOST], f"http://{'a' * 70}.test/a.png", "label"),
        ([HOST], f"http://{HOST}/a.png", "not at a public address"),
        (["127.0.0.1"], "http://127.0.0.1/a.png", "not at a public address"),
    ),
)
def test_addresses_that_are_not_asked(names: list[str], url: str, words: str) -> None:
    with pytest.raises(ServeError) as error:
        fetch(0, names=names, url=url)
    assert error.value.status == 422 and words in error.value.message


def test_a_name_is_resolved_once(web: ThreadingHTTPServer) -> None:
    """The address that was checked is the one connected to, so a name that changes its mind gains nothing."""
    lookups = []

    async def resolve(host: str, port: int) -> list[str]:
        lookups.append(host)
        return ["127.0.0.1"] if len(lookups) == 1 else ["127.0.0.2"]

    port = web.server_address[1]
    network = PublicNetwork(resolve, is_allowed=lambda address: address == "127.0.0.1")
    fetcher = Fetcher([f"{HOST}:{port}"], timeout_s=1, max_bytes=MAX_BYTES, network=network)
    assert asyncio.run(fetcher.fetch(f"http://{HOST}:{port}/picture", "a")) == saved()
    assert lookups == [HOST]


def test_one_private_address_among_public_ones_is_enough() -> None:
    async def both(host: str, port: int) -> list[str]:
        return ["93.184.216.34", "10.0.0.1"]

    fetcher = Fetcher([HOST], timeout_s=1, max_bytes=MAX_BYTES, network=PublicNetwork(both))
    with pytest.raises(ServeError, match="not at a public address"):
        asyncio.run(fetcher.fetch(f"http://{HOST}/picture", "a"))


def test_https_sees_the_name(web: ThreadingHTTPServer) -> None:
    """The certificate is checked against the host, though the connection goes to an address."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(HOST).configure_cert(context)
    web.socket = context.wrap_socket(web.socket, server_side=True)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    port = web.server_address[1]
    assert fetch(port, scheme="https", check=anywhere, ssl_context=trusting).size == (40, 30)
    for other in ({"ssl_context": trusting, "names": ["other.test:%d"]}, {}):
        names = [name % port for name in other.get("names", [f"{HOST}:%d"])]
        with pytest.raises(ServeError, match="certificate"):
            fetch(port, check=anywhere, url=f"https://{names[0]}/picture", **{**other, "names": names})


@pytest.mark.parametrize(
    "address",
    (
        *(
            "127.0.0.1",
            "127.9.9.9",
            "0.0.0.0",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.0.1",
            "169.254.169.254",
            "100.64.0.1",
        ),
        *("224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1"),
        *("::", "::1", "fe80::1", "fe80::1%2", "fc00::1", "fd12::1", "fec0::1", "ff02::1", "2001:db8::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::1", "2002:7f00:1::1"),
        *("2001:0:4136:e378:8000:63bf:3fff:fdd2", "100::1"),
    ),
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ("93.184.216.34", "1.1.1.1", "2606:4700:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101")
)
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(address)


def test_what_is_checked_is_what_is_asked_for() -> None:
    place = read_url("http://ExAmple.test:81/a%20b\u00e9?x= y\r\n#z")
    assert (place.host, place.port, place.target) == ("example.test", 81, "/a%20b%C3%A9?x=%20y")
    assert read_url("https://b\u00fccher.test").host == "xn--bcher-kva.test"


def greys(frames: list[Image.Image]) -> list[int]:
    return [int(np.asarray(frame).mean()) for frame in frames]


def read_film(source: str, **settings: Any) -> list[Image.Image]:
    return asyncio.run(media(max_media_mb=2, **settings).video(source))


def test_videos(tmp_path: Path) -> None:
    array = write_video(tmp_path / "film.mkv", 9)
    np.save(tmp_path / "film.npy", array)
    want = [0, 20, 40, 60]
    for name in ("film.mkv", "film.npy"):
        data = (tmp_path / name).read_bytes()
        assert greys(read_film(data_url(data, "video/mp4"))) == want
        assert greys(read_film(name, allowed_media_path=str(tmp_path))) == want
    frames = ",".join(base64_of(saved("JPEG", Image.fromarray(frame))) for frame in array)
    assert greys(read_film(f"data:video/jpeg;base64,{frames}")) == want


def test_bad_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "film.mkv", 9)
    film = (tmp_path / "film.mkv").read_bytes()
    array = saved_array(np.zeros((9, 32, 48, 3), np.uint8))
    playlist = f"#EXTM3U\n#EXTINF:1,\n{tmp_path}/film.mkv\n#EXT-X-ENDLIST\n".encode()
    concat = f"ffconcat version 1.0\nfile {tmp_path}/film.mkv\n".encode()
    for data, status, words in (
        (b"no film", 422, "not a video"),
        (playlist, 422, "not a video"),
        (concat, 422, "not a video"),
        (film[:60], 422, "not a readable video"),
        (b"\0\0\0\x18ftyp" + b"x" * 100, 422, "not a readable video"),
        (array[:-1], 422, "not an array of frames"),
        (array[:9], 422, "not an array of frames"),
        (saved_array(np.zeros((0, 32, 48, 3), np.uint8)), 422, "a video of 0 frames"),
        (saved_array(np.zeros((2, 8, 8, 3))), 422, "expected uint8"),
    ):
        with pytest.raises(ServeError) as error:
            read_film(data_url(data))
        assert error.value.status == status and words in error.value.message, data[:20]
    for data in (film, array):
        with pytest.raises(ServeError, match="48 x 32 pixels are more than 1000") as error:
            read_film(data_url(data), max_image_pixels=1000)
        assert error.value.status == 413
    monkeypatch.setattr(pictures, "MAX_VIDEO_FRAMES", 8)
    for data in (film, array):
        with pytest.raises(ServeError, match="more than 8 frames") as error:
            read_film(data_url(data))
        assert error.value.status == 413


def saved_array(array: np.ndarray) -> bytes:
    file = BytesIO()
    np.save(file, array)
    return file.getvalue()
