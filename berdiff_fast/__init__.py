# SPDX-License-Identifier: Apache-2.0
"""Fast, reproducible Bernoulli diffusion for medical image segmentation.

>>> import berdiff_fast as bf
>>> model = bf.load("phantom64")
>>> masks = bf.sample(model, model.preprocess(raw), n=16, steps=10, seed=7)   # bool (B, 16, 1, H, W)
"""

from importlib.metadata import PackageNotFoundError, version

from berdiff_fast import data, imaging, metrics, ops, rng
from berdiff_fast.backends.select import BackendUnavailableError
from berdiff_fast.imaging import figures
from berdiff_fast.imaging.summary import summarize
from berdiff_fast.model import BerDiff, Preprocessing, bundled_models, load, load_official
from berdiff_fast.network.unet import UNet
from berdiff_fast.rng import DRAW_CONTRACT, image_seeds
from berdiff_fast.sampling import Sampler, sample
from berdiff_fast.scans import sample_until, sample_volume
from berdiff_fast.schedule import NoiseSchedule

try:
    __version__ = version("berdiff_fast")
except PackageNotFoundError:  # the sources are imported without having been installed
    __version__ = "0+unknown"

__all__ = [
    "DRAW_CONTRACT",
    "BackendUnavailableError",
    "BerDiff",
    "NoiseSchedule",
    "Preprocessing",
    "Sampler",
    "UNet",
    "__version__",
    "bundled_models",
    "data",
    "figures",
    "image_seeds",
    "imaging",
    "load",
    "load_official",
    "metrics",
    "ops",
    "rng",
    "sample",
    "sample_until",
    "sample_volume",
    "summarize",
]
