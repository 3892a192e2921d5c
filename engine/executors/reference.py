"""The oracle: Hugging Face modules, padded, every layer run; exits applied afterwards on paper. Slow, right."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from engine.criteria import ExitReading
from engine.executors.base import AtOnce, ExitOptions, PackedBatch, RowOutputs, TokenRows
from engine.kernels.packing import unpack_lead
from engine.models.encoder import MultiExitEncoder

# The mode is a property of the modules: one run at a time may set it, whichever engine the modules belong to.
_MODE = threading.Lock()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off, and every module's own mode back afterwards."""
    with _MODE:
        training = [module for module in model.modules() if module.training]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True


class ReferenceExecutor(AtOnce):
    """Same meaning as every other executor, none of the speed."""

    name = "reference"

    def __init__(self, model: MultiExitEncoder, watching: bool = True):
        self.model = model

    def watch(self) -> None:
        """Nothing to do: the module itself is run."""

    def look(self) -> None:
        """Nothing to do: the module itself is run."""

    def refresh(self) -> None:
        """Nothing to do: the module itself is run."""

    def run(self, rows: TokenRows, options: ExitOptions) -> RowOutputs:
        device = self.model.device
        with torch.inference_mode(), _evaluating(self.model):
            batch = PackedBatch.from_rows(rows, self.model.family.first_position, device)
            return self._run(batch, options.to(device))

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
        state = options.begin()
        active = torch.ones(rows, dtype=torch.bool, device=device)
        for k, layer in enumerate(config.exit_layers):
            last = layer == config.num_layers
            if last:
                leave = active
            else:
                z = exits.policy_logits[:, k].float() if criterion.needs_policy else None
                classes = exits.logits[:, k].float() if criterion.needs_classifier else None
                leave = torch.zeros_like(active)
                if criterion.may_decide(layer) and options.reads_exit(layer):
                    # Rows that have left stay in the state: they are masked, not compacted.
                    reading = ExitReading(layer, first_tokens[k], z, classes)
                    leave = criterion.decide(reading, state) & (options.min_depth <= layer)
                forced = options.max_depth <= layer
                leave = active & (leave | forced)
                probs = torch.full_like(out.exit_probs, torch.nan) if z is None else torch.sigmoid(z)
                out.exit_probs[leave] = probs.masked_fill(forced, 1.0)[leave]
            out.logits[leave] = exits.logits[leave, k].float()
            out.exit_layers[leave] = layer
            active = active & ~leave
        return out
