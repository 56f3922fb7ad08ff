# SPDX-License-Identifier: Apache-2.0
"""Fast, reproducible Bernoulli diffusion for medical image segmentation.

>>> import berdiff_fast as bf
>>> model = bf.load("phantom64")
>>> masks = bf.sample(model, model.preprocess(raw), n=16, steps=10, seed=7)   # bool (B, 16, 1, H, W)

Names are imported when they are first used (PEP 562), so that the command line answers without torch.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from berdiff_fast import data, imaging, metrics, ops, rng
    from berdiff_fast._version import __version__
    from berdiff_fast.backends.select import BackendUnavailableError
    from berdiff_fast.imaging import figures
    from berdiff_fast.imaging.summary import summarize
    from berdiff_fast.loading import bundled_models, load, load_official
    from berdiff_fast.model import BerDiff
    from berdiff_fast.network.unet import UNet
    from berdiff_fast.preprocessing import Preprocessing
    from berdiff_fast.regions import Regions
    from berdiff_fast.rng import DRAW_CONTRACT, image_seeds
    from berdiff_fast.sampling import Sampler, sample
    from berdiff_fast.scans import sample_until, sample_volume
    from berdiff_fast.schedule import NoiseSchedule

__all__ = [
    "DRAW_CONTRACT",
    "BackendUnavailableError",
    "BerDiff",
    "NoiseSchedule",
    "Preprocessing",
    "Regions",
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

#: The module that each public name lives in; any other name is that of a module of the package.
_HOMES = {
    "__version__": "_version",
    "BackendUnavailableError": "backends.select",
    "BerDiff": "model",
    "DRAW_CONTRACT": "rng",
    "NoiseSchedule": "schedule",
    "Preprocessing": "preprocessing",
    "Regions": "regions",
    "Sampler": "sampling",
    "UNet": "network.unet",
    "bundled_models": "loading",
    "figures": "imaging",
    "image_seeds": "rng",
    "load": "loading",
    "load_official": "loading",
    "sample": "sampling",
    "sample_until": "scans",
    "sample_volume": "scans",
    "summarize": "imaging.summary",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value  # found at once the next time
        return value
    module = f"{__name__}.{name}"
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:  # the module is there, and something that it needs is not
            raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if "torch" in sys.modules:  # whoever has torch expects torch.ops.berdiff_fast from now on
    importlib.import_module(f"{__name__}.ops")
