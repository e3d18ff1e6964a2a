"""Feature maps: the product of `queries(q)` and `keys(k)` is, or estimates, a kernel of q and k."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stackwise.config.model import AttentionParams
from stackwise.model.frozen import RedrawnFeatures

_LEAST = 0.01
"""A mean kernel below this is lost in the noise of features: 20,000 of them estimate a kernel to 0.01."""
_LOG_KEY_RANGE = (-60.0, 40.0)
"""Where the logarithms of positive key features are held: sums of them over any number of keys keep within fp32."""


class FeatureMap(nn.Module):
    """Features of all heads' queries and keys, in the format of its input: fp32 at least."""

    size: int
    """Features of a head."""
    least: float
    """The least mean of the kernel over keys that a denominator may show."""

    def queries(self, q: Tensor) -> Tensor:
        """`[batch, n_heads, seq, width]` -> `[batch, n_heads, seq, size]`; each position may have a factor of its own,
        which its denominator shares."""
        raise NotImplementedError

    def keys(self, k: Tensor) -> Tensor:
        """`[batch, n_kv_heads, seq, width]` -> `[batch, n_kv_heads, seq, size]`."""
        raise NotImplementedError


class _RandomFeatures(FeatureMap):
    """A map by `size / 2` random frequencies `[n_kv_heads, size / 2, width]`.

    Each key-value head has a draw of its own, which its queries share: the errors of the heads are independent.
    """

    def __init__(self, attention: AttentionParams, n_kv_heads: int, width: int) -> None:
        super().__init__()
        self.size = attention.features or 2 * width
        self._shape = (n_kv_heads, self.size // 2, width)
        self.frequencies = RedrawnFeatures(self._shape, self._draw, attention.redraw)

    def _draw(self, generator: torch.Generator) -> Tensor:
        raise NotImplementedError

    def _projected(self, x: Tensor) -> Tensor:
        """`[batch, heads, seq, width]` -> `[batch, heads, seq, size / 2]`."""
        frequencies = self.frequencies.value.to(x.dtype)
        batch, heads, seq, width = x.shape
        grouped = x.reshape(batch, len(frequencies), -1, width)
        return (grouped @ frequencies.mT).view(batch, heads, seq, -1)


class FourierFeatures(_RandomFeatures):
    """Cosines and sines of random frequencies (Rahimi & Recht 2007, algorithm 1), of queries and keys of length 1 (Peng
    et al. 2021, Random Feature Attention, section 3.1).

    With bandwidth s and width d the kernel of unit vectors is, by the distribution of the frequencies:

    - `gaussian` (normal): `exp(-|q - k|^2 / (2 s^2))`, not less than `exp(-2 / s^2)`;
    - `laplacian` (Cauchy): `exp(-|q - k|_1 / (s sqrt(d)))`, not less than `exp(-2 / s)`: the 1-norm of a difference
      of unit vectors grows as `sqrt(d)`. Cauchy frequencies have no variance, so gradients are noisier;
    - `uniform` (uniform of variance `1 / s^2`): `prod_i sinc(sqrt(3) (q_i - k_i) / s)` with `sinc(x) = sin(x) / x`, not
      less than `sinc(sqrt(12) / s)` if s > 1.103. It agrees with `gaussian` to second order. With a smaller s it is
      negative where q and k differ by more than `1.8 s` in a single dimension.

    That bound, or 0.01 if it is less, is the least mean kernel in a denominator, so that no output is larger than the
    largest value over it.
    """

    def __init__(self, attention: AttentionParams, n_kv_heads: int, width: int) -> None:
        super().__init__(attention, n_kv_heads, width)
        self._family, self._bandwidth = attention.kernel, attention.bandwidth or 1.0
        self.least = max(_LEAST, self._bound())

    def queries(self, q: Tensor) -> Tensor:
        """See `FeatureMap`."""
        angles = self._projected(F.normalize(q, dim=-1, eps=1e-6))
        return torch.cat((angles.cos(), angles.sin()), dim=-1) * (self.size / 2) ** -0.5

    def keys(self, k: Tensor) -> Tensor:
        """See `FeatureMap`."""
        return self.queries(k)

    def _draw(self, generator: torch.Generator) -> Tensor:
        drawn = torch.empty(self._shape)
        match self._family:
            case "gaussian":
                drawn.normal_(generator=generator)
            case "laplacian":
                drawn.cauchy_(sigma=self._shape[-1] ** -0.5, generator=generator)
            case "uniform":
                drawn.uniform_(-(3**0.5), 3**0.5, generator=generator)
        return drawn / self._bandwidth

    def _bound(self) -> float:
        """The least value of the kernel, 0 if that is negative."""
        match self._family, self._bandwidth:
            case "gaussian", s:
                return math.exp(-2.0 / s**2)
            case "laplacian", s:
                return math.exp(-2.0 / s)
        farthest = 12**0.5 / self._bandwidth
        return math.sin(farthest) / farthest if farthest < math.pi else 0.0


class PositiveFeatures(_RandomFeatures):
    """Exponentials of random frequencies in orthogonal blocks, for the kernel `exp(q . k / sqrt(d))` of softmax
    attention (Choromanski et al. 2021, Rethinking Attention with Performers: lemma 1, hyperbolic, and section 2.4).

    With frequencies w and `x = k / d^(1/4)` the features of a key are `exp(+-w . x - |x|^2 / 2)`. A factor of a query
    cancels against its denominator, so a query's features have 1 as their maximum. A key's have no factor to spare:
    their logarithms are held in [-60, 40], whatever the other keys are, so that neither a causal mask nor decoding
    makes a difference. The lower end takes keys longer than about `11 d^(1/4)`, which are too long for the estimate
    (all count the same little), the upper one such as lie along a frequency too. No denominator is ever 0.
    """

    least = 0.0

    def queries(self, q: Tensor) -> Tensor:
        """See `FeatureMap`."""
        projected = self._projected(q * q.shape[-1] ** -0.25)
        most = projected.detach().abs().amax(dim=-1, keepdim=True)
        return torch.cat((projected - most, -projected - most), dim=-1).exp()

    def keys(self, k: Tensor) -> Tensor:
        """See `FeatureMap`."""
        k = k * k.shape[-1] ** -0.25
        projected, shift = self._projected(k), k.square().sum(dim=-1, keepdim=True) / 2
        return torch.cat((projected - shift, -projected - shift), dim=-1).clamp(*_LOG_KEY_RANGE).exp()

    def _draw(self, generator: torch.Generator) -> Tensor:
        heads, count, width = self._shape
        blocks = -(-count // width)
        # Unique but for signs, which pairs cancel; in fp64, so that machines differ in the last bit at most.
        q, _ = torch.linalg.qr(torch.randn(heads, blocks, width, width, generator=generator, dtype=torch.float64))
        directions = q.mT.reshape(heads, -1, width)[:, :count]
        lengths = torch.randn(self._shape, generator=generator, dtype=torch.float64).norm(dim=-1, keepdim=True)
        return (directions * lengths).float()


class EluFeatures(FeatureMap):
    """`elu(x) + 1` (Katharopoulos et al. 2020, equation 7): no randomness, their product is the kernel.

    The mean kernel in a denominator is at least 1e-6.
    """

    least = 1e-6

    def __init__(self, width: int) -> None:
        super().__init__()
        self.size = width

    def queries(self, q: Tensor) -> Tensor:
        """See `FeatureMap`."""
        return F.elu(q) + 1

    def keys(self, k: Tensor) -> Tensor:
        """See `FeatureMap`."""
        return F.elu(k) + 1


def build_features(attention: AttentionParams, n_kv_heads: int, width: int) -> FeatureMap:
    """The feature map of `attention.kernel`, for keys of `width`."""
    match attention.kernel:
        case "linear":
            return EluFeatures(width)
        case "softmax" | None:
            return PositiveFeatures(attention, n_kv_heads, width)
    return FourierFeatures(attention, n_kv_heads, width)
