"""Kernels prove themselves in a process of their own; faulty ones are refused, whatever they do."""

import itertools
import json
import logging
import re
import stat
import sys
import threading
from pathlib import Path

import pytest
import torch

from swin_moe import ops
from swin_moe.common.cache_folder import cache_folder
from swin_moe.ops import Choice, Signature, choice, trial
from swin_moe.ops.trial import kept
from swin_moe.ops.trial.child import try_kernel
from swin_moe.ops.window_reference import Windows, backward_reference, forward_reference
from tests.ops.devices import needs_library

pytestmark = needs_library("window_attention")
ATTENTION = Signature("window_attention", "cpu", "float32")
DISPATCH = Signature("moe_dispatch", "cpu", "float32")
COMBINE = Signature("moe_combine", "cpu", "float32")

# --------------------------------------------------------------------------------------------
# Stand-ins for faulty kernels


def forward(qkv, bias, scale, seed, *numbers):
    return forward_reference(qkv, bias, scale.view(-1, 1, 1), seed, _windows(numbers))


def backward(grad_out, qkv, bias, scale, seed, out, lse, *numbers):
    scale, windows = scale.view(-1, 1, 1), _windows(numbers)
    grads = backward_reference(grad_out, qkv, bias, scale, seed, out, lse, windows)
    return *grads[:2], grads[2].flatten()


def _windows(numbers):
    wh, ww, sh, sw, cosine, dropout = numbers
    return Windows((wh, ww), (sh, sw), cosine, dropout)


def wrong_value(*arguments):
    out, lse = forward(*arguments)
    out[-1, 0, 0, 3] += 0.01
    return out, lse


def unwritten(*arguments):
    out, lse = forward(*arguments)
    result = torch.empty_like(out)  # filled with NaN during the trial
    result[..., 1:] = out[..., 1:]
    return result, lse


RUNS = itertools.count()


def different_each_time(*arguments):
    out, lse = forward(*arguments)
    return out + 1e-7 * (next(RUNS) % 2), lse


def image_in_a_batch(qkv, *arguments):
    """Give the last of many images a rounding error that no comparison with fp64 shows."""
    out, lse = forward(qkv, *arguments)
    if len(out) > 2:
        out[-1] *= 1 + 1e-6
    return out, lse


def misaligned(qkv, *arguments):
    out, lse = forward(qkv, *arguments)
    return (out if qkv.data_ptr() % 16 == 0 else out.roll(1, -1)), lse


def padding_takes_part(qkv, bias, scale, seed, *numbers):
    window, shift, size = numbers[:2], numbers[2:4], qkv.shape[1:3]
    if any(s % w for s, w in zip(size, window, strict=True)) and any(shift):
        numbers = (*window, 0, 0, *numbers[4:])
    return forward(qkv, bias, scale, seed, *numbers)


def other_dropout(qkv, bias, scale, seed, *numbers):
    return forward(qkv, bias, scale, None if seed is None else seed + 1, *numbers)


def wrong_gradient(*arguments):
    grad_qkv, grad_bias, grad_scale = backward(*arguments)
    return grad_qkv, grad_bias * 1.001, grad_scale


def raises(*arguments):
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore lines")


@pytest.fixture
def stand_in():
    """Replace a CPU kernel by a function of Python until the test ends."""
    library = torch.library.Library("swin_moe", "IMPL")
    yield lambda op, function: library.impl(op, function, "CPU", allow_override=True)
    library._destroy()


@pytest.mark.parametrize(
    ("op", "function", "says"),
    [
        ("window_attention", wrong_value, "the kernel differed by .* in the output"),
        ("window_attention", unwritten, "the kernel left the output not finite"),
        ("window_attention", different_each_time, "gave another the output in a second run"),
        ("window_attention", image_in_a_batch, r"gave image \d+ of \d+ another the output than"),
        ("window_attention", misaligned, r"differed by .* in the output.*misaligned"),
        ("window_attention", padding_takes_part, r"differed by .* in the output.*shifted"),
        ("window_attention", other_dropout, r"differed by .* in the output.*dropout 0\.2"),
        ("window_attention_backward", wrong_gradient, "in the gradient of bias"),
        ("window_attention", raises, "the kernel failed: CUDA error: an illegal memory access"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*Overriding a previously registered kernel")
def test_each_fault_of_a_kernel_is_caught(stand_in, op, function, says):
    for name, right in (("window_attention", forward), ("window_attention_backward", backward)):
        if name != op:
            stand_in(name, right)
    stand_in(op, function)
    found = try_kernel(ATTENTION)
    assert not found.right
    assert not found.fused
    assert re.search(says, found.reason), found.reason
    assert "\n" not in found.reason


def test_a_route_to_other_experts_is_caught(stand_in, monkeypatch):
    real = ops.moe_route_reference

    def swapped(logits, noise, bias, *options):
        route = real(logits, noise, bias, ops.RouteOptions(*options))
        names = ("gate", "sums", "scalars", "expert", "slot", "source", "destination", "counts",
                 "first", "used")  # fmt: skip
        found = [getattr(route, name) for name in names]
        found[4] = found[4].flip(0)  # another place in the queues
        return tuple(found)

    stand_in("moe_route", swapped)
    assert "gave another slot" in try_kernel(Signature("moe_route", "cpu", "float32")).reason


@pytest.mark.parametrize("op", sorted(ops.status()))
def test_the_kernels_of_this_machine_pass(op):
    found = try_kernel(Signature(op, "cpu", "float32"))
    assert found.right, found.reason
    assert found.speedup > 0


def test_every_op_with_kernels_has_a_trial():
    from swin_moe.ops.trial.cases import TRIALS

    assert sorted(TRIALS) == sorted([*ops.status(), choice.AMX.op])


def test_a_slower_kernel_is_right_but_does_not_run(stand_in, monkeypatch):
    from swin_moe.ops.trial import checks

    monkeypatch.setattr(checks, "_medians", lambda calls, device: [0.3, 0.1])
    found = try_kernel(DISPATCH)
    assert (found.right, found.fused) == (True, False)
    assert str(found) == "fallback, its kernel takes 3.0 times as long"


# --------------------------------------------------------------------------------------------
# The process that tries


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine on which nothing was tried; its child is a program without torch."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(choice, "_trusted", False)
    monkeypatch.setattr(choice, "_required", False)
    monkeypatch.setattr(choice, "_wanted", True)
    monkeypatch.setattr(choice, "_choices", {})
    log = tmp_path / "tried"
    log.touch()

    def child(body: str) -> Path:
        program = tmp_path / "child.py"
        program.write_text(CHILD.format(log=str(log), body=body))
        monkeypatch.setattr(trial, "PROGRAM", (sys.executable, "-S", str(program)))
        return log

    return child


CHILD = """
import json, os, signal, sys, time
descriptor = int(sys.argv[1])
def tell(**message): os.write(descriptor, (json.dumps(message) + "\\n").encode())
for number, (op, device, dtype, shape) in enumerate(json.load(sys.stdin)):
    tell(signature=number)
    with open({log!r}, "a") as file: print(op, file=file)
    choice = [True, "", 2.5, True]
    {body}
    tell(signature=number, choice=choice)
"""
ALL = [ATTENTION, DISPATCH, COMBINE]


def test_a_crash_costs_its_child_and_the_rest_is_tried(machine):
    log = machine('if op == "moe_dispatch": os.kill(os.getpid(), signal.SIGSEGV)')
    found = trial.try_kernels(ALL)
    assert found[DISPATCH] == Choice(False, "the kernel's trial was killed by SIGSEGV")
    assert found[ATTENTION] == found[COMBINE] == Choice(True, speedup=2.5)
    assert log.read_text().split() == [s.op for s in ALL]
    # It is known on this machine from now on.
    assert trial.try_kernels(ALL) == found
    assert log.read_text().split() == [s.op for s in ALL]


def test_a_hang_costs_its_child_and_the_rest_is_tried(machine, monkeypatch):
    machine('if op == "window_attention": time.sleep(1000)')
    monkeypatch.setattr(trial, "LIMIT_S", {"cpu": 0.5})
    found = trial.try_kernels(ALL)
    late = Choice(False, "the kernel's trial did not end within 0.5 s", lasting=False)
    assert found[ATTENTION] == late  # a GPU's would last: no other work slows it so much
    assert found[DISPATCH].fused


def test_a_child_that_does_not_start_is_no_verdict(machine, monkeypatch):
    log = machine("")
    monkeypatch.setattr(trial, "PROGRAM", (sys.executable, "-c", "raise OSError('no torch here')"))
    found = trial.try_kernels(ALL)
    for key in ALL:
        assert "it could not be tried: the process ended with 1" in found[key].reason
        assert "no torch here" in found[key].reason
    machine("")  # later, it starts
    assert all(c.fused for c in trial.try_kernels(ALL).values())
    assert log.read_text().split() == [s.op for s in ALL]


def test_a_child_that_is_killed_from_outside_is_no_verdict(machine):
    log = machine("os.kill(os.getpid(), signal.SIGKILL)")
    assert "was killed by SIGKILL" in trial.try_kernels([ATTENTION])[ATTENTION].reason
    trial.try_kernels([ATTENTION])
    assert log.read_text().split() == ["window_attention"] * 2


def test_a_fallback_that_fails_is_no_fault_of_the_kernel(monkeypatch):
    from swin_moe.ops.trial import cases, checks

    real = cases.moe_dispatch

    def dispatch(x, *maps):
        if not choice._serves("moe_dispatch", "cpu", torch.float32) and x.dtype != torch.float64:
            raise RuntimeError("no such product here")
        return real(x, *maps)

    monkeypatch.setattr(cases, "moe_dispatch", dispatch)
    monkeypatch.setattr(checks, "broken", False)
    assert try_kernel(DISPATCH) == Choice(True)
    assert checks.broken  # on a GPU, another process makes the next trial


def test_want_of_memory_is_no_verdict(machine):
    log = machine('choice = [False, "the device had no memory left", 0.0, False]')
    assert not trial.try_kernels([ATTENTION])[ATTENTION].fused
    trial.try_kernels([ATTENTION])
    assert log.read_text().split() == ["window_attention"] * 2


def test_processes_of_a_machine_try_once(machine):
    log = machine("time.sleep(0.3)")
    threads = [threading.Thread(target=trial.try_kernels, args=(ALL,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert log.read_text().split() == [s.op for s in ALL]


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", '{"machine": 1}', '{"choices": [[1, 2]]}', "[" * 100_000,
     '{"choices": [[["moe_route", "cpu", "float32", []], [true, "", 1' + "0" * 400 + "]]]}"],
)  # fmt: skip
def test_a_damaged_file_of_results_is_replaced(machine, damage):
    machine("")
    path = kept.Kept("cpu").path
    facts = kept.machine("cpu")
    path.write_text(damage.replace('"choices"', f'"machine": {json.dumps(facts)}, "choices"'))
    assert trial.try_kernels([ATTENTION])[ATTENTION].fused
    assert kept.Kept("cpu").read() == {ATTENTION: Choice(True, speedup=2.5)}


@pytest.mark.parametrize("fact", ["library_digest", "cpu_instruction_set"])
def test_another_library_or_processor_is_tried_again(machine, monkeypatch, fact):
    log = machine("")
    trial.try_kernels([ATTENTION])
    monkeypatch.setattr(ops._library, fact, lambda *arguments: "another")
    kept.machine.cache_clear()
    trial.try_kernels([ATTENTION])
    kept.machine.cache_clear()
    assert log.read_text().split() == ["window_attention"] * 2
    assert stat.S_IMODE(kept.Kept("cpu").path.parent.stat().st_mode) == 0o700


def test_without_a_folder_each_process_tries(machine, monkeypatch):
    log = machine("")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/no")
    for _ in range(2):
        assert trial.try_kernels([ATTENTION])[ATTENTION].fused
    assert log.read_text().split() == ["window_attention"] * 2


def test_a_start_that_waits_for_trials_says_so_and_goes_on(machine, monkeypatch):
    machine("")
    monkeypatch.setattr(kept, "PATIENCE_S", 2.5)
    said = []
    with kept.Kept("cpu").lock(print):
        assert trial.try_kernels([ATTENTION], said.append)[ATTENTION].fused
    assert said[0].startswith("waiting for another process that tries kernels (")
    assert said[1] == "another process has tried kernels for 2.5 s; not waiting any longer"


def test_a_relative_cache_folder_is_ignored(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert cache_folder("kernels") == tmp_path / ".cache/swin_moe/kernels"


def test_results_are_forgotten_on_demand(machine):
    log = machine("")
    trial.try_kernels([ATTENTION])
    kept.forget()
    trial.try_kernels([ATTENTION])
    assert log.read_text().split() == ["window_attention"] * 2


def test_the_real_child_survives_a_kernel_that_crashes(machine, monkeypatch, tmp_path):
    machine("")
    program = tmp_path / "faulty.py"
    program.write_text(FAULTY)
    monkeypatch.setattr(trial, "PROGRAM", (sys.executable, str(program)))
    found = trial.try_kernels([COMBINE, DISPATCH])
    assert found[COMBINE].reason == "the kernel's trial was killed by SIGSEGV"
    assert found[DISPATCH].right


FAULTY = """
import ctypes, torch
from swin_moe.ops.trial import child
library = torch.library.Library("swin_moe", "IMPL")
library.impl("moe_combine", lambda *_: ctypes.string_at(0), "CPU", allow_override=True)
child.main()
"""


# --------------------------------------------------------------------------------------------
# The choice


def attention(dtype=torch.float32):
    qkv = torch.randn(1, 8, 8, 3, 2, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    bias, scale = torch.zeros(2, 16, 16), torch.ones(2, 1, 1)
    return ops.window_attention(qkv, bias, scale, window_size=4)


def test_the_first_call_tries_and_a_refused_kernel_falls_back_with_one_line(machine, caplog):
    log = machine('choice = [False, "the kernel differed by 3.0e-01 in the output", 0.0, True]')
    with caplog.at_level(logging.WARNING, "swin_moe"):
        out = attention()
        attention()
    needed = sorted(set(ops.status()) - {"adamw_"})  # what a model may need
    assert sorted(log.read_text().split()) == needed  # by one process
    why = "fallback, the kernel differed by 3.0e-01 in the output"
    assert caplog.messages[0] == f"trying {len(needed)} kernels on this machine, once"
    assert f"window_attention float32: {why}" in caplog.messages
    assert len(set(caplog.messages)) == len(caplog.messages) == 2 + len(needed)
    with ops.assume_fused(False):
        assert torch.equal(out, attention())
    with ops.assume_fused(True):
        assert not torch.equal(out, attention())


def test_required_kernels_must_be_right_but_may_be_slower(machine):
    machine('choice = [op == "moe_dispatch", "its reason", 0.5, True]')
    ops.require_fused("cpu")
    with pytest.raises(ValueError, match=r"ops.require_fused: window_attention float32: fallback"):
        attention()
    assert choice.uses_kernel("moe_dispatch", torch.zeros(2, 2))


def test_a_line_describes_the_choices():
    small = Signature("window_attention", "cuda", "bfloat16", (8, 8, 32))
    large = small._replace(shape=(16, 16, 32))
    route = Signature("moe_route", "cuda", "float32")
    found = {small: Choice(True, speedup=2.13), large: Choice(True, speedup=2.88),
             route: Choice(False, "the kernel differed by 3.0e-01 in gate")}  # fmt: skip
    assert ops.describe(found) == (
        "window_attention: fused, 2.1–2.9× the fallback; "
        "moe_route: fallback, the kernel differed by 3.0e-01 in gate"
    )
    found[small] = Choice(True, "its kernel takes 1.4 times as long", 0.7)
    assert ops.describe(found).startswith(
        "window_attention bfloat16 8×8×32: fallback, its kernel takes 1.4 times as long; "
        "window_attention bfloat16 16×16×32: fused, 2.9× the fallback; "
    )


BF16 = Signature("window_attention", "cpu", "bfloat16")


@pytest.mark.parametrize(
    ("body", "allowed"),
    [
        ("", [True]),
        ('choice = [not op.endswith("_amx"), "the kernel differed", 0.0, True]', []),
        ('if op.endswith("_amx"): os.kill(os.getpid(), signal.SIGILL)', []),
    ],
)
def test_amx_is_used_only_after_its_own_trial(machine, monkeypatch, body, allowed):
    calls = []
    monkeypatch.setattr(ops._library, "has_amx", lambda: True)
    monkeypatch.setattr(ops._library, "allow_amx", calls.append)
    machine(body)
    found = ops.decide([BF16])
    assert calls == allowed
    assert found[BF16].right
    assert found[choice.AMX].fused == bool(allowed)
    assert choice.AMX not in ops.decide([ATTENTION])  # fp32 has no tiles


def test_amx_may_be_allowed_on_any_processor():
    before = ops.cpu_instruction_set(torch.bfloat16)
    ops._library.allow_amx(True)
    try:
        now = ops.cpu_instruction_set(torch.bfloat16)
    finally:
        ops._library.allow_amx(False)
    assert now == ("amx_bf16" if ops._library.has_amx() else before)
    assert ops.cpu_instruction_set(torch.bfloat16) == before
