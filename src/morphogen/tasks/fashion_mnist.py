"""Fashion-MNIST: 70,000 images of clothes, 28x28, in ten classes.

Source: Xiao, Rasul and Vollgraf, "Fashion-MNIST", arXiv 1708.07747; https://github.com/zalandoresearch/fashion-mnist (MIT).
"""

from __future__ import annotations

from pathlib import Path

from morphogen.growth import GrowthPoint, Sowing
from morphogen.tasks.base import Task
from morphogen.tasks.data import TaskData
from morphogen.tasks.hosts import ConvHost
from morphogen.tasks.idx import FILES, load_images
from morphogen.tasks.sources import Source

SOURCE = Source(
    name="fashion-mnist",
    layouts=(FILES,),
    how_to_get=(
        "Install Debian's dataset-fashion-mnist, or put the four files from "
        "https://github.com/zalandoresearch/fashion-mnist into $MORPHOGEN_DATA/fashion-mnist."
    ),
)
# Of the uncompressed content: the published MD5 sums are of gzip files, and packagers compress anew.
_DIGESTS = {
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
_DECISION_SIZE = 5000
_SPLIT_SEED = 20_270_103


def load(path: Path | None = None) -> TaskData:
    """Images of shape (1, 28, 28), float32, standardised with the mean and deviation of all training pixels.

    Args:
        path: Directory of the four published files; None to look in $MORPHOGEN_DATA (or else the user's cache) and in the
            platform's directory of data sets.

    Returns:
        55,000 train, 5,000 decision and 10,000 test examples of 10 classes, on the CPU; the same at every call.

    Raises:
        DataError: The files are missing, damaged or others.
    """
    return load_images(SOURCE.require(path), _DECISION_SIZE, _SPLIT_SEED, _DIGESTS)


_CONV = Sowing(blueprint="conv3x3", options={"expansion": 4}, blend_ticks=3)
_POINTS = ("block1", "block2", "block3")

TASK = Task(
    name="fashion_mnist",
    summary="Fashion-MNIST, 28x28 images of ten kinds of clothes; a host of three narrow convolutions",
    load=load,
    make_host=lambda data: ConvHost((4, 8, 16), data.num_classes, stride=2),
    points={name: GrowthPoint(name) for name in _POINTS},
    blueprints=(
        _CONV,
        Sowing(blueprint="mlp", options={"expansion": 4}, blend_ticks=3),
        Sowing(blueprint="squeeze_excite", blend_ticks=3),
        Sowing(blueprint="depthwise", blend_ticks=3),
    ),
    reference=dict.fromkeys(_POINTS, _CONV),
    batch_size=128,
    total_steps=1200,
    tick_steps=30,
    learning_rate=4e-2,
    weight_decay=1e-2,
    source=SOURCE,
)
