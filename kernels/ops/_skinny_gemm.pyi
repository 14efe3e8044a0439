"""skinny_gemm.c. Built where there is a C compiler at installation; importing it raises ImportError
where the processor has no AVX2 or torch no GNU OpenMP."""

from typing_extensions import Buffer

def multiply_rows(
    x: Buffer,
    weight: Buffer,
    out: Buffer,
    bias: Buffer | None,
    other: Buffer | None,
    in_features: int,
    out_features: int,
    op: int,
    num_threads: int,
    /,
) -> None:
    """op(x Wᵀ + bias, other), without the GIL. All float32 and contiguous.

    Args:
        x: [num_rows, in_features], 1 to 32 rows.
        weight: [panels, in_features, 64]: output features by 64, both padded (to 64 and to 16), at
            an address that is a multiple of 32 bytes.
        out: [num_rows, out_features], written.
        bias: [out_features].
        other: [num_rows, out_features], for op 2 and 3.
        op: 0 = none, 1 = swish, 2 = times `other`, 3 = plus `other`.

    Raises:
        ValueError: something does not fit; nothing was computed.
    """
