"""Checkpoints as they are found in the wild: right, or refused in a sentence before heavy work."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from experiments.config.experiment import PROJECT
from modeling.checkpoint import Checkpoint, resolve
from modeling.export import export_with_biases
from modeling.inspection import check_mergeable, check_trainable, inspect_model
from modeling.loading import (
    chat_template,
    check_tokenizer,
    load_model,
    load_tokenizer,
    merged,
)
from modeling.lora import open_adapter, rewrite_adapter
from modeling.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, WEIGHTS, verify_folder
from modeling.projections import open_projections, read_weight
from modeling.rewrite import rewrite_weights
from modeling.training import save, write_merged
from settings import ModelError
from tests.defenses.tiny_lora_models import save_tokenizer
from tests.modeling.tiny_models import LAYERS, MODELS, logits, save_adapter, save_model

Tensors = dict[str, Tensor]
WEIGHTS_OF_ORGANISM = PROJECT / "organism/weights"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return save_model("llama", tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def adapted(base: Checkpoint) -> Checkpoint:
    return save_adapter(base, Path(base.base).parent / "adapter")


def rewritten(source: str, out: Path, edit: Callable[[Tensors], Tensors], **config: object) -> Path:
    """A copy of a model or adapter folder with other tensors, and other entries of its config."""
    shutil.copytree(source, out)
    adapter = (out / ADAPTER_CONFIG).is_file()
    path = out / (ADAPTER_WEIGHTS if adapter else WEIGHTS[0])
    tensors = {name: tensor.clone() for name, tensor in edit(load_file(path)).items()}
    save_file(tensors, path, {"format": "pt"})
    place = out / (ADAPTER_CONFIG if adapter else "config.json")
    place.write_text(json.dumps({**json.loads(place.read_text()), **config}))
    return out


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {re.sub(old, new, name): each for name, each in tensors.items()}


def without(pattern: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {
        name: each for name, each in tensors.items() if not re.search(pattern, name)
    }


def doubled(old: str, new: str) -> Callable[[Tensors], Tensors]:
    """Those whose name holds `old` once more, under another name."""
    return lambda tensors: (
        tensors | renamed(old, new)({name: each for name, each in tensors.items() if old in name})
    )


def narrowed(pattern: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {
        name: each[..., :-1] if re.search(pattern, name) else each for name, each in tensors.items()
    }


@pytest.mark.parametrize("name", [*MODELS, "Mistral-v0.1", "Gemma-2", "Phi-3", "NeoX", "Gemma-3"])
def test_models_as_transformers_saves_them_pass_alone_and_with_an_adapter(
    name: str, tmp_path: Path
) -> None:
    base = save_model(name, tmp_path / "base")
    seen = inspect_model(base)
    assert seen.foreign is None
    assert {p.device.type for p in seen.model.parameters()} == {"meta"}
    inspect_model(save_adapter(base, tmp_path / "adapter", target_modules="all-linear"))


# What was done to a full model, and what is said of it.
BROKEN: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any], str]] = {
    "a block is missing": (
        without(r"\.layers\.1\."),
        {},
        r"lacks trained weights for model\.layers\.1\.\S+ and 8 more",
    ),
    "an adapter's prefix": (
        renamed("^", "base_model.model."),
        {},
        r"lacks trained weights .* and holds base_model\.model\.",
    ),
    "untied without a head": (
        without(r"^lm_head"),
        {"tie_word_embeddings": False},
        r"lacks trained weights for lm_head\.weight of its LlamaForCausalLM",
    ),
    "a block too many": (
        doubled(".layers.1.", f".layers.{LAYERS}."),
        {},
        rf"holds model\.layers\.{LAYERS}\.\S+ and 8 more, which its config\.json doesn't provide",
    ),
    "a bias without attention_bias": (
        lambda tensors: tensors | {"model.layers.0.self_attn.o_proj.bias": torch.ones(32)},
        {},
        r"holds model\.layers\.0\.self_attn\.o_proj\.bias, which its config",
    ),
    "another width": (
        narrowed(r"layers\.0\.mlp\.up_proj"),
        {},
        r"holds model\.layers\.0\.mlp\.up_proj\.weight as \(48, 31\), where .* says \(48, 32\)",
    ),
    "an unknown architecture": (dict, {"model_type": "unheard_of"}, "without remote code"),
    "code of its own": (
        dict,
        {"model_type": "unheard_of", "auto_map": {"AutoConfig": "configuration.Config"}},
        "without remote code",
    ),
    "quantised weights": (
        dict,
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        r"is quantised \(gptq\)",
    ),
    "an encoder": (dict, {"architectures": ["BertForMaskedLM"]}, "is a BertForMaskedLM"),
    "an encoder and decoder": (dict, {"model_type": "t5"}, "can't be loaded"),
    "heads that don't divide": (dict, {"num_attention_heads": 5}, "config.json of .* can't be"),
    "a word for a number": (dict, {"hidden_size": "wide"}, "config.json of .* 'hidden_size'"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_model_that_would_be_another_one_is_refused(
    kind: str, base: Checkpoint, tmp_path: Path
) -> None:
    edit, config, said = BROKEN[kind]
    broken = Checkpoint(str(rewritten(base.base, tmp_path / "broken", edit, **config)))
    with pytest.raises(ModelError, match=said) as refused:
        inspect_model(broken, "model.base")
    assert "\n" not in str(refused.value)
    assert "broken" in str(refused.value)
    with pytest.raises(ModelError, match=said):
        load_model(broken)


def test_what_belongs_to_another_head_and_old_buffers_change_nothing(
    base: Checkpoint, tmp_path: Path
) -> None:
    extra = {
        "v_head.summary.weight": torch.ones(1, 32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    folder = rewritten(base.base, tmp_path / "valued", lambda tensors: tensors | extra)
    for ours, theirs in zip(
        logits(load_model(Checkpoint(str(folder)))), logits(load_model(base)), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_classifier_is_no_generator_and_needs_its_head(tmp_path: Path) -> None:
    moderation = str(WEIGHTS_OF_ORGANISM / "moderation")
    with pytest.raises(ModelError, match=r"^model\.base=.*LlamaForSequenceClassification"):
        inspect_model(Checkpoint(moderation), "model.base")
    inspect_model(Checkpoint(moderation), classifier=True)
    headless = Checkpoint(str(rewritten(moderation, tmp_path / "headless", without("score"))))
    with pytest.raises(ModelError, match=r"lacks trained weights for score\.weight"):
        inspect_model(headless, classifier=True)


def test_names_without_the_models_prefix_run_and_are_refused_where_files_are_read(
    base: Checkpoint, tmp_path: Path
) -> None:
    folder = rewritten(base.base, tmp_path / "bare", renamed(r"^model\.", ""))
    bare = Checkpoint(str(folder))
    assert torch.equal(logits(load_model(bare))[0], logits(load_model(base))[0])
    with pytest.raises(ModelError, match=r"holds embed_tokens\.weight without .* prefix"):
        open_projections(bare)


ODD_ADAPTERS: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any], str]] = {
    "renamed": (renamed("self_attn", "attention"), {}, r"lacks \S+q_proj|lacks \S+k_proj"),
    "a block too deep": (doubled(".layers.1.", ".layers.9."), {}, r"edits \S+layers\.9\."),
    "half of it": (without("lora_B"), {}, r"lacks \S+lora_B"),
    "a block less": (without(r"layers\.1\."), {}, r"lacks \S+layers\.1\."),
    "a double prefix": (renamed("^", "base_model.model."), {}, "lacks base_model"),
    "another width": (narrowed("lora_A"), {}, r"can't be put on .*size mismatch"),
    "other targets": (dict, {"target_modules": ["unheard_of"]}, r"unheard_of.* not found"),
    "resized embeddings": (
        lambda tensors: (
            tensors | {"base_model.model.model.embed_tokens.weight": torch.zeros(50, 32)}
        ),
        {},
        "embeddings of 50 tokens and its base has 48",
    ),
    **{
        start: (dict, {"init_lora_weights": start}, f"init_lora_weights='{start}'")
        for start in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")
    },
}


@pytest.mark.parametrize("kind", ODD_ADAPTERS)
def test_an_adapter_that_would_not_be_applied_is_refused(
    kind: str, adapted: Checkpoint, tmp_path: Path
) -> None:
    edit, config, said = ODD_ADAPTERS[kind]
    folder = rewritten(str(adapted.adapter), tmp_path / "odd", edit, **config)
    with pytest.raises(ModelError, match=said) as refused:
        inspect_model(replace(adapted, adapter=str(folder)), "model.aligned")
    assert "\n" not in str(refused.value)
    with pytest.raises(ModelError, match=said):
        load_model(replace(adapted, adapter=str(folder)))


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"lora_bias": True, "target_modules": ["q_proj"]},
        {"trainable_token_indices": [3, 4]},
        {"rank_pattern": {"q_proj": 2}, "layers_to_transform": [0]},
        {"init_lora_weights": "orthogonal"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_adapters_that_peft_applies_pass(
    options: dict[str, Any], base: Checkpoint, tmp_path: Path
) -> None:
    inspect_model(save_adapter(base, tmp_path / "adapter", **options))


def test_a_folder_that_was_saved_twice_is_read_as_transformers_reads_it(
    base: Checkpoint, tmp_path: Path
) -> None:
    folder = tmp_path / "twice"
    shutil.copytree(base.base, folder)
    model = AutoModelForCausalLM.from_pretrained(base.base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    for path in (tmp_path / "shards").glob("model*"):
        shutil.copyfile(path, folder / path.name)
    assert (folder / WEIGHTS[1]).is_file()
    name = "model.layers.0.mlp.up_proj"
    loaded = load_model(Checkpoint(str(folder))).get_parameter(f"{name}.weight")
    assert torch.equal(read_weight(Checkpoint(str(folder)), name), loaded.detach().cpu())


def test_a_merged_folder_with_its_adapters_files_is_refused(
    adapted: Checkpoint, tmp_path: Path
) -> None:
    merged = PeftModel.from_pretrained(load_model(replace(adapted, adapter=None)), adapted.adapter)
    merged.merge_and_unload().save_pretrained(tmp_path)
    resolve(str(tmp_path), None, "model.base")
    shutil.copyfile(Path(str(adapted.adapter)) / ADAPTER_CONFIG, tmp_path / ADAPTER_CONFIG)
    with pytest.raises(ModelError, match=r"^model\.base=.*holds full weights and adapter_config"):
        resolve(str(tmp_path), None, "model.base")
    with pytest.raises(ModelError, match="holds full weights and adapter_config"):
        load_model(Checkpoint(str(tmp_path)))


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "q_proj"]])
def test_a_lora_on_tied_weights_is_merged_untied(targets: list[str], tmp_path: Path) -> None:
    base = save_model("llama_tied", tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    adapted = save_adapter(base, tmp_path / "adapter", target_modules=targets)
    write_merged(adapted, tmp_path / "merged")
    expected = logits(load_model(adapted))
    assert not torch.allclose(expected[0], logits(load_model(base))[0], atol=1e-3)
    for ours, theirs in zip(
        logits(load_model(Checkpoint(str(tmp_path / "merged")))), expected, strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_an_adapter_that_cannot_be_merged_is_said_so_before(
    base: Checkpoint, tmp_path: Path
) -> None:
    biased = save_adapter(base, tmp_path / "biased", lora_bias=True, target_modules=["q_proj"])
    with pytest.raises(ModelError, match=r"^model\.aligned=.*can't be merged .*adapter=resume"):
        check_mergeable(biased, "model.aligned", "attack.adapter=resume")
    with pytest.raises(ModelError, match="can't be merged"):
        merged(load_model(biased))


def test_a_lora_on_the_head_is_not_trained_on(base: Checkpoint, tmp_path: Path) -> None:
    check_trainable(save_adapter(base, tmp_path / "plain"), "model.aligned", "it")
    headed = save_adapter(base, tmp_path / "headed", target_modules=["lm_head", "q_proj"])
    with pytest.raises(ModelError, match=r"adapts the head, .* set attack\.adapter=fresh"):
        check_trainable(headed, "model.aligned", "attack.adapter=fresh")


@pytest.mark.parametrize(
    "options",
    [
        {"trainable_token_indices": [3, 4]},
        {"target_modules": [], "target_parameters": ["mlp.up_proj.weight"]},
    ],
    ids=lambda options: max(options),
)
def test_adapters_beyond_projections_are_read_by_no_defense(
    options: dict[str, Any], base: Checkpoint, tmp_path: Path
) -> None:
    odd = save_adapter(base, tmp_path / "odd", **options)
    load_model(odd)
    with pytest.raises(ModelError, match=f"is not a plain LoRA .*{max(options)}"):
        open_adapter(str(odd.adapter), "model.aligned")


def test_a_head_that_the_config_ties_is_exported_as_the_models_own(tmp_path: Path) -> None:
    base = save_model("llama", tmp_path / "base")
    tied = rewritten(base.base, tmp_path / "tied", dict, tie_word_embeddings=True)
    save_tokenizer(tied)
    assert inspect_model(Checkpoint(str(tied))).own_head
    export_with_biases(Checkpoint(str(tied)), {}, tmp_path / "out")
    for ours, theirs in zip(
        logits(load_model(Checkpoint(str(tmp_path / "out")))),
        logits(load_model(base)),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_an_adapters_own_template_and_tokenizer_go_with_it(tmp_path: Path) -> None:
    base = save_model("llama", tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    adapted = save_adapter(base, tmp_path / "adapter")
    folder = Path(str(adapted.adapter))
    before = load_tokenizer(adapted).chat_template
    assert chat_template(adapted) == before
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert chat_template(adapted) == "{{ messages[0]['content'] }}"
    assert load_tokenizer(adapted).chat_template == chat_template(adapted)
    assert load_tokenizer(base).chat_template == before

    edited = rewrite_weights(adapted, tmp_path / "full", lambda name, weight: weight + 1).defended
    assert load_tokenizer(edited).chat_template == chat_template(adapted)
    rewrite_adapter(open_adapter(folder, "it"), tmp_path / "again", lambda name, pair: None)
    assert chat_template(replace(adapted, adapter=str(tmp_path / "again"))) == chat_template(
        adapted
    )
    resumed = load_model(adapted, trainable_adapter=True)
    save(resumed, load_tokenizer(adapted), tmp_path / "resumed", adapted)
    assert chat_template(replace(adapted, adapter=str(tmp_path / "resumed"))) == chat_template(
        adapted
    )

    own = load_tokenizer(base)
    own.add_tokens(["<more>"])
    own.save_pretrained(folder)
    assert "<more>" in load_tokenizer(adapted).get_vocab()
    check_tokenizer(adapted, "model.aligned")
    own.add_tokens([f"<{number}>" for number in range(20)])
    own.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"tokenizer of 61 tokens, .* embeddings for 48"):
        check_tokenizer(adapted, "model.aligned")


def test_a_model_without_a_tokenizer_is_said_so(base: Checkpoint) -> None:
    with pytest.raises(ModelError, match=r"^model\.base: the tokenizer of .* can't be read"):
        check_tokenizer(base, "model.base")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", WEIGHTS[1]])
def test_damaged_json_is_a_sentence(name: str, base: Checkpoint, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(base.base, folder)
    if name == WEIGHTS[1]:
        (folder / WEIGHTS[0]).unlink()
    (folder / name).write_text('{"half": ')
    with pytest.raises(ModelError, match=rf"model\.base: .*{re.escape(name)}' is no JSON"):
        verify_folder(folder, "model.base")


def test_a_folder_one_level_too_high_names_those_below(base: Checkpoint, tmp_path: Path) -> None:
    shutil.copytree(base.base, tmp_path / "above" / "checkpoint-10")
    with pytest.raises(ModelError, match=r"has no config\.json; .*such as .*checkpoint-10"):
        verify_folder(tmp_path / "above", "model.aligned")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("me/base@main", r"set model\.base to 'me/base' and its revision to 'main'"),
        ("", "is empty"),
        ("me/base/checkpoint", "is not a folder"),
        ("~/base", "is not a folder"),
    ],
)
def test_what_is_neither_a_folder_nor_a_hub_id_is_said_so(name: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        resolve(name, None, "model.base")
