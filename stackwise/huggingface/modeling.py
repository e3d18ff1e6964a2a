"""Racks as models of Transformers: for those that no class of it computes. This ships with them, and with it the very
modules that have trained them.

Attention stays within a text where `attention_mask` says what is padding. Padding goes left or right.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, MaskedLMOutput

from stackwise.huggingface.configuration import StackWiseConfig
from stackwise.model.embeddings import Embeddings
from stackwise.model.frozen import FrozenRandom
from stackwise.model.parts import DecodingCache
from stackwise.model.rack import Rack, RackShape


class StackWisePreTrainedModel(PreTrainedModel):
    """A rack with its weights."""

    config_class = StackWiseConfig
    base_model_prefix = "rack"
    main_input_name = "input_ids"

    def __init__(self, config: StackWiseConfig) -> None:
        super().__init__(config)
        self.rack = Rack(RackShape.from_json(config.rack))
        for part in self.rack.modules():
            if isinstance(part, FrozenRandom):  # stored here, lest a number depend on who draws it
                part.register_buffer("value", part.value)
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """All weights are stored."""

    def get_input_embeddings(self) -> Embeddings:
        """The input embeddings."""
        return self.rack.embeddings

    def residual(
        self, input_ids: Tensor, attention_mask: Tensor | None, document_ids: Tensor | None, **context: Any
    ) -> Tensor:
        """`[batch, seq]` -> the residual stream below the head `[batch, seq, d_model]`."""
        return self.rack(input_ids, segments=_segments(attention_mask, document_ids), **context)


class StackWiseForMaskedLM(StackWisePreTrainedModel):
    """Bidirectional: predicts every masked token, of any share of them. Logits have a column for the mask token, the
    last, which holds the lowest number there is: it is never predicted."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        times: Tensor | None = None,
        document_ids: Tensor | None = None,
        entry: int = 0,
        return_dict: bool | None = None,
        **_: Any,
    ) -> MaskedLMOutput | tuple[Any, ...]:
        """Predict.

        Args:
            input_ids: `[batch, seq]`; `config.mask_token_id` where something is to be predicted.
            attention_mask: `[batch, seq]`, 0 at padding.
            labels: `[batch, seq]`, -100 where there is none; gives the mean cross-entropy.
            times: the mask rate of each text `[batch]`, for models that are conditioned on it; None: what is masked.
            document_ids: `[batch, seq]` int64: positions of different numbers do not see each other.
            entry: the stack at which the text enters, for a model whose depth is time.
            return_dict: False asks for a tuple.
        """
        if times is None:
            times = _masked_share(input_ids == self.rack.shape.vocab_size, attention_mask)
        x = self.residual(input_ids, attention_mask, document_ids, times=times, entry=entry)
        logits = self.rack.head(x)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        logits = F.pad(logits, (0, 1), value=torch.finfo(logits.dtype).min)
        found = MaskedLMOutput(loss=loss, logits=logits)
        return found.to_tuple() if return_dict is False else found


class RackCache(Cache):
    """What all blocks keep of the positions they have seen."""

    def __init__(self, blocks: list[list[DecodingCache]]) -> None:
        super().__init__(layers=[])
        self.blocks = blocks

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions seen."""
        return self.blocks[0][0].length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beams are not kept apart.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("beam search on this model: give use_cache=False")


class StackWiseForCausalLM(StackWisePreTrainedModel, GenerationMixin):
    """Causal: predicts the next token. `generate` keeps the decoding cache of the model's own attention."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: RackCache | None = None,
        document_ids: Tensor | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Predict.

        Args:
            input_ids: `[batch, seq]`.
            attention_mask: `[batch, cached + seq]`, 0 at padding.
            labels: `[batch, seq]`, the ids themselves (each is predicted from those before it), -100 where there is
                none; gives the mean cross-entropy.
            past_key_values: what was seen before.
            document_ids: `[batch, cached + seq]` int64: positions of different numbers do not see each other.
            logits_to_keep: of the last positions only; 0: of all.
            return_dict: False asks for a tuple.
        """
        cache = None if past_key_values is None else past_key_values.blocks
        x = self.residual(input_ids, attention_mask, document_ids, causal=True, cache=cache)
        logits = self.rack.head(x[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        found = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
        return found.to_tuple() if return_dict is False else found

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int, length: int
    ) -> bool:
        """`generate` asks for a cache of `length` positions."""
        if generation_config.use_cache is False or model_kwargs.get("past_key_values") is not None:
            return False
        if generation_config.num_beams > 1:
            model_kwargs["use_cache"] = generation_config.use_cache = False
            return False
        batch = batch_size * generation_config.num_return_sequences
        model_kwargs["past_key_values"] = RackCache(self.rack.new_cache(batch, length))
        return True


def _segments(attention_mask: Tensor | None, document_ids: Tensor | None) -> Tensor | None:
    """Positions that do not see each other, as different numbers `[batch, seq]`; None where all do."""
    if attention_mask is None or bool(attention_mask.all()):
        return document_ids
    padding = (attention_mask == 0).long()
    return padding if document_ids is None else torch.where(padding.bool(), -1, document_ids)


def _masked_share(masked: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Of what is not padding, `[batch]` fp32."""
    present = torch.ones_like(masked) if attention_mask is None else attention_mask != 0
    return (masked & present).sum(dim=1).float() / present.sum(dim=1).clamp(min=1)
