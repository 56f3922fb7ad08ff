# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from support import golden

from berdiff_fast import metrics


def test_ged_of_the_published_code():
    values = golden("metrics_lidc")
    ged = metrics.generalized_energy_distance(values["masks_raters"], values["masks_samples"])
    torch.testing.assert_close(ged, values["ged"], rtol=0, atol=1e-6)


def test_empty_masks_agree():
    empty = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    assert metrics.iou_distance(empty, empty).abs().max() == 0
    assert metrics.generalized_energy_distance(empty, ~empty).item() == 2


def test_shapes_have_to_fit():
    with pytest.raises(ValueError, match="raters and samples must be"):
        metrics.generalized_energy_distance(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 5))
