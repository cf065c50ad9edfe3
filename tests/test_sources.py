"""Data sets that come as archives, on archives of the real layout made here; ImageNet-12 of a user's own folders."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from urllib.error import URLError
from zipfile import ZipFile

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from bdx import imagefile, recipe
from bdx.configure import compose
from bdx.datasets import gtsrb, tiny_imagenet
from bdx.datasets.base import load
from bdx.errors import UserError


def read(folder: Path, name: str, *words: str):
    cfg = OmegaConf.to_container(compose([f"dataset={name}", *words]).dataset, resolve=True)
    return load(cfg, folder, device="cpu", seed=0)


def encoded(color, size=(48, 40), kind="PPM", mode="RGB") -> bytes:
    Image.new(mode, size, color).save(stream := io.BytesIO(), kind)
    return stream.getvalue()


@pytest.fixture
def fetched(monkeypatch) -> list:
    """What would have been downloaded: [file, address, MD5]."""
    asked = []
    monkeypatch.setattr("torchvision.datasets.utils.download_url", lambda url, root, file, md5: asked.append([file, url, md5]))
    return asked


# GTSRB


def signs(folder: Path, classes: int = 43) -> None:
    """Two photos of each class to train on, red by class and green by frame; three test photos, blue."""
    with ZipFile(folder / "GTSRB_Final_Training_Images.zip", "w") as zip:
        zip.writestr("GTSRB/Readme-Images.txt", "read me")
        for c in reversed(range(classes)):
            zip.writestr(f"GTSRB/Final_Training/Images/{c:05}/GT-{c:05}.csv", "Filename;ClassId")
            for frame in (1, 0):
                zip.writestr(f"GTSRB/Final_Training/Images/{c:05}/00000_{frame:05}.ppm", encoded((c, frame, 0), (30 + c, 33)))
    with ZipFile(folder / "GTSRB_Final_Test_Images.zip", "w") as zip:
        for i in (2, 0, 1):
            zip.writestr(f"GTSRB/Final_Test/Images/{i:05}.ppm", encoded((0, 0, 100 + i)))
    with ZipFile(folder / "GTSRB_Final_Test_GT.zip", "w") as zip:
        lines = [f"{i:05}.ppm;48;40;5;5;40;40;{c}" for i, c in ((1, 7), (0, 42), (2, 3))]
        zip.writestr("GT-final_test.csv", "\r\n".join(["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId", *lines]))


def test_gtsrb_is_read_from_its_archives(tmp_path, fetched):
    signs(tmp_path)
    data = read(tmp_path, "gtsrb", "dataset.reserved.ratio=0.5")
    assert data.train.x.shape == (86, 3, 32, 32)
    assert data.train.y.tolist() == [c for c in range(43) for _ in range(2)]
    assert data.train.x[:, 0].amin((1, 2)).tolist() == data.train.x[:, 0].amax((1, 2)).tolist() == data.train.y.tolist()
    assert data.train.x[:, 1, 0, 0].tolist() == [0, 1] * 43  # frames in their order
    assert data.test.x[:, 2, 9, 9].tolist() == [100, 101, 102]
    assert data.test.y.tolist() == [42, 7, 3]  # by the file's name, not by the order of the table
    assert data.classes[14] == "stop"
    assert len(set(data.classes)) == 43
    assert [(file, md5) for file, _, md5 in fetched] == list(gtsrb.MD5.items())
    assert all(url == gtsrb.FROM + file for file, url, _ in fetched)
    read(tmp_path, "gtsrb", "dataset.reserved.ratio=0.5")
    assert len(fetched) == 3  # the cache is made once


def test_an_unreadable_photo_in_an_archive_is_named(tmp_path, fetched):
    signs(tmp_path)
    with ZipFile(tmp_path / "GTSRB_Final_Training_Images.zip", "a") as zip:
        zip.writestr("GTSRB/Final_Training/Images/00042/00009_00000.ppm", b"P6 no image")
    with pytest.raises(
        UserError, match=r"unreadable images: GTSRB/Final_Training/Images/00042/00009_00000\.ppm \(.*\); remove"
    ):
        read(tmp_path, "gtsrb")
    assert not (tmp_path / "gtsrb.safetensors").exists()


# Tiny ImageNet


def tiny(folder: Path, classes: int = 200) -> list[str]:
    """One image of each class to train on, two to test; green is the class. Returns the classes, sorted."""
    ids = [f"n{10_000 + 7 * i:08}" for i in range(classes)]
    root = "tiny-imagenet-200"
    with ZipFile(folder / tiny_imagenet.FILE, "w") as zip:
        notes = []
        for i, c in enumerate(reversed(ids)):
            color = (0, ids.index(c), 0)
            zip.writestr(f"{root}/train/{c}/images/{c}_0.JPEG", encoded(color, (64, 64), "PNG"))
            zip.writestr(f"{root}/train/{c}/{c}_boxes.txt", "0 0 63 63")
            for k in range(2):
                zip.writestr(f"{root}/val/images/val_{2 * i + k}.JPEG", encoded(ids.index(c), (64, 64), "PNG", "L"))
                notes.append(f"val_{2 * i + k}.JPEG\t{c}\t0\t0\t62\t62")
        zip.writestr(f"{root}/test/images/test_0.JPEG", encoded((1, 1, 1), (64, 64), "PNG"))  # without a label
        zip.writestr(f"{root}/val/val_annotations.txt", "\n".join(notes) + "\n")
        zip.writestr(f"{root}/words.txt", "\n".join(f"{c}\tthing {i}, what" for i, c in enumerate(ids)))
    return ids


@pytest.mark.parametrize(("name", "every"), [("tiny_imagenet", 1), ("tiny_imagenet_40", 5)])
def test_tiny_imagenet_is_read_from_its_archive(name, every, tmp_path, fetched):
    tiny(tmp_path)
    data = read(tmp_path, name, "dataset.reserved.ratio=1.0")
    kept = list(range(0, 200, every))
    assert data.train.x.shape == (len(kept), 3, 64, 64)
    assert data.train.x[:, 1, 5, 5].tolist() == kept
    assert data.train.y.tolist() == list(range(len(kept)))
    assert len(data.test) == 2 * len(kept)
    assert [kept[label] for label in data.test.y.tolist()] == data.test.x[:, 2, 60, 0].tolist()  # grey has three planes
    assert list(data.classes) == [f"thing {i}" for i in kept]
    assert fetched == [[tiny_imagenet.FILE, *tiny_imagenet.ARCHIVES[tiny_imagenet.FILE]]]
    assert imagefile.header(tmp_path / f"{name}.safetensors")["dataset"] == name


def test_how_many_classes_must_be_possible(tmp_path):
    with pytest.raises(UserError, match=r"dataset\.source\.every=0: expected 1 \(all 200 classes\) to 100"):
        read(tmp_path, "tiny_imagenet", "dataset.source.every=0")


@pytest.mark.parametrize("error", [URLError("no route"), RuntimeError("File not found or corrupted.")])
@pytest.mark.parametrize(("name", "archives"), [("gtsrb", list(gtsrb.MD5)), ("tiny_imagenet", [tiny_imagenet.FILE])])
def test_without_a_network_it_says_what_to_put_where(name, archives, error, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fail)
    with pytest.raises(UserError, match=rf"^{name} could not be downloaded \(.*\); without a network put ") as caught:
        read(tmp_path, name)
    for word in (*archives, f"a ready cache {name}.safetensors", f"into {tmp_path}", "BDX_DATA"):
        assert word in str(caught.value)


# ImageNet-12


@pytest.fixture
def imagenet(tmp_path) -> Path:
    for split, each in (("train", 2), ("val", 1)):
        for c in range(14):
            for i in range(each):
                path = tmp_path / "imagenet" / split / f"n{c:08}" / f"{i}.JPEG"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encoded((10 * c, 0, 0), (80, 60), "PNG"))
    return tmp_path / "imagenet"


def test_imagenet12_is_the_first_twelve_classes_whole(imagenet, tmp_path):
    data = read(tmp_path, "imagenet12", f"dataset.source.root={imagenet}", "dataset.reserved.ratio=0.5")
    assert data.train.x.shape == (24, 3, 256, 256)
    assert data.train.x[:, 0, 0, 0].tolist() == [10 * c for c in range(12) for _ in range(2)]
    assert data.test.y.tolist() == list(range(12))
    assert data.classes[-1] == "n00000011"
    assert data.augment.zoom == 0.2


def test_imagenet12_needs_the_users_own_images(tmp_path, monkeypatch, imagenet):
    with pytest.raises(
        UserError, match=r"dataset=imagenet12 needs dataset\.source\.root=PATH with train/CLASS/\*\.png and val/"
    ):
        read(tmp_path, "imagenet12")
    with pytest.raises(UserError, match=r"dataset\.source\.first=1: expected 2 classes or more"):
        read(tmp_path, "imagenet12", f"dataset.source.root={imagenet}", "dataset.source.first=1")
    monkeypatch.setenv("IMAGENET", str(imagenet))
    assert len(read(tmp_path, "imagenet12", "dataset.reserved.ratio=0.5").test) == 12


def test_unreadable_images_are_named_in_their_order(imagenet, tmp_path):
    (imagenet / "val" / "n00000003" / "0.JPEG").write_bytes(b"nothing")
    (imagenet / "val" / "n00000001" / "0.JPEG").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"unreadable images: \S+n00000001/0\.JPEG \(.*\); \S+n00000003/0\.JPEG"):
        read(tmp_path, "imagenet12", f"dataset.source.root={imagenet}")


def test_the_checksum_is_that_of_the_bytes():
    arrays = {k: np.arange(24, dtype=np.int64).reshape(2, 3, 4).transpose(1, 0, 2) for k in imagefile.TENSORS}
    assert imagefile.digest(arrays) == hashlib.sha256(b"".join(a.tobytes() for a in arrays.values())).hexdigest()


# generated images in place of the reserved ones


def made_up(path: Path, n: int = 60, **changes) -> Path:
    """Images of one colour, that of their number, of ten classes in turn."""
    x = np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None], (n, 32, 32, 3))
    np.savez(path, **{"X": x, "Y": np.arange(n, dtype=np.int32) % 10} | changes)
    return path


def test_generated_images_take_the_place_of_the_reserved_ones(digits, shared, tmp_path):
    file = made_up(tmp_path / "part0.npz")
    about = ["dataset.reserved.count=30", f"dataset.reserved.generated={file}"]
    data = read(shared / "data", "digits", *about)
    assert data.clean.y.tolist() == [int(x[0, 0, 0]) % 10 for x in data.clean.x]
    assert data.clean.y.bincount().tolist() == [3] * 10
    assert len(set(data.clean.x[:, 0, 0, 0].tolist())) == 30
    assert len(data.reserved) == 0
    assert len(data.train) == len(data.without_reserved()) == len(digits.train)  # no training image is given up
    again = read(shared / "data", "digits", *about)
    assert bytes(again.clean.x.numpy()) == bytes(data.clean.x.numpy())


def test_a_share_is_one_of_the_training_images(shared, tmp_path):
    file = made_up(tmp_path / "part0.npz", n=200)
    data = read(shared / "data", "digits", "dataset.reserved.ratio=0.1", f"dataset.reserved.generated={file}")
    assert len(data.clean) == 140  # of 1,438, not of 200


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"X": np.zeros((60, 28, 28, 3), np.uint8)}, r"expected X uint8 \(N, 32, 32, 3\) .*, found X uint8 \(60, 28, 28, 3\)"),
        ({"X": np.zeros((60, 32, 32, 3), np.float32)}, r"found X float32"),
        ({"Y": np.zeros(59, np.int64)}, r"Y int64 \(59,\)"),
        ({"Y": np.full(60, 10)}, r"its labels go from 10 to 10, expected 0 to 9"),
        (
            {"Y": np.array([{}] * 60, dtype=object)},
            r"expected a \.npz with images X \(N,H,W,C\) and labels Y \(N,\): Object arrays",
        ),
    ],
)
def test_generated_images_must_be_such_as_the_data_set(changes, says, shared, tmp_path):
    file = made_up(tmp_path / "part0.npz", **changes)
    with pytest.raises(UserError, match=rf"dataset\.reserved\.generated={file}: .*{says}"):
        read(shared / "data", "digits", f"dataset.reserved.generated={file}")


def test_what_is_no_such_file_is_refused(shared, tmp_path):
    (text := tmp_path / "text.npz").write_text("no archive")
    for file, says in ((tmp_path / "none.npz", "there is no such file"), (text, r"expected a \.npz with images")):
        with pytest.raises(UserError, match=rf"generated={file}: {says}"):
            read(shared / "data", "digits", f"dataset.reserved.generated={file}")
    words = [f"dataset.reserved.generated={made_up(tmp_path / 'a.npz')}", "dataset.reserved.source=held_out"]
    with pytest.raises(UserError, match=r"leaves the training set as it is: set dataset\.reserved\.source=train"):
        read(shared / "data", "digits", *words)


def test_the_file_is_part_of_the_run_and_not_of_the_backdoor(tmp_path):
    first, second = (made_up(tmp_path / f"{n}.npz", n=n) for n in (60, 61))
    runs = [compose([]), *(compose([f"dataset.reserved.generated={f}"]) for f in (first, second))]
    ids = [recipe.digest(recipe.of_run(cfg, "0" * 64)) for cfg in runs]
    assert len(set(ids)) == 3
    assert len({recipe.digest(recipe.of_backdoor(cfg, "0" * 64)) for cfg in runs}) == 1
    other = first.rename(tmp_path / "elsewhere.npz")
    moved = compose([f"dataset.reserved.generated={other}"])
    assert recipe.digest(recipe.of_run(moved, "0" * 64)) == ids[1]
