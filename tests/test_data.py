"""Splits, image caches, sources, the reserved set, what a method may see, and batches. No network."""

from __future__ import annotations

import functools
import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from conftest import ROOT
from omegaconf import OmegaConf
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from bdx import imagefile
from bdx.augment import Augment
from bdx.configure import compose
from bdx.datasets.base import Batches, ImageData, cache_path, load, reserve
from bdx.errors import UserError
from bdx.split import Split, pieces, pixels

SHARED = ROOT.parent / "shared"
TENSORS = ("train_images", "train_labels", "test_images", "test_labels")
PLAIN = Augment(zoom=1.0, crop=0, flip=False, rotate=0.0, cutout=0, cutmix=0.0)


@functools.cache
def config(name: str, *overrides: str) -> dict:
    return OmegaConf.to_container(compose([f"dataset={name}", *overrides]).dataset, resolve=True)


def read(folder: Path, name: str, *overrides: str, seed: int = 0) -> ImageData:
    return load(config(name, *overrides), folder, device=torch.device("cpu"), seed=seed)


def numbered(n: int, classes: int = 5) -> Split:
    """n images of 3×4×4; every pixel of image i is i."""
    x = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 3, 4, 4).contiguous()
    return Split.clean(x, torch.arange(n) % classes)


def loader(split: Split, **changes) -> Batches:
    how = {"size": 4, "shuffle": True, "augment": None, "drop_last": False, "classes": 5, "seed": 0}
    return Batches(split, **how | changes)


def order(batches: Batches) -> list[int]:
    """The images of one pass, in order, read off their pixels."""
    return [round(v) for batch in batches for v in (batch.x[:, 0, 0, 0] * 255).tolist()]


# Split


def test_a_split_needs_one_length():
    x, y = torch.zeros(3, 3, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"Split\.y has length 2 .* x has length 3"):
        Split(x, y[:2], y, torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"Split\.poisoned has length 4"):
        Split(x, y, y, torch.zeros(4, dtype=torch.bool))


@pytest.mark.parametrize("x", [torch.zeros(3, 3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.uint8)])
def test_a_split_holds_uint8_images(x):
    with pytest.raises(ValueError, match=r"expected \(N, C, H, W\) uint8"):
        Split.clean(x, torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("index", [slice(1, 3), torch.tensor([1, 2]), torch.tensor([False, True, True, False])])
def test_indexing_gives_a_sub_split(index):
    base = numbered(4)
    split = Split(base.x, torch.tensor([9, 8, 7, 6]), base.y, torch.tensor([True, False, True, False]))[index]
    assert split.x[:, 0, 0, 0].tolist() == [1, 2]
    assert (split.y.tolist(), split.y_true.tolist(), split.poisoned.tolist()) == ([8, 7], [1, 2], [False, True])


def test_a_clean_split_is_untouched():
    split = numbered(6)
    assert len(split) == 6
    assert torch.equal(split.y, split.y_true)
    assert not split.poisoned.any()


@pytest.mark.parametrize(("n", "side", "sizes"), [(250, 32, [100, 100, 50]), (30, 64, [25, 5]), (2, 512, [1, 1]), (0, 32, [0])])
def test_pieces_hold_as_many_images_as_fit_a_cache_and_all_of_them(n, side, sizes):
    x, y = torch.zeros(n, 1, side, side, dtype=torch.uint8), torch.arange(n)
    found = list(pieces(x, y))
    assert [len(part) for part, _ in found] == sizes
    assert torch.equal(torch.cat([labels for _, labels in found]), y)


def test_pixels_are_fractions_of_255_channels_last():
    x = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 4, 4).contiguous()
    out = pixels(x)
    assert out[0, :, 0, 0].tolist() == pytest.approx([0.0, 0.2, 1.0])
    assert out.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert x[0, 1, 0, 0] == 51  # the division in place is of the copy


# digits


def test_digits_sizes(digits):
    assert (len(digits.train), len(digits.test)) == (1438, 359)
    assert digits.train.x.shape == (1438, 3, 32, 32)
    assert (digits.train.x.dtype, digits.train.y.dtype) == (torch.uint8, torch.int64)
    assert digits.shape == (3, 32, 32)
    assert digits.classes == tuple("0123456789")
    assert digits.num_classes == 10
    assert digits.name == "digits"
    assert sorted(digits.test.y.unique().tolist()) == list(range(10))
    assert not digits.train.poisoned.any()


def test_digits_are_scikit_learns(tmp_path):
    from sklearn.datasets import load_digits

    target = load_digits().target
    data = read(tmp_path, "digits", "dataset.source.size=8")
    # the first row of the first image is 0 0 5 13 9 1 0 0 of 16: times 255/16, rounded
    assert data.train.x[0, 0, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]
    assert torch.equal(data.train.x[:, 0], data.train.x[:, 2])
    assert data.test.y.tolist() == target[4::5].tolist()
    assert data.train.y[:9].tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 0]  # the digits in order, each fifth is a test image
    assert data.shape == (3, 8, 8)


def test_the_cache_is_made_once(digits, shared, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("made again")

    path = shared / "data" / "digits.safetensors"
    before = path.stat()
    monkeypatch.setattr("bdx.datasets.digits.make", fail)
    again = read(shared / "data", "digits")
    assert torch.equal(again.train.x, digits.train.x)
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert path.stat().st_ino == before.st_ino


def test_two_sizes_are_two_caches(digits, shared):
    assert read(shared / "data", "digits", "dataset.source.size=16").shape == (3, 16, 16)
    assert read(shared / "data", "digits").shape == (3, 32, 32)


def test_the_header_tells_what_is_in_the_file(digits, shared):
    path = shared / "data" / "digits.safetensors"
    head = imagefile.header(path)
    assert head["format"] == "bdx-images-1"
    assert head["dataset"] == "digits"
    assert head["classes"] == list("0123456789")
    assert head["shape"] == (3, 32, 32)
    assert head["sizes"] == (1438, 359)
    parts = (digits.train.x, digits.train.y, digits.test.x, digits.test.y)
    raw = b"".join(p.numpy().tobytes() for p in parts)
    assert head["sha256"] == hashlib.sha256(raw).hexdigest() == digits.sha256


def test_the_header_is_read_without_torch(digits, shared):
    path = shared / "data" / "digits.safetensors"
    code = "import sys, pathlib, bdx.imagefile as f; print(f.header(pathlib.Path(sys.argv[1]))['sizes'], "
    code += "[m for m in ('torch', 'numpy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "(1438, 359) []"


# the file format is a contract with tools that write it


def write_contract(path: Path, *, dataset: str = "cifar10", train: int = 200, **changes) -> dict:
    """A cache as ../shared/tools/prepare_data.py writes it, of random pixels. Returns the arrays."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", train), ("test", 30)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(n) % 10).astype(np.int64)
    sha = hashlib.sha256()
    for name in TENSORS:
        sha.update(arrays[name].tobytes())
    classes = json.dumps([f"class {i}" for i in range(10)])
    meta = {
        "format": "bdx-images-1",
        "dataset": dataset,
        "classes": classes,
        "source": "packed copy",
        "sha256": sha.hexdigest(),
    }
    meta = {k: v for k, v in (meta | changes).items() if v is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(arrays | {"train_tracks": np.zeros(train, dtype=np.int64)}, path, metadata=meta)
    return arrays


def test_a_cache_that_another_tool_wrote_is_read(tmp_path):
    arrays = write_contract(tmp_path / "cifar10.safetensors")
    data = read(tmp_path, "cifar10")
    assert torch.equal(data.train.x, torch.from_numpy(arrays["train_images"]))
    assert torch.equal(data.train.y, torch.from_numpy(arrays["train_labels"]))
    assert torch.equal(data.test.x, torch.from_numpy(arrays["test_images"]))
    assert torch.equal(data.test.y_true, torch.from_numpy(arrays["test_labels"]))
    assert data.classes[3] == "class 3"
    assert len(data.clean) == 10  # 5 % of 200, one of each class
    assert [p.name for p in tmp_path.iterdir()] == ["cifar10.safetensors"]


REAL = {  # name -> pack, sizes, shape, images of the largest class, reserved ones of each class, some classes
    "cifar10": ("cifar10", (50_000, 10_000), (3, 32, 32), 5000, 250, {0: "airplane"}),
    "cifar100": ("cifar100", (50_000, 10_000), (3, 32, 32), 500, 25, {0: "apple", 99: "worm"}),
    "gtsrb": ("gtsrb", (39_209, 12_630), (3, 32, 32), 2250, 45, {14: "stop", 42: "end of no overtaking by trucks"}),
    "tiny_imagenet_40": ("tiny_imagenet_0", (20_000, 2_000), (3, 64, 64), 500, 25, {0: "goldfish"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_the_real_tool_and_bdx_agree(name, tmp_path):
    pack, sizes, shape, largest, each, some = REAL[name]
    script = SHARED / "tools" / "prepare_data.py"
    if not (script.is_file() and (SHARED / "data" / f"{pack}.npz").is_file()):
        pytest.skip(f"{script} or its packed images are not on this machine")
    subprocess.run([sys.executable, script, name, "--out", tmp_path], check=True, capture_output=True)
    head = imagefile.header(tmp_path / f"{name}.safetensors")
    assert (head["sizes"], head["shape"]) == (sizes, shape)
    data = read(tmp_path, name)
    assert int(data.train.y.bincount().max()) == largest
    assert set(data.clean.y.bincount().tolist()) == {each}
    assert {i: data.classes[i] for i in some} == some
    raw = b"".join(p.numpy().tobytes() for p in (data.train.x, data.train.y, data.test.x, data.test.y))
    assert data.sha256 == hashlib.sha256(raw).hexdigest()


def cut(path: Path):
    path.write_bytes(path.read_bytes()[:-100])


def lengthen(path: Path):
    path.write_bytes(path.read_bytes() + b"x")


def without_a_tensor(path: Path):
    with safe_open(path, "np") as f:
        meta, arrays = f.metadata(), {k: f.get_tensor(k) for k in f.keys() if k != "test_images"}  # noqa: SIM118
    save_file(arrays, path, metadata=meta)


SPOILED = {
    "truncated": (cut, r"truncated\?"),
    "too long": (lengthen, r"truncated\?"),
    "cut in its header": (lambda p: p.write_bytes(p.read_bytes()[:60]), ""),
    "empty": (lambda p: p.write_bytes(b""), ""),
    "text": (lambda p: p.write_text("these are no images"), "absurdly long"),
    "zeros": (lambda p: p.write_bytes(bytes(64)), ""),
    "an array": (lambda p: np.save(p.open("wb"), np.zeros(9)), "absurdly long"),
    "weights": (lambda p: save_file({"conv.weight": np.zeros(3)}, p), "format=None"),
    "another format": (lambda p: write_contract(p, format="bdx-images-9"), "format='bdx-images-9' instead of 'bdx-images-1'"),
    "a tensor is missing": (without_a_tensor, ""),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_a_spoiled_cache_is_refused(kind, tmp_path):
    spoil, says = SPOILED[kind]
    path = tmp_path / "cifar10.safetensors"
    write_contract(path)
    spoil(path)
    with pytest.raises(UserError, match=rf"cifar10\.safetensors is not a bdx image cache.*{says}.*remove it"):
        read(tmp_path, "cifar10")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda p: p.write_bytes(len("[1, 2]").to_bytes(8, "little") + b"[1, 2]"),
        lambda p: p.write_bytes(len('{"a": 1}').to_bytes(8, "little") + b'{"a": 1}'),
        lambda p: write_contract(p, classes=None),
        lambda p: write_contract(p, classes="cat, dog"),
        lambda p: write_contract(p, sha256=None),
    ],
    ids=["a list", "no tensors", "no classes", "classes are no JSON", "no checksum"],
)
def test_a_header_without_what_it_must_hold_is_refused(spoil, tmp_path):
    spoil(tmp_path / "cifar10.safetensors")
    with pytest.raises(UserError, match="is not a bdx image cache"):
        read(tmp_path, "cifar10")


# cifar10, cifar100


@pytest.mark.parametrize("error", [OSError("refused"), URLError("no route"), RuntimeError("File not found or corrupted.")])
@pytest.mark.parametrize(("name", "archive"), [("cifar10", "cifar-10-python.tar.gz"), ("cifar100", "cifar-100-python.tar.gz")])
def test_cifar_without_a_network_says_what_to_put_where(name, archive, error, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fail)
    with pytest.raises(UserError) as caught:
        read(tmp_path, name)
    said = str(caught.value)
    for word in (archive, f"{name}.safetensors", f"into {tmp_path}", "BDX_DATA", "paths.data"):
        assert word in said
    assert not list(tmp_path.glob("*.safetensors"))
    write_contract(tmp_path / f"{name}.safetensors", dataset=name)
    assert len(read(tmp_path, name).train) == 200  # and then that is enough


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_turned_into_planes(name, tmp_path, monkeypatch):
    class Fake:
        def __init__(self, root, train, download):
            assert download
            n = 40 if train else 10
            self.data = np.zeros((n, 32, 32, 3), np.uint8)
            self.data[:, 2, 5, 1] = 77  # row 2, column 5, green
            self.targets, self.classes = [i % 10 for i in range(n)], list("abcdefghij")

    monkeypatch.setattr(f"torchvision.datasets.{name.upper()}", Fake)
    data = read(tmp_path, name, "dataset.reserved.count=10")
    assert data.train.x.shape == (40, 3, 32, 32)
    assert (data.test.x[:, 1, 2, 5] == 77).all()
    assert int(data.test.x.sum()) == 77 * 10
    assert data.train.y[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert data.classes == tuple("abcdefghij")
    assert imagefile.header(tmp_path / f"{name}.safetensors")["sha256"] == data.sha256


def test_there_are_two_cifars(tmp_path):
    with pytest.raises(UserError, match=r"dataset\.source\.classes=20: expected 10 or 100"):
        read(tmp_path, "cifar10", "dataset.source.classes=20")


# folder

PICTURES = {  # class -> file -> (mode, color, size); the colours survive any scaling
    "apple": {
        "a.png": ("RGB", (255, 0, 0), (7, 5)), "b.PNG": ("L", 100, (40, 60)), "in/c.png": ("RGBA", (0, 255, 0, 9), (3, 3)),
    },
    "pear": {"a.jpg": ("L", 200, (64, 48)), "b.jpeg": ("RGB", (128, 128, 128), (16, 16)), "c.gif": ("P", 0, (1, 1))},
}  # fmt: skip
COLORS = [(255, 0, 0), (100,) * 3, (0, 255, 0), (200,) * 3, (128,) * 3, (10, 20, 30)]


def paint(path: Path, mode: str = "RGB", color=(1, 2, 3), size=(8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new(mode, size, color)
    if mode == "P":
        image.putpalette([10, 20, 30] + [0] * 765)
    image.save(path)
    return path


@pytest.fixture
def photos(tmp_path) -> Path:
    root = tmp_path / "photos"
    for split in ("train", "test"):
        for name, files in PICTURES.items():
            for file, (mode, color, size) in files.items():
                paint(root / split / name / file, mode, color, size)
    paint(root / "test" / "pear" / "d.png", color=(9, 9, 9))
    (root / "train" / "apple" / "notes.txt").write_text("no image")
    (root / "train" / ".hidden").mkdir()
    return root


def rooted(root: Path, *overrides: str) -> dict:
    cfg = config("folder", "dataset.reserved.count=2", *overrides)
    return cfg | {"source": cfg["source"] | {"root": str(root)}}


def folder(photos: Path, *overrides: str) -> ImageData:
    return load(rooted(photos, *overrides), photos.parent / "data", device=torch.device("cpu"), seed=0)


def test_a_folder_of_images(photos):
    data = folder(photos)
    assert data.classes == ("apple", "pear")
    assert data.train.x.shape == (6, 3, 32, 32)
    assert data.train.y.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test.y.tolist() == [0, 0, 0, 1, 1, 1, 1]
    for image, color in zip(data.train.x, COLORS, strict=True):
        wanted = torch.tensor(color).view(3, 1, 1).expand(3, 32, 32)
        assert (image.int() - wanted).abs().max() <= 1  # JPEG
    assert sorted(data.clean.y.tolist()) == [0, 1]


def test_an_image_is_scaled_as_a_whole(photos):
    wide = Image.new("RGB", (96, 32))
    wide.paste((255, 255, 255), (0, 0, 32, 32))  # the left third is white
    wide.save(photos / "train" / "apple" / "a.png")
    image = folder(photos).train.x[0, 0]
    assert (image[:, :10] == 255).all()
    assert (image[:, 12:] == 0).all()


def test_the_size_is_asked_for(photos):
    assert folder(photos, "dataset.source.size=16").shape == (3, 16, 16)
    assert folder(photos).shape == (3, 32, 32)


def test_grey_of_16_bits_keeps_its_brightness(photos):
    grey = np.full((8, 8), 32768, dtype=np.uint16)
    Image.fromarray(grey).save(photos / "train" / "apple" / "a.png")
    assert 126 <= int(folder(photos).train.x[0].max()) <= 129


def no_split(root: Path):
    (root / "train").rename(root / "training")


def no_classes(root: Path):
    (root / "test").rename(root / "old")
    (root / "test").mkdir()


MISTAKES = {
    "no train": (no_split, r"photos has no folder train/: expected .*train/CLASS"),
    "no classes": (no_classes, r"photos/test has no class folders"),
    "only in train": (lambda r: paint(r / "train" / "kiwi" / "a.png"), "class kiwi is in only one of train/ and test/"),
    "only in test": (lambda r: paint(r / "test" / "fig" / "a.png"), "class fig is in only one of train/ and test/"),
    "empty class": (lambda r: (r / "test" / "fig").mkdir(), r"photos/test: no images in class fig .*\.png"),
    "no image": (lambda r: (r / "train" / "pear" / "z.png").write_text("text"), r"unreadable images: .*train/pear/z\.png"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_in_the_folder_is_named(kind, photos):
    spoil, says = MISTAKES[kind]
    spoil(photos)
    with pytest.raises(UserError, match=says):
        folder(photos)
    assert not list((photos.parent / "data").glob("*.safetensors"))


def test_a_folder_must_be_named(tmp_path):
    with pytest.raises(UserError, match=r"needs dataset\.source\.root=PATH"):
        read(tmp_path, "folder")
    with pytest.raises(UserError, match=r"nowhere has no folder train/"):
        read(tmp_path, "folder", f"dataset.source.root={tmp_path / 'nowhere'}")


def test_every_unreadable_image_is_named(photos):
    path = photos / "train" / "apple" / "a.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    (photos / "train" / "pear" / "a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"apple/a\.png .*pear/a\.jpg"):
        folder(photos)
    for i in range(7):
        (photos / "train" / "pear" / f"x{i}.png").write_bytes(b"")
    with pytest.raises(UserError, match="and 4 more; remove or replace them"):
        folder(photos)


def test_an_image_of_absurd_size_is_named(photos, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1100)
    with pytest.raises(UserError, match=r"unreadable images: .*pear/a\.jpg"):
        folder(photos)


def test_an_unchanged_folder_is_not_read_again(photos, monkeypatch):
    def fail(*_):
        raise AssertionError("read again")

    before = folder(photos)
    monkeypatch.setattr("bdx.datasets.folder.stack", fail)
    assert torch.equal(folder(photos).train.x, before.train.x)


@pytest.mark.parametrize("change", ["add", "remove", "rename", "rewrite"])
def test_a_changed_folder_is_read_again(change, photos):
    before = folder(photos)
    first = photos / "train" / "apple" / "a.png"
    if change == "add":
        paint(photos / "train" / "apple" / "z.png")
    elif change == "remove":
        first.unlink()
    elif change == "rename":
        first.rename(first.with_name("z.png"))
    else:
        paint(first, "RGB", (0, 0, 255), (7, 5))
    after = folder(photos)
    assert len(after.train) == len(before.train) + {"add": 1, "remove": -1}.get(change, 0)
    assert after.sha256 != before.sha256
    assert after.train.y.bincount().tolist() == [len(after.train) - 3, 3]
    assert len(list((photos.parent / "data").glob("*.safetensors"))) == 1


def test_two_folders_of_one_name_are_two_caches(photos):
    other = photos.parent / "elsewhere" / "photos"
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            paint(other / split / name / "a.png")
    folder_of = [cache_path(rooted(p), photos.parent / "data") for p in (photos, other)]
    assert folder_of[0] != folder_of[1]
    assert imagefile.header(folder_of[0])["classes"] == ["apple", "pear"]
    assert imagefile.header(folder_of[1])["classes"] == ["cat", "dog"]


# several processes

PREPARE = """
import sys, time
from pathlib import Path
import numpy as np
from bdx import imagefile

folder = Path(sys.argv[1])

def make(path):
    with open(folder / "made", "a") as f:
        f.write("made\\n")
    time.sleep(float(sys.argv[2]))
    images, labels = np.full((9, 3, 4, 4), 7, np.uint8), np.arange(9)
    arrays = dict(zip(imagefile.TENSORS, (images, labels, images, labels)))
    imagefile.write(path, arrays, dataset="x", classes=["a"], source="test")

(folder / f"ready{sys.argv[3]}").touch()
while not (folder / "go").exists():
    time.sleep(0.01)
print(imagefile.header(imagefile.ensure(folder / "x.safetensors", make))["sha256"])
"""


def prepare(folder: Path, seconds: float, number: int) -> subprocess.Popen:
    """A process that makes x.safetensors in `folder`, once `go` is there."""
    return subprocess.Popen(
        [sys.executable, "-c", PREPARE, folder, str(seconds), str(number)], stdout=subprocess.PIPE, text=True
    )


def wait_for(*paths: Path) -> None:
    end = time.monotonic() + 60
    while not all(p.exists() for p in paths):
        assert time.monotonic() < end, f"waited in vain for {paths}"
        time.sleep(0.01)


def test_of_many_processes_one_makes_the_cache(tmp_path):
    started = [prepare(tmp_path, 0.3, i) for i in range(3)]
    wait_for(*(tmp_path / f"ready{i}" for i in range(3)))
    (tmp_path / "go").touch()
    said = {p.communicate(timeout=60)[0].strip() for p in started}
    assert [p.returncode for p in started] == [0, 0, 0]
    assert (tmp_path / "made").read_text() == "made\n"
    assert said == {imagefile.header(tmp_path / "x.safetensors")["sha256"]}
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_killed_process_leaves_no_cache_and_no_lock(tmp_path):
    (tmp_path / "go").touch()
    killed = prepare(tmp_path, 600, 0)
    wait_for(tmp_path / "made")
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    assert not (tmp_path / "x.safetensors").exists()
    images, labels = np.zeros((2, 3, 4, 4), np.uint8), np.arange(2)
    arrays = dict(zip(TENSORS, (images, labels, images, labels), strict=True))
    path = imagefile.ensure(
        tmp_path / "x.safetensors", lambda p: imagefile.write(p, arrays, dataset="x", classes=["a"], source="test")
    )
    assert imagefile.header(path)["sizes"] == (2, 2)


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(arrays, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.numpy.save_file", fail)
    images, labels = np.zeros((2, 3, 4, 4), np.uint8), np.arange(2)
    arrays = dict(zip(TENSORS, (images, labels, images, labels), strict=True))
    with pytest.raises(OSError, match="disk full"):
        imagefile.write(tmp_path / "x.safetensors", arrays, dataset="x", classes=["a"], source="test")
    assert not list(tmp_path.iterdir())


def test_what_is_written_is_what_was_given_in_any_memory_layout(tmp_path):
    images = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3).transpose(0, 3, 1, 2)  # planes, but not in memory
    arrays = dict(zip(TENSORS, (images, np.arange(2), images, np.arange(2)), strict=True))
    imagefile.write(tmp_path / "x.safetensors", arrays, dataset="x", classes=["a"], source="test")
    found = load_file(tmp_path / "x.safetensors")
    assert found["train_images"].shape == (2, 3, 4, 5)
    assert found["train_images"][0, 0, 0].tolist() == [0, 3, 6, 9, 12]
    assert imagefile.header(tmp_path / "x.safetensors")["sha256"] == imagefile.digest(found)


# the reserved set


def choose(y, **changes) -> torch.Tensor:
    how = {"ratio": 0.1, "count": None, "balanced": True, "seed": 0}
    return reserve(torch.as_tensor(y), **how | changes)


def test_reserved_from_train_stays_in_train(digits):
    assert len(digits.train) == 1438
    assert torch.equal(digits.clean.x, digits.train.x[digits.reserved])
    assert torch.equal(digits.clean.y, digits.train.y[digits.reserved])
    assert digits.clean.y.bincount().tolist() == [14] * 10  # ⌊round(0.1 · 1438) / 10⌋ of each


def test_held_out_images_leave_the_training_set(digits, shared):
    held = read(shared / "data", "digits", "dataset.reserved.source=held_out")
    assert torch.equal(held.reserved, digits.reserved)
    assert torch.equal(held.clean.x, digits.clean.x)
    rest = sorted(set(range(1438)) - set(digits.reserved.tolist()))
    assert len(rest) == len(held.train) == 1438 - 140
    assert torch.equal(held.train.x, digits.train.x[rest])
    assert torch.equal(held.train.y, digits.train.y[rest])
    assert torch.equal(held.test.x, digits.test.x)


def test_an_unknown_source_of_reserved_images(digits, shared):
    with pytest.raises(UserError, match=r"dataset\.reserved\.source=test: expected train or held_out"):
        read(shared / "data", "digits", "dataset.reserved.source=test")


def test_the_reserved_indices_are_sorted_and_unique():
    for balanced in (True, False):
        index = choose(torch.arange(200) % 4, balanced=balanced)
        assert index.tolist() == sorted(set(index.tolist()))
        assert len(index) == 20


def test_balanced_takes_as_many_of_each_class():
    y = torch.tensor([0] * 70 + [1] * 20 + [2] * 10)
    assert y[choose(y, count=25)].bincount().tolist() == [8, 8, 8]  # ⌊25/3⌋ of each


def test_uniform_takes_exactly_as_many_as_asked():
    y = torch.tensor([0] * 700 + [1] * 300)
    index = choose(y, count=333, balanced=False)
    assert len(index) == 333
    assert 0.5 < (y[index] == 0).float().mean() < 0.9
    assert len(choose(y, ratio=0.05, balanced=False)) == 50


def test_count_has_precedence_over_ratio():
    assert len(choose(torch.arange(100) % 2, ratio=0.9, count=6)) == 6


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"count": 101}, r"dataset\.reserved\.count=101 asks for 101 reserved images of 100: expected 1 to 100"),
        ({"count": 0}, "count=0 asks for 0"),
        ({"ratio": 1.5}, r"ratio=1\.5 asks for 150 reserved images of 100"),
        ({"ratio": 0.0}, r"ratio=0\.0 asks for 0"),
        ({"count": 1}, r"asks for 1 images, 0 of each of 2 classes.*balanced=false"),
        ({"count": 30}, r"asks for 30 images, 15 of each of 2 classes, .*the smallest class has 10"),
    ],
)
def test_too_many_or_too_few_reserved_images(asked, says):
    y = torch.tensor([0] * 90 + [1] * 10)
    with pytest.raises(UserError, match=says):
        choose(y, **asked)


def test_where_a_class_is_too_small_a_larger_count_is_no_advice():
    y = torch.tensor([0] * 90 + [1] * 10)
    with pytest.raises(UserError, match=r"balanced=false") as caught:
        choose(y, count=30)
    assert "raise dataset.reserved.count" not in str(caught.value)


def test_the_seed_alone_draws_the_reserved_images(digits, shared):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    y = torch.arange(500) % 5
    first = choose(y, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8)
    assert torch.equal(choose(y, seed=3), first)
    assert not torch.equal(choose(y, seed=4), first)
    assert torch.equal(read(shared / "data", "digits").reserved, digits.reserved)
    assert not torch.equal(read(shared / "data", "digits", seed=1).reserved, digits.reserved)


# what a method may see


def test_an_undeclared_split_is_out_of_reach(digits):
    data = digits.allow(frozenset({"clean"}))
    assert torch.equal(data.clean.x, digits.clean.x)
    for touch in (lambda s: s.x, len, list, lambda s: s[0], lambda s: s.to("cpu")):
        with pytest.raises(PermissionError, match=r"does not declare that it needs data\.train"):
            touch(data.train)
        with pytest.raises(PermissionError, match=r"data\.test"):
            touch(data.test)


def test_test_images_are_never_allowed(digits):
    data = digits.allow(frozenset({"train", "clean", "test"}))
    assert len(data.train) == 1438
    with pytest.raises(PermissionError, match=r"data\.test"):
        len(data.test)
    with pytest.raises(PermissionError, match=r"data\.clean"):
        len(digits.allow(frozenset()).clean)


def test_what_is_allowed_still_works(digits):
    data = digits.allow(frozenset({"clean"}))
    assert data.shape == (3, 32, 32)
    assert data.num_classes == 10
    assert data.classes == digits.classes
    assert data.name == "digits"
    batch = next(iter(data.batches(data.clean, size=32, shuffle=True, augment=True)))
    assert batch.x.shape == (32, 3, 32, 32)
    with pytest.raises(PermissionError, match=r"data\.train"):
        next(iter(data.batches(data.train, size=32, shuffle=True, augment=True)))
    assert len(digits.test) == 359  # the original is as it was


def test_what_is_allowed_can_be_narrowed_again(digits):
    data = digits.allow(frozenset({"clean", "train"})).allow(frozenset({"clean"}))
    assert len(data.clean) == 140
    assert data.shape == (3, 32, 32)
    with pytest.raises(PermissionError, match=r"data\.train"):
        len(data.train)


def test_a_poisoned_set_takes_the_place_of_the_clean_one(digits):
    other = digits.train[:10]
    data = digits.poisoned(other)
    assert data.train is other
    assert data.clean is digits.clean
    assert len(digits.train) == 1438


# batches


@pytest.mark.parametrize(("n", "size"), [(50, 4), (50, 25), (7, 7), (3, 8), (1, 1)])
def test_each_image_comes_once_per_pass(n, size):
    batches = loader(numbered(n), size=size)
    for _ in range(3):
        assert sorted(order(batches)) == list(range(n))


def test_a_batch_knows_its_images():
    split = numbered(10)
    poisoned = Split(split.x, (split.y + 1) % 5, split.y, torch.ones(10, dtype=torch.bool))
    for batch in loader(poisoned):
        assert batch.index.tolist() == [round(v) for v in (batch.x[:, 0, 0, 0] * 255).tolist()]
        assert torch.equal(batch.y, (batch.index + 1) % 5)  # training sees y, not y_true
        assert batch.x.dtype == torch.float32


def test_each_pass_has_its_own_order():
    batches = loader(numbered(50))
    passes = [order(batches) for _ in range(4)]
    assert len({tuple(p) for p in passes}) == 4
    assert list(range(50)) not in passes


def test_without_shuffling_the_order_is_the_splits():
    batches = loader(numbered(10), shuffle=False)
    assert order(batches) == order(batches) == list(range(10))


def test_seed_and_epoch_fix_the_order():
    one, same, other = loader(numbered(50)), loader(numbered(50)), loader(numbered(50), seed=1)
    torch.manual_seed(1)
    first = [order(one) for _ in range(3)]
    torch.manual_seed(2)
    assert [order(same) for _ in range(3)] == first
    assert not {tuple(order(other)) for _ in range(3)} & {tuple(p) for p in first}


def test_the_epoch_can_be_set_to_go_on(digits):
    def batches():
        return digits.batches(digits.clean, size=64, shuffle=True, augment=True)

    whole, resumed = batches(), batches()
    passes = [list(whole) for _ in range(4)]
    resumed.epoch = 2
    for wanted in passes[2:]:
        for a, b in zip(wanted, resumed, strict=True):
            assert torch.equal(a.index, b.index)
            assert torch.equal(a.x, b.x)  # the augmentation's draws go on as well
    assert whole.epoch == resumed.epoch == 4


def test_stages_and_seeds_draw_apart(digits, shared):
    other = read(shared / "data", "digits", seed=1)
    firsts = [
        tuple(next(iter(d.batches(d.train, size=64, shuffle=True, augment=False, stage=s))).index.tolist())
        for d in (digits, other)
        for s in (0, 1)
    ]
    assert len(set(firsts)) == 4


def test_global_random_numbers_are_left_alone(digits):
    state = torch.get_rng_state()
    list(digits.batches(digits.clean, size=64, shuffle=True, augment=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("n", "size", "drop", "sizes"),
    [
        (10, 4, False, [4, 4, 2]),
        (10, 4, True, [4, 4]),
        (8, 4, False, [4, 4]),
        (8, 4, True, [4, 4]),
        (9, 4, False, [4, 5]),  # BatchNorm may know no deviation of one image
        (5, 4, False, [5]),
        (4, 4, False, [4]),
        (9, 4, True, [4, 4]),
        (3, 1, False, [1, 1, 1]),
        (3, 8, False, [3]),
        (3, 8, True, [3]),  # a set smaller than one batch is still a batch
    ],
)
def test_sizes_of_the_batches(n, size, drop, sizes):
    batches = loader(numbered(n), size=size, drop_last=drop)
    assert len(batches) == len(sizes)
    assert [len(b.x) for b in batches] == [len(b.index) for b in batches] == sizes


def test_what_is_dropped_changes_from_pass_to_pass():
    batches = loader(numbered(10), drop_last=True)
    left_out = [set(range(10)) - set(order(batches)) for _ in range(20)]
    assert {len(s) for s in left_out} == {2}
    assert set().union(*left_out) == set(range(10))


def test_no_images_no_batches():
    with pytest.raises(UserError, match="there are no images to make batches of"):
        loader(numbered(10)[:0])


def test_which_augmentation_is_used(digits):
    def first(augment):
        return next(iter(digits.batches(digits.clean, size=64, shuffle=False, augment=augment)))

    plain, own = first(False), first(True)
    assert torch.equal(plain.x, pixels(digits.clean.x[:64]))
    assert torch.equal(first(PLAIN).x, plain.x)
    assert digits.augment.crop == 2
    assert not torch.equal(own.x, plain.x)
    black = first(Augment(zoom=1.0, crop=0, flip=False, rotate=0.0, cutout=64, cutmix=0.0))
    assert (black.x == 0).all()


def test_cutmix_makes_labels_probabilities(digits):
    mixed = Augment(zoom=1.0, crop=0, flip=False, rotate=0.0, cutout=0, cutmix=1.0)
    batch = next(iter(digits.batches(digits.train, size=64, shuffle=True, augment=mixed)))
    assert batch.y.shape == (64, 10)
    assert torch.allclose(batch.y.sum(1), torch.ones(64))


def test_altered_pixels_and_another_data_set_are_refused(tmp_path):
    """A run's id names the pixels by the header's checksum, so they must be those."""
    path = tmp_path / "cifar10.safetensors"
    write_contract(path)
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"does not match its checksum: altered|holds 10 classes and labels up to"):
        read(tmp_path, "cifar10")
    write_contract(path, dataset="cifar100")
    with pytest.raises(UserError, match=r"dataset.name=cifar10, but .* holds cifar100: dataset=NAME chooses"):
        read(tmp_path, "cifar10")


def test_hidden_files_are_no_images(photos):
    (photos / "train" / "apple" / "._a.png").write_bytes(b"resource fork")
    assert len(folder(photos).train) == 6
