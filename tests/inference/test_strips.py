"""Products of 4-bit weights: those of numpy for every size, share of it and number of rows."""

import numpy as np
import pytest
import torch

from flextron.elastic.quantized import FourBits
from flextron.inference.kernels.strips import product_of_strips


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize(("outputs", "inputs"), [(576, 1536), (40, 44), (5, 7), (33, 17), (64, 3), (1, 1)])
def test_products_are_those_of_numpy(outputs, inputs, rows):
    """Also where sizes are no multiple of a strip, and for odd numbers of inputs."""
    draw = np.random.default_rng(0)
    held = FourBits.of(torch.from_numpy(draw.standard_normal((outputs, inputs)).astype(np.float32)))
    values = held.floats(slice(None), slice(None)).double().numpy()
    scale = held.scale.view(torch.uint16).numpy()
    for taken in {inputs, (inputs + 1) // 2, 1}:
        for kept in {outputs, (outputs + 1) // 2, 1}:
            x = draw.standard_normal((rows, taken)).astype(np.float32)
            y = np.full((rows, kept), np.nan, np.float32)
            product_of_strips(held.weight.numpy(), scale, x, y)
            expected = x.astype(np.float64) @ values[:kept, :taken].T
            np.testing.assert_allclose(y, expected, atol=1e-5 * (1 + np.abs(expected).max()), rtol=0)


def test_floats_are_any_rows_and_columns():
    held = FourBits.of(torch.randn(70, 45))
    whole = held.floats(slice(None), slice(None))
    assert whole.shape == (70, 45)
    for rows, columns in ((slice(0, 33), slice(0, 7)), (slice(31, 65), slice(5, 45)), (slice(0, 0), slice(None))):
        torch.testing.assert_close(held.floats(rows, columns), whole[rows, columns], rtol=0, atol=0)


def test_a_matrix_of_zeros_stays_one():
    assert not FourBits.of(torch.zeros(32, 4)).floats(slice(None), slice(None)).any()
