"""Networks through ``optimize``: the answer, and everything about the module that must stay."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from typing import Any

import pytest
import torch
from networks import SMALL, drops, leaves, make, relative, seed_weights, street
from torch import nn

import p2pfast
from p2pfast import models
from p2pfast.fuse.optimize import parse_bytes

pytestmark = pytest.mark.usefixtures("strict")

INSTANCE = models.norm_layer_of("instance")


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", list(SMALL))
def test_answer(name: str, mode: str) -> None:
    net, inputs = make(name)
    net.train(mode == "train")
    reference = copy.deepcopy(net)
    fast = p2pfast.optimize(net)
    with torch.no_grad():
        torch.manual_seed(3)
        expected = reference.double()(*(x.double() if x.is_floating_point() else x for x in inputs))
        torch.manual_seed(3)
        eager = copy.deepcopy(net)(*inputs)
    torch.manual_seed(3)
    found = fast(*inputs)
    assert type(found) is type(expected)
    for e, f, g in zip(leaves(expected), leaves(found), leaves(eager), strict=True):
        assert f.shape == e.shape and f.dtype == torch.float32 and f.stride() == g.stride()
        # Random dropout masks of float64 and float32 differ: there float32 eager is the reference.
        assert relative(f, g if drops(net) and mode == "train" else e) < 3e-5
    assert p2pfast.explain(fast).rows or name.startswith("encoder")
    # BatchNorm's running statistics are updated as eager updates them.
    if mode == "train":
        for (key, a), (_, b) in zip(net.named_buffers(), reference.named_buffers(), strict=True):
            assert torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-5), key


@pytest.mark.parametrize("name", ["local", "global", "resnet", "unet-batch", "multiscale-features"])
@pytest.mark.parametrize("setting", ["bfloat16", "channels_last", "64 MB", "batch of one"])
def test_settings(name: str, setting: str) -> None:
    net, (x,) = make(name)
    net.train()
    x = x[:1] if setting == "batch of one" else x
    x = x.to(memory_format=torch.channels_last) if setting == "channels_last" else x
    dtype = torch.bfloat16 if setting == "bfloat16" else None
    with torch.no_grad():
        expected = copy.deepcopy(net)(x)
        eager = copy.deepcopy(net).to(dtype)(x.to(dtype)) if dtype else expected
    found = p2pfast.optimize(net, dtype=dtype, memory_limit="64MB" if setting == "64 MB" else None)(x)
    for e, f, g in zip(leaves(expected), leaves(found), leaves(eager), strict=True):
        assert f.dtype == (dtype or torch.float32) and f.stride() == g.stride()
        assert relative(f, e) < (max(2 * relative(g, e), 0.02) if dtype else 3e-5)


@pytest.mark.parametrize("enhancers", [0, 1, 2])
@pytest.mark.parametrize("edges", [True, False])
def test_label_map_equals_the_dense_tensor(enhancers: int, edges: bool) -> None:
    full = street(1)
    labels = p2pfast.LabelMap(full.labels, full.instances, num_classes=35, edges=edges)
    channels = labels.num_channels
    net: nn.Module = models.GlobalGenerator(channels, 3, 4, 2, 2, INSTANCE)
    if enhancers > 0:
        net = models.LocalEnhancer(channels, 3, 4, 2, 2, enhancers, 1, INSTANCE)
    fast = p2pfast.optimize(net)
    with torch.no_grad():
        expected = net(labels.dense())
    assert relative(fast(labels), expected) < 3e-5
    kernels = {row.kernel for row in p2pfast.explain(fast).rows}
    assert all(0 <= row.share < 3 for row in p2pfast.explain(fast).rows)
    assert "label_conv" in kernels
    assert relative(fast(labels.dense()), expected) < 3e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_regions_of_one_label_are_computed_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2PFAST_TUNE", "off")
    full = street(3, 128, 256)
    net = models.GlobalGenerator(36, 3, 16, 3, 1, INSTANCE)
    fast = p2pfast.optimize(net, dtype=dtype)
    # The dense tensor says nothing of regions: every tile is computed.
    assert relative(fast(full), fast(full.dense())) < (1e-5 if dtype == torch.float32 else 3e-2)
    assert relative(fast(full), net(full.dense()).detach()) < (3e-5 if dtype == torch.float32 else 0.1)
    copied = [row.name for row in p2pfast.explain(fast).rows if "one-label" in row.detail]
    assert len(copied) >= 3
    # Batch normalisation merges the images; one has a single label.
    two = torch.cat([full.labels, torch.full_like(full.labels, 7)])
    batch = p2pfast.LabelMap(two, full.instances.repeat(2, 1, 1, 1), num_classes=35)
    net = models.GlobalGenerator(36, 3, 16, 2, 1, models.norm_layer_of("batch"))
    found = p2pfast.optimize(net, dtype=dtype)(batch)
    assert relative(found, net(batch.dense()).detach()) < (3e-5 if dtype == torch.float32 else 0.1)


def test_label_map_with_features_and_odd_first_layer() -> None:
    full = street(2)
    features = torch.randn(1, 3, 64, 128)
    with_features = p2pfast.LabelMap(full.labels, full.instances, features, num_classes=35)
    net = models.GlobalGenerator(39, 3, 4, 2, 1, INSTANCE)
    assert relative(p2pfast.optimize(net)(with_features), net(with_features.dense()).detach()) < 3e-5
    strided = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(36, 8, 4, 2, 1), nn.InstanceNorm2d(8), nn.ReLU())
    fast = p2pfast.optimize(strided)
    assert relative(fast(full), strided(full.dense()).detach()) < 3e-5


def test_the_original_is_not_modified_and_parameters_are_shared() -> None:
    net, (x,) = make("resnet-batch")
    before = copy.deepcopy(net.state_dict())
    keys = list(net.state_dict())
    fast = p2pfast.optimize(net)
    assert list(fast.state_dict()) == keys and type(net) is models.ResnetGenerator
    assert isinstance(fast, models.ResnetGenerator)
    fast.eval()
    assert net.training and all(m.training for m in net.modules())
    fast(x)
    assert all(torch.equal(before[k], net.state_dict()[k]) for k in keys)
    assert all(a is b for a, b in zip(net.parameters(), fast.parameters(), strict=True))


def test_changed_parameters_take_effect() -> None:
    net, (x,) = make("unet-batch")
    net.eval()
    fast = p2pfast.optimize(net)
    fast(x)
    other, _ = make("unet-batch")
    other.train()
    other(x)
    for target in (fast, net):
        state = {k: v + 0.1 if v.is_floating_point() else v for k, v in other.state_dict().items()}
        target.load_state_dict(state)
        with torch.no_grad():
            assert relative(fast(x), net(x)) < 3e-5
            next(net.parameters()).mul_(1.5)
            assert relative(fast(x), net(x)) < 3e-5
    fast.load_state_dict({k: v.clone() for k, v in other.state_dict().items()}, assign=True)
    with torch.no_grad():
        assert relative(fast(x), other.eval()(x)) < 3e-5


def test_switching_modes_and_sizes() -> None:
    net, (x,) = make("resnet-batch")
    fast = p2pfast.optimize(net)
    reference = copy.deepcopy(net)
    for _ in range(2):
        for training in (True, False):
            fast.train(training)
            reference.train(training)
            for size in ((32, 48), (20, 36), (33, 47)):
                x = torch.randn(1, 1, *size)
                with torch.no_grad():
                    assert relative(fast(x), reference(x)) < 3e-5
    assert len(fast.__dict__["_p2pfast"].engine.plans) == 6


def test_live_dropout_draws_what_pytorch_draws() -> None:
    net, (x,) = make("resnet-dropout")
    fast = p2pfast.optimize(net.train())
    answers = []
    for run in (net, fast, fast):
        torch.manual_seed(11)
        with torch.no_grad():
            answers.append(run(x))
    assert relative(answers[1], answers[0]) < 3e-5
    assert torch.equal(answers[1], answers[2])
    assert relative(fast(x), answers[0]) > 1e-3


def test_explain_counts_bytes_of_the_stored_dtype_in_columns() -> None:
    net, inputs = make("global")
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        fast = p2pfast.optimize(net, dtype=dtype)
        fast(*inputs)
        found.append(p2pfast.explain(fast))
        title, *lines = str(found[-1]).splitlines()[: len(found[-1].rows) + 1]
        point = title.index("MB")
        assert all(line[point] == "." for line in lines)
    for a, b in zip(*(f.rows for f in found), strict=True):
        assert a.name == b.name and b.megabytes == a.megabytes / 2 > 0


@pytest.mark.parametrize("name", ["resnet-dropout", "unet-batch", "local"])
def test_another_default_device(name: str) -> None:
    net, (x,) = make(name)
    answers = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            torch.manual_seed(11)
            answers.append(p2pfast.optimize(net)(x))
    assert torch.equal(*answers)


class Quirky(nn.Module):
    """A generator from somebody's repository: in-place changes, functional forms, several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1, padding_mode="reflect")
        self.norm = nn.GroupNorm(12, 12)
        self.grouped = nn.Conv2d(12, 12, 3, padding=1, groups=3)
        self.dilated = nn.Conv2d(12, 12, 3, padding=2, dilation=2)
        self.last = nn.ConvTranspose2d(24, 5, 4, 2, 1)
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: torch.Tensor, *, gain: float = 1.0) -> dict[str, Any]:
        a = torch.relu(self.norm(self.first(torch.nn.functional.pad(x, (1, 1, 1, 1)))))
        b = nn.functional.leaky_relu(self.grouped(a), 0.2, True)
        c = self.dilated(a) * self.scale
        b += c
        skip = torch.cat([a, b], dim=1)
        y = torch.sigmoid(self.last(nn.functional.elu(skip)))
        return {"image": y, "features": [a, (b, skip)], "mean": y.mean() * gain}


def test_a_network_of_quirks() -> None:
    net = Quirky()
    fast = p2pfast.optimize(net)
    x = torch.randn(2, 3, 18, 22)
    with torch.no_grad():
        expected, found = net(x, gain=2.0), fast(x, gain=2.0)
    assert found.keys() == expected.keys()
    flat = lambda o: [o["image"], o["features"][0], *o["features"][1], o["mean"]]  # noqa: E731
    first = [f.clone() for f in flat(found)]
    for e, f in zip(flat(expected), first, strict=True):
        assert relative(f, e) < 3e-5
    fast(torch.randn(2, 3, 18, 22), gain=2.0)
    assert all(torch.equal(a, b) for a, b in zip(first, flat(found), strict=True)), "results alias the arena"
    reasons = " ".join(reason for _, reason in p2pfast.explain(fast).unfused)
    assert "groups=3" in reasons and "dilation" in reasons


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) if x.sum() > 0 else x


def test_control_flow_that_cannot_be_traced_runs_in_pytorch() -> None:
    net = DataDependent()
    fast = p2pfast.optimize(net)
    x = torch.ones(1, 3, 4, 4)
    assert torch.equal(fast(x), net(x).detach())
    assert "control flow" in str(p2pfast.explain(fast))


def test_hooks_run() -> None:
    net, (x,) = make("resnet")
    seen: list[torch.Size] = []
    net.model[1].register_forward_hook(lambda m, i, o: seen.append(o.shape))  # type: ignore[index,union-attr]
    fast = p2pfast.optimize(net)
    with torch.no_grad():
        expected = net(x)
    assert relative(fast(x), expected) < 3e-5 and len(seen) == 2


def test_copies_and_pickles() -> None:
    net, (x,) = make("resnet")
    fast = p2pfast.optimize(net)
    expected = fast(x)
    twin = copy.deepcopy(fast)
    with torch.no_grad():
        next(net.parameters()).add_(1.0)
    assert torch.equal(twin(x), expected) and not torch.equal(fast(x), expected)
    again = pickle.loads(pickle.dumps(twin))
    assert torch.equal(again(x), expected)
    buffer = io.BytesIO()
    torch.save(fast.state_dict(), buffer)
    buffer.seek(0)
    net.load_state_dict(torch.load(buffer, weights_only=True))


def test_wrong_inputs_raise_what_pytorch_raises() -> None:
    net, _ = make("resnet")
    fast = p2pfast.optimize(net)
    for bad in (torch.randn(1, 4, 32, 32), torch.randn(1, 3, 2, 2), torch.randn(3, 32)):
        with pytest.raises(Exception) as theirs:
            net(bad)
        with pytest.raises(type(theirs.value)):
            fast(bad)
    with pytest.raises(TypeError):
        fast()


def test_several_threads_and_threads_of_torch() -> None:
    net, (x,) = make("global")
    fast = p2pfast.optimize(net)
    expected = fast(x)
    answers: list[torch.Tensor] = []

    def work() -> None:
        for _ in range(5):
            answers.append(fast(x))

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(answers) == 15 and all(torch.equal(a, expected) for a in answers)


def test_a_float64_network_runs_in_pytorch_and_says_so() -> None:
    net, (x,) = make("resnet")
    fast = p2pfast.optimize(net.double())
    assert torch.equal(fast(x.double()), net(x.double()).detach())
    assert "float64" in str(p2pfast.explain(fast))


def test_what_runs_in_pytorch_says_so() -> None:
    net, (x,) = make("resnet")
    fast = p2pfast.optimize(net, backend="reference")
    found = fast(x)
    assert torch.equal(found, net(x)) and not found.requires_grad
    assert "runs in PyTorch" in str(p2pfast.explain(fast))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "fast"}, "mode is 'fast'"),
        ({"backend": "tpu"}, "backend is 'tpu'"),
        ({"accuracy": "low"}, "accuracy is 'low'"),
        ({"dtype": torch.float16}, "dtype is torch.float16"),
        ({"memory_limit": "lots"}, "memory_limit is 'lots'"),
        ({"memory_limit": 0}, "must be positive"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        p2pfast.optimize(nn.Identity(), **options)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        p2pfast.optimize(torch.relu)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"p2pfast\.optimize"):
        p2pfast.explain(nn.Identity())


def test_parse_bytes() -> None:
    assert parse_bytes("4GB") == 4 * 10**9
    assert parse_bytes("2 GiB") == 2 * 2**30
    assert parse_bytes("512mb") == 512 * 10**6
    assert parse_bytes(17) == 17


def test_weights_reach_the_same_answer_at_every_level(cpu_level: str) -> None:
    net = models.LocalEnhancer(36, 3, 4, 2, 1, 1, 1, INSTANCE)
    seed_weights(net)
    labels = street(3, 48, 80)
    with torch.no_grad():
        expected = net.double()(labels.dense().double())
    assert relative(p2pfast.optimize(net.float())(labels), expected) < 3e-5
