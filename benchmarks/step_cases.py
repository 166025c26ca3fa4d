"""Students, teachers and images of the step benchmark, as kdcache and as PyTorch's users hold them.

The teacher is four networks of the student's shape whose logits are averaged: four times its
forward pass, in operations and in time, whatever the machine.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import torchvision
from torch import nn
from torch.utils.data import Dataset as TorchDataset
from torchvision import transforms as v1
from torchvision.transforms import v2

from benchmarks.bench_loader import make_photos
from kdcache.data.beton import Dataset
from kdcache.data.convert import convert
from kdcache.data.sources import Source, open_source
from kdcache.models import load, resnet
from kdcache.models.classifier import Classifier
from kdcache.views.spec import ViewSpec

CLASSES = 10
TEACHERS = 4
Item = tuple[torch.Tensor, int]


class Committee(nn.Module):
    """Normalised images [B, 3, H, W] to the mean of the members' logits [B, C]."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([member(x) for member in self.members]).mean(0)


@dataclass(frozen=True)
class Case:
    """One student, one teacher, one set of images.

    data     for kdcache
    items    for a DataLoader: the same images, cropped to the same share of their area and flipped,
             uint8 [1 or 3, H, W]
    epochs   of one run: few images need several, or the start of the workers would count
    """

    name: str
    view: ViewSpec
    batch_size: int
    epochs: int
    device: torch.device
    data: Dataset
    items: TorchDataset[Item]

    def student(self) -> Classifier:
        """A fresh one, with the same first weights every time."""
        torch.manual_seed(0)
        return load.load_model(
            "kdcache:small",
            "student",
            num_classes=CLASSES,
            size_px=self.view.size_px,
            device=self.device,
        )

    def teacher(self) -> Classifier:
        """With fresh weights: its speed is the same."""
        torch.manual_seed(1)
        network = Committee([resnet.build("small", CLASSES) for _ in range(TEACHERS)])
        teacher = Classifier(network, "four of kdcache:small", load.OWN_MEAN, load.OWN_STD)
        teacher.to(self.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        return teacher.requires_grad_(False)

    @property
    def batches(self) -> int:
        """Of one epoch; the rest of the images, less than a batch, is left out by everyone."""
        return len(self.data) // self.batch_size

    @property
    def images(self) -> int:
        """Of one run."""
        return self.epochs * self.batches * self.batch_size


class Arrays(TorchDataset[Item]):
    """Grey images in memory through PIL. They stay grey until the batch, which costs least."""

    def __init__(self, source: Source, view: ViewSpec) -> None:
        self.source = source
        crop = v1.RandomResizedCrop(view.size_px, (view.min_scale, 1.0))
        self.transform = v1.Compose([crop, v1.RandomHorizontalFlip(), v1.PILToTensor()])

    def __len__(self) -> int:
        return len(self.source.images)

    def __getitem__(self, i: int) -> Item:
        image = PIL.Image.fromarray(np.asarray(self.source.images[i]))
        return self.transform(image), self.source.labels[i]


class Photos(TorchDataset[Item]):
    """JPEG files decoded by torchvision and cropped as uint8 tensors, which is faster than PIL."""

    def __init__(self, source: Source, view: ViewSpec) -> None:
        self.source = source
        crop = v2.RandomResizedCrop(view.size_px, (view.min_scale, 1.0), antialias=True)
        self.transform = v2.Compose([crop, v2.RandomHorizontalFlip()])

    def __len__(self) -> int:
        return len(self.source.images)

    def __getitem__(self, i: int) -> Item:
        data = torchvision.io.read_file(str(self.source.images[i]))
        image = torchvision.io.decode_jpeg(data, torchvision.io.ImageReadMode.RGB)
        return self.transform(image), self.source.labels[i]


@contextmanager
def fashion(num_samples: int, device: torch.device) -> Iterator[Case]:
    """Fashion-MNIST to 28 px, in batches of 256."""
    whole = open_source("fashion-mnist", "train")
    source = Source(whole.class_names, whole.images[:num_samples], whole.labels[:num_samples])
    view = ViewSpec(28, min_scale=0.3, mixup=1.0)
    with tempfile.TemporaryDirectory() as name:
        data, _ = convert(source, Path(name) / "data.beton")
        yield Case(
            "Fashion-MNIST to 28 px",
            view,
            min(256, num_samples),
            1,
            device,
            data,
            Arrays(source, view),
        )


@contextmanager
def photos(num_samples: int, size_px: int, epochs: int, device: torch.device) -> Iterator[Case]:
    """JPEGs of about 500x400 px."""
    view = ViewSpec(size_px, min_scale=0.3, mixup=1.0)
    with tempfile.TemporaryDirectory() as name:
        paths = make_photos(Path(name), num_samples)
        classes = tuple(f"class {i}" for i in range(CLASSES))
        source = Source(classes, paths, [i % CLASSES for i in range(num_samples)])
        data, _ = convert(source, Path(name) / "data.beton")
        yield Case(
            f"photos to {size_px} px",
            view,
            min(32, num_samples),
            epochs,
            device,
            data,
            Photos(source, view),
        )
