"""Experts without torch: numpy agrees with the kernel, and a row's outputs with those of many rows to the bit."""

from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from comoe.forms.plain import NUMPY_ACTIVATIONS, PlainMath, is_plain, numpy_activated
from comoe.kernels import native
from comoe.store.pack import Pack
from comoe.types import ExpertId, Leaf, Site


def test_numpy_computes_what_the_kernel_does(packed: Path) -> None:
    pack = Pack(packed)
    maths = PlainMath(pack.manifest.site(0), "silu", True)
    x = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    for form in pack.manifest.forms:
        blobs = [np.frombuffer(pack.read_bytes(blob), np.uint8) for blob in pack.manifest.blobs(ExpertId(0, 3), form)]
        ours = maths.run(form, blobs, x)
        with mock.patch.object(native, "available", return_value=False):
            plainly = maths.run(form, blobs, x)
        np.testing.assert_allclose(ours, plainly, rtol=1e-4, atol=1e-6)
        for row in range(len(x)):
            np.testing.assert_array_equal(maths.run(form, blobs, x[row : row + 1])[0], ours[row])
    pack.close()


@pytest.mark.parametrize("activation", sorted(NUMPY_ACTIVATIONS))
@pytest.mark.parametrize("gated", [False, True])
def test_activations_are_torchs(activation: str, gated: bool) -> None:
    import torch

    from comoe.runtime.experts import activated

    hidden = np.linspace(-120, 120, 2000, dtype=np.float32).reshape(2, 1000)
    theirs = activated(torch.from_numpy(hidden), activation, gated).numpy()
    np.testing.assert_allclose(numpy_activated(hidden, activation, gated), theirs, rtol=1e-5, atol=1e-6)


def test_only_two_linears_that_fit_are_plain() -> None:
    def site(*leaves: Leaf) -> Site:
        return Site("experts", 2, leaves, "float32")

    up, down = Leaf("up", (64, 32)), Leaf("down", (32, 32))
    assert is_plain(site(up, down), gated=True) and not is_plain(site(up, down), gated=False)
    assert is_plain(site(up, Leaf("down", (32, 64))), gated=False)
    assert not is_plain(site(up, down, Leaf("norm", (32,))), gated=True)
    assert not is_plain(site(up, Leaf("bias", (32,))), gated=True)
    with pytest.raises(ValueError, match="not two linears"):
        PlainMath(site(up, down), "silu", False)
