"""quant_matmul for Hopper in Pallas Mosaic GPU."""


def supported(x, weight, *, activation, out_dtype, interpret=False) -> str | None:
    """Why the kernel cannot take the call, or None."""
    return "not written yet"


def quant_matmul(x, weight, *, activation, out_dtype):
    """See pallas_kernels.quant_matmul."""
    raise NotImplementedError
