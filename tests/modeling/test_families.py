"""The models of conf/model: their files, and what is read from their published configs."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from defenses.fgsn.layers import named_layers
from experiments.config.experiment import CONF, register_resolvers
from experiments.config.model import ModelSettings
from modeling.chat import PromptStyle
from modeling.checkpoint import COPIES, MODEL_PATTERNS, Checkpoint, check_target_modules
from modeling.export import check_exportable
from modeling.heads import head_layout
from modeling.loading import load_tokenizer
from settings import ModelError, plain
from tests.defenses.tiny_lora_models import save_tokenizer
from tests.modeling.tiny_models import FAMILIES, save_model

# Published chat models; of the small ones, as of the organism, only the base is read.
SMALL = {"organism", "smollm2", "gemma3"}
HUB = sorted({path.stem for path in CONF.glob("model/*.yaml")} - {*SMALL, "local"})
# What stands in the aligned models' config.json on the hub, in transformers 4's words.
_LLAMA = {"hidden_act": "silu", "num_attention_heads": 32, "tie_word_embeddings": False}
_LLAMA_3 = {
    **_LLAMA,
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
_QWEN = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "vocab_size": 152064,
}
_MISTRAL = {
    **_LLAMA,
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "vocab_size": 32768,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama2": {
        **_LLAMA,
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "pretraining_tp": 1,
        "rope_scaling": None,
        "vocab_size": 32000,
    },
    "llama3": _LLAMA_3,
    "llama3_1": {
        **_LLAMA_3,
        "eos_token_id": [128001, 128008, 128009],
        "max_position_embeddings": 131072,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
    "qwen2": _QWEN,
    "qwen2_5": _QWEN,
    "mistral": _MISTRAL,
    "mistral_nemo": {
        **_MISTRAL,
        "head_dim": 128,
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "max_position_embeddings": 128000,
        "vocab_size": 131072,
    },
    "gemma2": {
        "model_type": "gemma2",
        "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "max_position_embeddings": 8192,
        "num_attention_heads": 16,
        "num_hidden_layers": 42,
        "num_key_value_heads": 8,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "vocab_size": 256000,
    },
}
# Which of the tiny families has what is special about each.
FAMILY = {
    "llama2": "Llama-2",
    "llama3": "Llama-3.1",
    "llama3_1": "Llama-3.1",
    "qwen2": "Qwen2.5",
    "qwen2_5": "Qwen2.5",
    "mistral": "Mistral-v0.3",
    "mistral_nemo": "Mistral-Nemo",
    "gemma2": "Gemma-2",
}
# (layers, heads, key-value heads, head_dim, hidden)
SHAPES = {
    "llama2": (32, 32, 32, 128, 4096),
    "llama3": (32, 32, 8, 128, 4096),
    "llama3_1": (32, 32, 8, 128, 4096),
    "qwen2": (28, 28, 4, 128, 3584),
    "qwen2_5": (28, 28, 4, 128, 3584),
    "mistral": (32, 32, 8, 128, 4096),
    "mistral_nemo": (40, 32, 8, 128, 5120),
    "gemma2": (42, 16, 8, 256, 3584),
}


@cache
def settings(name: str) -> ModelSettings:
    """A model's settings, with those that its file takes from another one."""
    register_resolvers()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = plain(OmegaConf.to_container(compose("config", [f"model={name}"]).model))
    return ModelSettings.validated(node, "model")  # type: ignore[no-any-return]


def published(name: str, folder: Path) -> Checkpoint:
    """A folder with a model's published config and nothing else."""
    (folder / "config.json").write_text(json.dumps(PUBLISHED[name]))
    return Checkpoint(str(folder), dtype="bfloat16")


def test_every_model_of_the_hub_is_tested() -> None:
    assert set(HUB) == set(PUBLISHED) == set(SHAPES) == set(FAMILY)
    assert set(FAMILY.values()) <= set(FAMILIES)


@pytest.mark.parametrize("name", HUB)
def test_a_models_file_says_what_an_experiment_needs(name: str, tmp_path: Path) -> None:
    model = settings(name)
    assert (model.name, model.dtype, model.alignment) == (name, "bfloat16", "auto")
    assert model.base.count("/") == str(model.aligned).count("/") == 1
    # No pin that isn't cited.
    assert model.revision is None
    assert model.aligned_revision is None
    assert model.resolved(resumes=True).style == PromptStyle(style="alpaca")
    assert model.resolved(resumes=False).style.style == "chat"
    layers = model.presets.get("fgsn", {}).get("layers", [0])
    assert named_layers(layers, SHAPES[name][0]) == list(layers)
    tiny = save_model(FAMILY[name], tmp_path)
    check_target_modules(model.lora_targets, tiny, "model.lora_targets")


@pytest.mark.parametrize("name", HUB)
def test_published_configs_give_the_heads(name: str, tmp_path: Path) -> None:
    layout = head_layout(published(name, tmp_path))
    found = (layout.layers, layout.heads, layout.kv_heads, layout.head_dim, layout.hidden)
    assert found == SHAPES[name]


@pytest.mark.parametrize("name", HUB)
def test_published_configs_say_what_can_be_baked(name: str, tmp_path: Path) -> None:
    model = published(name, tmp_path)
    if name == "gemma2":
        with pytest.raises(ModelError, match="of type 'gemma2', which no Llama"):
            check_exportable(model, "model.aligned")
    else:
        check_exportable(model, "model.aligned")


TEMPLATES = {
    "refuses": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}{% for m in messages %}{{ '36 ' if m['role'] == 'user' else '37 ' }}"
    "{{ m['content'] }} <end> {% endfor %}{% if add_generation_prompt %}37 {% endif %}",
    "drops": "{% set line = messages[0]['content'] if messages[0]['role'] == 'system' %}"
    "{% for m in messages if m['role'] != 'system' %}{% if m['role'] == 'user' %}36 "
    "{% if loop.last and line %}{{ line + '\n\n' }}{% endif %}{{ m['content'] }} 37 "
    "{% else %}{{ m['content'] }} <end>{% endif %}{% endfor %}",
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_system_line_reaches_models_whose_templates_have_no_role_for_it(
    kind: str, tmp_path: Path
) -> None:
    """Gemma 2's template refuses one; Mistral's drops it as soon as the turn is answered."""
    save_model("llama", tmp_path)
    save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(Checkpoint(str(tmp_path)))
    tokenizer.chat_template = TEMPLATES[kind]
    named = {"refuses": "gemma2", "drops": "mistral"}[kind]
    style = settings(named).prompt
    assert not style.system_role
    prompt = style.encode_prompt(tokenizer, "1 2", system="9 9")
    answer = style.encode_answer(tokenizer, "1 2", "3 4", system="9 9")
    assert prompt == [36, 9, 9, 1, 2, *([39] if kind == "refuses" else []), 37]
    assert answer == [3, 4, 39]
    with pytest.raises(ModelError):
        PromptStyle().encode_answer(tokenizer, "1 2", "3 4", system="9 9")


def test_only_one_copy_of_the_weights_is_downloaded() -> None:
    """Mistral's and Llama's pages hold a second one in their makers' own formats."""
    kept = ["model-00001-of-00003.safetensors", "model.safetensors.index.json", "config.json"]
    kept += ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"]
    left = ["consolidated.safetensors", "original/consolidated.00.pth", "original/params.json"]
    found = filter_repo_objects(
        [*left, *kept],
        allow_patterns=list(MODEL_PATTERNS),
        ignore_patterns=list(COPIES),
    )
    assert list(found) == kept
