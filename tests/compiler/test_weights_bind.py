"""Binding a traced program to a checkpoint: layouts, dtypes, ties; checkpoints that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import Subject, tiny_program
from safetensors.torch import load_file, save_file

from smelt.compiler.weights import ModuleSource, bind, checkpoint_specs
from smelt.models.checkpoint import Checkpoint
from smelt.passes.program import Program
from smelt.passes.weights import PlanError
from smelt.runtime.errors import UserError


def saved(subject: Subject, folder: Path, **options: Any) -> Path:
    subject.model.save_pretrained(folder, **options)
    return folder


def bound(subject: Subject, folder: Path) -> tuple[Program, Checkpoint]:
    checkpoint = Checkpoint(folder)
    bind(subject.program.weights, checkpoint_specs(checkpoint), subject.model, "FOLDER")
    return subject.program, checkpoint


def equal_to_the_module(subject: Subject, folder: Path) -> None:
    """Every weight of the program, read from the folder, is the module's parameter."""
    program, checkpoint = bound(subject, folder)
    state = subject.model.state_dict()
    made = dict(program.weights.materialize(program.used_weights(), checkpoint))
    assert set(made) == set(program.used_weights())
    for name, value in made.items():
        if name not in program.weights.computed:
            assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("shard", ["10GB", "60KB"], ids=["one file", "shards"])
def test_one_file_or_shards(tmp_path: Path, shard: str) -> None:
    subject = tiny_program("llama")
    folder = saved(subject, tmp_path, max_shard_size=shard)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard == "60KB")
    equal_to_the_module(subject, folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_checkpoint_of_another_dtype_is_converted(tmp_path: Path, dtype: torch.dtype) -> None:
    subject = tiny_program("llama")
    folder = saved(subject, tmp_path)
    file = folder / "model.safetensors"
    tensors = {name: value.to(dtype) for name, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    program, checkpoint = bound(subject, folder)
    name = "model.layers.1.mlp.down_proj.weight"
    made = dict(program.weights.materialize([name], checkpoint))[name]
    assert torch.equal(made, tensors[name].float())
    assert program.weights.producers()[name].op == "cast"


def test_a_checkpoint_of_the_same_dtype_is_read_without_a_copy(tmp_path: Path) -> None:
    subject = tiny_program("llama")
    program, _ = bound(subject, saved(subject, tmp_path))
    ops = {program.weights.producers()[name].op for name in program.used_weights()}
    assert ops == {"load", "put"}


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight"])
def test_tied_weights_under_either_name(tmp_path: Path, kept: str) -> None:
    subject = tiny_program("gemma2")
    assert subject.config.tie_word_embeddings
    folder = saved(subject, tmp_path)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tied = [n for n in tensors if n in ("model.embed_tokens.weight", "lm_head.weight")]
    assert len(tied) == 1
    tensors[kept] = tensors.pop(tied[0])
    save_file(tensors, file, metadata={"format": "pt"})
    equal_to_the_module(subject, folder)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_stored_one_by_one(tmp_path: Path, family: str) -> None:
    subject = tiny_program(family)
    folder = saved(subject, tmp_path)
    stored = load_file(folder / "model.safetensors")
    assert any(".experts.3." in name for name in stored), "experts are not stored one by one"
    equal_to_the_module(subject, folder)
    ops = {step.op for step in subject.program.weights.steps}
    assert {"stack", "cat"} <= ops


def test_more_than_ten_experts_come_in_their_order() -> None:
    from smelt.compiler.weights import _natural

    names = [f"layers.0.experts.{i}.w" for i in range(12)]
    assert sorted(sorted(names), key=_natural) == names


@pytest.mark.parametrize("family", ["gpt2", "phi3", "gpt_neox"])
def test_other_layouts(tmp_path: Path, family: str) -> None:
    subject = tiny_program(family)
    equal_to_the_module(subject, saved(subject, tmp_path))


def test_a_checkpoint_of_the_base_model_lacks_the_prefix(tmp_path: Path) -> None:
    """What GPT-2's hub folder holds: names without `transformer.`."""
    subject = tiny_program("gpt2")
    folder = saved(subject, tmp_path)
    file = folder / "model.safetensors"
    tensors = {n.removeprefix("transformer."): v for n, v in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    equal_to_the_module(subject, folder)


def edited(tmp_path: Path, **changes: torch.Tensor | None) -> tuple[Subject, Path]:
    """A llama folder with tensors replaced, or removed where None is given."""
    subject = tiny_program("llama")
    file = saved(subject, tmp_path) / "model.safetensors"
    tensors = load_file(file)
    for name, value in changes.items():
        tensors.pop(name)
        if value is not None:
            tensors[name] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return subject, tmp_path


NORM = "model.norm.weight"


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    subject, folder = edited(tmp_path, **{NORM: None})
    with pytest.raises(UserError, match=f"FOLDER: the checkpoint has no tensor for {NORM}"):
        bound(subject, folder)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    subject, folder = edited(tmp_path, **{NORM: torch.zeros(65)})
    with pytest.raises(UserError, match=rf"{NORM} has shape \[65\], config.json says \[64\]"):
        bound(subject, folder)


def test_integers_are_taken_for_a_quantized_checkpoint(tmp_path: Path) -> None:
    subject, folder = edited(tmp_path, **{NORM: torch.zeros(64, dtype=torch.int8)})
    with pytest.raises(UserError, match=f"{NORM} is stored as torch.int8, and config.json does"):
        bound(subject, folder)


def test_a_tensor_stored_under_both_spellings_is_refused(tmp_path: Path) -> None:
    subject, folder = edited(tmp_path)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["norm.weight"] = tensors[NORM].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"the checkpoint has {NORM} twice"):
        bound(subject, folder)


def test_a_missing_expert_is_refused(tmp_path: Path) -> None:
    subject = tiny_program("mixtral")
    file = saved(subject, tmp_path) / "model.safetensors"
    tensors = load_file(file)
    gone = next(name for name in tensors if ".experts.3." in name)
    del tensors[gone]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises((UserError, PlanError, RuntimeError)) as caught:
        bound(subject, tmp_path)
    assert isinstance(caught.value, UserError) and "\n" not in str(caught.value)


def test_a_module_in_memory_is_a_source_too() -> None:
    subject = tiny_program("qwen3_moe")
    source = ModuleSource(subject.model)
    bind(subject.program.weights, source.specs, subject.model, "module")
    program = subject.program
    made = dict(program.weights.materialize(program.used_weights(), source))
    state = subject.model.state_dict()
    for name in set(made) & set(state):
        assert torch.equal(made[name], state[name])
