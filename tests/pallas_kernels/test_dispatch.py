"""The rule that picks an implementation."""

import pytest

from pallas_kernels.dispatch import Implementation, UnsupportedError, run

SQUARES = {
    "mosaic_gpu": Implementation(lambda x: ("mosaic_gpu", x * x), platforms=("gpu",)),
    "interpret": Implementation(lambda x: ("interpret", x * x), lambda x: "x is odd" if x % 2 else None, ()),
    "tiled": Implementation(lambda x: ("tiled", x * x), lambda x: "x is over 10" if x > 10 else None),
    "reference": Implementation(lambda x: ("reference", x * x), lambda x: "x is over 100" if x > 100 else None),
}


def test_the_first_that_supports_the_call():
    assert run("square", SQUARES, None, 3) == ("tiled", 9)
    assert run("square", SQUARES, None, 20) == ("reference", 400)


def test_a_named_backend():
    assert run("square", SQUARES, "interpret", 4) == ("interpret", 16)
    with pytest.raises(UnsupportedError, match=r"nothing can run square: interpret: x is odd$"):
        run("square", SQUARES, "interpret", 3)
    with pytest.raises(ValueError, match="backend must be one of mosaic_gpu, interpret, tiled, reference for square"):
        run("square", SQUARES, "triton", 3)


def test_all_the_reasons():
    reasons = (
        "mosaic_gpu: not for platform cpu; interpret: not for platform cpu; tiled: x is over 10; "
        "reference: x is over 100"
    )
    with pytest.raises(UnsupportedError, match=reasons):
        run("square", SQUARES, None, 1000)


def test_an_error_is_no_reason_to_try_the_next():
    def fails(x):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run("square", {"broken": Implementation(fails), **SQUARES}, None, 3)
