"""The oracle: Hugging Face modules, padded, every layer run; exits applied afterwards on paper. Slow, obviously right."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.criteria import ExitReading
from engine.executors.base import ExitOptions, PackedBatch, RowOutputs
from engine.kernels.packing import unpack_lead
from engine.models.encoder import MultiExitEncoder


class ReferenceExecutor:
    """Same meaning as every other executor, none of the speed."""

    name = "reference"

    def __init__(self, model: MultiExitEncoder):
        self.model = model

    def refresh(self) -> None:
        """Nothing to do: the module itself is run."""

    def run(self, batch: PackedBatch, options: ExitOptions) -> RowOutputs:
        training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode():
                return self._run(batch, options)
        finally:
            self.model.train(training)

    def _run(self, batch: PackedBatch, options: ExitOptions) -> RowOutputs:
        model, config = self.model, self.model.config
        longest = max(batch.lengths)

        def padded(packed: Tensor) -> Tensor:
            return unpack_lead(packed, batch.cu_seqlens, longest)

        mask = padded(torch.ones_like(batch.input_ids))  # spare rows behind the last token are not copied
        types = None if batch.token_type_ids is None else padded(batch.token_type_ids)
        hidden = model.hidden_states(padded(batch.input_ids), mask, types)
        first_tokens = [hidden[layer - 1][:, 0] for layer in config.exit_layers]
        exits = model.exits(first_tokens)

        rows = len(batch.lengths)
        device = batch.input_ids.device
        out = RowOutputs(
            torch.zeros(rows, config.num_labels, device=device),
            torch.zeros(rows, dtype=torch.int32, device=device),
            torch.ones(rows, device=device),
        )
        criterion = options.criterion
        state = criterion.begin(options.threshold, options.exit_layers)
        active = torch.ones(rows, dtype=torch.bool, device=device)
        for k, layer in enumerate(config.exit_layers):
            last = layer == config.num_layers
            if last:
                leave = active
            else:
                z = exits.policy_logits[:, k].float()
                leave = torch.zeros_like(active)
                if criterion.may_decide(layer) and layer >= options.shallowest:
                    # Rows that have left stay in the state: they are masked, not compacted.
                    reading = ExitReading(layer, first_tokens[k], z, exits.logits[:, k])
                    leave = criterion.decide(reading, state) & (options.min_depth <= layer)
                forced = options.max_depth <= layer
                leave = active & (leave | forced)
                out.exit_probs[leave] = torch.sigmoid(z[leave]).masked_fill(forced[leave], 1.0)
            out.logits[leave] = exits.logits[leave, k].float()
            out.exit_layers[leave] = layer
            active = active & ~leave
        return out
