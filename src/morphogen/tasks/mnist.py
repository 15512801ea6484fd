"""MNIST: 70,000 images of handwritten digits, 28x28.

Source: LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document recognition", 1998.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from morphogen.tasks import fashion_mnist
from morphogen.tasks.data import TaskData
from morphogen.tasks.idx import FILES, load_images
from morphogen.tasks.sources import Source

SOURCE = Source(
    name="mnist",
    layouts=(FILES,),
    how_to_get="Put the four files of MNIST in idx format, gzipped, into $MORPHOGEN_DATA/mnist.",
)
# Of the uncompressed content, as packagers compress anew.
_DIGESTS = {
    "train-images-idx3-ubyte.gz": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte.gz": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte.gz": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte.gz": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
_DECISION_SIZE = 5000
_SPLIT_SEED = 20_270_105


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


TASK = dataclasses.replace(
    fashion_mnist.TASK,
    name="mnist",
    summary="MNIST, 28x28 images of handwritten digits; the host of fashion_mnist",
    load=load,
    source=SOURCE,
)
