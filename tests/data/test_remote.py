"""Shards that lie elsewhere: an S3-compatible server, and an HTTP server that cuts connections."""

import hashlib
import http.server
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from medclip_lab.data import remote
from medclip_lab.data.manifest import Manifest, Shard
from medclip_lab.data.quarantine import Quarantine
from medclip_lab.data.reader import read_split
from medclip_lab.data.shards import write_shards
from medclip_lab.errors import UserError

from ..conftest import toy_samples


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEDCLIP_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(remote, "BLOCK_BYTES", 4096)
    return tmp_path / "cache" / "shards"


class Flaky(http.server.SimpleHTTPRequestHandler):
    """Serves ranges, and breaks off in the middle of every second answer."""

    trouble = True
    ranges = True
    status = 0
    served = 0

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        if self.status:
            self.send_error(self.status)
            return
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        first, last = 0, len(data) - 1
        wanted = self.headers.get("Range", "") if self.ranges else ""
        if wanted:
            low, _, high = wanted.removeprefix("bytes=").partition("-")
            first, last = int(low), min(int(high or last), last)
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(last - first + 1))
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.end_headers()
        if not body:
            return
        type(self).served += 1
        part = data[first : last + 1]
        if self.trouble and self.served % 2 and path.suffix == ".tar":
            self.wfile.write(part[: len(part) // 2])
            self.close_connection = True
            return
        self.wfile.write(part)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """From a folder to the URL of a server over it."""
    servers = []

    def start(folder: Path, **changes: Any) -> str:
        handler = type("Handler", (Flaky,), {"served": 0, **changes})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write_shards(toy_samples(60), tmp_path / "shards", "toy", 10)
    return tmp_path / "shards"


def keys(manifest: Manifest) -> list[str]:
    quarantine = Quarantine(60)
    return [study.key for study in read_split(manifest, "train", quarantine)]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_server_that_cuts_connections_gives_every_sample(
    serve: Callable[..., str], shards: Path, ranges: bool
) -> None:
    url = serve(shards, ranges=ranges)
    assert keys(Manifest.load(url)) == keys(Manifest.load(shards))


def test_a_copy_is_fetched_once_and_the_cache_is_bounded(
    serve: Callable[..., str], shards: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = serve(shards, trouble=False)
    manifest = Manifest.load(url)
    assert keys(manifest)
    copies = {path: path.stat().st_mtime_ns for path in cache.glob("*.tar")}
    assert len(copies) == len(manifest.of_split("train"))
    shutil.rmtree(shards)
    assert keys(manifest), "from the cache alone"
    size = next(iter(copies)).stat().st_size
    monkeypatch.setenv("MEDCLIP_LAB_CACHE_GIB", str(1.5 * size / 2**30))
    newest = max(cache.glob("*.tar"), key=lambda path: path.stat().st_mtime_ns)
    remote._make_room(cache, newest)
    left = list(cache.glob("*.tar"))
    assert newest in left
    assert len(left) < len(copies)
    assert sum(path.stat().st_size for path in left) <= 1.5 * size


def test_what_is_not_what_the_manifest_tells_is_refused(serve: Callable[..., str], shards: Path, cache: Path) -> None:
    path = shards / "train-00000.tar"
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(bytes(data))
    manifest = Manifest.load(serve(shards, trouble=False))
    quarantine = Quarantine(60, 1.0)
    found = [study.key for study in read_split(manifest, "train", quarantine)]
    assert quarantine.causes == {"unreadable shard": 10}
    assert len(found) == manifest.count("train") - 10
    with pytest.raises(remote.FetchError, match="not the bytes that the manifest tells of"):
        manifest.of_split("train")[0].local()
    assert not [path for path in cache.iterdir() if path.name.endswith(".tmp")]


def test_a_server_that_gives_nothing_is_given_up(serve: Callable[..., str], shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read http://.*/none/manifest\.json: it is not there"):
        Manifest.load(serve(shards) + "/none")
    with pytest.raises(UserError, match="after 6 attempts"):
        Manifest.load("http://127.0.0.1:9/shards")  # nobody listens there


def test_patterns_of_urls_and_paths(serve: Callable[..., str], shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = keys(Manifest.load(shards))
    url = serve(shards, trouble=False)
    assert keys(Manifest.load(url + "/train-{00000..00003}.tar")) == expected
    assert keys(Manifest.load(f"{shards}/train-*.tar")) == expected
    monkeypatch.chdir(shards.parent)
    manifest = Manifest.load("shards/{train,val}-*.tar")
    assert keys(manifest) == expected
    assert {shard.split for shard in manifest.shards} == {"train", "val"}
    (shards / "manifest.json").unlink()
    bare = Manifest.load("shards/train-*.tar")
    assert keys(bare) == expected
    assert [shard.samples for shard in bare.shards] == [shard.samples for shard in manifest.of_split("train")]
    with pytest.raises(UserError, match=r"nothing matches 'shards/none-\*\.tar'"):
        Manifest.load("shards/none-*.tar")
    with pytest.raises(UserError, match=r"cannot read shards/none-0\.tar: No such file"):
        Manifest.load("shards/none-{0..1}.tar")


def test_a_manifest_names_nothing_outside_its_folder(shards: Path) -> None:
    text = (shards / "manifest.json").read_text()
    for name in ("../train-00000.tar", "/etc/passwd", ".hidden"):
        (shards / "manifest.json").write_text(text.replace("train-00000.tar", name))
        with pytest.raises(UserError, match="names a shard outside of its folder"):
            Manifest.load(shards)


def test_an_unknown_kind_of_address_says_what_is_missing() -> None:
    with pytest.raises(UserError, match=r"cannot read nosuch:// here.*pip install 'medclip_lab\[remote\]'"):
        Manifest.load("nosuch://bucket/shards")


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    pytest.importorskip("s3fs")
    server_of = pytest.importorskip("moto.server")
    server = server_of.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    import s3fs

    yield s3fs.S3FileSystem(skip_instance_cache=True)
    server.stop()


def test_an_object_store(s3: Any, shards: Path, cache: Path) -> None:
    s3.mkdir("hospital")
    s3.put(str(shards), "hospital/shards", recursive=True)
    expected = keys(Manifest.load(shards))
    assert keys(Manifest.load("s3://hospital/shards")) == expected
    assert keys(Manifest.load("s3://hospital/shards/train-*.tar")) == expected
    for path in cache.glob("*.tar"):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert digest in {shard.sha256 for shard in Manifest.load(shards).shards}
    assert oct(cache.stat().st_mode & 0o777) == "0o700"
    with pytest.raises(UserError, match=r"cannot read s3://hospital/none/manifest\.json: it is not there"):
        Manifest.load("s3://hospital/none")


@pytest.mark.parametrize("status", [500, 503, 403])
def test_a_server_in_trouble_is_no_folder_without_a_manifest(
    serve: Callable[..., str], shards: Path, status: int
) -> None:
    """Else its held-out shards would be taken for training ones."""
    with pytest.raises(UserError, match=r"cannot read http://.*/manifest\.json"):
        Manifest.load(serve(shards, status=status) + "/{train,val}-00000.tar")


def test_a_cache_that_is_too_small_loses_nothing(
    serve: Callable[..., str], shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDCLIP_LAB_CACHE_GIB", "0")
    manifest = Manifest.load(serve(shards, trouble=False))
    expected = keys(Manifest.load(shards))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: keys(manifest), range(8))) == [expected] * 8


@pytest.mark.parametrize("named", ["64GB", "-1", "nan", "1e400"])
def test_a_cache_without_a_size_is_refused(
    serve: Callable[..., str], shards: Path, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDCLIP_LAB_CACHE_GIB", named)
    with pytest.raises(UserError, match="MEDCLIP_LAB_CACHE_GIB: a number of GiB expected"):
        Manifest.load(serve(shards, trouble=False)).shards[0].local()


def test_what_killed_downloads_left_goes(cache: Path) -> None:
    cache.mkdir(parents=True)
    old, new = cache / ".a.tar.0.tmp", cache / ".b.tar.0.tmp"
    for path in (old, new):
        path.touch()
    os.utime(old, (0, 0))
    remote._make_room(cache, new)
    assert not old.exists()
    assert new.exists()


def test_keys_to_a_server_are_not_shown() -> None:
    url = "https://user:secret@host/a/train-0.tar?X-Amz-Signature=secret"
    assert remote.shown(url) == "https://host/a/train-0.tar"
    assert Shard(url, "train", 1, 0, "").name == "train-0.tar"
    assert not remote.is_pattern("https://host/shards?sig=abc")
    with pytest.raises(UserError, match="braces that do not match"):
        Manifest.load("shards/{a,b-*.tar")


def test_a_shard_that_changed_is_fetched_again(serve: Callable[..., str], shards: Path, tmp_path: Path) -> None:
    """Without a manifest there is no hash to tell it by."""
    served = tmp_path / "served"
    served.mkdir()
    url = serve(served, trouble=False) + "/train-{00000..00000}.tar"
    for many in (4, 9):
        write_shards(list(toy_samples(20))[:many], tmp_path / str(many), "toy", 20)
        shutil.copy(tmp_path / str(many) / "train-00000.tar", served)
        expected = Manifest.load(tmp_path / str(many)).of_split("train")[0].samples
        assert Manifest.load(url).shards[0].samples == expected
