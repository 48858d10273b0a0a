"""The families the compiler promises, from trace to lowered step, against eager transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.check_pass import operators
from helpers.steps import Stepper
from helpers.tiny import FAMILIES, Subject, tiny_config, tiny_difference, tiny_lowered, tiny_program
from torch import nn

from smelt.compiler import trace
from smelt.compiler.trace import PackedForward, TraceError, check_against_eager, trace_config
from smelt.passes.program import Dialect, Role
from smelt.runtime.errors import UserError

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


def eager(subject: Subject, ids: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] of one sequence by transformers, without a cache."""
    with torch.no_grad():
        logits: torch.Tensor = PackedForward(subject.model)(ids, torch.arange(len(ids)))
    return logits


@pytest.fixture(params=FAMILIES)
def lowered(request: pytest.FixtureRequest) -> Subject:
    return tiny_lowered(request.param)


@pytest.fixture
def weights(lowered: Subject) -> dict[str, torch.Tensor]:
    program = lowered.program
    return dict(program.weights.materialize(program.used_weights(), lowered.source))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_traced_graph_equals_eager(family: str) -> None:
    assert tiny_difference(family) < 1e-5
    program = tiny_program(family).program
    assert program.dialect is Dialect.ATEN
    assert operators(program)["smelt.attention"] == program.facts.hidden_layers
    assert operators(program)["aten.softmax"] <= ("moe" in family or family == "mixtral") * 2


def test_every_pass_finds_what_the_modules_promise(lowered: Subject) -> None:
    records = lowered.program.records
    assert "choose-providers" in [record["name"] for record in records]
    for record in records:
        if record["expected"] is not None:
            assert record["matched"] == record["expected"], record["name"]
        assert record["changed"] == (record["rewritten"] > 0), record["name"]
        assert record["declined"] == [], record["name"]
    assert lowered.program.dialect is Dialect.LOWERED


def test_prefill_chunks_decode_and_packing(
    lowered: Subject, weights: dict[str, torch.Tensor]
) -> None:
    """One pool, four sequences: whole at once, in chunks, token by token, and all of them mixed."""
    ids = lowered.ids
    sequences = [ids, ids.flip(0), ids.roll(7), ids[3:20]]
    expected = [eager(lowered, s) for s in sequences]

    def check(out: dict[int, torch.Tensor], stepper: Stepper) -> None:
        for b, logits in out.items():
            end = stepper.done[b]
            wanted = expected[b][end - len(logits) : end]
            torch.testing.assert_close(logits, wanted, **TOLERANCE, msg=f"sequence {b} at {end}")

    stepper = Stepper(lowered.program, weights, sequences)
    check(stepper.step({0: len(ids)}), stepper)  # one prefill
    for size in (5, 17, 1, 6):  # chunked prefill; block boundaries fall inside chunks
        check(stepper.step({1: size}), stepper)
    check(stepper.step({2: 16}), stepper)
    for _ in range(4):  # token by token
        check(stepper.step({2: 1}), stepper)
    stepper.done[0] = 20  # the tail of sequence 0 again, over what is in the cache
    check(stepper.step({3: 9, 0: 4, 2: 1}), stepper)  # prefill, chunk and decode in one step
    check(stepper.step({2: 1, 3: 1, 0: 1}), stepper)  # three decodes


def test_only_wanted_rows_are_computed(lowered: Subject, weights: dict[str, torch.Tensor]) -> None:
    stepper = Stepper(lowered.program, weights, [lowered.ids])
    whole = stepper.step({0: len(lowered.ids)})[0]
    assert whole.shape == (len(lowered.ids), lowered.program.facts.vocab_size)
    names = {lowered.program.inputs[n.name].name for n in lowered.program.placeholders(Role.BATCH)}
    assert "logits_rows" in names


def refused(config: Any, text: str) -> None:
    with pytest.raises(UserError, match=text) as caught:
        check_against_eager(config)
    assert "\n" not in str(caught.value)


def test_recurrent_state_is_refused() -> None:
    refused(tiny_config("mamba"), "MambaForCausalLM.*recurrent|Mamba")


def test_alibi_is_refused() -> None:
    refused(tiny_config("bloom"), "BloomForCausalLM")


def test_latent_attention_is_refused() -> None:
    config = tiny_config(
        "deepseek_v3",
        num_hidden_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        vocab_size=128,
    )
    refused(config, "Deepseek.*latent attention")


def test_an_encoder_is_refused() -> None:
    refused(tiny_config("bert"), "Bert.*(decoder-only|causal)")


def test_keys_shared_between_layers_are_refused() -> None:
    config = tiny_config(
        "gemma3n_text",
        num_hidden_layers=4,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_kv_shared_layers=2,
        vocab_size=128,
        vocab_size_per_layer_input=128,
        hidden_size_per_layer_input=8,
        altup_num_inputs=2,
        laurel_rank=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 4,
    )
    refused(config, "Gemma3n.*shares keys between layers")


def test_an_export_that_fails_names_the_source_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    def by_value(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x if bool(x.sum() > 0) else -x

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", by_value)
    refused(tiny_config("llama"), r"LlamaForCausalLM does not export: .*modeling_llama\.py:\d+")


def test_an_attention_it_does_not_reproduce_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last guard: whatever the reason, logits that differ from eager's stop the trace."""
    from smelt.compiler import trace

    original: Callable[..., Any] = trace._attention

    def wrong(*args: Any, **options: Any) -> Any:
        return original(*args, **{**options, "sliding_window": 3})

    monkeypatch.setattr(trace, "_attention", wrong)
    with pytest.raises(TraceError, match="logits differ from eager's"):
        check_against_eager(tiny_config("llama"))


def test_the_model_gets_its_attention_back() -> None:
    subject = tiny_program("llama")
    assert subject.model.config._attn_implementation == "eager"
    torch.testing.assert_close(eager(subject, subject.ids), subject.logits)


def test_a_large_model_traces_without_its_weights() -> None:
    """8 billion parameters would be 16 GB; layers are cut here only to save time."""
    config = tiny_config(
        "llama", hidden_size=8192, intermediate_size=28672, num_hidden_layers=2, vocab_size=128256
    )
    program = trace_config(config, torch.bfloat16)
    spec = program.weights.specs["model.layers.0.mlp.down_proj.weight"]
    assert (spec.shape, spec.dtype) == ((8192, 28672), torch.bfloat16)
    assert program.facts.dtype == "bfloat16"


@pytest.mark.parametrize("family", ["gemma2", "smollm3", "cohere2"])
def test_every_kind_of_layer_is_in_the_small_model(family: str) -> None:
    config, small = tiny_config(family), tiny_program(family).config
    for name in ("layer_types", "no_rope_layers"):
        if getattr(config, name, None):
            assert set(getattr(small, name)) == set(getattr(config, name))


def test_a_configuration_is_checked_once_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(trace, "check_against_eager", lambda config, trust: seen.append(config))
    monkeypatch.setattr(trace, "_CHECKED", set())
    for width in (96, 96, 128):
        trace.check_once(tiny_config("llama", intermediate_size=width))
    assert [config.intermediate_size for config in seen] == [96, 128]
    trace.check_once(tiny_config("llama", intermediate_size=128), trust_remote_code=True)
    assert len(seen) == 3, "a folder's code may have changed"


def test_a_failed_check_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "_CHECKED", set())

    def fail(config: object, trust: bool) -> None:
        raise TraceError("no")

    monkeypatch.setattr(trace, "check_against_eager", fail)
    for _ in range(2):
        with pytest.raises(TraceError):
            trace.check_once(tiny_config("llama"))
