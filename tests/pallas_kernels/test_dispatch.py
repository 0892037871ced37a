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


def test_the_environment_names_one_for_all_ops_that_have_it(monkeypatch):
    implementations = {"mosaic_gpu": Implementation(lambda: "kernel"), "reference": Implementation(lambda: "plain")}
    assert run("op", implementations, None) == "kernel"
    monkeypatch.setenv("PALLAS_KERNELS_BACKEND", "reference")
    assert run("op", implementations, None) == "plain"
    assert run("op", implementations, "mosaic_gpu") == "kernel"
    assert run("op", {"mosaic_gpu": implementations["mosaic_gpu"]}, None) == "kernel"
    monkeypatch.setenv("PALLAS_KERNELS_BACKEND", "refrence")
    with pytest.raises(ValueError, match=r"PALLAS_KERNELS_BACKEND must be one of .*, got 'refrence'"):
        run("op", implementations, None)


def test_a_gpu_that_runs_the_reference_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    implementations = {
        "mosaic_gpu": Implementation(lambda: None, lambda: "compute capability 8.0, 9.0 is needed"),
        "reference": Implementation(lambda: "plain"),
    }
    assert [run("an_op", implementations, None) for _ in range(2)] == ["plain"] * 2
    assert [record.getMessage() for record in caplog.records] == [
        "an_op runs as reference: mosaic_gpu: compute capability 8.0, 9.0 is needed"
    ]
