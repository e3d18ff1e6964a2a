"""Formats `int8`, `nf4` and `fp4`, by bitsandbytes. Its import takes seconds: import this module where it is used.

Its modules hold the weights and their state, its kernels round and decode them. Its own products are not used. With
4 bits they repack the weight in place on CPUs with AVX512-BF16 as soon as something is evaluated, after which it gives
no gradient, and they compute in the format of the first input ever seen. With 8 bits they round the activations too,
but only when the module is not training, and need fp16 for it, whatever computes. All of them return the format of
their input, and neither can be moved from one device to another.
"""

import logging
from typing import Any

import torch
from torch import Tensor

# Says at import that an optional package is missing, which would fetch code from the network.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from bitsandbytes import cextension
from bitsandbytes.functional import QuantState, dequantize_4bit, int8_vectorwise_quant, quantize_4bit
from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt, Params4bit

from stackwise.precision.sizes import FOUR_BIT_BLOCK, NESTED_BLOCK
from stackwise.precision.stored import Empty, StoredLinear, decode_rows, numbers_at_a_time

_NESTED = FOUR_BIT_BLOCK * NESTED_BLOCK
"""Numbers whose scales share a scale."""


class FourBitLinear(StoredLinear, Linear4bit):
    """A linear map with a matrix of 4-bit codes in blocks of 64, whose scales are codes of 8 bits in blocks of 256
    (Dettmers et al. 2023, QLoRA, section 3)."""

    weight: Params4bit

    def __init__(self, in_features: int, out_features: int, bias: bool, codes: str) -> None:
        """
        Args:
            in_features, out_features: widths.
            bias: whether it has one.
            codes: `nf4` or `fp4`.
        """
        super().__init__(in_features, out_features, bias, quant_type=codes)
        self.codes = codes
        self.support_avx512bf16_for_cpu = False  # no repacking, whoever calls

    def take(self, weight: Tensor) -> None:
        """See `StoredLinear`."""
        weight = weight.detach().float()
        codes, state = quantize_4bit(weight, blocksize=FOUR_BIT_BLOCK, compress_statistics=True, quant_type=self.codes)
        self.hold(codes, *_tensors(state))

    def stored(self) -> tuple[Tensor, ...]:
        """Codes, two in a byte; their scales' codes; the codes' values; the same two of the scales; their mean."""
        return self.weight, *_tensors(self.weight.quant_state)

    def hold(self, *stored: Tensor) -> None:
        """See `StoredLinear`."""
        state = self._state((self.out_features, self.in_features), torch.float32, *stored[1:])
        self.weight = Params4bit(stored[0], quant_state=state, quant_type=self.codes, bnb_quantized=True)
        self.quant_state = state

    def decode(self, empty: Empty, dtype: torch.dtype, *stored: Tensor) -> Tensor:
        """See `StoredLinear`."""
        codes, scales, values, nested_scales, nested_values, mean = (tensor.detach() for tensor in stored)
        matrix = empty((self.out_features, self.in_features), dtype, codes.device)
        numbers, size = matrix.view(-1), numbers_at_a_time(codes.device)
        for start in range(0, len(numbers), size):
            part = codes[start // 2 : (start + size) // 2]
            state = self._state(
                (1, 2 * len(part)),  # as one row: for rows of odd length bitsandbytes would call a compiler
                dtype,
                scales[start // FOUR_BIT_BLOCK : (start + size) // FOUR_BIT_BLOCK],
                values,
                nested_scales[start // _NESTED : (start + size) // _NESTED],
                nested_values,
                mean,
            )
            numbers[start : start + size] = dequantize_4bit(part, state).flatten()[: len(numbers) - start]
        return matrix

    def _state(self, shape: tuple[int, int], dtype: torch.dtype, *tensors: Tensor) -> QuantState:
        scales, values, nested_scales, nested_values, mean = tensors
        nested = QuantState(absmax=nested_scales, code=nested_values, blocksize=NESTED_BLOCK, dtype=torch.float32)
        return QuantState(
            absmax=scales,
            shape=torch.Size(shape),
            code=values,
            blocksize=FOUR_BIT_BLOCK,
            quant_type=self.codes,
            dtype=dtype,
            offset=mean,
            state2=nested,
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *others: Any
    ) -> None:
        """Take the tensors as they are, without a copy, as `assign=True` does."""
        if (codes := _found(state_dict, f"{prefix}weight", missing)) is not None:
            start = f"{prefix}weight."
            state = {name.removeprefix(start): t for name, t in state_dict.items() if name.startswith(start)}
            self.hold(codes, *_tensors(QuantState.from_dict(state, codes.device)))
        _load_bias(self, state_dict, prefix, missing)


class EightBitLinear(StoredLinear, Linear8bitLt):
    """A linear map with a matrix of integers up to 127 and an fp32 scale for each row (Dettmers et al. 2022, LLM.int8,
    section 3.1, of the weights alone)."""

    weight: Int8Params

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__(in_features, out_features, bias, has_fp16_weights=False)

    def take(self, weight: Tensor) -> None:
        """See `StoredLinear`."""
        codes, largest, _ = int8_vectorwise_quant(weight.detach().half())
        codes[largest == 0] = 0  # a row of zeros has been divided by 0
        self.hold(codes, largest)

    def stored(self) -> tuple[Tensor, ...]:
        """Codes `[out_features, in_features]`, the largest value of each row `[out_features]`."""
        return self.weight, self.weight.SCB

    def hold(self, *stored: Tensor) -> None:
        """See `StoredLinear`."""
        codes, largest = stored
        self.weight = Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=largest)

    def decode(self, empty: Empty, dtype: torch.dtype, *stored: Tensor) -> Tensor:
        """See `StoredLinear`."""
        codes, largest = stored

        def decode(codes: Tensor, scale: Tensor) -> Tensor:
            return codes.to(dtype).mul_(scale[:, None])

        matrix = empty((self.out_features, self.in_features), dtype, codes.device)
        return decode_rows(decode, matrix, codes.detach(), largest / 127)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *others: Any
    ) -> None:
        """Take the tensors as they are, without a copy, as `assign=True` does."""
        codes, largest = (_found(state_dict, prefix + name, missing) for name in ("weight", "SCB"))
        if codes is not None and largest is not None:
            self.hold(codes, largest)
        _load_bias(self, state_dict, prefix, missing)


def has_native_library() -> bool:
    """Whether what bitsandbytes needs on this machine has been found; it says so itself only when it computes."""
    return not isinstance(cextension.lib, cextension.ErrorHandlerMockBNBNativeLibrary)


def _tensors(state: QuantState) -> tuple[Tensor, ...]:
    return state.absmax, state.code, state.state2.absmax, state.state2.code, state.offset


def _load_bias(module: StoredLinear, state_dict: dict[str, Any], prefix: str, missing: list[str]) -> None:
    if module.bias is not None and (bias := _found(state_dict, f"{prefix}bias", missing)) is not None:
        module.bias = torch.nn.Parameter(bias, requires_grad=module.bias.requires_grad)


def _found(state_dict: dict[str, Any], name: str, missing: list[str]) -> Tensor | None:
    if name not in state_dict:
        missing.append(name)
    return state_dict.get(name)
