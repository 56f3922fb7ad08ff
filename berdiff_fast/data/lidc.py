# SPDX-License-Identifier: Apache-2.0
"""Six CT slices of LIDC-IDRI with their four readings: a first look at real data, without a download.

They are of validation patients, which no bundled model was trained on. Cite with any result::

    Armato SG 3rd, McLennan G, Bidaut L, et al. Data From LIDC-IDRI. The Cancer Imaging Archive, 2015.
    https://doi.org/10.7937/K9/TCIA.2015.LO9QL9SX. Licence: CC BY 3.0,
    https://creativecommons.org/licenses/by/3.0/. Cut to 128 x 128 pixels around a nodule, scaled to 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

import numpy as np
import torch

#: In the title of a picture; ``ATTRIBUTION`` is the whole of it.
SHORT = "CT: LIDC-IDRI (TCIA), CC BY 3.0"
#: To be shown beside the slices.
ATTRIBUTION = "CT: LIDC-IDRI, The Cancer Imaging Archive, doi:10.7937/K9/TCIA.2015.LO9QL9SX, CC BY 3.0"


@dataclass(frozen=True)
class Slices:
    """Slices with their readings.

    Attributes:
        images: float32 (6, 1, 128, 128), grey values from 0 to 255, each slice scaled by itself.
        raters: bool (6, 4, 1, 128, 128), the four radiologists' masks; empty where one marked nothing. The order of the
            radiologists differs from slice to slice.
        names: patient, nodule and slice of each.
    """

    images: torch.Tensor
    raters: torch.Tensor
    names: list[str]


def load() -> Slices:
    """Read the six slices: two each that two, three and all four radiologists marked."""
    with resources.files(__package__).joinpath("lidc_slices.npz").open("rb") as file, np.load(file) as stored:
        images = torch.from_numpy(stored["images"].astype(np.float32))
        masks = torch.from_numpy(np.unpackbits(stored["masks"], axis=-1).astype(bool))
        places = zip(stored["patients"].tolist(), stored["places"].tolist(), strict=True)
        names = [f"LIDC-IDRI-{patient:04d}, nodule {nodule}, slice {z}" for patient, (nodule, z) in places]
    return Slices(images[:, None], masks[:, :, None], names)
