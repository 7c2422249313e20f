"""Products of opening projections: those of numpy for every type, size and number of rows."""

import numpy as np
import pytest
from weights import stored

from flextron.inference.kernels.rows import product_of_rows


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_products_are_those_of_numpy(kind, rows):
    """Also where the inputs are no multiple of what is multiplied at once, or fewer."""
    draw = np.random.default_rng(0)
    for outputs, inputs in ((576, 1536), (40, 44), (5, 7), (33, 65), (64, 128), (1, 1)):
        weight, numbers = stored(draw.standard_normal((outputs, inputs)).astype(np.float32), kind)
        x = draw.standard_normal((rows, inputs)).astype(np.float32)
        for first, last in ((0, outputs), (outputs // 3, outputs)):
            y = np.full((outputs, rows), np.nan, np.float32)
            product_of_rows(weight, first, last, x, y)
            expected = numbers[first:last].astype(np.float64) @ x.T
            np.testing.assert_allclose(y[first:last], expected, atol=1e-5 * (1 + np.abs(expected).max()), rtol=0)
            assert np.isnan(y[:first]).all()
