"""Products of closing projections that lie column by column: those of numpy for every type, size and number of rows."""

import numpy as np
import pytest
from weights import stored

from flextron.inference.kernels import columns

PARTS = 4


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_products_are_those_of_numpy(kind, rows, pieces):
    """Also where sizes are no multiple of what is computed at once, and with fewer columns than there are parts."""
    draw = np.random.default_rng(0)
    for inputs, outputs in ((1536, 576), (44, 40), (7, 5), (33, 17), (100, 96), (3, 64), (40, 1100)):
        weight, numbers = stored(draw.standard_normal((inputs, outputs)).astype(np.float32), kind)
        for taken in {inputs, inputs // 2, 1}:
            x = draw.standard_normal((rows, taken)).astype(np.float32)
            sums = np.full((PARTS, rows, -(-outputs // columns.LANES) * columns.LANES), np.nan, np.float32)
            columns.product_of_columns(weight, x, sums, pieces)
            expected = x.astype(np.float64) @ numbers[:taken]
            tolerance = 1e-5 * (1 + np.abs(expected).max())
            np.testing.assert_allclose(sums[:, :, :outputs].sum(0), expected, atol=tolerance, rtol=0)
