"""Class weights from numbers of pixels, by hand. That the numbers are right is tested in test_averaged_run.py."""

import numpy as np

from psp_jax.data.frequencies import inverse_log_frequency


def test_weights_are_enets() -> None:
    weights = inverse_log_frequency(np.array([0, 50, 150]))
    np.testing.assert_allclose(weights, [50.498, 4.1838, 1.7514], rtol=1e-4)  # 1 / ln 1.02, 1 / ln 1.27, 1 / ln 1.77


def test_nothing_labelled_weighs_all_alike() -> None:
    assert len(set(inverse_log_frequency(np.zeros(3, np.int64)))) == 1
