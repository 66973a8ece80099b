"""DETR: published layout and numbers, output conventions, options, and the same behaviour of every model by name."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from detr_fast.models import MODELS, build_model, options_of_model
from detr_fast.models.detr import detr
from detr_fast.structures import Images, Predictions

GOLDEN = Path(__file__).parent.parent / "golden"
SMALL = {"num_queries": 5, "hidden_dim": 32, "nheads": 4, "enc_layers": 1, "dec_layers": 2, "dim_feedforward": 16}
DETECTION = [name for name in MODELS if "panoptic" not in name]


def tiny(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_model("detr_tiny", 3, **{**SMALL, **options})


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, *size, generator=generator) for size in ((64, 48), (40, 96))]


def layout(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "entries", "parameters", "trained", "buffers"),
    [
        ("detr_resnet50", 458, 41_524_768, 41_302_368, 106_240),
        ("detr_resnet50_dc5", 458, 41_524_768, 41_302_368, 106_240),
        ("detr_resnet101", 713, 60_464_672, 60_242_272, 210_688),
        ("detr_resnet101_dc5", 713, 60_464_672, 60_242_272, 210_688),
    ],
)
def test_published_sizes(name: str, entries: int, parameters: int, trained: int, buffers: int) -> None:
    with torch.device("meta"):
        model = build_model(name, 91)
    assert len(model.state_dict()) == entries
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained
    assert sum(b.numel() for b in model.buffers()) == buffers


def test_published_names_and_shapes() -> None:
    lines = (GOLDEN / "detr_resnet50_keys.txt").read_text().splitlines()
    rows = [line.split("\t") for line in lines]
    published = {name: tuple(int(x) for x in re.findall(r"\d+", shape)) for name, shape, _ in rows}
    with torch.device("meta"):
        model = build_model("detr_resnet50", 91)
    assert layout(model) == published


def test_outputs_of_a_list_are_the_published_dictionary() -> None:
    model = tiny().eval()
    outputs = model(images())
    assert set(outputs) == {"pred_logits", "pred_boxes", "aux_outputs"}
    assert outputs["pred_logits"].shape == (2, 5, 4)
    assert outputs["pred_boxes"].shape == (2, 5, 4)
    assert outputs["pred_boxes"].min() > 0
    assert outputs["pred_boxes"].max() < 1
    assert [set(layer) for layer in outputs["aux_outputs"]] == [{"pred_logits", "pred_boxes"}]


def test_images_give_predictions_of_all_layers() -> None:
    model = tiny().eval()
    predictions, outputs = model(Images.batch(images())), model(images())
    assert isinstance(predictions, Predictions)
    assert torch.equal(predictions.logits[1], outputs["pred_logits"])
    assert torch.equal(predictions.boxes[0], outputs["aux_outputs"][0]["pred_boxes"])
    pixels = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(pixels)["pred_logits"], model(list(pixels))["pred_logits"])


def test_without_auxiliary_losses_only_the_last_layer_is_returned() -> None:
    with_them, without = tiny().eval(), tiny(aux_loss=False).eval()
    outputs = without(images())
    assert set(outputs) == {"pred_logits", "pred_boxes"}
    assert torch.equal(outputs["pred_logits"], with_them(images())["pred_logits"])


def test_padding_of_the_batch_is_not_seen_by_the_transformer() -> None:
    """Pixels far outside an image, further than its last cell's receptive field reaches, change nothing."""
    model = tiny().eval()
    batch = Images.batch([torch.randn(3, 32, 32), torch.randn(3, 512, 512)])
    before = model(batch)
    batch.pixels[0, :, 400:, 400:] = 7.0
    after = model(batch)
    assert torch.equal(before.logits[:, 0], after.logits[:, 0])


VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "pre-norm, learned": {"pre_norm": True, "position_embedding": "learned"},
    "frozen backbone": {"train_backbone": False, "dropout": 0.1},
}


@pytest.mark.parametrize(
    ("name", "variant"),
    [*((name, "default") for name in DETECTION), *(("detr_tiny", variant) for variant in list(VARIANTS)[1:])],
)
def test_every_model_trains_a_step_and_loads_its_own_weights(name: str, variant: str) -> None:
    options = VARIANTS[variant]
    torch.manual_seed(0)
    model = build_model(name, 7, **SMALL, **options)
    optimizer = torch.optim.AdamW(model.parameter_groups(1e-3, 1e-4))
    predictions = model(Images.batch(images()))
    assert predictions.logits.shape == (2, 2, 5, 8)
    (predictions.logits.square().mean() + predictions.boxes.square().mean()).backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    optimizer.step()
    assert (model.num_classes, model.num_queries) == (7, 5)
    other = build_model(name, 7, **SMALL, **options)
    other.load_state_dict(model.state_dict(), strict=True)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        expected = model.eval()(images()[:1])
        for twin in (other.eval(), copied.eval()):
            assert torch.equal(twin(images()[:1])["pred_boxes"], expected["pred_boxes"])


def test_parameter_groups_are_those_of_the_paper() -> None:
    with torch.device("meta"):
        model = build_model("detr_resnet50", 91)
    rest, backbone = model.parameter_groups(1e-4, 1e-5)
    assert (rest["lr"], backbone["lr"]) == (1e-4, 1e-5)
    assert (len(rest["params"]), len(backbone["params"])) == (193, 42)
    with torch.device("meta"):
        frozen = build_model("detr_resnet50", 91, train_backbone=False)
    (only,) = frozen.parameter_groups(1e-4, 1e-5)
    assert (only["lr"], len(only["params"])) == (1e-4, 193)


def test_heads_stay_in_float32_under_autocast() -> None:
    model = tiny(dropout=0.1).train()
    with torch.autocast("cpu", torch.bfloat16):
        predictions = model(Images.batch(images()))
    assert predictions.logits.dtype == predictions.boxes.dtype == torch.float32
    predictions.boxes.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_autocast_is_close() -> None:
    """bfloat16 keeps 8 bits; the boxes of this shallow network agree to a few of them."""
    model = tiny().eval()
    expected = model(images())["pred_boxes"]
    with torch.autocast("cpu", torch.bfloat16):
        found = model(images())["pred_boxes"]
    assert not torch.equal(found, expected)
    assert (found - expected).abs().max() < 16 * torch.finfo(torch.bfloat16).eps


def test_model_in_float64() -> None:
    model, wide = tiny().eval(), tiny().eval().double()
    expected = wide([image.double() for image in images()])["pred_logits"]
    assert expected.dtype == torch.float64
    torch.testing.assert_close(model(images())["pred_logits"].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compiles_without_recompiling_for_other_sizes() -> None:
    """Two graphs, up to the packed tokens and from there; a third size of images must not add any."""
    model = tiny().eval()
    graphs: list[torch.fx.GraphModule] = []

    def keep_graph(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=keep_graph)
    canvas = Images.batch([torch.randn(3, 64, 96), torch.randn(3, 64, 96)])
    counts = []
    for sizes in (((64, 96), (64, 96)), ((64, 48), (40, 96)), ((20, 96), (64, 70)), ((33, 17), (64, 96))):
        batch = Images(canvas.pixels, canvas.padding, sizes)
        with torch.no_grad():
            torch.testing.assert_close(compiled(batch).logits, model(batch).logits)
        counts.append(len(graphs))
    assert counts[1] == counts[3]


def test_attention_maps_cover_the_images_without_padding() -> None:
    model = tiny().eval()
    maps = model.attention_maps(Images.batch(images()), encoder=True)
    assert [tuple(x.shape) for x in maps.cross] == [(5, 4, 3), (5, 3, 6)]
    assert [tuple(x.shape) for x in maps.encoder] == [(4, 3, 4, 3), (3, 6, 3, 6)]
    for whole in (*maps.cross, *(x.flatten(0, 1) for x in maps.encoder)):
        torch.testing.assert_close(whole.flatten(1).sum(1), torch.ones(len(whole)))
    assert model.attention_maps(Images.batch(images())).encoder is None
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_attention_maps_are_what_the_decoder_uses() -> None:
    """With one layer whose values are the locations' row numbers, the output is the mean row under the map."""
    model = tiny(dec_layers=1, nheads=1).eval()
    attention = model.transformer.decoder.layers[0].multihead_attn
    batch = Images.batch(images())
    seen: list[Tensor] = []
    handle = attention.out_proj.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    model(batch)
    handle.remove()
    memory: list[Tensor] = []
    handle = attention.register_forward_pre_hook(lambda _, arguments: memory.append(arguments[1].content))
    maps = model.attention_maps(batch)
    handle.remove()
    values = nn.functional.linear(memory[0], attention.in_proj_weight[64:], attention.in_proj_bias[64:])
    counts = [x[0].numel() for x in maps.cross]
    pairs = zip(maps.cross, values.split(counts), strict=True)
    expected = torch.cat([weights.flatten(1) @ value for weights, value in pairs])
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-5)


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="got 'detr_resnet5'; did you mean 'detr_resnet50'"):
        build_model("detr_resnet5", 3)
    with pytest.raises(ValueError, match=r"backbone must be one of .*'tiny'.*, got 'huge'"):
        detr("huge", 3)
    with pytest.raises(ValueError, match="position_embedding must be 'sine' or 'learned', got 'sin'"):
        tiny(position_embedding="sin")
    with pytest.raises(TypeError, match="num_querys"):
        build_model("detr_tiny", 3, num_querys=5)


def test_options_of_every_model() -> None:
    for name in MODELS:
        options = options_of_model(name)
        assert options["num_queries"] is int
        assert options["pre_norm"] is bool
        assert get_args(options["position_embedding"]) == ("sine", "learned")


def test_positions_in_values_are_added_to_the_content_of_the_tokens() -> None:
    batch = Images.batch(images())
    without, _ = tiny(position_in_values=False).eval().tokens(batch)
    with_them, _ = tiny(position_in_values=True).eval().tokens(batch)
    assert torch.equal(with_them.content, without.content + without.position)
    assert torch.equal(with_them.position, without.position)
    assert detr("tiny", 3).position_in_values is False
