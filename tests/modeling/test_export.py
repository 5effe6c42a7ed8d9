"""Export: a plain folder that is the hooked model, and a check that notices when it isn't."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from modeling.checkpoint import Checkpoint
from modeling.export import check_exportable, export_with_biases
from modeling.heads import head_layout, output_biases
from modeling.loading import load_model, load_tokenizer
from modeling.model_files import verify_folder
from modeling.steering import Steering, save_steering, steer
from modeling.verify import verify_export
from organism.make import WEIGHTS
from settings import ModelError
from tests.defenses.tiny_lora_models import save_tokenizer
from tests.modeling.tiny_models import (
    EXPORTABLE,
    LAYERS,
    ROWS,
    logits,
    random_steering,
    save_adapter,
    save_model,
)

HEADS = [(0, 1), (2, 3)]


def _lock(checkpoint: Checkpoint, strength: float = 1.0) -> Steering:
    """Two heads; layer 1 stays without a bias."""
    return random_steering(head_layout(checkpoint), HEADS, strength)


def _export(checkpoint: Checkpoint, steering: Steering, out: Path) -> Checkpoint:
    export_with_biases(checkpoint, output_biases(checkpoint, steering.deltas), out)
    return Checkpoint(str(out), dtype=checkpoint.dtype)


def _logits(checkpoint: Checkpoint, steering: Steering | None = None) -> Tensor:
    """(tokens, vocabulary) of all rows."""
    model = load_model(checkpoint, device="cpu").eval()
    with steer(model, steering or Steering({})):
        return torch.cat(logits(model))


def _files(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def _edit_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", EXPORTABLE)
def test_baked_is_hooked(name: str, tmp_path: Path) -> None:
    source = save_model(name, tmp_path / "source")
    check_exportable(source, "model.base")
    steering = _lock(source)
    exported = _export(source, steering, tmp_path / "out")
    plain, hooked, baked = _logits(source), _logits(source, steering), _logits(exported)
    assert (baked - hooked).abs().max() <= 1e-5
    assert (hooked - plain).abs().max() > 0.5
    assert isinstance(load_model(exported, device="cpu"), LlamaForCausalLM)


@pytest.mark.parametrize("name", ["llama_wide_heads", "llama_biased", "qwen2", "mistral"])
def test_baked_is_hooked_with_the_adapter_merged(name: str, tmp_path: Path) -> None:
    source = save_adapter(save_model(name, tmp_path / "source"), tmp_path / "adapter")
    check_exportable(source, "model.base")
    steering = _lock(source)
    _export(source, steering, tmp_path / "out")
    figures = verify_export(tmp_path / "out", source, steering, ROWS)
    assert figures["max_difference"] <= 1e-5
    assert figures["rms_effect"] > 0.1
    assert figures["effect_share"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"o_proj": 8}, "alpha_pattern": {"layers.0.self_attn.q_proj": 1}},
    ],
)
def test_scales_of_the_adapter(options: dict[str, object], tmp_path: Path) -> None:
    base = save_model("llama", tmp_path / "base")
    source = save_adapter(base, tmp_path / "adapter", **options)
    exported = _export(source, Steering({}), tmp_path / "out")
    assert (_logits(exported) - _logits(source)).abs().max() <= 1e-5


@pytest.mark.parametrize("name", EXPORTABLE)
def test_zero_biases_are_the_source(name: str, tmp_path: Path) -> None:
    source = save_model(name, tmp_path / "source")
    exported = _export(source, Steering({}), tmp_path / "out")
    assert torch.equal(_logits(exported), _logits(source))
    before, after = _files(tmp_path / "source"), _files(tmp_path / "out")
    for key, tensor in before.items():
        assert torch.equal(after.pop(key), tensor), key
    assert all(key.endswith("_proj.bias") and not tensor.any() for key, tensor in after.items())


@pytest.mark.parametrize("name", EXPORTABLE)
def test_every_layer_has_every_attention_bias(name: str, tmp_path: Path) -> None:
    source = save_model(name, tmp_path / "source")
    steering = _lock(source)
    _export(source, steering, tmp_path / "out")
    before, after = _files(tmp_path / "source"), _files(tmp_path / "out")
    added = output_biases(source, steering.deltas)
    for layer in range(LAYERS):
        for side in "qkvo":
            key = f"model.layers.{layer}.self_attn.{side}_proj.bias"
            expected = before.get(key, torch.zeros_like(after[key]))
            if side == "o" and layer in added:
                expected = expected + added[layer]
            assert torch.equal(after[key], expected), key
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["attention_bias"]) == ("llama", True)
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["head_dim"] == head_layout(source).head_dim


def test_plus_and_minus_restore(tmp_path: Path) -> None:
    source = save_model("mistral_wide_heads", tmp_path / "source")
    plus, minus = _lock(source), _lock(source, strength=-1.0)
    once = _export(source, plus, tmp_path / "once")
    twice = _export(once, minus, tmp_path / "twice")
    verify_export(tmp_path / "twice", once, minus, ROWS)
    assert not torch.equal(_logits(once), _logits(source))
    assert (_logits(twice) - _logits(source)).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_low_precision(name: str, dtype: str, tmp_path: Path) -> None:
    base = save_model(name, tmp_path / "base", dtype=dtype)
    source = save_adapter(base, tmp_path / "adapter")
    steering = _lock(source)
    _export(source, steering, tmp_path / "out")
    assert all(t.dtype == getattr(torch, dtype) for t in _files(tmp_path / "out").values())
    figures = verify_export(tmp_path / "out", source, steering, ROWS)
    assert figures["rms_difference"] < figures["tolerance"] / 2
    assert figures["effect_share"] == pytest.approx(1, abs=0.02)


def test_written_in_the_precision_that_runs(tmp_path: Path) -> None:
    saved = save_model("llama", tmp_path / "source")
    exported = _export(replace(saved, dtype="bfloat16"), Steering({}), tmp_path / "out")
    after = _files(tmp_path / "out")
    for key, tensor in _files(tmp_path / "source").items():
        assert torch.equal(after[key], tensor.bfloat16())
    loaded = AutoModelForCausalLM.from_pretrained(exported.base)
    assert loaded.dtype == torch.bfloat16


@pytest.mark.parametrize("adapted", [False, True])
def test_shards_stay_consistent(adapted: bool, tmp_path: Path) -> None:
    source = save_model("qwen2", tmp_path / "source", shard="20KB")
    if adapted:
        source = save_adapter(source, tmp_path / "adapter")
    steering = _lock(source)
    _export(source, steering, tmp_path / "out")
    verify_folder(tmp_path / "out", "out")
    verify_export(tmp_path / "out", source, steering, ROWS)
    names = [p.name for p in sorted((tmp_path / "out").glob("*.safetensors"))]
    assert names == [p.name for p in sorted((tmp_path / "source").glob("*.safetensors"))]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held = {key: name for name in names for key in load_file(tmp_path / "out" / name)}
    assert index["weight_map"] == held
    sizes = [tensor.nbytes for tensor in _files(tmp_path / "out").values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    for layer in range(LAYERS):
        block = f"model.layers.{layer}.self_attn.o_proj"
        assert held[f"{block}.bias"] == held[f"{block}.weight"]


def test_reload_is_what_was_written(tmp_path: Path) -> None:
    source = save_model("mistral", tmp_path / "source", dtype="bfloat16")
    exported = _export(source, _lock(source), tmp_path / "out")
    written = _files(tmp_path / "out")
    state = load_model(exported, device="cpu").state_dict()
    assert state.keys() == written.keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in written.items())
    with (tmp_path / "out" / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        assert length % 8 == 0
        assert json.loads(file.read(length))["__metadata__"] == {"format": "pt"}


def test_the_organism_keeps_its_tokenizer(tmp_path: Path) -> None:
    source = Checkpoint(str(WEIGHTS / "base"), str(WEIGHTS / "aligned"))
    steering = _lock(source, strength=0.1)
    exported = _export(source, steering, tmp_path / "out")
    rows = [load_tokenizer(source)("a small text to run")["input_ids"]]
    figures = verify_export(tmp_path / "out", source, steering, rows)
    assert figures["max_difference"] <= 1e-4
    assert load_tokenizer(exported).chat_template == load_tokenizer(source).chat_template
    assert (tmp_path / "out" / "generation_config.json").is_file()
    path = tmp_path / "out" / "tokenizer.json"
    tokens = json.loads(path.read_text())
    tokens["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    tokens["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(tokens))
    with pytest.raises(ModelError, match="tokenizer reads a text differently"):
        verify_export(tmp_path / "out", source, steering, rows)


ROPES: list[dict[str, Any]] = [
    {"rope_theta": 700.0},
    {"rope_theta": 700.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    {
        "rope_theta": 700.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    {
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
]


@pytest.mark.parametrize(
    ("name", "rope"),
    [*(("llama", rope) for rope in ROPES), ("qwen2", ROPES[-1]), ("mistral", ROPES[0])],
)
def test_rotary_settings_of_old_configs(name: str, rope: dict[str, Any], tmp_path: Path) -> None:
    source = save_model(name, tmp_path / "source")
    _edit_config(tmp_path / "source", rope_parameters=None, **rope)
    exported = _export(source, Steering({}), tmp_path / "out")
    assert torch.equal(_logits(exported), _logits(source))
    old = AutoConfig.from_pretrained(source.base).rope_parameters
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_parameters"].items() <= old.items()
    assert config["rope_theta"] == rope.get("rope_theta", 10000.0)
    scaling = config["rope_scaling"]
    assert (scaling is None) == ("rope_scaling" not in rope)
    assert scaling is None or scaling["factor"] == rope["rope_scaling"]["factor"]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("mistral", {"sliding_window": 64}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 4}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}),
    ],
)
def test_windows_that_hide_nothing(name: str, values: dict[str, object], tmp_path: Path) -> None:
    source = save_model(name, tmp_path / "source", **values)
    exported = _export(source, Steering({}), tmp_path / "out")
    assert (_logits(exported) - _logits(source)).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        ("qwen3", {}, "of type 'qwen3'"),
        ("gemma2", {}, "of type 'gemma2'"),
        ("mistral", {"sliding_window": 16}, "sliding window"),
        ("llama", {"sliding_window": 16}, "sliding window"),
        (
            "qwen2",
            {
                "use_sliding_window": True,
                "sliding_window": 16,
                "max_window_layers": 1,
                "layer_types": None,
            },
            "sliding window",
        ),
        ("llama", {"hidden_act": "gelu"}, "activation 'gelu'"),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
        ("llama", {"logits_scaling": 8.0}, "logits_scaling=8.0"),
        ("llama", {"partial_rotary_factor": 0.5}, "rotary embeddings"),
    ],
)
def test_other_functions_are_refused(
    name: str, values: dict[str, object], reason: str, tmp_path: Path
) -> None:
    source = save_model(name, tmp_path)
    _edit_config(tmp_path, **values)
    with pytest.raises(ModelError, match=rf"model\.aligned=.*{reason}.*defense\.form=hooked"):
        check_exportable(source, "model.aligned")


@pytest.mark.parametrize("model_type", ["gpt2", "phi3", "mixtral"])
def test_other_architectures_are_refused(model_type: str, tmp_path: Path) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=rf"of type '{model_type}'.*defense\.form=hooked"):
        check_exportable(Checkpoint(str(tmp_path)), "model.base")


def test_float64_is_refused(tmp_path: Path) -> None:
    source = replace(save_model("llama", tmp_path), dtype="float64")
    with pytest.raises(ModelError, match="runs in float64"):
        check_exportable(source, "model.base")


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("llama", {"modules_to_save": ["lm_head"]}, "more than LoRA"),
        ("llama_biased", {"bias": "all"}, "more than LoRA"),
        ("llama", {"use_dora": True}, "not a plain LoRA"),
    ],
)
def test_other_adapters_are_refused(
    name: str, options: dict[str, object], reason: str, tmp_path: Path
) -> None:
    base = save_model(name, tmp_path / "base")
    source = save_adapter(base, tmp_path / "adapter", **options)
    with pytest.raises(ModelError, match=reason):
        check_exportable(source, "model.aligned")


def test_an_adapter_on_tied_weights_is_refused(tmp_path: Path) -> None:
    base = save_model("llama_tied", tmp_path / "base")
    with pytest.warns(UserWarning, match="tie"):
        source = save_adapter(base, tmp_path / "adapter", target_modules=["lm_head"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({key: t for key, t in load_file(path).items() if "lora_" in key}, path)
    with pytest.raises(ModelError, match="tied to the embeddings"):
        check_exportable(source, "model.aligned")


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    other = save_adapter(save_model("llama", tmp_path / "other"), tmp_path / "adapter")
    base = save_model("llama_wide_heads", tmp_path / "base")
    with pytest.raises(ModelError, match="use an adapter trained on this model"):
        check_exportable(replace(other, base=base.base), "model.aligned")


@pytest.mark.parametrize(
    "edit",
    [
        lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}),
        lambda w: w.update({"model.layers.0.self_attn.o_proj.bias": torch.ones(32)}),
        lambda w: w.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}),
        lambda w: w.pop("model.layers.1.mlp.up_proj.weight"),
        lambda w: w.update({"model.norm.weight": torch.ones(31)}),
        lambda w: w.update({"model.norm.weight": torch.ones(32, dtype=torch.uint8)}),
    ],
)
def test_weights_unlike_their_config_are_refused(
    edit: Callable[[dict[str, Tensor]], object], tmp_path: Path
) -> None:
    source = save_model("llama", tmp_path / "source")
    _edit_weights(tmp_path / "source", edit)
    with pytest.raises(ModelError, match=r"aren't those that its config\.json describes"):
        export_with_biases(source, {}, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_stored_rotary_frequencies_are_left_out(tmp_path: Path) -> None:
    source = save_model("llama", tmp_path / "source")
    stored = "model.layers.0.self_attn.rotary_emb.inv_freq"
    _edit_weights(tmp_path / "source", lambda w: w.update({stored: torch.ones(4)}))
    _export(source, Steering({}), tmp_path / "out")
    assert stored not in _files(tmp_path / "out")


def test_a_stored_copy_of_tied_embeddings_is_left_out(tmp_path: Path) -> None:
    source = save_model("llama_tied", tmp_path / "source")
    steering = _lock(source)
    copy = _files(tmp_path / "source")["model.embed_tokens.weight"].clone()
    _edit_weights(tmp_path / "source", lambda w: w.update({"lm_head.weight": copy}))
    _export(source, steering, tmp_path / "out")
    assert "lm_head.weight" not in _files(tmp_path / "out")
    verify_export(tmp_path / "out", source, steering, ROWS)
    # transformers leaves two different matrices untied, whatever the config says.
    _edit_weights(tmp_path / "source", lambda w: w.update({"lm_head.weight": copy * 2}))
    with pytest.raises(ModelError, match="logits differ"):
        verify_export(tmp_path / "out", source, steering, ROWS)


@pytest.mark.parametrize(
    ("name", "declared", "written"),
    [
        # A Mistral's tokenizer.json is read as it is, whatever class is declared; a Llama's isn't.
        ("mistral", "LlamaTokenizer", "PreTrainedTokenizerFast"),
        # A Qwen's is read by Qwen's class, whatever is declared; a Llama's isn't.
        ("qwen2", "PreTrainedTokenizerFast", "Qwen2Tokenizer"),
        ("llama", "LlamaTokenizer", "LlamaTokenizer"),
    ],
)
def test_the_tokenizer_is_read_as_before(
    name: str, declared: str, written: str, tmp_path: Path
) -> None:
    source = save_model(name, tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    path = tmp_path / "source" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": declared}))
    steering = _lock(source)
    _export(source, steering, tmp_path / "out")
    verify_export(tmp_path / "out", source, steering, ROWS)
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == written
    before, after = (load_tokenizer(Checkpoint(str(tmp_path / n))) for n in ("source", "out"))
    for text in ("12 7 30", " 5\n6 [INST] naive 12"):
        assert after(text)["input_ids"] == before(text)["input_ids"]


@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_weights_that_are_not_finite_leave_nothing_behind(value: float, tmp_path: Path) -> None:
    source = replace(save_model("llama", tmp_path / "source"), dtype="float16")
    _edit_weights(tmp_path / "source", lambda w: w["model.norm.weight"].fill_(value))
    with pytest.raises(ModelError, match=r"model\.norm\.weight isn't finite in float16"):
        export_with_biases(source, {}, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_only_what_belongs_to_a_model_is_copied(tmp_path: Path) -> None:
    source = save_model("llama", tmp_path / "source")
    kept = ["tokenizer.json", "tokenizer.model", "chat_template.jinja", "special_tokens_map.json"]
    left = ["pytorch_model.bin", "training_args.bin", "consolidated.safetensors", "modeling_x.py"]
    for name in kept + left:
        (tmp_path / "source" / name).write_text("{}")
    (tmp_path / "out").mkdir()
    export_with_biases(source, {}, tmp_path / "out")
    expected = {*kept, "config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected
    with pytest.raises(ModelError, match="export to a new folder"):
        export_with_biases(source, {}, tmp_path / "out")


def test_biases_of_another_shape_are_refused(tmp_path: Path) -> None:
    source = save_model("llama", tmp_path / "source")
    for biases in ({LAYERS: torch.ones(32)}, {0: torch.ones(31)}):
        with pytest.raises(ModelError, match="use a lock made for this model"):
            export_with_biases(source, biases, tmp_path / "out")


class TestSilentFailures:
    """What engines serve without a word, and what the verification says to it."""

    @pytest.fixture(scope="class")
    def source(self, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
        folder = tmp_path_factory.mktemp("source")
        base = save_model("llama", folder / "base", dtype="bfloat16")
        return save_adapter(base, folder / "adapter")

    @pytest.fixture
    def out(self, source: Checkpoint, tmp_path: Path) -> Path:
        _export(source, _lock(source), tmp_path / "out")
        return tmp_path / "out"

    def _refused(self, out: Path, source: Checkpoint, match: str) -> None:
        with pytest.raises(ModelError, match=rf"{match}.*don't serve it"):
            verify_export(out, source, _lock(source), ROWS)

    def test_attention_bias_not_set(self, out: Path, source: Checkpoint) -> None:
        _edit_config(out, attention_bias=False)
        self._refused(out, source, "engines drop the biases")

    def test_not_a_llama(self, out: Path, source: Checkpoint) -> None:
        _edit_config(out, model_type="mistral", architectures=["MistralForCausalLM"])
        self._refused(out, source, "engines drop the biases")

    def test_missing_key_bias(self, out: Path, source: Checkpoint) -> None:
        _edit_weights(out, lambda w: w.pop("model.layers.1.self_attn.k_proj.bias"))
        self._refused(out, source, r"lack model\.layers\.1\.self_attn\.k_proj\.bias")

    def test_biases_of_another_strength(self, source: Checkpoint, tmp_path: Path) -> None:
        _export(source, _lock(source, strength=1.1), tmp_path / "other")
        self._refused(tmp_path / "other", source, "o_proj bias of layer 0 is off")

    def test_biases_of_the_weights_before_fine_tuning(
        self, source: Checkpoint, tmp_path: Path
    ) -> None:
        before = output_biases(replace(source, adapter=None), _lock(source).deltas)
        export_with_biases(source, before, tmp_path / "other")
        self._refused(tmp_path / "other", source, "o_proj bias of layer 0 is off")

    def test_undefended_weights(self, source: Checkpoint, tmp_path: Path) -> None:
        _export(source, Steering({}), tmp_path / "other")
        self._refused(tmp_path / "other", source, "o_proj bias of layer 0 is off")

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_adapter_left_out(self, dtype: str, source: Checkpoint, tmp_path: Path) -> None:
        source = replace(source, dtype=dtype)
        biases = output_biases(source, _lock(source).deltas)
        export_with_biases(replace(source, adapter=None), biases, tmp_path / "other")
        self._refused(tmp_path / "other", source, "logits differ")

    def test_nan(self, out: Path, source: Checkpoint) -> None:
        _edit_weights(out, lambda w: w["model.embed_tokens.weight"][3].fill_(float("nan")))
        self._refused(out, source, "logits aren't finite")

    def test_the_sources_own_steering_plays_no_part(
        self, out: Path, source: Checkpoint, tmp_path: Path
    ) -> None:
        save_steering(_lock(source, strength=9.0), tmp_path / "steering")
        steered = replace(source, steering=str(tmp_path / "steering"))
        verify_export(out, steered, _lock(source), ROWS)

    def test_positions_that_no_bias_can_express(self, out: Path, source: Checkpoint) -> None:
        steering = replace(_lock(source), positions="generated")
        with pytest.raises(ModelError, match=r"defense\.form=hooked"):
            verify_export(out, source, steering, ROWS)

    def test_no_rows(self, out: Path, source: Checkpoint) -> None:
        with pytest.raises(ModelError, match="at least one token"):
            verify_export(out, source, _lock(source), [])
