"""Devices, precision, console output, signals, strict determinism, attention kernels and compilation."""

import io
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from harness import ALONE, tiny_model
from torch import Tensor, nn

from neogpt import model, runtime, training


def test_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes = dict(bf16=torch.bfloat16, fp32=torch.float32)
    for amx, avx512, auto in ((True, False, "bf16"), (False, True, "bf16"), (False, False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx512=avx512: avx512)
        for precision, expected in (("auto", auto), ("bf16", "bf16"), ("fp32", "fp32")):
            rt = runtime.setup("cpu", precision)
            assert rt == runtime.Runtime(0, 1, torch.device("cpu"), expected)
            with rt.autocast():
                assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtypes[expected]
    assert runtime.peak_flops(ALONE.device) is None


@pytest.mark.parametrize("device", ["tpu", "cpu:x", "cpu:", "", f"cuda:{torch.cuda.device_count()}"])
def test_unavailable_devices(device: str) -> None:
    with pytest.raises(ValueError, match=f"--device={device}"):
        runtime.setup(device, deterministic=True)


def test_print0(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime.setup("cpu")
    runtime.print0("a\x1b[31m\x00b\tc é\x85\r5 train 1\nnext %s line")  # control characters, as a byte model samples
    assert capsys.readouterr() == ("a\ufffd[31m\ufffdb\ufffdc é\ufffd\ufffd5 train 1\nnext %s line\n", "")
    runtime.setup("cpu", console=sys.stderr)
    runtime.print0("text")
    assert capsys.readouterr() == ("", "text\n")
    with monkeypatch.context() as windows:  # characters that a console cannot show
        windows.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
        runtime.setup("cpu")
        runtime.print0("a\ufffdé")
        assert sys.stdout.buffer.getvalue().decode("cp1252").split() == ["a?é"]
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **settings: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert runtime.setup("cpu")[:2] == (1, 2)
    runtime.print0("text")
    assert capsys.readouterr() == ("", "")


def test_several_processes_need_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="torchrun"):
            patch.setenv(name, "2")
            runtime.setup("cpu")


def test_the_first_signal_asks_to_stop_and_a_second_ctrl_c_kills() -> None:
    signals = [getattr(signal, name) for name in runtime.STOP_SIGNALS]
    before = {signum: signal.getsignal(signum) for signum in signals}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        runtime.stop_on_signals()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        for signum in before:
            requested = runtime.stop_on_signals()
            assert not requested()
            os.kill(os.getpid(), signum)
            assert requested()
            assert (signal.getsignal(signum) == signal.SIG_DFL) is (signum == signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)  # at once: torchrun and Slurm both send it
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@pytest.mark.parametrize("attention", ["flash", "manual"])
def test_attention_kernel_is_named(attention: str) -> None:
    config = model.GPTConfig(n_layer=1, n_head=2, n_embd=16, attention=attention)
    assert runtime.attention_kernel(config, 2, 16, ALONE) == f"{attention} attention"
    assert runtime.attention_kernel(config, 2, 16, ALONE._replace(precision="bf16")) == "manual attention"


@pytest.mark.parametrize("enabled", [True, False])
def test_determinism_is_strict_in_training_steps(enabled: bool) -> None:
    def loss_fn(net: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict]:
        assert torch.get_deterministic_debug_mode() == 2 * enabled  # 2: raise an error
        with runtime.single_shape_attention():
            assert torch.backends.cuda.cudnn_sdp_enabled() != enabled
        return net(batch["x"]).sum(), {}

    try:
        runtime.set_determinism(enabled)
        for _ in range(2):
            assert torch.get_deterministic_debug_mode() == enabled  # 1: warn
            training.backward(nn.Linear(2, 2), dict(x=torch.ones(1, 2)), loss_fn, 1.0, ALONE)
            assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch._inductor.config.deterministic == enabled  # PyTorch sets it; or timing would choose some kernels
    finally:
        runtime.set_determinism(False)


def test_compiler_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    for kind, variable, compiler in (("cuda", "CC", "gcc"), ("cpu", "CXX", "g++")):
        monkeypatch.delenv(variable, raising=False)
        with pytest.raises(ValueError) as error:
            runtime.require_compiler(torch.device(kind))
        assert compiler in str(error.value) and "--compile=False" in str(error.value)
        monkeypatch.setenv(variable, "cc")
        runtime.require_compiler(torch.device(kind))


def test_wrap(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:  # needs no compiler
        values = [node.meta["example_value"] for node in graph.graph.output_node().args[0]]
        outputs.append([getattr(value, "shape", None) for value in values])
        return graph.forward

    raw, idx = tiny_model(n_layer=1), torch.arange(8)[None]
    assert training.wrap(raw, ALONE, False, False, compile=False) is raw
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setattr(runtime, "require_compiler", lambda device: None)
    compiled = training.wrap(raw, ALONE, False, False, compile=True)
    assert compiled is not raw and torch.equal(compiled(idx), raw(idx))
    outputs.clear()
    compiled(idx, idx, reduction="sum").backward()
    assert outputs == [[torch.Size([])]]  # of the training graph, only the loss
    raw.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    with pytest.raises(torch._dynamo.exc.Unsupported):
        training.wrap(raw, ALONE, False, False, compile=True)(idx)
    training.wrap(raw, ALONE, False, False, compile=True, dynamic=True)(idx)
