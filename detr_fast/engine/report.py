"""A run as one HTML file: curves, numbers, predictions beside the truth, and where the queries look.

Everything is inside the file: pictures as base64, charts as SVG, no script.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detr_fast.boxes import box_cxcywh_to_xyxy
from detr_fast.data.coco import CocoDetection, coco_target
from detr_fast.data.images import read_image
from detr_fast.engine.charts import Line, line_chart
from detr_fast.engine.draw import colour_of_class, draw_boxes
from detr_fast.engine.errors import EngineError
from detr_fast.engine.evaluate import NUMBERS
from detr_fast.engine.loaders import evaluation_dataset
from detr_fast.engine.predict import Detector, load_detector
from detr_fast.engine.run import LAST
from detr_fast.files import write_atomically
from detr_fast.structures import Images

SHOWN_SIDE = 300  # longer side of a picture in the report, in pixels
THRESHOLD = 0.5  # least score of a prediction that is drawn

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2328; background: #fff; max-width: 1160px; margin: 32px auto;
  padding: 0 20px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 40px 0 12px; }
p { max-width: 75ch; } .quiet { color: #59636e; }
.facts { display: flex; flex-wrap: wrap; gap: 12px; margin: 20px 0; }
.fact { border: 1px solid #d1d9e0; border-radius: 8px; padding: 8px 16px; min-width: 90px; }
.fact b { display: block; font-size: 22px; font-variant-numeric: tabular-nums; }
.row { display: flex; flex-wrap: wrap; gap: 24px; align-items: flex-start; } .row > * { flex: 1 1 480px; min-width: 0; }
svg { width: 100%; height: auto; } svg text { font-family: system-ui, sans-serif; fill: #1f2328; }
svg .title { font-size: 15px; font-weight: 600; } svg .tick { font-size: 12px; fill: #59636e; }
svg .grid { stroke: #e6eaef; }
table { border-collapse: collapse; }
th, td { text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid #e6eaef; }
td.number { text-align: right; font-variant-numeric: tabular-nums; } th.number { text-align: right; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(480px, 1fr)); gap: 18px 28px; }
.looks { display: grid; grid-template-columns: repeat(4, 1fr); gap: 10px; margin: 0 0 18px; }
figure { margin: 0; } figcaption { font-size: 13px; color: #59636e; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 8px; }
img { width: 100%; border-radius: 4px; display: block; }
.key span { display: inline-block; margin-right: 16px; } .key i { display: inline-block; width: 12px; height: 12px;
  border-radius: 3px; margin-right: 6px; vertical-align: -1px; }
"""


def write_report(
    run: str | Path,
    path: str | Path,
    data: str | Path | None = None,
    *,
    title: str = "Training report",
    pictures: int = 8,
    looks: int = 3,
) -> Path:
    """Writes the report of a run's folder to ``path``.

    Args:
        data: where the data set lies now; by default where it lay in training.
        pictures: images of the evaluation split with predictions.
        looks: images of it with the attention of their most certain queries.

    Raises:
        EngineError: it was not evaluated, or its checkpoint cannot be used.
    """
    run, path = Path(run), Path(path)
    detector, config = load_detector(run / LAST)
    if not (run / "evaluation.json").is_file():
        evaluating = "" if config.evaluate.every else " --evaluate.every=1"
        raise EngineError(
            f"{run} has no evaluation yet: continue it with `detr-fast train --resume {run}{evaluating}` to the end of "
            "an epoch"
        )
    if data is not None:
        config = config.with_overrides({"data.path": str(data)})
    dataset = evaluation_dataset(config.data, detector.categories)
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluation = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    chosen = _choose(dataset, max(pictures, looks))
    sections = [
        _head(title, entries, evaluation, config.model.name, detector),
        f'<h2>Learning</h2><div class="row">{_loss_chart(entries)}{_precision_chart(entries)}</div>',
        f'<h2>Numbers</h2><div class="row">{_numbers(evaluation)}{_classes(evaluation)}</div>',
        _pictures(detector, dataset, chosen[:pictures]),
        _looks(detector, dataset, chosen[:looks]),
    ]
    page = "\n".join(sections)
    write_atomically(
        path,
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>\n{page}\n</body></html>\n",
    )
    return path


def _choose(dataset: CocoDetection, count: int) -> list[int]:
    """Image ids spread evenly over the split, those with objects first."""
    full = [image_id for image_id in dataset.image_ids if dataset.coco.getAnnIds(imgIds=[image_id])]
    ids = full or list(dataset.image_ids)
    count = min(count, len(ids))
    return [ids[(number * len(ids)) // count] for number in range(count)]


def _head(
    title: str, entries: Sequence[dict[str, Any]], evaluation: dict[str, Any], name: str, detector: Detector
) -> str:
    epochs = [entry for entry in entries if entry["kind"] == "epoch"]
    seconds = sum(entry["seconds"] for entry in epochs)
    parameters = sum(parameter.numel() for parameter in detector.model.parameters())
    facts = {
        "AP50": f"{evaluation['numbers']['AP50']:.3f}",
        "AP": f"{evaluation['numbers']['AP']:.3f}",
        "epochs": str(len(epochs)),
        "steps": f"{entries[-1]['step']:,}" if entries else "0",
        "minutes of training": f"{seconds / 60:.1f}",
        "images evaluated": f"{evaluation['images']:,}",
        "parameters": f"{parameters:,}",
    }
    boxes = "".join(f'<div class="fact"><b>{value}</b>{label}</div>' for label, value in facts.items())
    model = (
        f'<p class="quiet">Model {html.escape(name)}; classes {html.escape(", ".join(detector.categories.names))}.</p>'
    )
    return f'<h1>{html.escape(title)}</h1>{model}<div class="facts">{boxes}</div>'


def _column(entries: Sequence[dict[str, Any]], kind: str, x: str, y: str) -> tuple[list[float], list[float]]:
    rows = [(float(e[x]), float(e[y])) for e in entries if e["kind"] == kind and y in e]
    return [a for a, _ in rows], [b for _, b in rows]


def _loss_chart(entries: Sequence[dict[str, Any]]) -> str:
    names = {"loss": "total", "loss_ce": "class", "loss_bbox": "box L1", "loss_giou": "GIoU"}
    lines = [
        Line(label, *_column(entries, "step", "step", name), emphasis=name == "loss") for name, label in names.items()
    ]
    return f"<div>{line_chart('Training loss: weighted total of all layers, and the last layer', 'step', lines)}</div>"


def _precision_chart(entries: Sequence[dict[str, Any]]) -> str:
    lines = []
    for name in ("AP50", "AP"):
        epochs, values = _column(entries, "epoch", "epoch", name)
        lines.append(Line(name, [epoch + 1 for epoch in epochs], values))
    return f"<div>{line_chart('Average precision on held-out images', 'epoch', lines, (0.0, 1.0))}</div>"


def _numbers(evaluation: dict[str, Any]) -> str:
    rows = "".join(
        f'<tr><td>{name}</td><td class="number">{_number(evaluation["numbers"][name])}</td><td>{meaning}</td></tr>'
        for name, meaning in NUMBERS.items()
    )
    return f'<table><tr><th>number</th><th class="number">value</th><th>meaning</th></tr>{rows}</table>'


def _classes(evaluation: dict[str, Any]) -> str:
    rows = "".join(
        f'<tr><td>{html.escape(name)}</td><td class="number">{_number(values["AP"])}</td>'
        f'<td class="number">{_number(values["AP50"])}</td></tr>'
        for name, values in evaluation["per_class"].items()
    )
    return f'<table><tr><th>class</th><th class="number">AP</th><th class="number">AP50</th></tr>{rows}</table>'


def _number(value: float) -> str:
    return "–" if value < 0 else f"{value:.3f}"  # noqa: RUF001 (a dash for numbers that no object defines)


def _pictures(detector: Detector, dataset: CocoDetection, image_ids: Sequence[int]) -> str:
    """Truth and prediction of each image, side by side."""
    figures = []
    for image_id in image_ids:
        picture, scale = _enlarged(dataset, image_id)
        labels, boxes = _truth(dataset, image_id)
        names = [detector.categories.names[label] for label in labels]
        left = draw_boxes(picture, [[scale * x for x in box] for box in boxes], labels, names)
        found = detector.predict(read_image(dataset.path_of(image_id)), THRESHOLD)[0]
        captions = [f"{name} {score:.2f}" for name, score in zip(found.names, found.scores.tolist(), strict=True)]
        right = draw_boxes(picture, (found.boxes * scale).tolist(), found.labels.tolist(), captions)
        figures.append(
            f'<div class="pair">{_figure(left, f"truth, image {image_id}: {len(labels)} objects")}'
            f"{_figure(right, f'prediction: {len(found)} objects')}</div>"
        )
    key = "".join(
        f'<span><i style="background:rgb{colour_of_class(label)}"></i>{html.escape(name)}</span>'
        for label, name in enumerate(detector.categories.names[:12])
    )
    return (
        '<h2>Predictions beside the truth</h2><p class="quiet">Held-out images; predictions with a score of at least '
        f'{THRESHOLD}, overlaps not suppressed.</p><p class="key">{key}</p><div class="pairs">{"".join(figures)}</div>'
    )


def _truth(dataset: CocoDetection, image_id: int) -> tuple[list[int], list[list[float]]]:
    entry = dataset.coco.imgs[image_id]
    target = coco_target(
        entry["width"],
        entry["height"],
        image_id,
        dataset.coco.loadAnns(dataset.coco.getAnnIds(imgIds=[image_id])),
        False,
    )
    index_of = {category: index for index, category in enumerate(dataset.categories.ids)}
    return [index_of[category] for category in target["labels"].tolist()], target["boxes"].tolist()


def _enlarged(dataset: CocoDetection, image_id: int) -> tuple[Image.Image, float]:
    """The image at the size it is shown, twice that for sharp captions, and the scale."""
    picture = read_image(dataset.path_of(image_id))
    scale = 2 * SHOWN_SIDE / max(picture.size)
    size = round(picture.width * scale), round(picture.height * scale)
    return picture.resize(size, Image.Resampling.BICUBIC), scale


@torch.no_grad()
def _looks(detector: Detector, dataset: CocoDetection, image_ids: Sequence[int], queries: int = 4) -> str:
    """Cross-attention of the most certain queries over their image."""
    if not hasattr(detector.model, "attention_maps"):
        return ""
    rows = []
    for image_id in image_ids:
        picture, _ = _enlarged(dataset, image_id)
        pixels = detector.transform(read_image(dataset.path_of(image_id)), {}, None)[0]
        images = Images.batch([pixels]).to(detector.device)
        outputs = detector.model(images)
        maps = detector.model.attention_maps(images).cross[0].float().cpu()  # type: ignore[operator]
        scores, labels = outputs.logits[-1, 0].float().softmax(-1)[:, :-1].max(-1)
        boxes = box_cxcywh_to_xyxy(outputs.boxes[-1, 0].float()).cpu() * torch.tensor(picture.size * 2)
        for query in scores.argsort(descending=True)[:queries].tolist():
            name = f"{detector.categories.names[int(labels[query])]} {float(scores[query]):.2f}"
            drawn = draw_boxes(overlay(picture, maps[query]), [boxes[query].tolist()], [int(labels[query])], [name])
            rows.append(_figure(drawn, f"image {image_id}, query {query}"))
    return (
        '<h2>Where the queries look</h2><p class="quiet">Attention of the last decoder layer to the image, mean of '
        f"its heads, for the {queries} most certain queries of an image: bright where a query looks, and the box it "
        f'predicts.</p><div class="looks">{"".join(rows)}</div>'
    )


def overlay(picture: Image.Image, weights: Tensor) -> Image.Image:  # weights [h, w]
    """The picture dimmed where the weights are small and warm where they are large."""
    share = weights / weights.max().clamp(min=1e-12)
    small = Image.fromarray((share.sqrt() * 255).byte().numpy())
    heat = np.asarray(small.resize(picture.size, Image.Resampling.BICUBIC), dtype=np.float32)[..., None] / 255
    grey = np.asarray(picture.convert("L"), dtype=np.float32)[..., None]
    warm = np.array([255.0, 196.0, 0.0], dtype=np.float32)
    mixed = grey * (0.35 + 0.3 * heat) * (1 - 0.6 * heat) + (0.5 * warm + 0.4 * grey) * heat
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))


def _figure(picture: Image.Image, caption: str) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    content = base64.b64encode(buffer.getvalue()).decode()
    image = f'<img alt="{html.escape(caption)}" src="data:image/jpeg;base64,{content}">'
    return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"
