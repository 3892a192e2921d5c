"""gpt-fast, from a checkout beside the project, as a competitor of the decoder: its own model, step and loop.

Of github.com/meta-pytorch/gpt-fast model.py and generate.py are imported, nothing else: no quantisation, no tensor
parallelism, no tokenizer. Weights are random, sizes those of a Hugging Face LLaMA, dtype and device the caller's.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch._functorch.config
import torch._inductor.config
from torch import Tensor, nn

from engine.bench.report import commit_of

FILES = ("model.py", "generate.py")
# Greedy, the cheapest way it has: without top_k it sorts nothing. It divides logits by the temperature in their own
# dtype, and by 1e-5 where that is 0: fp16 overflows, and every probability is nan. Divided by 2**-12 logits below 16
# stay finite, and neighbours in fp16 lie 8 apart between 2 and 4, where the largest of 32000 are, 16 above.
GREEDY: dict[str, Any] = {"temperature": 2.0**-12, "top_k": None}
_CONFIGS = (torch._inductor.config, torch._functorch.config)


def check(folder: Path) -> None:
    """ValueError where ``folder`` lacks a file of gpt-fast that is imported."""
    absent = [name for name in FILES if not (folder / name).is_file()]
    if absent:
        raise ValueError(
            f"{folder} has no {' and no '.join(absent)}: --gpt-fast must name a checkout of "
            f"https://github.com/meta-pytorch/gpt-fast, or a folder with its {' and '.join(FILES)}"
        )


def described(folder: Path, compiled: bool) -> str:
    """What a reader of its times should know. A folder that is no checkout may name its commit in a file COMMIT."""
    said = folder / "COMMIT"
    commit = commit_of(folder) or (said.read_text().strip() if said.is_file() else "of unknown commit")
    step = "compiled" if compiled else "not compiled"
    return f"gpt-fast {commit}, decode_one_token {step}, temperature {GREEDY['temperature']:g} without top_k"


def load(folder: Path) -> tuple[ModuleType, ModuleType, list[dict[str, Any]]]:
    """Its model and generate, and what generate set in torch._inductor.config and torch._functorch.config.

    The modules keep names of ours (torch.compile looks modules up by name). The search path, names that others may
    have, and the settings, which would hold for every other competitor too, are put back.
    """
    check(folder)
    before = [config.get_config_copy() for config in _CONFIGS]
    path, names = list(sys.path), {name: sys.modules.get(name) for name in ("model", "tokenizer")}
    no_tokenizer = ModuleType("tokenizer")  # the real one needs sentencepiece and tiktoken
    no_tokenizer.get_tokenizer = None
    try:
        sys.modules["model"] = model = _imported(folder / "model.py")
        sys.modules["tokenizer"] = no_tokenizer
        generate = _imported(folder / "generate.py")
    finally:
        sys.path[:] = path
        for name, module in names.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
        settings = []
        for config, old in zip(_CONFIGS, before, strict=True):
            settings.append({k: v for k, v in config.get_config_copy().items() if v != old[k]})
            for name in settings[-1]:
                setattr(config, name, old[name])
    return model, generate, settings


def _imported(path: Path) -> ModuleType:
    name = f"gpt_fast_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def random_transformer(model: ModuleType, hf: Any, positions: int, device: torch.device, dtype: torch.dtype) -> Any:
    """Its Transformer in the sizes of ``hf``, a LlamaConfig. Activations keep their size from layer to layer."""
    args = model.ModelArgs(
        block_size=max(model.ModelArgs.block_size, positions),
        vocab_size=hf.vocab_size,
        n_layer=hf.num_hidden_layers,
        n_head=hf.num_attention_heads,
        n_local_heads=hf.num_key_value_heads,
        dim=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
    )
    with torch.device("meta"):
        made = model.Transformer(args)
    made = made.to(dtype).to_empty(device=device).eval()
    for weight in made.parameters():
        nn.init.normal_(weight, std=hf.hidden_size**-0.5) if weight.dim() > 1 else nn.init.ones_(weight)
    return made


def decoding(folder: Path, hf: Any, ids: Tensor, new: int, dtype: torch.dtype, compiled: bool) -> Callable[[], float]:
    """Seconds that its loop takes for new - 1 tokens behind ids [1, P], draws included, the prompt's pass left out.

    With ``compiled`` the step is compiled as its main() does it; prompts are not, as there by default. Everything is
    compiled and recorded when this returns.
    """
    model, generate, settings = load(folder)
    made = random_transformer(model, hf, ids.shape[1] + new, ids.device, dtype)
    if compiled:
        generate.decode_one_token = torch.compile(generate.decode_one_token, mode="reduce-overhead", fullgraph=True)
    seconds: list[float] = []
    steps = generate.decode_n_tokens

    def now() -> float:
        if ids.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed_steps(*args: Any, **kwargs: Any) -> Any:
        started = now()
        tokens = steps(*args, **kwargs)
        seconds.append(now() - started)
        return tokens

    generate.decode_n_tokens = timed_steps

    def run() -> float:
        with ExitStack() as stack:
            for config, changes in zip(_CONFIGS, settings, strict=True):
                stack.enter_context(config.patch(changes))
            generate.generate(made, ids[0], new, batch_size=1, interactive=False, draft_model=None, **GREEDY)
        return seconds.pop()

    run()
    return run
