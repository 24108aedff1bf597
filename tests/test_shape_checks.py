"""Shapes in annotations are checked in the tests."""

import jaxtyping
import numpy as np
import pytest
from tiny import tiny_detector


def test_a_mask_of_another_size_is_noticed():
    with pytest.raises(jaxtyping.TypeCheckError, match="pixel_mask"):
        tiny_detector()(np.zeros((1, 32, 40, 3), np.float32), np.ones((1, 40, 32), bool))
