"""Archives made to harm: nothing is written or opened outside them, and memory is bounded."""

import io
import json
import os
import struct
import tarfile
import tracemalloc
import zlib

import pytest
from PIL import Image

from modeling_amorlip.cli_amorlip import UserError
from modeling_amorlip.images_amorlip import open_image
from tests.helpers.shards import make_config, write_tar
from training.data.dataset import PairDataset
from training.data.mixture import open_pairs


def png(width=8, height=8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, "PNG")
    return buffer.getvalue()


def read_all(path, **changes):
    """Return the pairs of a tar and the samples of one epoch."""
    config = make_config(path, **changes)
    pairs = open_pairs(config)
    dataset = PairDataset(pairs, config, 8)
    return pairs, [dataset[0, i] for i in range(len(pairs))]


def reasons(samples) -> str:
    return " ".join(f"{entry['key']}: {entry['reason']}" for sample in samples for entry in sample.bad_samples)


def add(tar, name, content=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(content))


def test_names_and_links_lead_nowhere_outside(tmp_path, monkeypatch):
    secret = tmp_path / "secret.txt"
    secret.write_text("a secret caption")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("../../evil", "/tmp/evil", "a/../../b", "c:\\evil", "\\\\host\\evil"):
            add(tar, f"{name}.png", png())
            add(tar, f"{name}.txt", b"inside")
        for i, target in enumerate((str(secret), "secret.txt", "../secret.txt", "/proc/self/environ", "/dev/zero")):
            for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                add(tar, f"link{i}{kind.decode()}.png", png())
                add(tar, f"link{i}{kind.decode()}.txt", type=kind, linkname=target)
        for i, kind in enumerate((tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE)):
            add(tar, f"device{i}.png", png())
            add(tar, f"device{i}.txt", type=kind, devmajor=1, devminor=5)
    before = sorted(os.listdir(tmp_path))
    pairs, samples = read_all(path)
    assert {sample.caption for sample in samples} == {"inside"} and len(samples) == 5
    assert {pairs.describe(i)[0] for i in range(5)} >= {"../../evil", "/tmp/evil"}
    (line,) = pairs.report()
    assert "10 links to files outside the archive" in line and "special files" in line
    assert sorted(os.listdir(tmp_path)) == before and not os.path.exists("/tmp/evil.txt")


def test_declared_sizes_take_no_memory(tmp_path):
    """A file with holes may hold a caption of gigabytes."""
    path = tmp_path / "0.tar"
    members = [
        ("a.png", png()),
        ("a.txt", b"a"),
        ("b.png", png()),
        ("b.txt", 3 * 2**30),
        ("c.png", 2**31),
        ("c.txt", b"c"),
    ]
    with path.open("wb") as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = content if isinstance(content, int) else len(content)
            file.write(info.tobuf(tarfile.USTAR_FORMAT))
            if isinstance(content, bytes):
                file.write(content)
            else:
                file.seek(info.size, os.SEEK_CUR)
            file.seek(-info.size % 512, os.SEEK_CUR)
        file.write(bytes(1024))
    tracemalloc.start()
    pairs, samples = read_all(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [pairs.describe(i)[0] for i in range(3)] == ["a", "b", "c"] and peak < 100 * 2**20
    assert "b: a member has 3221225472 bytes" in reasons(samples)
    assert "c: a member has 2147483648 bytes" in reasons(samples)


@pytest.mark.parametrize(
    "size", [b"\x80" + b"\xff" * 11, b"\xff" * 12, b"77777777777\0", b"\x80" + bytes(10) + b"\x01"]
)
def test_sizes_beyond_the_file_are_damage(tmp_path, size):
    path = tmp_path / "0.tar"
    write_tar(path, [(f"{key}.{e}", png() if e == "png" else b"t") for key in "abc" for e in ("png", "txt")])
    content = bytearray(path.read_bytes())
    content[124:136] = size
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    path.write_bytes(content)
    pairs, samples = read_all(path)
    assert [pairs.describe(i)[0] for i in range(len(pairs))][-2:] == ["b", "c"]
    assert "damaged" in pairs.report()[0] or len(pairs) == 3


def test_long_names_without_end_take_no_memory(tmp_path):
    path = tmp_path / "0.tar"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        add(tar, "././@LongLink", type=b"L", content=b"x" * 100)
        add(tar, "a.png", png())
        add(tar, "b.png", png())
        add(tar, "b.txt", b"fine")
    content = bytearray(buffer.getvalue())
    content[124:136] = b"\x80" + (2**40).to_bytes(11, "big")
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    path.write_bytes(content)
    pairs, samples = read_all(path)
    assert [sample.caption for sample in samples] == ["fine"] and "1 damaged shard" in pairs.report()[0]


def test_bombs_are_refused_by_what_their_headers_say(tmp_path):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    def bomb(width, height, *more):
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        pixels = chunk(b"IDAT", zlib.compress(bytes(10_000)))
        return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + pixels + chunk(b"IEND", b"")

    text = chunk(b"zTXt", b"comment\0\0" + zlib.compress(bytes(10**8), 9))
    images = {
        "pixels": bomb(30_000, 30_000),
        "text": bomb(8, 8, text),
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "gzip": zlib.compress(bytes(10**6)),
    }
    path = tmp_path / "0.tar"
    nested = b"[" * 100_000 + b"]" * 100_000
    members = [
        (f"{key}.{e}", content) for key, image in images.items() for e, content in (("png", image), ("txt", b"t"))
    ]
    members += [("nested.png", png()), ("nested.json", nested), ("number.png", png())]
    members += [("number.json", json.dumps({"caption": 0}).encode().replace(b"0", b"9" * 10_000))]
    write_tar(path, [*members, ("good.png", png()), ("good.txt", b"good")])
    tracemalloc.start()
    pairs, samples = read_all(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    listed = {entry["key"] for sample in samples for entry in sample.bad_samples}
    assert listed == {*images, "nested", "number"} and peak < 200 * 2**20
    assert all(sample.caption == "good" for sample in samples)


def test_postscript_is_never_handed_to_ghostscript(monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args: pytest.fail("Ghostscript was called"))
    with pytest.raises(OSError, match="cannot identify"):
        open_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")


def test_pipes_in_place_of_shards_do_not_hang(tmp_path):
    (tmp_path / "shards").mkdir()
    os.mkfifo(tmp_path / "shards" / "0.tar")
    for source in ("shards", "shards/0.tar", "shards/*.tar"):
        with pytest.raises(UserError, match="0.tar"):
            open_pairs(make_config(tmp_path / source))
