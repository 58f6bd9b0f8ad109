"""Data sets by name, as tensors on the device or streamed to it, and batches of them, augmented there.

`load("digits")` and `load("digits-hard")` need nothing but scikit-learn; MNIST, FashionMNIST, SVHN and CIFAR come
through torchvision; any other name is an image folder `<root>/<name>/{train,test}/<class>/*`, which as `<name>@<side>`
is decoded when batches are drawn (see `folders`). `<name>-first80` and `<name>-last80` are disjoint, biased halves of
any of them, see `base_name`. The root is the argument, else $REPAIRLIB_DATA, else the checkout's `data/`. Pixels stay
uint8 until a batch is drawn, so CIFAR-10 takes 184 MB of device memory.

A data set is one file of this folder, and one line below; one of your own gets a name by `register`.
"""

from companion.runs.data import archives, digits  # each registers its data sets
from companion.runs.data.augmentation import AUGMENTATIONS, augment
from companion.runs.data.digits import clutter
from companion.runs.data.folders import DataMissing, Stream
from companion.runs.data.loader import Loader, iterate
from companion.runs.data.loading import base_name, check_name, is_there, load, title_of
from companion.runs.data.registry import (
    DATASETS,
    Dataset,
    Facts,
    Source,
    Split,
    data_root,
    register,
)
from companion.runs.files import project_root

__all__ = [
    "AUGMENTATIONS", "DATASETS", "DataMissing", "Dataset", "Facts", "Loader", "Source", "Split", "Stream", "archives",
    "augment", "base_name", "check_name", "clutter", "data_root", "digits", "is_there", "iterate", "load",
    "project_root", "register", "title_of",
]  # fmt: skip
