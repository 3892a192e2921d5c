"""The oracle: no cache at all. Every step runs the whole sequence again through Hugging Face's layers, hidden states of
positions that have left overwritten by their exit states. Slow, right."""

from __future__ import annotations

import torch

from engine.decoding.criteria import decide
from engine.decoding.packed import StepOutputs, logits_by_exit
from engine.decoding.requests import Generating, scripted_layer, threshold_of
from engine.models.decoder import MultiExitDecoder


class ReferenceDecoder:
    """Same meaning as every other executor, none of the speed. Keeps nothing between calls."""

    def __init__(self, model: MultiExitDecoder):
        self.model = model

    @torch.inference_mode()
    def next(self, sequence: Generating) -> StepOutputs:
        """What follows the newest position of a sequence: behind its prompt at full depth, else where its exit says."""
        model, layers = self.model, self.model.config.num_layers
        request = sequence.request
        depths = [layers] * len(request.prompt) + sequence.frozen
        depths += [layers] * (len(sequence) - len(depths))  # the newest position has not left anywhere yet
        ids = torch.tensor([sequence.ids], device=model.device)
        outputs = model.layer_outputs(ids, exit_layers=torch.tensor([depths], device=model.device))
        exit_layer, prob = layers, 1.0
        if sequence.new:
            embedded = model.backbone.embed_tokens(ids)[0, -1:]
            exit_layer, prob = self._exit(sequence, [embedded, *(out[0, -1:] for out in outputs)])
        n = model.final_norm(outputs[exit_layer - 1][0, -1:])
        return StepOutputs(logits_by_exit(model, n, [exit_layer]), [exit_layer], [prob])

    def _exit(self, sequence: Generating, states: list[torch.Tensor]) -> tuple[int, float]:
        """states [1, H] of the newest position, behind layer 0 (embedded), 1, ..."""
        model, request = self.model, sequence.request
        script = scripted_layer(request, len(sequence.new))
        for index, layer in enumerate(model.config.exit_layers[:-1]):
            if layer < request.min_depth:
                continue
            if request.max_depth is not None and layer >= request.max_depth:
                return layer, 1.0
            n, limit = model.final_norm(states[layer]), threshold_of(request, len(sequence.new))
            above, prob = decide(model, request.criterion, index, n, states[layer], states[layer - 1], [limit])
            if above[0] if script is None else script <= layer:
                return layer, prob[0]
        return model.config.num_layers, 1.0
