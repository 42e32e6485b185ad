"""`spinal verify`: it passes what is right, and fails what is wrong by little, at the layer where it is wrong."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from spinal_jax import verify as verify_module
from spinal_jax.config import ModelConfig, PromptsConfig, VerifyConfig
from spinal_jax.errors import UserError
from spinal_jax.models.decoder import Decoder
from spinal_jax.models.formats.byte_level import byte_tokenizer
from spinal_jax.models.formats.convert import convert
from spinal_jax.models.formats.open import open_checkpoint
from spinal_jax.verify import ForwardDifference, Stream, Verification, forward_difference, judge, verify

from . import test_gguf_families, test_gguf_models
from .cases import draw_config
from .reference import random_model
from .test_delta_net import composite
from .test_gguf_tokens import byte_level, byte_level_keys  # noqa: F401 (a fixture)
from .test_sparse import SWITCHES, tiny

WORDS = [f"w{number}" for number in range(50)]
PYTORCH = "Hugging Face's model"


def write_model(folder: Path, hf_config: PretrainedConfig) -> Path:
    """A random model with a tokenizer of a word each for fifty tokens."""
    random_model(hf_config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    random = np.random.default_rng(0)
    lines = [" ".join(random.choice(WORDS, length)) for length in (30, 9, 21)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("verify") / "model", draw_config("llama", 0))


def settings(source: Path, prompts: Path, **more: Any) -> VerifyConfig:
    texts = PromptsConfig(path=str(prompts), format="text", max_length=64)
    return VerifyConfig(ModelConfig(str(source)), texts, **more)


def check(result: Verification, what: str) -> bool | None:
    (found,) = [check for check in result.checks if check.what == what]
    return found.passed


def test_the_right_model_passes(folder: Path, prompts: Path) -> None:
    result = verify(settings(folder, prompts))
    assert result.passed
    assert [check.passed for check in result.checks] == [None, True, True, True, True]
    assert result.difference is not None
    depth = open_checkpoint(str(folder)).config["num_hidden_layers"]
    assert result.difference.residual.shape == (depth + 1,)
    assert result.difference.residual.max() < 1e-5
    assert result.difference.kl.shape == (30 + 9 + 21,)
    lines = str(result).splitlines()
    assert lines[-1] == "PASS; not checked: hash"
    assert sum(line.strip().split(" ")[0] in map(str, range(depth + 1)) for line in lines) == depth + 1


@pytest.mark.parametrize("family", ["mistral3", "deepseek_v2", "longrope", "qwen3_5_moe"])
def test_models_that_need_care_pass(tmp_path: Path, prompts: Path, family: str) -> None:
    """Text parts, experts, a recurrent state; frequencies by the length of the prompt, two of which are too long."""
    if family == "longrope":
        scaling = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 15}
        factors = {"short_factor": [1.0] * 8, "long_factor": [2.0 + i for i in range(8)]}
        config = draw_config("llama", 0)
        config.head_dim, config.max_position_embeddings = 16, 60
        config.rope_parameters = scaling | factors | {"factor": 4.0}
    elif family == "mistral3":
        config = draw_config("mistral3", 0)
    elif family == "qwen3_5_moe":
        config = composite(family, 300)
    else:
        (kind,) = [kind for kind in SWITCHES if kind.model_type == family]
        config = tiny(kind, 0)
    write_model(tmp_path / "model", config)
    if family == "qwen3_5_moe":  # whose class of tokenizers has bytes
        byte_tokenizer().save_pretrained(tmp_path / "model")
    result = verify(settings(tmp_path / "model", prompts))
    assert result.passed, str(result)
    assert result.difference is not None
    assert result.difference.residual.max() < 1e-5


def test_a_converted_folder_and_a_gguf_file_pass(
    tmp_path: Path,
    folder: Path,
    prompts: Path,
    byte_level: Any,  # noqa: F811
) -> None:
    result = verify(settings(convert(open_checkpoint(str(folder)), str(tmp_path / "ours")), prompts))
    assert [check.passed for check in result.checks] == [True] * 5
    keys = {key: value for key, value in byte_level_keys(byte_level).items() if key.startswith("tokenizer.")}
    case = test_gguf_models.llama({"vocab_size": len(keys["tokenizer.ggml.tokens"])}, keys)
    single = test_gguf_models.export(case, test_gguf_models.random_model(case), tmp_path / "model.gguf")
    result = verify(settings(single, prompts))
    assert [check.passed for check in result.checks] == [None, True, True, True, True], str(result)


def test_a_gguf_file_that_transformers_cannot_read_is_compared_with_its_export(
    tmp_path: Path,
    prompts: Path,
    byte_level: Any,  # noqa: F811
) -> None:
    keys = {key: value for key, value in byte_level_keys(byte_level).items() if key.startswith("tokenizer.")}
    vocabulary = {"vocab_size": len(keys["tokenizer.ggml.tokens"])}
    test_gguf_families.exported(
        dataclasses.replace(test_gguf_families.CASES["olmo2"], config=vocabulary, keys=keys), tmp_path / "model.gguf"
    )
    result = verify(settings(tmp_path / "model.gguf", prompts))
    assert result.passed
    assert check(result, "Hugging Face's reading of the file") is None
    assert check(result, "residual stream and logits") is True
    assert "compared with its export instead" in str(result)


def test_a_wrong_weight_fails_from_its_layer_on(folder: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One entry in a thousand of one matrix is off by a tenth."""

    def wrong(*arguments: Any) -> Decoder:
        model = load_decoder(*arguments)
        up = model.stacks[0].mlp.up.weight
        row = up[...][1]
        spoiled = row.at[0, :5].add(0.1)
        up[...] = up[...].at[1].set(spoiled)
        return model

    load_decoder = verify_module.load_decoder
    monkeypatch.setattr(verify_module, "load_decoder", wrong)
    result = verify(settings(folder, prompts))
    assert not result.passed
    assert check(result, "residual stream and logits") is False
    assert result.difference is not None
    assert (result.difference.residual[:2] < 1e-5).all()
    assert (result.difference.residual[2:] > 1e-4).all()
    assert str(result).splitlines()[-1].startswith("FAIL: residual stream and logits")


def test_a_lens_that_is_not_the_output_fails(folder: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stats = verify_module.lens_stats
    monkeypatch.setattr(
        verify_module,
        "lens_stats",
        lambda *a: (found := stats(*a))._replace(log_normaliser=found.log_normaliser + 0.1),
    )
    verify_module._forward.clear_cache()
    try:
        result = verify(settings(folder, prompts))
    finally:
        verify_module._forward.clear_cache()
    assert check(result, "the lens at the last boundary is the output") is False


def test_changed_bytes_fail(tmp_path: Path, folder: Path, prompts: Path) -> None:
    ours = convert(open_checkpoint(str(folder)), str(tmp_path / "ours"))
    chunk = next((ours / "state" / "final_norm.weight").glob("[0-9]*"))
    values = np.fromfile(chunk, np.float32)
    np.concatenate([values[:-1], values[-1:] + 1]).tofile(chunk)
    result = verify(settings(ours, prompts))
    assert check(result, "hash") is False
    assert check(result, "names and shapes") is False  # and so it is not loaded
    assert "final_norm.weight/0 is not what spinal convert wrote" in str(result)
    assert not result.passed


def test_files_of_the_hub_are_held_against_their_names(tmp_path: Path, folder: Path, prompts: Path) -> None:
    """The hub's cache names a large file by its hash, and the snapshot links to it."""
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    shutil.copytree(folder, snapshot)
    blobs.mkdir()
    weights = snapshot / "model.safetensors"
    blob = blobs / open_checkpoint(str(folder)).sha256()
    shutil.move(weights, blob)
    weights.symlink_to(os.path.relpath(blob, snapshot))
    assert check(verify(settings(snapshot, prompts)), "hash") is True
    raw = bytearray(blob.read_bytes())
    raw[-1] ^= 1
    blob.write_bytes(raw)
    assert check(verify(settings(snapshot, prompts)), "hash") is False


def test_tensors_that_do_not_fit_fail(tmp_path: Path, folder: Path, prompts: Path) -> None:
    copied = tmp_path / "model"
    shutil.copytree(folder, copied)
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"intermediate_size": config["intermediate_size"] + 8}))
    result = verify(settings(copied, prompts))
    assert check(result, "names and shapes") is False
    assert "mlp" in str(result)
    assert result.difference is None


def test_without_torch_it_says_what_it_could_not_check(
    folder: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_module, "find_spec", lambda name: None)
    monkeypatch.setattr(verify_module, "torch_streams", None)  # nothing may call it
    result = verify(settings(folder, prompts))
    assert result.passed
    assert check(result, PYTORCH) is None
    assert result.difference is None
    assert "torch is not installed" in str(result)
    assert str(result).splitlines()[-1] == f"PASS; not checked: hash, {PYTORCH}"


def test_what_transformers_cannot_open_is_said(folder: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    def refuse(*arguments: Any, **options: Any) -> None:
        raise ValueError("GGUF model with architecture\nphi2 is not supported yet.")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    result = verify(settings(folder, prompts))
    assert check(result, PYTORCH) is None
    assert "cannot open it: GGUF model with architecture phi2 is not supported yet." in str(result)


def streams(seed: int = 0) -> list[Stream]:
    random = np.random.default_rng(seed)
    return [
        Stream(random.normal(size=(3, n, 4)).astype(np.float32), random.normal(size=(n, 6)).astype(np.float32))
        for n in (5, 2)
    ]


def test_differences_are_relative_to_the_largest_value_and_kl_is_in_nats() -> None:
    theirs = streams()
    same = forward_difference(theirs, theirs)
    assert (same.residual.tolist(), same.logits, same.kl.tolist()) == ([0] * 3, 0, [0] * 7)
    ours = copy.deepcopy(theirs)
    ours[1].residual[2, 1, 3] += 0.5
    largest = max(float(np.abs(stream.residual[2]).max()) for stream in theirs)
    np.testing.assert_allclose(forward_difference(ours, theirs).residual, [0, 0, 0.5 / largest], rtol=1e-6)
    # A coin of 1/2 : 1/2 seen as one of 1/4 : 3/4.
    one = [Stream(np.ones((1, 1, 1), np.float32), np.log(np.array([[p, 1 - p]], np.float32))) for p in (0.25, 0.5)]
    found = forward_difference(one[:1], one[1:])
    np.testing.assert_allclose(found.kl, [0.5 * np.log(2) + 0.5 * np.log(2 / 3)], rtol=1e-6)


def test_what_is_not_a_number_fails() -> None:
    theirs, ours = streams(), streams()
    ours[0].residual[1, 0, 0] = np.nan
    ours[1].logits[0, 0] = np.nan
    difference = forward_difference(ours, theirs)
    assert difference.residual.tolist() == [0, np.inf, 0]
    assert difference.kl.max() == np.inf
    assert [check.passed for check in judge(difference, 1e-4, 1e-5)] == [False, False]


def test_judgement_is_at_the_tolerance() -> None:
    difference = ForwardDifference(np.array([0.0, 2e-4]), 1e-6, np.array([0.0, 3e-6]))
    assert [check.passed for check in judge(difference, 1e-4, 1e-5)] == [False, True]
    assert [check.passed for check in judge(difference, 2e-4, 1e-6)] == [True, False]


def test_only_float32_can_be_verified() -> None:
    with pytest.raises(UserError, match="float32 here"):
        VerifyConfig(ModelConfig("x", dtype="bfloat16"))


def test_the_command(tmp_path: Path, folder: Path, prompts: Path) -> None:
    """Exit code 0 for a right model and 1 for a wrong one, in one other process."""
    ours = convert(open_checkpoint(str(folder)), str(tmp_path / "ours"))
    chunk = next((ours / "state" / "final_norm.weight").glob("[0-9]*"))
    script = f"""
import sys
from pathlib import Path
from spinal_jax.cli import main as cli
for broken in (False, True):
    if broken:
        chunk = Path({str(chunk)!r})
        chunk.write_bytes(chunk.read_bytes()[::-1])
    sys.argv = ["spinal", "verify", "model.source={ours}", "prompts.path={prompts}", "prompts.format=text"]
    cli.main()
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    verdicts = [line for line in done.stdout.splitlines() if line.startswith(("PASS", "FAIL"))]
    assert len(verdicts) == 2
    assert verdicts[0] == "PASS"
    assert verdicts[1].startswith("FAIL: hash")  # a damaged folder is also refused where it is loaded
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]
