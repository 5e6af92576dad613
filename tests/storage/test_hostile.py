"""Servers, files and folders that are not what they claim: an error of ours, in bounded memory, and never a wait."""

import bz2
import gzip
import json
import lzma
import os
import socket
import subprocess
import sys
import threading
import zlib

import numcodecs
import numpy as np
import pytest
import zarr

from storage import (
    ChunkCache,
    ConversionError,
    ConvertOptions,
    CorruptImageError,
    NotAPyramidError,
    Slide,
    StorageError,
    TransferError,
    UnsupportedImageError,
    open_image,
    validate,
    write_pyramid,
)
from storage.format.ome_zarr import seal
from storage.place.remote_store import RemoteStore
from storage.place.retry import Patience

from .test_foreign import edit, texture, write_foreign

HUGE = 68719476736


class HostileServer:
    """Sends the same to everybody: a head, and a body piece by piece without end, or with a pause in between."""

    def __init__(self) -> None:
        self.head, self.piece, self.pause_s = b"", b"x" * 65536, 0.0
        self.requests: list[str] = []
        self.over = threading.Event()
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.threads = [threading.Thread(target=self.accept)]
        self.threads[0].start()

    def accept(self) -> None:
        while True:
            connection, _ = self.socket.accept()
            if self.over.is_set():
                connection.close()
                return
            self.threads.append(threading.Thread(target=self.answer, args=(connection,)))
            self.threads[-1].start()

    def answer(self, connection: socket.socket) -> None:
        with connection:
            try:
                self.requests.append(connection.recv(65536).decode().partition("\r\n")[0])
                connection.sendall(self.head)
                while self.piece and not self.over.wait(self.pause_s):
                    connection.sendall(self.piece)
            except OSError:
                pass

    def close(self) -> None:
        self.over.set()
        socket.create_connection(self.socket.getsockname()).close()
        for thread in self.threads:
            thread.join()
        self.socket.close()


@pytest.fixture
def hostile():
    server = HostileServer()
    yield server
    server.close()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr("storage.place.retry.TIMEOUT_S", 0.3)
    monkeypatch.setattr("storage.place.retry.READING", Patience(4, 0.0))


@pytest.fixture
def pyramid(tmp_path, textured):
    options = ConvertOptions(chunk=16, shard=32, min_level_size=32)
    write_pyramid(tmp_path / "p.ome.zarr", textured((3, 60, 70)), options=options)
    return tmp_path / "p.ome.zarr"


def change_root(pyramid, change):
    """Change what a pyramid says of itself, and make its checksum hold."""
    root = json.loads((pyramid / "zarr.json").read_text())
    change(root, root["attributes"]["ome"]["multiscales"][0], root["attributes"]["nested_ats"])
    seal(root)
    (pyramid / "zarr.json").write_text(json.dumps(root))


def read_all(pyramid):
    with Slide(pyramid) as slide:
        for level in range(len(slide.levels)):
            slide.read(level, (0, 0, 60, 70))


class TestServers:
    @pytest.mark.parametrize("status", ["200 OK", "404 Not Found", "403 Forbidden", "503 Busy"])
    def test_a_claimed_length_is_not_believed(self, hostile, status):
        """In a process of its own, which it would end."""
        hostile.head = f"HTTP/1.1 {status}\r\nContent-Length: {HUGE}\r\n\r\n".encode()
        code = f"""if True:
            import storage, storage.place.retry
            storage.place.retry.READING = storage.place.retry.Patience(0, 60.0)
            for open_, name in (("Slide", "p.zarr"), ("open_image", "p.tif"), ("validate", "p.zarr")):
                try:
                    print("ours", getattr(storage, open_)(f"{hostile.url}/{{name}}"))
                except storage.StorageError as error:
                    print("ours", error)
        """
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr[-500:]
        assert done.stdout.count("ours ") == 3

    def test_metadata_is_refused_by_its_size(self, hostile):
        hostile.head, hostile.piece = b"HTTP/1.1 200 OK\r\nContent-Length: 67108865\r\n\r\n", b""
        with pytest.raises(
            CorruptImageError, match=r"zarr\.json: holds 67108865 bytes, more than the 67108864 it may"
        ):
            Slide(f"{hostile.url}/p.zarr")

    def test_a_body_without_a_length_is_cut_off(self, hostile):
        hostile.head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        hostile.piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        with pytest.raises(CorruptImageError, match="holds more than the 100000 it may"):
            RemoteStore(hostile.url).get("zarr.json", 100_000)

    @pytest.mark.parametrize("content_range", ["bytes 0-99/1000", "bytes 0-999/1000", "bytes 7-106/1000", "no", ""])
    def test_a_range_is_bounded_by_what_was_asked(self, hostile, content_range):
        hostile.head = (
            f"HTTP/1.1 206 Partial\r\nContent-Length: {HUGE}\r\nContent-Range: {content_range}\r\n\r\n".encode()
        )
        with pytest.raises(TransferError, match="0/c/0/0/0: the request failed"):
            next(RemoteStore(hostile.url).get_ranges([("0/c/0/0/0", 0, 100)]))

    @pytest.mark.parametrize(
        "head", [b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: "]
    )
    def test_an_answer_that_drips_has_a_time(self, hostile, impatient, head):
        hostile.head, hostile.piece, hostile.pause_s = head, b"x", 0.05
        with pytest.raises(TransferError, match=r"no whole answer within 0\.3 s"):
            Slide(f"{hostile.url}/p.zarr")
        assert len(hostile.requests) == 1

    @pytest.mark.parametrize(
        "place", ["file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://x/", "data:text/plain,{}"]
    )
    def test_redirects_stay_within_http(self, hostile, place):
        hostile.head = f"HTTP/1.1 302 Found\r\nLocation: {place}\r\nContent-Length: 0\r\n\r\n".encode()
        with pytest.raises(TransferError, match="the request failed"):
            Slide(f"{hostile.url}/p.zarr")

    def test_redirects_end(self, hostile):
        ends = b"Content-Length: 0\r\nConnection: close\r\n\r\n"
        hostile.head, hostile.piece = b"HTTP/1.1 302 Found\r\nLocation: /again\r\n" + ends, b""
        with pytest.raises(TransferError, match="TooManyRedirects"):
            Slide(f"{hostile.url}/p.zarr")

    def test_a_redirect_to_a_web_server_is_followed(self, hostile, web, pyramid):
        target = f"{web.url}/p.ome.zarr/zarr.json"
        hostile.head = f"HTTP/1.1 302 Found\r\nLocation: {target}\r\nContent-Length: 0\r\n\r\n".encode()
        hostile.piece = b""
        assert RemoteStore(hostile.url).get("zarr.json") == (pyramid / "zarr.json").read_bytes()

    def test_object_stores_are_bounded_too(self, hostile, monkeypatch):
        for name, value in {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "REGION": "c"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", hostile.url)
        date = "Last-Modified: Mon, 01 Jan 2024 00:00:00 GMT"
        hostile.head = f"HTTP/1.1 200 OK\r\n{date}\r\nContent-Length: {HUGE}\r\n\r\n".encode()
        with pytest.raises(CorruptImageError, match=f"holds {HUGE} bytes"):
            Slide("s3://bucket/p.zarr")
        part = "Content-Range: bytes 0-99/100"
        hostile.head = f"HTTP/1.1 206 Partial\r\n{date}\r\nContent-Length: {HUGE}\r\n{part}\r\n\r\n".encode()
        with pytest.raises(CorruptImageError, match="more than the 100 it may"):
            next(RemoteStore("s3://bucket/p.zarr").get_ranges([("0/c/0/0/0", 0, 100)]))


@pytest.fixture(params=["fifo", "device"])
def no_file(request):
    """Put something in the place of a file that would be read for ever."""

    def put(path):
        path.unlink(missing_ok=True)
        os.mkfifo(path) if request.param == "fifo" else path.symlink_to("/dev/zero")

    return put


class TestFiles:
    def test_what_is_no_file_is_refused(self, pyramid, no_file):
        for key, level in (("zarr.json", None), ("0/c/0/0/0", 0)):
            sound = (pyramid / key).read_bytes()
            no_file(pyramid / key)
            with pytest.raises(CorruptImageError, match=rf"{key}: a pipe or a device, not a file"):
                read_all(pyramid)
            assert level in [problem.level for problem in validate(pyramid)]
            (pyramid / key).unlink()
            (pyramid / key).write_bytes(sound)

    @pytest.mark.parametrize(("version", "key"), [("0.4", ".zattrs"), ("0.4", "0/.zarray"), ("0.5", "0/zarr.json")])
    def test_nor_in_pyramids_of_others(self, tmp_path, no_file, version, key):
        path = write_foreign(tmp_path / "f.zarr", texture((3, 40, 40), "uint8"), version=version)
        no_file(path / key)
        with pytest.raises(CorruptImageError, match=r"f\.zarr.*a pipe or a device, not a file"):
            Slide(path)

    def test_nor_as_an_image_or_in_a_cache(self, tmp_path, no_file):
        no_file(tmp_path / "image.tif")
        for open_ in (open_image, Slide):
            with pytest.raises(StorageError, match=r"image\.tif"):
                open_(tmp_path / "image.tif")
        with pytest.raises(UnsupportedImageError, match="a pipe or a device, not an image file"):
            open_image(tmp_path / "image.tif")
        cache = ChunkCache(tmp_path / "cache", max_bytes=10_000)
        cache.path("a").parent.mkdir(parents=True)
        no_file(cache.path("a"))
        assert cache.get("a") is None

    @pytest.mark.parametrize("key", ["zarr.json", "0/c/0/0/0", "0", "1/c"])
    def test_a_link_that_leads_out_is_refused(self, tmp_path, pyramid, key):
        """It is refused even where the file that it leads to would be sound."""
        outside = tmp_path / "outside"
        (pyramid / key).rename(outside)
        (pyramid / key).symlink_to(outside)
        with pytest.raises(CorruptImageError, match="a link that leads out of the pyramid"):
            read_all(pyramid)
        assert any("a link that leads out" in problem.message for problem in validate(pyramid))

    def test_a_link_to_a_pyramid_or_within_it_is_none(self, tmp_path, pyramid):
        (tmp_path / "link").symlink_to(pyramid)
        (pyramid / "0/c/0/0/0").rename(pyramid / "elsewhere")
        (pyramid / "0/c/0/0/0").symlink_to("../../../../elsewhere")
        with Slide(tmp_path / "link") as slide:
            slide.read(0, (0, 0, 60, 70))

    def test_a_sparse_shard_is_refused_by_its_size(self, pyramid):
        with open(pyramid / "0/c/0/0/0", "ab") as file:
            file.truncate(2 * 2**40)
        [problem] = [p for p in validate(pyramid, full=True) if p.what == "shard"]
        assert "0/c/0/0/0: holds 2199023255552 bytes, more than" in problem.message
        with Slide(pyramid) as slide:  # whose table tells where the index is
            slide.read(0, (0, 0, 60, 70))

    def test_and_in_pyramids_of_others(self, tmp_path):
        path = write_foreign(tmp_path / "f.zarr", texture((3, 40, 40), "uint8"), axes="cyx")
        with open(path / "0/c/0/0/0", "ab") as file:
            file.truncate(2 * 2**40)
        with (
            Slide(path) as slide,
            pytest.raises(CorruptImageError, match=r"chunk \(0, 0\) is damaged .*2199023255552"),
        ):
            slide.read(0, (0, 0, 40, 40))


class TestClaims:
    """The checksum of our own pyramids is right here, since whoever writes them can make one."""

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda root, image, own: image["datasets"].clear(), "without levels"),
            (lambda root, image, own: own["shards"][0]["length"].__setitem__(0, 2**64), "no sound table"),
            (lambda root, image, own: own["shards"][0]["length"].__setitem__(0, 10**12), "no sound table"),
            (lambda root, image, own: own["shards"][0]["length"].__setitem__(0, 5), "too short for its index"),
            (lambda root, image, own: own["shards"][0]["crc32"].__setitem__(0, 2**70), "no sound table"),
            (lambda root, image, own: own["shards"][0]["index_crc32c"].__setitem__(0, -1), "no sound table"),
            (lambda root, image, own: own["shards"][0]["length"].append(0), "no sound table"),
            (lambda root, image, own: own["shards"].pop(), "shards has 2 items, not 3"),
            (
                lambda root, image, own: (image["datasets"].reverse(), own["shards"].reverse()),
                "is said to be level 0 of .* correct the scales",
            ),
        ],
    )
    def test_are_checked_where_they_are_read(self, pyramid, change, words):
        change_root(pyramid, change)
        with pytest.raises(CorruptImageError, match=rf"p\.ome\.zarr: damaged metadata \(.*{words}"):
            Slide(pyramid)
        [problem] = validate(pyramid)
        assert problem.what == "metadata"

    @pytest.mark.parametrize("scale", [float("inf"), 5e-324, 0.0, -1.0, 10**400, 1e300, "1"])
    def test_scales_are_finite_and_normal(self, pyramid, scale):
        def change(root, image, own):
            image["datasets"][1]["coordinateTransformations"][0]["scale"][1] = scale

        change_root(pyramid, change)
        with pytest.raises(CorruptImageError, match="scale is .*, not a number of 1e-18 to 1e"):
            Slide(pyramid)

    def test_nesting_ends(self, pyramid):
        (pyramid / "zarr.json").write_text("[" * 100_000 + "]" * 100_000)
        with pytest.raises(CorruptImageError, match=r"zarr\.json is damaged \(nested too deep\)"):
            Slide(pyramid)
        [problem] = validate(pyramid)
        assert "nested too deep" in problem.message

    def test_absent_shards_take_no_memory(self, tmp_path):
        """Whose index would have 2048 x 2048 entries for every level."""
        write_pyramid(
            tmp_path / "p.zarr", np.zeros((1, 40, 40), np.uint8), options=ConvertOptions(chunk=16, shard=64)
        )
        text = (tmp_path / "p.zarr/zarr.json").read_text()
        text = text.replace("[1,64,64]", "[1,8192,8192]").replace("[1,16,16]", "[1,4,4]")
        (tmp_path / "p.zarr/zarr.json").write_text(text)
        change_root(tmp_path / "p.zarr", lambda root, image, own: None)
        with Slide(tmp_path / "p.zarr") as slide:
            assert [index._lines.nbytes for index in slide._source._indexes] == [0, 0]  # type: ignore[attr-defined]
            assert not slide.read(0, (0, 0, 40, 40)).any()
        assert {problem.what for problem in validate(tmp_path / "p.zarr", full=True)} == {
            "metadata"
        }  # the levels' own

    @pytest.mark.parametrize(
        "name", ["../0", "a/../../b", "http://127.0.0.1/x", "/etc", "a//b", "%2e%2e/x", "a\\b", "x\0", "?"]
    )
    @pytest.mark.parametrize("version", ["own", "0.4", "0.5"])
    def test_levels_lie_below_their_pyramid(self, tmp_path, pyramid, version, name):
        if version == "own":
            change_root(pyramid, lambda root, image, own: image["datasets"][0].update(path=name))
            path = pyramid
        else:
            path = write_foreign(tmp_path / "f.zarr", texture((3, 40, 40), "uint8"), version=version)
            file = {"0.4": ".zattrs", "0.5": "zarr.json"}[version]
            edit(path, lambda ome: ome["multiscales"][0]["datasets"][0].update(path=name), file)
        with pytest.raises(NotAPyramidError, match="leaves the pyramid"):
            Slide(path)


BOMB = bytes(64 * 2**20)
STREAMS = {
    "gzip": lambda data: gzip.compress(data, 9),
    "zlib": lambda data: zlib.compress(data, 9),
    "bz2": bz2.compress,
    "lzma": lzma.compress,
    "zstd": lambda data: bytes(numcodecs.zstd.compress(data, 1)),
    "lz4": lambda data: bytes(numcodecs.lz4.compress(data)),
    "blosc": lambda data: bytes(numcodecs.blosc.compress(data, b"zstd", 1, 0)),
}


class TestCodecs:
    @pytest.fixture
    def image(self, tmp_path):
        return write_foreign(tmp_path / "f.zarr", texture((1, 40, 40), "uint8"), axes="yx", compressors=None)

    @staticmethod
    def set_codecs(image, codecs):
        meta = json.loads((image / "0/zarr.json").read_text())
        meta["codecs"] = [{"name": "bytes"}, *codecs]
        (image / "0/zarr.json").write_text(json.dumps(meta))

    @pytest.mark.parametrize("times", [1, 2])
    @pytest.mark.parametrize("name", STREAMS)
    def test_what_they_make_is_bounded(self, image, name, times, monkeypatch):
        """64 MB for a chunk of 1024 bytes; one within another is not asked for what the outer one may not make."""
        self.set_codecs(image, [{"name": name}] * times)
        data = BOMB
        for _ in range(times):
            data = STREAMS[name](data)
        (image / "0/c/0/0").write_bytes(data)
        made = []
        from storage.format import codecs

        original = codecs.CODECS[name]
        monkeypatch.setitem(codecs.CODECS, name, lambda *args: made.append(original(*args)) or made[-1])
        with Slide(image) as slide, pytest.raises(CorruptImageError, match=r"level 0, chunk \(0, 0\) is damaged"):
            slide.read(0, (0, 0, 8, 8))
        assert sum(map(len, made)) < 100_000

    @pytest.mark.parametrize("name", STREAMS)
    def test_sound_chunks_are_read(self, image, name):
        pixels = texture((32, 32), "uint8", seed=3)  # noise, of which codecs make a little more
        self.set_codecs(image, [{"name": name}, {"name": name}])
        (image / "0/c/0/0").write_bytes(STREAMS[name](STREAMS[name](pixels.tobytes())))
        with Slide(image) as slide:
            np.testing.assert_array_equal(slide.read(0, (0, 0, 32, 32))[0], pixels)

    @pytest.mark.parametrize("name", ["pickle", "numcodecs.pickle", "json2", "vlen-utf8", "msgpack2", "x" * 99])
    def test_others_are_refused_by_name(self, image, name):
        self.set_codecs(image, [{"name": name, "configuration": {}}])
        with pytest.raises(
            NotAPyramidError, match=f"has the codec '{name.removeprefix('numcodecs.')}'; only blosc, bz2"
        ):
            Slide(image)

    @pytest.mark.parametrize("place", ["compressor", "filters"])
    def test_those_of_zarr_2_too(self, tmp_path, place, monkeypatch):
        def get_codec(config):
            raise AssertionError("a name in a file is looked up")

        image = write_foreign(tmp_path / "f.zarr", texture((3, 40, 40), "uint8"), version="0.4")
        meta = json.loads((image / "0/.zarray").read_text())
        meta[place] = {"id": "pickle"} if place == "compressor" else [{"id": "pickle"}]
        (image / "0/.zarray").write_text(json.dumps(meta))
        monkeypatch.setattr(numcodecs.registry, "get_codec", get_codec)
        with pytest.raises(NotAPyramidError, match="pickle"):
            Slide(image)

    @pytest.mark.parametrize("data", [b"", b"x", bytes(20)])
    @pytest.mark.parametrize("name", STREAMS)
    def test_cut_chunks_are_damaged(self, image, name, data):
        self.set_codecs(image, [{"name": name}])
        (image / "0/c/0/0").write_bytes(data)
        with Slide(image) as slide, pytest.raises(CorruptImageError, match="is damaged"):
            slide.read(0, (0, 0, 8, 8))

    def test_an_index_that_lies_is_damaged(self, tmp_path):
        path = tmp_path / "f.zarr"
        write_foreign(path, texture((3, 64, 64), "uint8"), axes="cyx", chunks=(3, 16, 16), shards=(3, 32, 32))
        shard = path / "0/c/0/0/0"
        sound = shard.read_bytes()
        index_bytes = 4 * 16 + 4
        for offset, length in ((2**63, 9), (0, 2**62), (2**64 - 2, 2**64 - 1), (len(sound) * 9, 100)):
            index = np.frombuffer(sound[-index_bytes:-4], "<u8").copy()
            index[:2] = offset, length
            raw = index.tobytes()
            crc = numcodecs.checksum32.CRC32C().encode(raw)
            shard.write_bytes(sound[:-index_bytes] + raw + bytes(crc)[-4:])
            with Slide(path) as slide, pytest.raises(CorruptImageError, match=r"chunk \(0, 0\) is damaged"):
                slide.read(0, (0, 0, 8, 8))

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"chunks": [0, 32, 32]}, "chunks is 0, not an integer of 1"),
            ({"chunks": [1, 2**70, 2**70]}, "chunks is 1180591620717411303424"),
            ({"chunks": [1, 2**24, 2**24]}, "store it in smaller chunks"),
            ({"shape": [3, float("inf"), 40]}, "shape is inf"),
            ({"shape": [3, 40]}, "unlike what the image says|chunks has 3 items"),
            ({"dtype": "|O"}, "holds '|O'; only"),
            ({"dtype": [["a", "<u1"]]}, "holds a list; only"),
            ({"fill_value": 10**400}, "fill_value is a number of more than 38 digits"),
            ({"order": [[]]}, "order a list"),
        ],
    )
    def test_arrays_of_zarr_2_are_checked(self, tmp_path, change, words):
        image = write_foreign(tmp_path / "f.zarr", texture((3, 40, 40), "uint8"), axes="cyx", version="0.4")
        meta = json.loads((image / "0/.zarray").read_text()) | change
        (image / "0/.zarray").write_text(json.dumps(meta))
        with pytest.raises(StorageError, match=rf"f\.zarr: level '0'.*{words}"):
            Slide(image)

    def test_a_huge_shard_index_is_refused(self, tmp_path):
        image = write_foreign(
            tmp_path / "f.zarr", texture((1, 64, 64), "uint8"), axes="yx", chunks=(1, 1), shards=(32, 32)
        )
        meta = json.loads((image / "0/zarr.json").read_text())
        meta["chunk_grid"]["configuration"]["chunk_shape"] = [2**20, 2**20]
        (image / "0/zarr.json").write_text(json.dumps(meta))
        with pytest.raises(NotAPyramidError, match=r"has an index of \d+ bytes; store it in larger chunks"):
            Slide(image)


class TestFolders:
    """Files that a conversion may remove and write to."""

    @pytest.fixture
    def pixels(self, textured):
        return textured((3, 40, 50))

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_what_is_not_ours_stays(self, tmp_path, pixels, overwrite):
        target, other = tmp_path / "p.ome.zarr", tmp_path / "p.ome.zarr.replaced"
        other.mkdir()
        (other / "notes.txt").write_text("mine")
        if overwrite:
            write_pyramid(tmp_path / "q.zarr", pixels)
            (tmp_path / "q.zarr").rename(target)
        with pytest.raises(ConversionError, match=r"p\.ome\.zarr\.replaced: holds notes\.txt"):
            write_pyramid(target, pixels, overwrite=overwrite)
        assert (other / "notes.txt").read_text() == "mine"
        assert not (tmp_path / "p.ome.zarr.partial").exists()

    def test_nor_where_nothing_is_to_be_done(self, tmp_path, tiff, small):
        from storage import convert

        source, _ = tiff(40, 50)
        convert(source, tmp_path / "p.zarr", options=small)
        other = tmp_path / "p.zarr.replaced"
        other.mkdir()
        (other / "notes.txt").write_text("mine")
        assert convert(source, tmp_path / "p.zarr", options=small).up_to_date
        assert (other / "notes.txt").read_text() == "mine"

    def test_a_replaced_pyramid_is_removed(self, tmp_path, pixels):
        write_pyramid(tmp_path / "p.zarr.replaced", pixels)
        write_pyramid(tmp_path / "p.zarr", pixels)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["p.zarr"]

    @pytest.mark.parametrize("suffix", [".partial", ".replaced", ".partial.lock"])
    def test_links_are_not_written_through(self, tmp_path, pixels, suffix):
        other = tmp_path / "other"
        other.mkdir()
        (tmp_path / f"p.zarr{suffix}").symlink_to(other if suffix != ".partial.lock" else tmp_path / "lock")
        with pytest.raises(ConversionError, match=r"p\.zarr"):
            write_pyramid(tmp_path / "p.zarr", pixels)
        assert list(other.iterdir()) == []
        assert not (tmp_path / "lock").exists()

    def test_nor_those_within(self, tmp_path, pixels):
        other = tmp_path / "other"
        other.mkdir()
        (tmp_path / "p.zarr.partial").mkdir()
        (tmp_path / "p.zarr.partial/0").symlink_to(other)
        with pytest.raises(ConversionError, match="holds 0, which no conversion has put there"):
            write_pyramid(tmp_path / "p.zarr", pixels)
        assert list(other.iterdir()) == []

    @pytest.mark.parametrize(
        "line", ['{"level": 1e999}', "[" * 5000, '{"level": 0, "y": 0, "x": 0, "length": "1"}', "\xff"]
    )
    def test_a_journal_of_nonsense_is_skipped(self, tmp_path, tiff, small, line):
        from storage import convert
        from storage.conversion.receipts import parse_journal

        job = {"a": 1}
        good = '{"level": 0, "y": 0, "x": 1, "length": 9, "crc32": 1, "index_crc32c": 2, "tag": ""}'
        data = "\n".join([json.dumps({"job": job}), line, good]).encode("latin1")
        assert [receipt.place for receipt in parse_journal(data, job)] == [(0, 0, 1)]
        assert parse_journal(data, {"a": 2}) == []
        (tmp_path / "p.zarr.partial").mkdir()
        (tmp_path / "p.zarr.partial/journal.jsonl").write_bytes(data)
        source, _ = tiff(40, 50)
        convert(source, tmp_path / "p.zarr", options=small)
        assert validate(tmp_path / "p.zarr") == []


def test_pyramids_of_others_need_no_zarr(tmp_path):
    """Whose registry of codecs would look up the names that files give."""
    image = write_foreign(tmp_path / "f.zarr", texture((3, 40, 40), "uint8"))
    code = f"""if True:
        import sys, storage
        storage.Slide({str(image)!r}).read(0, (0, 0, 8, 8))
        assert "zarr" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_zarr_and_we_read_the_same(tmp_path):
    """Codecs that the writers in other tests do not use, transposed."""
    pixels = texture((3, 50, 40), "uint16")
    image = tmp_path / "f.zarr"
    filters = [zarr.codecs.TransposeCodec(order=(2, 0, 1)), zarr.codecs.TransposeCodec(order=(1, 2, 0))]
    write_foreign(image, pixels, axes="cyx", filters=filters, serializer=zarr.codecs.BytesCodec(endian="big"))
    with Slide(image) as slide:
        np.testing.assert_array_equal(slide.read(0, (0, 0, 50, 40)), pixels)
