"""Sums of Kronecker products: form one, find the nearest one, multiply by one without forming it.

n = number of terms and of blocks a side; p, q = rows and columns of a block; k = the kernel's dimensions, maybe none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lamina.nn._precision import without_autocast


def kron_sum(A: Tensor, F: Tensor) -> Tensor:
    """Form H = sum_i A[i] (kron) F[i]; A (n, n, n), F (n, p, q, *k) -> (n p, n q, *k).

    Block (a, b) of H is sum_i A[i, a, b] F[i], so row a * p + r belongs to block a. Formed in float32 at least, under
    autocast too, and returned in F's dtype: one product of an (n^2, n) with an (n, p q k) matrix and one copy, without
    the n-fold intermediate of summing Kronecker products.
    """
    n, p, q = F.shape[:3]
    exact = torch.promote_types(F.dtype, torch.float32)
    with without_autocast(F.device):
        blocks = A.to(exact).flatten(1).T @ F.to(exact).flatten(1)
    ordered = blocks.view(n, n, p, -1).transpose(1, 2)  # (a, p, b, q k)
    return ordered.reshape(n * p, n * q, *F.shape[3:]).to(F.dtype)


def multiply_blocks_first(x: Tensor, A: Tensor, F: Tensor) -> Tensor:
    """Return x @ kron_sum(A, F).T without forming it; x (..., n q), A (n, n, n), F (n, p, q) -> (..., n p).

    Every F[i] is applied to every block of x, then A mixes the results: for a few rows the fastest way, as it reads
    1/n of the dense weight; for many rows it moves n times the output through memory.
    """
    n, p, q = F.shape
    products = (x.reshape(-1, q) @ F.reshape(n * p, q).T).view(-1, n * n, p)  # (rows, b i, p)
    return torch.matmul(A.permute(1, 2, 0).reshape(n, n * n).to(products.dtype), products).reshape(*x.shape[:-1], n * p)


def multiply_low_rank(x: Tensor, A: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return x @ kron_sum(A, left @ right).T; left (n, p, r), right (n, r, q), r small; x (..., n q) -> (..., n p)."""
    n, p, r = left.shape
    narrow = (x.reshape(-1, right.shape[2]) @ right.flatten(0, 1).T).view(-1, n, n, r)  # (rows, b, i, r)
    mixed = torch.einsum("iab,tbir->tair", A.to(narrow.dtype), narrow)
    wide = mixed.reshape(-1, n * r) @ left.transpose(1, 2).reshape(n * r, p).to(mixed.dtype)
    return wide.reshape(*x.shape[:-1], n * p)


def nearest_kron_sum(weight: Tensor, n: int) -> tuple[Tensor, Tensor, float]:
    """Find A and F whose sum of n Kronecker products is nearest to a weight (rows, columns, *k) in Frobenius norm.

    Cut into n x n blocks and with a row for each block, the weight is a matrix whose best approximation of rank n gives
    both factors (Van Loan and Pitsianis 1993), each with the square root of its singular value; float64.

    Returns: A (n, n, n), F (n, rows / n, columns / n, *k), and the error as a fraction of the weight's norm.
    """
    blocks = _block_rows(weight, n)
    u, s, v = torch.linalg.svd(blocks, full_matrices=False)
    # The signs of singular vectors are the library's choice: fixed, so that machines agree.
    sign = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    u, v = u * sign, v * sign.T
    norm = s.square().sum()
    error = (s[n:].square().sum() / norm).sqrt() if norm > 0 else norm
    algebra, content = weight.new_zeros((n, n * n), dtype=blocks.dtype), blocks.new_zeros(n, blocks.shape[1])
    count = min(n, len(s))
    algebra[:count] = (u * s.sqrt()).T[:count]
    content[:count] = (v * s.sqrt()[:, None])[:count]
    _revive(algebra)
    return algebra.view(n, n, n), content.view(n, *_block_shape(weight, n)), float(error)


def nearest_blocks(weight: Tensor, A: Tensor) -> tuple[Tensor, float]:
    """Find the F that brings kron_sum(A, F) nearest to a weight where A stays; F and the relative error, float64."""
    n = len(A)
    blocks = _block_rows(weight, n)
    basis = A.to(blocks.dtype).flatten(1).T  # (n^2, n)
    content = torch.linalg.pinv(basis) @ blocks
    norm = blocks.norm()
    error = (blocks - basis @ content).norm() / norm if norm > 0 else norm
    return content.view(n, *_block_shape(weight, n)), float(error)


def _block_shape(weight: Tensor, n: int) -> tuple[int, ...]:
    return (weight.shape[0] // n, weight.shape[1] // n, *weight.shape[2:])


def _block_rows(weight: Tensor, n: int) -> Tensor:
    """Lay out a weight with a row for each block: (n^2, p q k), float64."""
    p, q = _block_shape(weight, n)[:2]
    cut = weight.detach().to(torch.float64).reshape(n, p, n, q, -1)
    return cut.transpose(1, 2).reshape(n * n, -1)


def _revive(algebra: Tensor) -> None:
    """Give terms that came out as zero a unit matrix element: where A and F are both zero, no gradient would flow."""
    for i, term in enumerate(algebra):
        if not term.any():
            term[i % len(term)] = 1.0
