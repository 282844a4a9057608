"""A common float16 factor of several numbers: how sub-scales of the K types are found again."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nybble.convert.transcode.groups import refuse


def common_factor(
    values: npt.NDArray[np.float64], lowest: int, highest: int, what: str
) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.int16]]:
    """A float16 and integers from ``lowest`` to ``highest`` whose products are exactly the values.

    Of several answers the likeliest is taken, so that blocks that were taken apart come back as they
    were: the value of largest magnitude has the integer ``lowest`` if that works (llama.cpp's
    quantizer of q6_k makes it so), else the largest that works, with a positive factor if that works.
    Signs of zeros are kept.

    Args:
        values: (blocks, count), each exact in float32.
        lowest: 0 or negative.
        highest: positive.
        what: for messages.

    Returns:
        Factors (blocks,) and integers (blocks, count).

    Raises:
        DoesNotFit: a block has no answer; groups are counted as ``count`` a block.
    """
    factors = np.zeros(len(values), np.float16)
    integers = np.zeros(values.shape, np.int16)
    places = np.abs(values).argmax(axis=1)
    top: npt.NDArray[np.float64] = values[np.arange(len(values)), places]
    zero: npt.NDArray[np.bool_] = np.equal(top, 0)
    # Of zeros only the sign is left: a factor of +0 times 0 or -1.
    integers[zero] = -np.signbit(values[zero]).astype(np.int16)
    open_rows = np.flatnonzero(~zero & np.isfinite(values).all(axis=1))
    solved: npt.NDArray[np.bool_] = zero & (integers.min(axis=1, initial=0) >= lowest)
    candidates = sorted((k for k in range(lowest, highest + 1) if k), key=lambda k: (-abs(k), -k))
    for candidate in candidates:
        if not len(open_rows):
            break
        with np.errstate(over="ignore"):
            # The candidate is for a positive top value; -128 has no positive partner and is tried as it is;
            # without negative integers the factor has the sign.
            sign = 1 if -candidate > highest or not lowest else np.sign(top[open_rows])
            factor = (top[open_rows] / (candidate * sign)).astype(np.float16)
        wide = factor.astype(np.float64)[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            found = np.rint(values[open_rows] / wide)
        good: npt.NDArray[np.bool_] = np.asarray(
            np.isfinite(found).all(axis=1) & (found >= lowest).all(axis=1) & (found <= highest).all(axis=1)
        )
        found = np.where(good[:, None], found, 0).astype(np.int16)
        product = wide * found
        wanted = values[open_rows]
        same = np.equal(product, wanted) & np.equal(np.signbit(product), np.signbit(wanted))
        good &= same.all(axis=1)
        rows = open_rows[good]
        factors[rows], integers[rows], solved[rows] = factor[good], found[good], True
        open_rows = open_rows[~good]
    refuse(np.repeat(~solved, values.shape[1]), f"its {what} are not whole multiples of one float16")
    return factors, integers
