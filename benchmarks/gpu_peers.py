"""transformers beside smelt: the same class and layers in bf16, static cache, torch.compile."""

from __future__ import annotations

import time
from typing import Any

import torch

from .gpu_cases import Model
from .gpu_measure import synchronize
from .gpu_packages import configuration


class Transformers:
    """Decodes and reads prompts through torch.compile(mode="reduce-overhead"), each batch with
    sizes of its own. On a CPU without Inductor, to try the way there."""

    name = "transformers"

    def __init__(self, model: Model, layers: int, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM

        config = configuration(model, layers)
        torch.manual_seed(0)
        with torch.device(device):
            self._model = AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, attn_implementation="sdpa"
            ).eval()
        how: dict[str, Any] = {"mode": "reduce-overhead"}
        if device.type == "cpu":
            how = {"backend": "eager"}
        self._step: Any = torch.compile(self._model, dynamic=False, **how)
        self._device = device
        self._vocab = model.vocab
        self._cache: Any = None
        self._size = (0, 0)

    def start(self, batch: int, prompt: int, steps: int) -> None:
        """Read prompts of random tokens, eagerly, as `generate` does; then `steps` may follow."""
        ids = torch.randint(0, self._vocab, (batch, prompt), device=self._device)
        self._open(batch, prompt + steps)
        positions = torch.arange(prompt, device=self._device)[None].expand(batch, -1)
        with torch.no_grad():
            out = self._model(
                ids,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
            self._token = out.logits[:, -1].argmax(-1, keepdim=True)
            self._at = positions[:, -1:].contiguous() + 1

    def steps(self, count: int) -> float:
        """Seconds of so many decode steps, each token read before the next is computed."""
        synchronize(self._device)
        began = time.perf_counter()
        with torch.no_grad():
            for _ in range(count):
                torch.compiler.cudagraph_mark_step_begin()
                out = self._step(
                    self._token,
                    position_ids=self._at,
                    past_key_values=self._cache,
                    use_cache=True,
                )
                self._token = out.logits[:, -1].argmax(-1, keepdim=True)
                self._at = self._at + 1
                self._token.tolist()
        return time.perf_counter() - began

    def prefill(self, tokens: int) -> float:
        """Seconds from a prompt to its first token."""
        ids = torch.randint(0, self._vocab, (1, tokens), device=self._device)
        positions = torch.arange(tokens, device=self._device)[None]
        self._open(1, tokens)
        synchronize(self._device)
        began = time.perf_counter()
        with torch.no_grad():
            torch.compiler.cudagraph_mark_step_begin()
            out = self._step(
                ids,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
            out.logits[:, -1].argmax(-1).tolist()
        return time.perf_counter() - began

    def stop(self) -> None:
        """Let the caches go."""
        self._cache = None

    def _open(self, batch: int, length: int) -> None:
        """An empty static cache; the same one again where it fits, so that its graph does, too."""
        from transformers import StaticCache

        size = (batch, length)
        if self._cache is not None and self._size == size:
            self._cache.reset()
            return
        self._size = size
        config = self._model.config
        self._cache = StaticCache(config=config, max_cache_len=length)
        # Now, so that torch.compile finds tensors at addresses that stay.
        self._cache.early_initialization(
            batch, config.num_key_value_heads, config.head_dim, torch.bfloat16, self._device
        )


def graph_refusals() -> list[str]:
    """What kept torch.compile from using CUDA graphs, as its counters have it."""
    from torch._dynamo.utils import counters

    found = counters["inductor"]
    return [f"{name}: {count}" for name, count in found.items() if "cudagraph" in name]
