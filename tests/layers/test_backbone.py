"""ResNets: structure, constant batch norm folded into convolutions, dilation, what is trained."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from detr_fast.layers.backbone import Backbone, BasicBlock, Bottleneck, FrozenBatchNorm2d, ResNet, resnet

NETWORKS = [(BasicBlock, (1, 2, 1, 1)), (Bottleneck, (2, 1, 1, 2))]


NAMES_OF_STAGES = ["layer1", "layer2", "layer3", "layer4"]


def randomised(network: nn.Module) -> nn.Module:
    torch.manual_seed(2)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and tensor.dim() == 1:
            nn.init.uniform_(tensor, 0.5, 1.5) if name.endswith(("var", "weight")) else nn.init.normal_(tensor)
    return network


def plain(network: ResNet, pixels: Tensor) -> list[Tensor]:
    """The same network, convolution by convolution and norm by norm."""

    def norm(x: Tensor, module: nn.Module) -> Tensor:
        return nn.functional.batch_norm(x, module.running_mean, module.running_var, module.weight, module.bias)

    x = nn.functional.max_pool2d(norm(network.conv1(pixels), network.bn1).relu(), 3, 2, 1)
    maps = []
    for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
        for block in stage:
            shortcut = x if block.downsample is None else norm(block.downsample[0](x), block.downsample[1])
            count = 3 if isinstance(block, Bottleneck) else 2
            for number in range(1, count + 1):
                x = norm(getattr(block, f"conv{number}")(x), getattr(block, f"bn{number}"))
                x = (x if number < count else x + shortcut).relu()
        maps.append(x)
    return maps


@pytest.mark.parametrize(("block", "blocks"), NETWORKS, ids=["basic", "bottleneck"])
@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, nn.BatchNorm2d])
def test_folded_norm_is_the_norm(
    block: type[BasicBlock] | type[Bottleneck], blocks: tuple[int, ...], norm: type[nn.Module]
) -> None:
    network = randomised(ResNet(block, blocks, width=4, norm=norm)).double().eval()
    pixels = torch.randn(2, 3, 70, 50, dtype=torch.float64)
    for found, expected in zip(network(pixels), plain(network, pixels), strict=True):
        torch.testing.assert_close(found, expected)


def test_gradient_through_the_folded_norm() -> None:
    network = randomised(ResNet(Bottleneck, (1, 1, 1, 1), width=4)).double()
    pixels = torch.randn(1, 3, 40, 40, dtype=torch.float64)
    gradients = [
        torch.autograd.grad(run(pixels)[-1].square().sum(), list(network.parameters()))
        for run in (network, lambda x: plain(network, x))
    ]
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


def test_folded_weights_are_never_old() -> None:
    """After an optimizer step, a write behind autograd's back, a new state dict and a copy."""
    network = randomised(ResNet(BasicBlock, (1, 1, 1, 1), width=4)).double().eval()
    pixels = torch.randn(1, 3, 40, 40, dtype=torch.float64)

    def check(network: ResNet) -> None:
        with torch.no_grad():
            torch.testing.assert_close(network(pixels)[-1], plain(network, pixels)[-1])

    check(network)
    network(pixels)[-1].sum().backward()
    torch.optim.SGD(network.parameters(), lr=0.1).step()
    check(network)
    network.conv1.weight.data.mul_(2)
    network.bn1.running_mean.add_(1)
    check(network)
    network.load_state_dict({name: value * 1.5 for name, value in network.state_dict().items()})
    check(network)
    check(copy.deepcopy(network))


def test_training_batch_norm_uses_the_batch() -> None:
    network = randomised(ResNet(BasicBlock, (1, 1, 1, 1), width=4, norm=nn.BatchNorm2d)).train()
    before = network.bn1.running_mean.clone()
    network(torch.randn(4, 3, 64, 64))
    assert not torch.equal(network.bn1.running_mean, before)


@pytest.mark.parametrize(("name", "channels"), [("resnet18", 512), ("resnet50", 2048)])
def test_maps_have_the_published_strides(name: str, channels: int) -> None:
    with torch.no_grad():
        maps = resnet(name)(torch.randn(1, 3, 65, 96))
    assert [tuple(x.shape[-2:]) for x in maps] == [(17, 24), (9, 12), (5, 6), (3, 3)]
    assert maps[-1].shape[1] == channels


def test_dilation_keeps_the_resolution_and_the_weights() -> None:
    network, dilated = resnet("resnet50"), resnet("resnet50", dilation=True)
    dilated.load_state_dict(network.state_dict(), strict=True)
    assert [block.conv2.dilation[0] for block in dilated.layer4] == [1, 2, 2]
    assert [block.conv2.stride[0] for block in dilated.layer4] == [1, 1, 1]
    with torch.no_grad():
        maps = dilated(torch.randn(1, 3, 64, 96))
    assert maps[-1].shape == (1, 2048, 4, 6)
    assert maps[-2].shape[-2:] == (4, 6)


@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
def test_basic_blocks_have_no_dilation(name: str) -> None:
    with pytest.raises(ValueError, match="no dilated form"):
        resnet(name, dilation=True)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"backbone must be one of .*'resnet50'.*, got 'resnet51'"):
        resnet("resnet51")


@pytest.mark.parametrize(
    ("train", "pretrained", "still"),
    [(True, True, ["conv1", "layer1"]), (True, False, []), (False, True, ["conv1", *NAMES_OF_STAGES])],
)
def test_what_is_not_trained(train: bool, pretrained: bool, still: list[str]) -> None:
    backbone = Backbone(resnet("resnet18"), train, pretrained)
    parts = {name.split(".")[1] for name, parameter in backbone.named_parameters() if not parameter.requires_grad}
    assert sorted(parts) == still


@pytest.mark.parametrize("train", [True, False])
def test_a_body_that_is_not_trained_keeps_its_statistics(train: bool) -> None:
    backbone = Backbone(ResNet(BasicBlock, (1, 1, 1, 1), width=4, norm=nn.BatchNorm2d), train, pretrained=False)
    whole = nn.Sequential(backbone)
    for mode in (backbone.body.training, whole.train().training and backbone.body.training):
        assert mode is train
    before = backbone.body.bn1.running_mean.clone()
    whole(torch.randn(2, 3, 64, 64))
    assert torch.equal(before, backbone.body.bn1.running_mean) is not train
    whole.eval()
    assert not backbone.body.training


def test_batch_norm_counters_of_a_checkpoint_are_dropped() -> None:
    network = resnet("resnet18")
    state = {**network.state_dict(), "bn1.num_batches_tracked": torch.tensor(3)}
    network.load_state_dict(state, strict=True)
