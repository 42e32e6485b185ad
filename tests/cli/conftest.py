"""A tiny Llama folder, a prompts file, and `spinal` on them: within this process, or as a process of its own."""

from __future__ import annotations

import json
import logging
import os
import string
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from spinal_jax.cli import main as cli

WIDTH, DEPTH, HEADS, KV_HEADS, HIDDEN = 32, 3, 4, 2, 48


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    def refusal(self, *words: str) -> str:
        """The one line with which it was refused; asserts that there is no other and that it holds these words."""
        assert self.code == 2, self
        lines = [line for line in self.err.splitlines() if ", mesh " not in line]  # beside the start-up line
        assert len(lines) == 1, self.err
        assert lines[0].startswith("spinal: ")
        assert self.err.endswith(f"{lines[0]}\n")
        assert "Traceback" not in self.out + self.err
        for word in words:
            assert word in lines[0], lines[0]
        return lines[0]


Spinal = Callable[..., Outcome]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="session")
def write_model() -> Callable[[Path], Path]:
    return _write_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, with code beside it that would leave a file `ran` there. Nobody may change it."""
    folder = _write_model(tmp_path_factory.mktemp("models") / "tiny")
    (folder / "modeling_evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    for name, cls in (("config.json", "AutoModelForCausalLM"), ("tokenizer_config.json", "AutoTokenizer")):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {"auto_map": {cls: "modeling_evil.Evil"}}))
    return folder


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty lines of letters, digits and blanks. Nobody may change it."""
    rng = np.random.default_rng(1)
    path = tmp_path_factory.mktemp("prompts") / "words.txt"
    alphabet = [*string.ascii_letters, *string.digits, *" " * 8]
    path.write_text("".join("x" + "".join(rng.choice(alphabet, rng.integers(15, 60))) + "\n" for _ in range(40)))
    return path


@pytest.fixture
def spinal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Spinal:
    """Runs `spinal ARGUMENTS` within this process, in `tmp_path`."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["spinal", *map(str, arguments)])
        code: Any = 0
        before = {name: logging.getLogger(name).handlers[:] for name in (None, "hydra")}
        try:
            cli.main()
        except SystemExit as exit:
            code = exit.code
        finally:
            for name, handlers in before.items():  # Hydra's --info leaves handlers that write to this run's streams
                logging.getLogger(name).handlers[:] = handlers
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def start() -> Start:
    """Starts `spinal ARGUMENTS` as a process of its own; `before` is Python to be run first in it."""

    def popen(*arguments: object, before: str = "", **options: object) -> subprocess.Popen[str]:
        code = f"{before}\nfrom spinal_jax.cli.main import main\nmain()"
        piped = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        own = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
        environment = {**own, "JAX_PLATFORMS": "cpu", **options.pop("env", {})}  # type: ignore[dict-item]
        return subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            env=environment,
            **{**piped, **options},  # type: ignore[call-overload]
        )

    return popen


def _write_model(folder: Path) -> Path:
    """A random Llama of the tiny sizes above with a tokenizer of single bytes."""
    folder.mkdir(parents=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["<s>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {
        "model_type": "llama",
        "vocab_size": 257,
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return (0.2 * rng.normal(size=shape)).astype(np.float32)

    heads, kv_heads = WIDTH, WIDTH * KV_HEADS // HEADS
    tensors = {
        "model.embed_tokens.weight": random(257, WIDTH),
        "model.norm.weight": 1 + random(WIDTH),
        "lm_head.weight": random(257, WIDTH),
    }
    for layer in range(DEPTH):
        shapes = {
            "input_layernorm": (WIDTH,),
            "post_attention_layernorm": (WIDTH,),
            "self_attn.q_proj": (heads, WIDTH),
            "self_attn.k_proj": (kv_heads, WIDTH),
            "self_attn.v_proj": (kv_heads, WIDTH),
            "self_attn.o_proj": (WIDTH, heads),
            "mlp.gate_proj": (HIDDEN, WIDTH),
            "mlp.up_proj": (HIDDEN, WIDTH),
            "mlp.down_proj": (WIDTH, HIDDEN),
        }
        tensors |= {f"model.layers.{layer}.{name}.weight": random(*shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def sweep_settings(folder: Path) -> dict[str, bool | float | str]:
    """The settings by which TensorBoard tells the runs of a sweep apart, as it reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData  # type: ignore[attr-defined]

    metadata = EventAccumulator(str(folder)).Reload().SummaryMetadata("_hparams_/session_start_info")
    data = HParamsPluginData()
    data.ParseFromString(metadata.plugin_data.content)
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in data.session_start_info.hparams.items()}
