"""Sums over batches: the same for every split, in memory that does not grow."""

import torch

from ofb_hf.pruning.sums import Sums, with_ones


def test_sums_do_not_depend_on_the_batches_and_do_not_grow():
    rows = torch.randn(40, 6, dtype=torch.float64)
    sums = Sums()
    for part in rows.split(7):
        part = with_ones(part)
        sums.add(("products",), part.mT @ part)
        sums.add(("rows",), len(part))
    sums.reduce_()  # one process: nothing to add
    products = sums[("products",)]
    assert products.shape == (7, 7)
    torch.testing.assert_close(products[:6, :6], rows.mT @ rows)
    torch.testing.assert_close(products[6, :6], rows.sum(0))
    assert products[6, 6] == sums[("rows",)] == 40


def test_sums_of_half_precision_are_wide():
    sums = Sums()
    for _ in range(4096):
        sums.add(("ones",), torch.ones((), dtype=torch.float16))
    assert sums[("ones",)].dtype == torch.float64
    assert sums[("ones",)] == 4096
