"""NLSR's scores against their literal definitions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid

from defenses.nlsr import NLSR, scores
from defenses.nlsr.identify import _scored
from modeling.capture import TokenRow, adapter_linears
from modeling.checkpoint import Checkpoint
from modeling.loading import load_model
from modeling.lora import LoraAdapter, open_adapter

ROWS: list[TokenRow] = [
    ([1, 2, 3], [4, 5, 39]),
    ([6, 7], [8, 9, 10, 11, 39]),
    ([12, 13, 14, 15], [16, 39]),
    ([17, 18], [19, 20, 21, 39]),
    ([5, 22, 9], [23, 24, 39]),
    ([31, 30], [29, 28, 27, 26, 39]),
]


@pytest.fixture
def adapter(aligned: Checkpoint) -> LoraAdapter:
    return open_adapter(str(aligned.adapter), "aligned")


def _plan(**changes: object) -> NLSR:
    values = {"method": "low_rank", "sparsity": 0.5, "topk": "row", "batch_size": 2}
    return NLSR(**{**values, **changes})


def _score(
    aligned: Checkpoint, adapter: LoraAdapter, plan: NLSR, rows: list[TokenRow] = ROWS
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(plan.mask_seed)
    found = {}
    with torch.no_grad():
        model = load_model(aligned, device="cpu")
        linears = adapter_linears(model, adapter.names)
        for names, score in _scored(model, linears, adapter, rows, plan, generator):
            found.update({name: (score(name, "A"), score(name, "B")) for name in names})
    return found


def _literal(x: torch.Tensor, w: torch.Tensor, rank: int) -> torch.Tensor:
    """|V V^T W|, V from the full singular value decomposition of X W^T."""
    v = torch.linalg.svd(x @ w.T, full_matrices=False).Vh[:rank].T
    return (v @ (v.T @ w)).abs()


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 6),
    st.integers(2, 12),
    st.integers(2, 12),
    st.integers(1, 30),
    st.integers(0, 2**31),
    st.data(),
)
def test_projection_is_the_literal_singular_value_decomposition(
    rank: int, d_in: int, d_out: int, tokens: int, seed: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b, x = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((rank, d_in), (d_out, rank), (tokens, d_in))
    )
    z = x @ a.T
    # More singular vectors than X W^T has nonzero singular values aren't defined.
    defined = min(rank, d_in, d_out, tokens)
    rank_a, rank_b = (data.draw(st.integers(1, defined)) for _ in range(2))
    gram = (z.T @ z)[None]
    got_a, got_b = scores.project(a[None], b[None], gram, rank_a, rank_b)
    torch.testing.assert_close(got_a[0].abs(), _literal(x, a, rank_a), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got_b[0].abs(), _literal(z, b, rank_b), rtol=1e-4, atol=1e-5)


def test_projection_agrees_with_svd_lowrank_of_the_official_code() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, x = (torch.randn(*s, generator=generator) for s in ((8, 40), (30, 8), (200, 40)))
    a *= 0.6 ** torch.arange(8)[:, None]  # On a flat spectrum, 20 iterations don't converge.
    z = x @ a.T
    got = scores.project(a[None], b[None], (z.T @ z).double()[None], 3, 5)
    for projected, inputs, w, rank in ((got[0], x, a, 3), (got[1], z, b, 5)):
        torch.manual_seed(42)
        v = torch.svd_lowrank(inputs @ w.T, q=rank, niter=20)[2]
        torch.testing.assert_close(projected[0].float(), v @ (v.T @ w), rtol=1e-3, atol=1e-3)


def test_projection_of_a_stack_is_that_of_each_member() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, z = (torch.randn(*s, generator=generator) for s in ((5, 3, 7), (5, 6, 3), (5, 9, 3)))
    gram = (z.mT @ z).double()
    together = scores.project(a, b, gram, 1, 2)
    for j in range(5):
        alone = scores.project(a[j : j + 1], b[j : j + 1], gram[j : j + 1], 1, 2)
        for stacked, single in zip(together, alone, strict=True):
            torch.testing.assert_close(stacked[j], single[0])


def test_directions_that_no_token_has_score_nothing() -> None:
    a = torch.eye(3)[None]
    gram = torch.diag(torch.tensor([4.0, 0.0, 0.0], dtype=torch.float64))[None]
    projected, _ = scores.project(a, torch.eye(3)[None], gram, 3, 3)
    assert torch.equal(projected[0].abs(), torch.diag(torch.tensor([1.0, 0, 0])).double())


def test_ranks_are_those_of_paper_and_official_code() -> None:
    assert scores.projection_rank("kept", 0.8, 128, (128, 4096)) == 26
    assert scores.projection_rank("dropped", 0.8, 128, (4096, 128)) == 102
    assert scores.projection_rank("kept", 1.0, 16, (16, 64)) == 1
    assert scores.projection_rank("kept", 0.1, 16, (8, 16)) == 8


@pytest.fixture
def inputs(aligned: Checkpoint, adapter: LoraAdapter) -> dict[str, torch.Tensor]:
    """X of every lora_A and lora_B at answer tokens, row by row, without padding."""
    model = load_model(aligned, device="cpu").eval()
    return _inputs(model, adapter.names)


def _inputs(model: torch.nn.Module, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    seen: dict[str, list[torch.Tensor]] = {}
    start, handles = [0], []
    for key, linear in adapter_linears(model, names).items():
        handles.append(
            linear.register_forward_pre_hook(
                lambda _, args, key=key: seen.setdefault(key, []).append(args[0][0, start[0] :])
            )
        )
    for prompt, answer in ROWS:
        start[0] = len(prompt)
        with torch.no_grad():
            model(input_ids=torch.tensor([prompt + answer]))
    for handle in handles:
        handle.remove()
    return {key: torch.cat(rows).double() for key, rows in seen.items()}


@pytest.mark.parametrize("rule", ["kept", "dropped"])
def test_unsequential_low_rank_scores_of_a_model(
    aligned: Checkpoint, adapter: LoraAdapter, inputs: dict[str, torch.Tensor], rule: str
) -> None:
    plan = _plan(sparsity=0.75, rank_rule=rule, sequential=False)
    got = _score(aligned, adapter, plan)
    rank = {"kept": 1, "dropped": 3}[rule]
    for name, pair in adapter.pairs():
        expected = (
            _literal(inputs[f"{name}.A"], pair.a.double(), rank),
            _literal(inputs[f"{name}.B"], pair.b.double(), rank),
        )
        for score, literal in zip(got[name], expected, strict=True):
            torch.testing.assert_close(score, literal, rtol=1e-3, atol=1e-5)


def test_later_blocks_see_the_projections_of_earlier_ones(
    aligned: Checkpoint, adapter: LoraAdapter
) -> None:
    plan = _plan(sparsity=0.75, sequential=True)
    got = _score(aligned, adapter, plan)
    plain = _score(aligned, adapter, _plan(sparsity=0.75, sequential=False))
    model = load_model(aligned, device="cpu").eval()
    for block in range(3):
        x = _inputs(model, adapter.names)
        linears = adapter_linears(model, adapter.names)
        for name in adapter.names:
            if not name.startswith(f"model.layers.{block}."):
                continue
            for score, side in zip(got[name], "AB", strict=True):
                linear = linears[f"{name}.{side}"]
                w = linear.weight.detach().double()
                v = torch.linalg.svd(x[f"{name}.{side}"] @ w.T).Vh[:1].T
                torch.testing.assert_close(score, (v @ v.T @ w).abs(), rtol=1e-3, atol=1e-5)
                linear.weight.data = (v @ v.T @ w).float()
    first, last = adapter.names[0], adapter.names[-1]
    torch.testing.assert_close(got[first][0], plain[first][0], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(got[last][0], plain[last][0], rtol=1e-2)


def test_wanda_equals_the_naive_loop(
    aligned: Checkpoint, adapter: LoraAdapter, inputs: dict[str, torch.Tensor]
) -> None:
    got = _score(aligned, adapter, _plan(method="wanda"))
    for name, pair in adapter.pairs():
        for score, side, w in zip(got[name], "AB", (pair.a, pair.b), strict=True):
            norm = (inputs[f"{name}.{side}"].square().sum(0) / len(ROWS)).sqrt()
            torch.testing.assert_close(score, w.double().abs() * norm, rtol=1e-4, atol=1e-6)


def _answer_log_likelihood(model: torch.nn.Module, row: TokenRow) -> torch.Tensor:
    prompt, answer = row
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    at = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return torch.stack([logits[t, token] for t, token in zip(at, answer, strict=True)])


def _naive_sums(
    model: torch.nn.Module, names: tuple[str, ...], losses: list, accumulate: bool
) -> dict[str, torch.Tensor]:
    weights = {key: linear.weight for key, linear in adapter_linears(model, names).items()}
    for weight in weights.values():
        weight.requires_grad_(True)
        weight.grad = None
    sums = {key: torch.zeros_like(weight) for key, weight in weights.items()}
    for loss in losses:
        loss().backward()
        for key, weight in weights.items():
            sums[key] += weight.grad.abs()
            if not accumulate:
                weight.grad = None
    return {key: total * weights[key].detach().abs() for key, total in sums.items()}


@pytest.mark.parametrize("accumulate", [False, True])
def test_snip_equals_the_naive_loop(
    aligned: Checkpoint, adapter: LoraAdapter, accumulate: bool
) -> None:
    got = _score(aligned, adapter, _plan(method="snip", accumulate_gradients=accumulate))
    model = load_model(aligned, device="cpu").eval()
    losses = [lambda row=row: -_answer_log_likelihood(model, row).mean() for row in ROWS]
    naive = _naive_sums(model, adapter.names, losses, accumulate)
    for name, pair in got.items():
        for score, side in zip(pair, "AB", strict=True):
            torch.testing.assert_close(score, naive[f"{name}.{side}"], rtol=1e-3, atol=1e-6)


def test_snips_quirk_changes_the_score(aligned: Checkpoint, adapter: LoraAdapter) -> None:
    plain, quirk = (
        _score(aligned, adapter, _plan(method="snip", accumulate_gradients=value))
        for value in (False, True)
    )
    name = adapter.names[-1]
    ratio = quirk[name][0] / plain[name][0]
    assert ratio.std() > 0.05


@pytest.mark.parametrize("accumulate", [False, True])
def test_preference_snip_equals_the_naive_loop(
    aligned: Checkpoint, adapter: LoraAdapter, accumulate: bool
) -> None:
    rows = [
        row for chosen in ROWS for row in (chosen, (chosen[0], [7, *reversed(chosen[1][:-1]), 39]))
    ]
    plan = _plan(method="preference_snip", dpo_beta=0.3, accumulate_gradients=accumulate)
    got = _score(aligned, adapter, plan, rows)
    model = load_model(aligned, device="cpu").eval()

    def log_ratio(row: TokenRow) -> torch.Tensor:
        with torch.no_grad(), model.disable_adapter():
            reference = _answer_log_likelihood(model, row).sum()
        return _answer_log_likelihood(model, row).sum() - reference

    losses = [
        lambda at=at: -logsigmoid(0.3 * (log_ratio(rows[at]) - log_ratio(rows[at + 1])))
        for at in range(0, len(rows), 2)
    ]
    naive = _naive_sums(model, adapter.names, losses, accumulate)
    for name, pair in got.items():
        for score, side in zip(pair, "AB", strict=True):
            torch.testing.assert_close(score, naive[f"{name}.{side}"], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", ["low_rank", "wanda", "snip", "preference_snip"])
def test_the_batch_size_changes_no_score(
    aligned: Checkpoint, adapter: LoraAdapter, method: str
) -> None:
    one, three = (
        _score(aligned, adapter, _plan(method=method, batch_size=size)) for size in (1, 3)
    )
    for name in adapter.names:
        for single, batched in zip(one[name], three[name], strict=True):
            torch.testing.assert_close(single, batched, rtol=1e-3, atol=1e-5)


def test_modules_outside_of_blocks_ask_for_another_setting(
    base: Checkpoint, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        load_model(base, device="cpu"), LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    )
    model.save_pretrained(tmp_path)
    odd = Checkpoint(base.base, str(tmp_path))
    from settings import SettingError

    with pytest.raises(SettingError, match=r"defense\.sequential=false"):
        _score(odd, open_adapter(tmp_path, "adapter"), _plan())
    found = _score(odd, open_adapter(tmp_path, "adapter"), _plan(sequential=False))
    assert "lm_head" in found
