"""Face networks in the tensor contract of antelopev2, small enough to train in minutes, or of the true size.

The detector follows SCRFD (arXiv:2105.04714): a basic-block residual network with average-pool shortcuts, a path
aggregation pyramid and one head per stride. The recogniser follows the IResNet of ArcFace (arXiv:1801.07698). Used by
the training script, the tests (random weights) and the benchmark (random weights of the true sizes).
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STRIDES = (8, 16, 32)
ANCHORS = 2
# Output names of the published detector: scores, boxes and key points, per stride.
DETECTOR_OUTPUTS = ("448", "471", "494", "451", "474", "497", "454", "477", "500")
RECOGNISER_OUTPUT = "1333"


def normalised_conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, active: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([nn.ReLU(inplace=True)] if active else []))


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = normalised_conv(inputs, outputs, 3, stride)
        self.second = normalised_conv(outputs, outputs, active=False)
        shortcut: list[nn.Module] = []
        if stride != 1:
            shortcut.append(nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False))
        if stride != 1 or inputs != outputs:
            shortcut += [nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.shortcut(x))


class Scrfd(nn.Module):
    """`width` 1 is SCRFD-10G with key points (4.2 million weights); 0.25 has 0.29 million.

    forward gives the nine exported outputs. batch_outside=False is the layout of the files in use, where rows run over
    cells, then pictures, then anchors; True is that of newer exports, [N, rows, channels].
    """

    def __init__(self, width: float = 1.0, batch_outside: bool = False) -> None:
        super().__init__()

        def scaled(channels: int) -> int:
            return max(8, round(channels * width / 8) * 8)

        self.batch_outside = batch_outside
        stem, neck, head = scaled(56), scaled(56), scaled(80)
        stages = [scaled(c) for c in (56, 88, 88, 224)]
        self.stem = nn.Sequential(
            normalised_conv(3, stem // 2, 3, 2),
            normalised_conv(stem // 2, stem // 2),
            normalised_conv(stem // 2, stem),
            nn.MaxPool2d(3, 2, 1),
        )
        self.stages = nn.ModuleList()
        channels = stem
        for level, (count, outputs) in enumerate(zip((3, 4, 2, 3), stages, strict=True)):
            self.stages.append(
                nn.Sequential(
                    *(
                        BasicBlock(channels if i == 0 else outputs, outputs, 2 if i == 0 and level else 1)
                        for i in range(count)
                    )
                )
            )
            channels = outputs
        self.lateral = nn.ModuleList(nn.Conv2d(c, neck, 1) for c in stages[1:])
        self.smooth = nn.ModuleList(nn.Conv2d(neck, neck, 3, padding=1) for _ in STRIDES)
        self.down = nn.ModuleList(nn.Conv2d(neck, neck, 3, 2, 1) for _ in STRIDES[1:])
        self.aggregate = nn.ModuleList(nn.Conv2d(neck, neck, 3, padding=1) for _ in STRIDES[1:])
        self.tower = nn.ModuleList(
            nn.Sequential(normalised_conv(neck, head), normalised_conv(head, head), normalised_conv(head, head))
            for _ in STRIDES
        )
        self.score = nn.ModuleList(nn.Conv2d(head, ANCHORS, 3, padding=1) for _ in STRIDES)
        self.sides = nn.ModuleList(nn.Conv2d(head, ANCHORS * 4, 3, padding=1) for _ in STRIDES)
        self.points = nn.ModuleList(nn.Conv2d(head, ANCHORS * 10, 3, padding=1) for _ in STRIDES)
        self.scale = nn.ParameterList(nn.Parameter(torch.tensor(1.0)) for _ in STRIDES)

    def features(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        levels = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i:
                levels.append(x)
        side = [lateral(level) for lateral, level in zip(self.lateral, levels, strict=True)]
        for i in (2, 1):
            side[i - 1] = side[i - 1] + F.interpolate(side[i], size=side[i - 1].shape[2:], mode="nearest")
        out = [smooth(s) for smooth, s in zip(self.smooth, side, strict=True)]
        for i in (0, 1):
            out[i + 1] = out[i + 1] + self.down[i](out[i])
        return [out[0], self.aggregate[0](out[1]), self.aggregate[1](out[2])]

    def heads(self, x: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Per stride: score logits [N, 2, H, W], sides [N, 8, H, W] and points [N, 20, H, W], in strides."""
        found = []
        for i, feature in enumerate(self.features(x)):
            tower = self.tower[i](feature)
            found.append((self.score[i](tower), self.sides[i](tower) * self.scale[i], self.points[i](tower)))
        return found

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        columns: tuple[list[Tensor], ...] = ([], [], [])
        for score, sides, points in self.heads(x):
            for column, value, channels in zip(columns, (score.sigmoid(), sides, points), (1, 4, 10), strict=True):
                if self.batch_outside:
                    column.append(value.permute(0, 2, 3, 1).reshape(value.shape[0], -1, channels))
                else:
                    column.append(value.permute(2, 3, 0, 1).reshape(-1, channels))
        return (*columns[0], *columns[1], *columns[2])


class ResidualUnit(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.PReLU(outputs),
            nn.Conv2d(outputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.shortcut(x)


class IResNet(nn.Module):
    """Depth 100 at width 1 has the size of glintr100. `squeeze` narrows the last layer, for a small file."""

    UNITS: ClassVar[dict[int, tuple[int, ...]]] = {18: (2, 2, 2, 2), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3)}

    def __init__(self, depth: int = 100, width: float = 1.0, squeeze: int | None = None) -> None:
        super().__init__()
        channels = [max(8, int(c * width)) for c in (64, 128, 256, 512)]
        units: list[nn.Module] = [
            nn.Conv2d(3, channels[0], 3, 1, 1, bias=False),
            nn.BatchNorm2d(channels[0]),
            nn.PReLU(channels[0]),
        ]
        inputs = channels[0]
        for count, outputs in zip(self.UNITS[depth], channels, strict=True):
            for i in range(count):
                units.append(ResidualUnit(inputs, outputs, 2 if i == 0 else 1))
                inputs = outputs
        if squeeze is not None:
            units.append(nn.Conv2d(inputs, squeeze, 1, bias=False))
            inputs = squeeze
        self.body = nn.Sequential(*units, nn.BatchNorm2d(inputs))
        self.last = nn.Linear(inputs * 49, 512)
        self.norm = nn.BatchNorm1d(512)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.last(torch.flatten(self.body(x), 1)))


@torch.no_grad()
def randomise(network: nn.Module, seed: int = 0) -> None:
    """Seeded weights under which activations neither die nor explode, with statistics unlike the identity."""
    g = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.running_mean.normal_(0, 0.1, generator=g)
            module.running_var.uniform_(0.6, 1.4, generator=g)
            module.weight.uniform_(0.7, 1.3, generator=g)
            module.bias.normal_(0, 0.1, generator=g)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.normal_(0, math.sqrt(2 / module.weight[0].numel()), generator=g)
            if module.bias is not None:
                module.bias.normal_(0, 0.05, generator=g)
        elif isinstance(module, nn.PReLU):
            module.weight.uniform_(0.1, 0.4, generator=g)


@torch.no_grad()
def calibrate(detector: Scrfd, picture: Tensor) -> None:
    """Bend random heads so that 40, 20 and 8 anchors of the strides pass 0.5 on `picture` [1, 3, H, W] with face shapes."""
    points = (torch.tensor([[38.3, 51.7], [73.5, 51.5], [56.0, 71.7], [41.5, 92.4], [70.7, 92.2]]) - 56) / 56
    for i, feature in enumerate(detector.features(picture)):
        tower = detector.tower[i](feature)
        for head, spread, bias in (
            (detector.score[i], 3.0, torch.zeros(2)),
            (detector.sides[i], 0.25, torch.tensor([3, 3.5, 3, 3.5, 5, 6, 5, 6.0])),
            (detector.points[i], 0.25, torch.cat([(points * 3).flatten(), (points * 5).flatten()])),
        ):
            free = head(tower) - head.bias.view(1, -1, 1, 1)
            head.weight.mul_(spread / free.std())
            head.bias.copy_(bias + 1e-3 * i)  # no two levels alike, or the exporter shares them
        logits = (detector.score[i](tower) - detector.score[i].bias.view(1, -1, 1, 1)).flatten()
        detector.score[i].bias.fill_(-float(logits.topk((40, 20, 8)[i]).values[-1]) - 1e-3)


def export(
    network: nn.Module, example: Tensor, path: Path, outputs: tuple[str, ...], open_dims: dict[int, str]
) -> None:
    """Write an opset 11 ONNX file with input `input.1`, as the published files are.

    `open_dims` names the input dimensions that stay open. The outputs' batch is open where the input's is.
    """
    import onnx

    path.parent.mkdir(parents=True, exist_ok=True)
    # The exporter refuses names that are numbers; they are put in afterwards.
    names = {f"out_{name}": name for name in outputs}
    axes: dict[str, Any] = {"input.1": open_dims}
    if 0 in open_dims:
        axes.update({name: {0: open_dims[0]} for name in names})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network.eval(), (example,), str(path), input_names=["input.1"], output_names=list(names),
            dynamic_axes=axes, opset_version=11, dynamo=False,
        )  # fmt: skip
    model = onnx.load(str(path))
    for node in model.graph.node:
        for values in (node.input, node.output):
            values[:] = [names.get(v, v) for v in values]
    for output in model.graph.output:
        output.name = names[output.name]
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def export_detector(network: Scrfd, path: Path) -> None:
    """`[1, 3, ?, ?]` in the published layout; all but the channels open when the batch is outside."""
    open_dims = {2: "?", 3: "?"} | ({0: "?"} if network.batch_outside else {})
    export(network, torch.zeros(1, 3, 640, 640), path, DETECTOR_OUTPUTS, open_dims)


def export_recogniser(network: IResNet, path: Path) -> None:
    """`[None, 3, 112, 112]` to `[None, 512]`."""
    export(network, torch.zeros(1, 3, 112, 112), path, (RECOGNISER_OUTPUT,), {0: "None"})


def random_model_folder(
    root: Path,
    picture: Tensor,
    name: str = "antelopev2",
    width: float = 0.25,
    depth: int = 18,
    batch_outside: bool = False,
    recogniser: bool = True,
) -> Path:
    """A model folder `root/models/name` with random weights; `picture` [1, 3, H, W] is where it finds "faces"."""
    folder = root / "models" / name
    detector = Scrfd(width, batch_outside=batch_outside).eval()
    randomise(detector, 0)
    calibrate(detector, picture)
    export_detector(detector, folder / "scrfd_10g_bnkps.onnx")
    if recogniser:
        identity = IResNet(depth, width).eval()
        randomise(identity, 1)
        export_recogniser(identity, folder / "glintr100.onnx")
    return folder
