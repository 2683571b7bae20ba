"""Which rule every torch function has in a frozen pass, by name: `F.relu`, `torch.relu`, `x.relu_()` are all `relu`."""

from __future__ import annotations

from lamina.verify.linear_scopes.call import Call, Scope
from lamina.verify.linear_scopes.products import SCOPES as _PRODUCTS
from lamina.verify.linear_scopes.selections import SCOPES as _SELECTIONS
from lamina.verify.linear_scopes.units import SCOPES as _UNITS

LINEAR = frozenset(
    # Sums and means.
    "add __add__ __radd__ __iadd__ sub subtract __sub__ __rsub__ __isub__ rsub neg negative __neg__ positive __pos__ "
    "sum mean nanmean nansum cumsum trace diff conj resolve_conj resolve_neg "
    # Shapes.
    "view view_as reshape reshape_as flatten ravel unflatten squeeze unsqueeze expand expand_as broadcast_to repeat "
    "repeat_interleave tile permute transpose t adjoint movedim moveaxis swapaxes swapdims flip fliplr flipud rot90 "
    "roll T mT H mH as_strided contiguous clone alias channel_shuffle pixel_shuffle pixel_unshuffle unfold fold "
    "broadcast_tensors atleast_1d atleast_2d atleast_3d view_as_real view_as_complex real imag "
    # Parts, and what is put together of parts.
    "__getitem__ __setitem__ chunk split split_with_sizes tensor_split hsplit vsplit dsplit unbind narrow select "
    "index_select gather take take_along_dim masked_select diagonal diag diag_embed tril triu cat concat concatenate "
    "stack hstack vstack dstack column_stack index_add index_copy index_fill index_put scatter scatter_add "
    "select_scatter slice_scatter masked_fill masked_scatter where copy fill zero "
    # Types and places.
    "to float double half bfloat16 type type_as cpu cuda "
    # Pools, padding, interpolation, transforms; dropout, which is off.
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d pad constant_pad_nd "
    "interpolate upsample upsample_nearest upsample_bilinear fft_fft fft_ifft fft_rfft fft_irfft fft_fft2 fft_ifft2 "
    "fft_rfft2 fft_irfft2 fft_fftn fft_ifftn fft_rfftn fft_irfftn fft_fftshift fft_ifftshift max_unpool1d "
    "max_unpool2d max_unpool3d".split()
)
"""Linear, or affine, in all that depends on the probe: run on it as they are."""

CONSTANT = frozenset(
    # Weights that read other things; choices; tests.
    "softmax softmin argmax argmin argsort searchsorted bucketize sign sgn signbit heaviside gt ge lt le eq ne greater "
    "greater_equal less less_equal not_equal __gt__ __ge__ __lt__ __le__ __eq__ __ne__ isnan isinf isfinite isclose "
    "isposinf isneginf logical_not logical_and logical_or logical_xor any all nonzero count_nonzero argwhere".split()
)
"""Decisions: their value at x0 is kept."""

NEW = frozenset(
    "zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty new_tensor arange".split()
)
"""Use a tensor's shape and type only."""

DROPOUT = frozenset("dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout".split())
"""Nothing while they are off."""

ROUNDING = frozenset(
    "floor ceil round trunc fix frac floor_divide __floordiv__ __rfloordiv__ __ifloordiv__ remainder fmod __mod__ "
    "__rmod__ __imod__ long int short char byte bool".split()
)
"""Whole numbers: no linear part."""

CONTROL = frozenset(
    "item tolist numpy __array__ __bool__ __int__ __float__ __index__ __complex__ is_nonzero equal allclose "
    "__contains__".split()
)
"""Leave torch with a value: what Python does with it cannot be followed."""

SCOPES: dict[str, Scope] = {
    **dict.fromkeys(LINEAR, Call.linear),
    **_UNITS,
    **_PRODUCTS,
    **_SELECTIONS,
    # The graph of the probe is ours, not the model's to cut.
    **dict.fromkeys(("detach", "data"), lambda call: call.probes[0]),
}
"""Name -> rule. The names of `CONSTANT`, `NEW`, `DROPOUT`, `ROUNDING` and `CONTROL` have none to compute."""


def name_of(function: object) -> str:
    """Return the one name of a torch function, of its methods and its variants in place."""
    name = getattr(function, "__name__", type(function).__name__)
    if name in ("__get__", "__set__", "__delete__"):
        attribute: str = getattr(getattr(function, "__self__", None), "__name__", name)
        return attribute if name == "__get__" else name
    return name if name.startswith("__") else name.strip("_")


def in_place(function: object, args: tuple[object, ...], kwargs: dict[str, object]) -> bool:
    """Say whether a call changes its first argument."""
    name = getattr(function, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        return name not in ("requires_grad_", "detach_")
    if name == "__setitem__" or (name.startswith("__i") and name[3:-2] in _IN_PLACE):
        return True
    return bool(kwargs.get("inplace")) or (name in _FLAGS and len(args) > _FLAGS[name] and bool(args[_FLAGS[name]]))


_IN_PLACE = frozenset("add sub mul div truediv floordiv mod pow and or xor lshift rshift".split())

_FLAGS = {
    **dict.fromkeys(("relu", "relu6", "selu", "silu", "mish", "hardswish", "hardsigmoid"), 1),
    **dict.fromkeys(("leaky_relu", "elu", "celu"), 2),
    **dict.fromkeys(("hardtanh", "threshold", *DROPOUT), 3),
    "rrelu": 4,
}
"""Where a function takes `inplace` by place."""
