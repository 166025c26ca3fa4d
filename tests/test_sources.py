"""Where images come from: folders, and data sets with names."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torchvision.datasets as tvd

from kdcache.data.convert import convert
from kdcache.data.sources import fashion_mnist, open_source
from kdcache.data.sources.fashion_mnist import DEBIAN_FASHION_MNIST, FASHION_CLASSES
from kdcache.errors import StorageError, UsageError


def put(path: Path, value: int = 0) -> Path:
    """A small grey image at `path`, folders included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("L", (4, 3), value).save(path)
    return path


# --- class folders


def test_class_folders_give_classes_and_files_in_sorted_order(tmp_path: Path) -> None:
    b2, b1 = put(tmp_path / "bees" / "2.png"), put(tmp_path / "bees" / "1.jpg")
    a1 = put(tmp_path / "ants" / "z.png")
    source = open_source(str(tmp_path), "train")
    assert source.class_names == ("ants", "bees")
    assert source.images == [a1, b1, b2]
    assert source.labels == [0, 1, 1]
    assert source.name(2) == str(b2)


def test_images_may_lie_deeper_and_other_files_are_left_out(tmp_path: Path) -> None:
    deep = put(tmp_path / "ants" / "2024" / "june" / "x.PNG")
    top = put(tmp_path / "ants" / "y.jpeg")
    (tmp_path / "ants" / "notes.txt").write_text("no image")
    (tmp_path / "README.md").write_text("no class")
    assert open_source(str(tmp_path), "train").images == [deep, top]


def test_symbolic_links_to_files_and_folders_are_followed(tmp_path: Path) -> None:
    put(tmp_path / "store" / "ants" / "1.png")
    folder = tmp_path / "classes"
    folder.mkdir()
    (folder / "ants").symlink_to(tmp_path / "store" / "ants")
    assert open_source(str(folder), "train").images == [folder / "ants" / "1.png"]


@pytest.mark.parametrize("test_folder", ["test", "val"])
def test_split_folders_are_recognised(tmp_path: Path, test_folder: str) -> None:
    train = put(tmp_path / "train" / "ants" / "1.png")
    test = put(tmp_path / test_folder / "ants" / "2.png")
    assert open_source(str(tmp_path), "train").images == [train]
    assert open_source(str(tmp_path), "test").images == [test]
    assert open_source(str(tmp_path), "test").class_names == ("ants",)


def test_the_test_folder_goes_before_the_val_folder(tmp_path: Path) -> None:
    for name in ("train", "val", "test"):
        put(tmp_path / name / "ants" / "1.png")
    assert open_source(str(tmp_path), "test").images == [tmp_path / "test" / "ants" / "1.png"]


def test_a_train_folder_alone_is_a_split_not_a_class(tmp_path: Path) -> None:
    image = put(tmp_path / "train" / "ants" / "1.png")
    source = open_source(str(tmp_path), "train")
    assert (source.class_names, source.images) == (("ants",), [image])
    with pytest.raises(UsageError, match="no folder for the test split"):
        open_source(str(tmp_path), "test")


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for name in ("bus", "car", "train"):
        put(tmp_path / name / "1.png")
    assert open_source(str(tmp_path), "train").class_names == ("bus", "car", "train")


def test_an_empty_class_folder_is_named(tmp_path: Path) -> None:
    put(tmp_path / "ants" / "1.png")
    (tmp_path / "bees").mkdir()
    with pytest.raises(UsageError, match=r"class folder .*bees holds no image"):
        open_source(str(tmp_path), "train")


def test_an_empty_class_can_be_kept(tmp_path: Path) -> None:
    put(tmp_path / "ants" / "1.png")
    (tmp_path / "bees").mkdir()
    put(tmp_path / "cows" / "1.png")
    source = open_source(str(tmp_path), allow_empty=True)
    assert (source.class_names, source.labels) == (("ants", "bees", "cows"), [0, 2])


def test_images_without_class_folders_have_no_labels(tmp_path: Path) -> None:
    files = [put(tmp_path / "1.png"), put(tmp_path / "2.png")]
    (tmp_path / "notes.txt").write_text("no image")
    source = open_source(str(tmp_path))
    assert (source.class_names, source.images, source.labels) == ((), files, [-1, -1])
    assert source.ignored == {".txt": 1}


@pytest.mark.parametrize("empty", [True, False])
def test_a_folder_without_images_is_refused(tmp_path: Path, empty: bool) -> None:
    if not empty:
        (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(UsageError, match="holds no images, nor class folders with images"):
        open_source(str(tmp_path), "train")


@pytest.mark.parametrize(
    "name", [".ipynb_checkpoints", "@eaDir", "__MACOSX", ".git", "lost+found", "$RECYCLE.BIN"]
)
def test_hidden_and_system_folders_are_no_classes(tmp_path: Path, name: str) -> None:
    image = put(tmp_path / "ants" / "1.png")
    for folder in (tmp_path, tmp_path / "ants"):
        put(folder / name / "1-checkpoint.png")
        (folder / ".DS_Store").write_bytes(b"x")
        (folder / "Thumbs.db").write_bytes(b"x")
        put(folder / "._1.png")
    source = open_source(str(tmp_path))
    assert (source.class_names, source.images) == (("ants",), [image])
    assert source.ignored == {"hidden or a system's": 8}


def test_a_loop_of_links_is_read_once(tmp_path: Path) -> None:
    ant, bee = put(tmp_path / "ants" / "1.png"), put(tmp_path / "bees" / "2.png")
    (tmp_path / "ants" / "here").symlink_to(".")
    (tmp_path / "ants" / "up").symlink_to("..")
    (tmp_path / "bees" / "up").symlink_to("..")
    (tmp_path / "bees" / "root").symlink_to("/")
    source = open_source(str(tmp_path))
    assert (source.images, source.labels) == ([ant, bee], [0, 1])
    assert source.ignored == {"a link to a folder that is read anyway": 4}


def test_a_link_into_another_class_does_not_take_its_images(tmp_path: Path) -> None:
    """`ants` is read first, and its link leads to a folder of `bees`."""
    ant, bee = put(tmp_path / "ants" / "1.png"), put(tmp_path / "bees" / "deep" / "2.png")
    (tmp_path / "ants" / "link").symlink_to(tmp_path / "bees" / "deep")
    source = open_source(str(tmp_path))
    assert (source.images, source.labels) == ([ant, bee], [0, 1])


def test_a_folder_elsewhere_is_read_by_one_link(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere" / "1.png")
    classes = tmp_path / "classes"
    put(classes / "ants" / "2.png")
    for name in ("link", "other"):
        (classes / "ants" / name).symlink_to(tmp_path / "elsewhere")
    images = open_source(str(classes)).images
    assert images == [classes / "ants" / "2.png", classes / "ants" / "link" / "1.png"]


def test_two_classes_of_one_folder_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "ants" / "1.png")
    (tmp_path / "bees").symlink_to("ants")
    with pytest.raises(UsageError, match=r"ants and .*bees are the same folder"):
        open_source(str(tmp_path))


def test_only_regular_files_are_images(tmp_path: Path) -> None:
    image = put(tmp_path / "ants" / "1.png")
    os.mkfifo(tmp_path / "ants" / "pipe.png")
    (tmp_path / "ants" / "device.png").symlink_to("/dev/zero")
    source = open_source(str(tmp_path))
    assert source.images == [image]
    assert source.ignored == {"not a regular file": 2}


def test_files_without_a_known_extension_are_decided_by_content(tmp_path: Path) -> None:
    folder = tmp_path / "ants"
    image = put(folder / "1.png").read_bytes()
    for name in ("a", "b.jpg_large", "c.0001"):
        (folder / name).write_bytes(image)
    for name in ("LICENSE", "d.csv", "e.csv"):
        (folder / name).write_text("class,file")
    (folder / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(20))
    (folder / "gone.txt").symlink_to("nowhere")
    source = open_source(str(tmp_path))
    names = [Path(str(x)).name for x in source.images]
    assert names == ["1.png", "a", "b.jpg_large", "c.0001", "photo.heic"]
    assert source.ignored == {".csv": 2, "no extension": 1, "a broken link": 1}
    with pytest.raises(UsageError, match=r"photo\.heic: unsupported image format"):
        convert(source, tmp_path / "x.beton")


def test_images_beside_class_folders_are_counted(tmp_path: Path) -> None:
    put(tmp_path / "ants" / "1.png")
    put(tmp_path / "loose.png")
    assert open_source(str(tmp_path)).ignored == {"outside the class folders": 1}


def test_a_folder_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "ants" / "1.png")
    locked = tmp_path / "ants" / "locked"
    locked.mkdir()
    real = os.listdir

    def listdir(path: Path) -> list[str]:
        if path == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "listdir", listdir)
    with pytest.raises(StorageError, match=f"cannot read the folder {locked}: Permission denied"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("train", "test"),
    [("train", "valid"), ("Train", "Test"), ("training", "testing"), ("TRAIN", "Validation")],
)
def test_splits_are_recognised_by_their_usual_names(tmp_path: Path, train: str, test: str) -> None:
    for name in (train, test):
        put(tmp_path / name / "ants" / f"{name}.png")
    for split, name in (("train", train), ("test", test)):
        source = open_source(str(tmp_path), split)  # type: ignore[arg-type]
        assert source.class_names == ("ants",)
        assert source.images == [tmp_path / name / "ants" / f"{name}.png"]


def test_unclear_splits_are_refused_with_the_names_seen(tmp_path: Path) -> None:
    for name in ("train", "Train", "test"):
        put(tmp_path / "a" / name / "ants" / "1.png")
    with pytest.raises(UsageError, match="several folders for the train split: Train, train"):
        open_source(str(tmp_path / "a"))
    for name in ("val", "test"):
        put(tmp_path / "b" / name / "ants" / "1.png")
    with pytest.raises(UsageError, match="no folder for the train split, only test, val"):
        open_source(str(tmp_path / "b"))


def test_a_missing_folder_is_refused_and_the_choices_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no such folder: .*nowhere; SOURCE is .*'digits'"):
        open_source(str(tmp_path / "nowhere"), "train")
    with pytest.raises(UsageError, match=r"torchvision:NAME'; did you mean fashion-mnist\?$"):
        open_source("fashon-mnist", "train")
    with pytest.raises(UsageError, match=r"torchvision.datasets; did you mean CIFAR10\?$"):
        open_source("torchvision:CIFAR", "train")


def test_a_file_is_no_source(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a file; SOURCE is a folder"):
        open_source(str(put(tmp_path / "x.png")), "train")


# --- data sets with names


def test_digits_are_split_1500_to_297() -> None:
    train, test = open_source("digits", "train"), open_source("digits", "test")
    assert (len(train.images), len(train.labels)) == (1500, 1500)
    assert (len(test.images), len(test.labels)) == (297, 297)
    assert train.class_names == test.class_names == tuple("0123456789")
    first = train.images[0]
    assert isinstance(first, np.ndarray)
    assert (first.shape, first.dtype, train.labels[0]) == ((8, 8), np.uint8, 0)
    assert max(int(np.asarray(x).max()) for x in train.images) == 255
    assert train.name(3) == "image 3"


@pytest.mark.skipif(
    not (DEBIAN_FASHION_MNIST / "t10k-images-idx3-ubyte.gz").exists(),
    reason="the Debian package dataset-fashion-mnist is not installed",
)
def test_fashion_mnist_comes_from_the_debian_package() -> None:
    source = open_source("fashion-mnist", "test")
    assert source.class_names == FASHION_CLASSES
    assert len(source.images) == 10_000
    assert np.bincount(source.labels).tolist() == [1000] * 10
    assert source.labels[:3] == [9, 2, 1]
    assert source.class_names[source.labels[0]] == "Ankle boot"
    first = source.images[0]
    assert isinstance(first, np.ndarray)
    assert (first.shape, first.dtype) == ((28, 28), np.uint8)


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return gzip.compress(header + array.tobytes())


def test_idx_files_are_read_by_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FASHION_MNIST", tmp_path)
    images = np.arange(2 * 3 * 5, dtype=np.uint8).reshape(2, 3, 5)
    for stem, labels in (("train", [7, 1]), ("t10k", [0, 9])):
        (tmp_path / f"{stem}-images-idx3-ubyte.gz").write_bytes(idx(images))
        (tmp_path / f"{stem}-labels-idx1-ubyte.gz").write_bytes(idx(np.array(labels, np.uint8)))
    assert open_source("fashion-mnist", "train").labels == [7, 1]
    source = open_source("fashion-mnist", "test")
    assert source.labels == [0, 9]
    assert (np.stack([np.asarray(x) for x in source.images]) == images).all()


def test_fashion_mnist_without_package_or_network_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(fashion_mnist, "DEBIAN_FASHION_MNIST", tmp_path)
    monkeypatch.setattr(tvd.FashionMNIST, "__init__", offline)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UsageError, match=r"apt-get install dataset-fashion-mnist.*no route"):
        open_source("fashion-mnist", "train")


# --- torchvision


class Tiny(tvd.VisionDataset):
    """Two images for training and one for testing, in torchvision's manner."""

    classes = ("left", "right")

    def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
        super().__init__(root)
        self.values = [10, 20] if train else [30]
        assert download

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, i: int) -> tuple[PIL.Image.Image, int]:
        return PIL.Image.new("RGB", (4, 4), (self.values[i],) * 3), 1 - i


class BySplit(Tiny):
    def __init__(self, root: str, split: str = "train", download: bool = False) -> None:
        super().__init__(root, split == "train", download)


@pytest.fixture
def torchvision_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[str, type[Any]], None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def add(name: str, kind: type[Any]) -> None:
        monkeypatch.setattr(tvd, name, kind, raising=False)

    return add


@pytest.mark.parametrize("kind", [Tiny, BySplit])
def test_torchvision_data_sets_are_found_by_name(
    kind: type[Any], torchvision_has: Callable[[str, type[Any]], None]
) -> None:
    torchvision_has("Tiny", kind)
    train, test = open_source("torchvision:Tiny", "train"), open_source("torchvision:Tiny", "test")
    assert train.class_names == ("left", "right")
    assert (train.labels, test.labels) == ([1, 0], [1])
    assert [np.asarray(x).max() for x in (*train.images, *test.images)] == [10, 20, 30]


@pytest.mark.parametrize("name", ["NoSuchThing", "", "mnist", "os", "wrap_dataset_for_transforms"])
def test_an_unknown_torchvision_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="torchvision has no data set"):
        open_source(f"torchvision:{name}", "train")


@pytest.mark.parametrize("name", ["CocoDetection", "FakeData", "VisionDataset"])
def test_a_torchvision_data_set_that_needs_more_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UsageError, match=f"torchvision's {name} "):
        open_source(f"torchvision:{name}", "train")


def test_a_failed_download_names_the_data_set(
    torchvision_has: Callable[[str, type[Any]], None],
) -> None:
    class Broken(Tiny):
        def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
            raise RuntimeError("checksum of the archive is wrong")

    torchvision_has("Broken", Broken)
    with pytest.raises(StorageError, match=r"could not provide Broken: checksum"):
        open_source("torchvision:Broken", "train")


def test_a_folder_without_splits_has_no_test_images(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    with pytest.raises(UsageError, match="has no folders train/ and test/"):
        open_source(str(tmp_path), "test")
