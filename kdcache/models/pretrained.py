"""torchvision's and timm's models as classifiers, with what their own configurations say of them.

In: a model's name there. Out: a `Classifier` with the normalisation that its weights were trained
with, fresh or with these weights; or the weights alone. timm is optional.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import torch

from kdcache.errors import ClassesMismatch, MissingDependency, UsageError, did_you_mean
from kdcache.models.class_names import ClassNames
from kdcache.models.classifier import Classifier

Role = Literal["teacher", "student"]
Weights = dict[str, torch.Tensor]

# Built without their auxiliary heads, which make the answer of a training network a tuple.
_AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}
# Trained by TensorFlow's normalisation, which torchvision applies within the network instead.
_INCEPTION_NORM = (0.5, 0.5, 0.5)


def from_torchvision(name: str, role: Role, num_classes: int | None) -> Classifier:
    """A fresh student of `num_classes`, or a teacher with torchvision's best weights.

    Raises UsageError for an unknown name, a model for something else, weights that cannot be had,
    and before these are fetched for a teacher of another class count.
    """
    try:
        weights = _torchvision().models.get_model_weights(name).DEFAULT
        preprocess = weights.transforms()
        mean, std = tuple(preprocess.mean), tuple(preprocess.std)
        options: dict[str, Any] = {}
        if name in _AUXILIARY:
            mean = std = _INCEPTION_NORM
            options = {"aux_logits": False, "init_weights": role == "student"}
        # These have a position embedding for one size, 224 by default.
        if name.startswith("vit_"):
            options = {"image_size": _fixed_size(weights)}
        count = num_classes
        if role == "teacher":
            count = len(weights.meta["categories"])
            require_classes(f"torchvision:{name}", count, num_classes)
        network = _torchvision().models.get_model(name, weights=None, num_classes=count, **options)
        if role == "teacher":
            network.load_state_dict(_torchvision_weights(name, weights))
    except UsageError:
        raise
    except ValueError as error:
        close = did_you_mean(name, _torchvision().models.list_models(module=_torchvision().models))
        line = f"unknown model 'torchvision:{name}': see torchvision.models{close}"
        raise UsageError(line) from error
    except (TypeError, AttributeError, KeyError) as error:
        raise UsageError(f"torchvision:{name} does not classify images: {_line(error)}") from error
    except (OSError, RuntimeError) as error:
        line = f"the weights of torchvision:{name} cannot be had: {_line(error)}"
        raise UsageError(line) from error
    return Classifier(network, f"torchvision:{name}", mean, std)


def from_timm(name: str, role: Role, num_classes: int | None) -> Classifier:
    """A fresh student of `num_classes`, or a teacher with timm's weights for that name.

    Raises UsageError for an unknown name, weights that cannot be had, and before these are fetched
    for a teacher of another class count.
    """
    timm = _timm()
    try:
        if role == "teacher":
            # Checked before create_model, which would fetch the weights first.
            config = timm.models.get_pretrained_cfg(name)
            if config:
                require_classes(f"timm:{name}", config.num_classes, num_classes)
            network = timm.create_model(name, pretrained=True)
        else:
            network = timm.create_model(name, pretrained=False, num_classes=num_classes)
    except (RuntimeError, OSError) as error:
        known = [*timm.list_models(), *timm.list_pretrained()]
        close = "" if name in known else did_you_mean(name, known)
        raise UsageError(f"timm:{name}: {_line(error)}{close}") from error
    config = network.pretrained_cfg
    return Classifier(network, f"timm:{name}", config["mean"], config["std"])


def pretrained(name: str) -> tuple[Weights, int]:
    """The library's own weights for "torchvision:NAME" or "timm:NAME", and their class count.

    Raises UsageError for another kind of model, and where they cannot be had.
    """
    kind, _, rest = name.partition(":")
    if kind == "torchvision":
        weights = _torchvision().models.get_model_weights(rest).DEFAULT
        try:
            return _torchvision_weights(rest, weights), len(weights.meta["categories"])
        except (OSError, RuntimeError) as error:
            line = f"the weights of {name} cannot be had: {_line(error)}"
            raise UsageError(line) from error
    if kind == "timm":
        network: Any = from_timm(rest, "teacher", None).network
        return network.state_dict(), int(network.pretrained_cfg["num_classes"])
    raise UsageError(
        f"{name} has no pretrained weights: torchvision's and timm's models have; give a "
        ".safetensors file or a run's folder"
    )


def class_names(name: str) -> ClassNames | None:
    """Of the classes of "torchvision:NAME" or "timm:NAME" with its pretrained weights.

    None where they are unknown, and for any other name. ImageNet's classes have their WordNet ids
    too, where timm is installed.
    """
    kind, _, rest = name.partition(":")
    try:
        if kind == "torchvision":
            categories = _torchvision().models.get_model_weights(rest).DEFAULT.meta["categories"]
            synsets = _imagenet_names("imagenet-1k") if len(categories) == 1000 else None
            ids = ([names[:1] for names in synsets] if synsets else None) or [()] * len(categories)
            return ClassNames(
                tuple((str(c), *i) for c, i in zip(categories, ids, strict=True)), own=False
            )
        if kind == "timm":
            timm = _timm()
            subset = timm.data.infer_imagenet_subset(timm.models.get_pretrained_cfg(rest))
            names = _imagenet_names(subset) if subset else None
            return ClassNames(tuple(names), own=False) if names else None
    except (AttributeError, KeyError, ValueError, RuntimeError, MissingDependency):
        pass  # `load_model` says what is wrong with such a name
    return None


def _imagenet_names(subset: str) -> list[tuple[str, ...]] | None:
    """WordNet id and words of each class, in the order of the classes; None without timm."""
    try:
        info = _timm().data.ImageNetInfo(subset)
    except MissingDependency:
        return None
    words = [text.split(",") for text in info.label_descriptions()]
    return [
        (i, *(w.strip() for w in some)) for i, some in zip(info.label_names(), words, strict=True)
    ]


def require_classes(name: str, found: int, expected: int | None) -> None:
    """Raise ClassesMismatch unless a model has as many classes as the data, where these count."""
    if expected not in (None, found):
        raise ClassesMismatch(f"{name} has {found} classes, the data has {expected}")


def pretrained_size_px(name: str) -> int | None:
    """The side of the views that the pretrained weights of "torchvision:NAME" or "timm:NAME" are
    for, as its configuration says; None for any other name. Loads no weights."""
    kind, _, rest = name.partition(":")
    try:
        if kind == "timm":
            config = _timm().models.get_pretrained_cfg(rest)
            return int(config.input_size[-1]) if config else None
        if kind == "torchvision":
            preprocess = _torchvision().models.get_model_weights(rest).DEFAULT.transforms()
            return int(preprocess.crop_size[0])
    except (AttributeError, LookupError, ValueError, RuntimeError, MissingDependency):
        pass  # `load_model` says what is wrong with such a name
    return None


def natural_size_px(name: str) -> int | None:
    """The only side of views that "torchvision:NAME" or "timm:NAME" takes, as its configuration
    says; None where it takes many, and for any other name. Loads no weights."""
    kind, _, rest = name.partition(":")
    if kind == "timm":
        try:
            config = _timm().models.get_pretrained_cfg(rest)
        except RuntimeError:  # no such weights of that network
            return None
        return int(config.input_size[-1]) if config and config.fixed_input_size else None
    if kind == "torchvision" and rest.startswith(("vit_", "maxvit_")):
        try:
            return _fixed_size(_torchvision().models.get_model_weights(rest).DEFAULT)
        except ValueError:
            return None
    return None


def _fixed_size(weights: Any) -> int:
    return int(weights.meta["min_size"][0])


def _torchvision_weights(name: str, weights: Any) -> Weights:
    # In place: what torch adds to the dictionary tells layers how old these weights are.
    state: Weights = weights.get_state_dict(check_hash=True, weights_only=True)
    for key in list(state):
        if key.startswith(_AUXILIARY.get(name, ())):
            del state[key]
        # The DenseNets' were saved by a torch whose modules could have dots in their names.
        elif key != (new := re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)", r"\1\2", key)):
            state[new] = state.pop(key)
    return state


def _torchvision() -> Any:
    # Here, not above: it takes a second to import, and a cache can be read and trained from
    # without it.
    import torchvision

    return torchvision


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise MissingDependency("timm is not installed: pip install 'kdcache[timm]'") from error
    return timm


def _line(error: Exception) -> str:
    """The first line of a message of somebody else's, without its full stop."""
    return (str(error).splitlines() or [""])[0].removesuffix(".")
