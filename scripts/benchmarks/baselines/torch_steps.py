"""Baseline: the same network in PyTorch, channels last, trained on arrays in memory. Prints one line of JSON.

    python scripts/benchmarks/baselines/torch_steps.py FOLDER 64 bfloat16 compiled 40

FOLDER is the output of export_network.py, followed by batch size, precision (float32, or bfloat16 by autocast), eager
or compiled, and steps. Needs only PyTorch and NumPy, not this project.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch  # type: ignore[import-not-found]
import torch.nn.functional as F  # type: ignore[import-not-found]
from protocol import AUX_WEIGHT, LEARNING_RATE, MOMENTUM, WARM_UP, check_parity, print_results
from torch import Tensor, nn

Settings = dict[str, Any]
Values = dict[str, np.ndarray]


def convolution(settings: Settings, values: Values) -> nn.Module:
    kernel = torch.from_numpy(values["kernel"]).permute(3, 2, 0, 1)
    size = kernel.shape[2:]
    same = settings["padding"] == "same"
    assert not same or tuple(settings["strides"]) == (1, 1), "padding of a strided convolution is not symmetric"
    layer = nn.Conv2d(
        kernel.shape[1], kernel.shape[0], size, tuple(settings["strides"]),
        tuple(side // 2 for side in size) if same else 0, bias="bias" in values,
    )  # fmt: skip
    layer.weight.data = kernel.contiguous(memory_format=torch.channels_last)
    if "bias" in values:
        layer.bias.data = torch.from_numpy(values["bias"])
    return nn.Sequential(layer, nn.ReLU(inplace=True)) if settings["activation"] == "relu" else layer


def normalisation(settings: Settings, values: Values) -> nn.Module:
    layer = nn.BatchNorm2d(len(values["beta"]), settings["epsilon"], 1 - settings["momentum"])
    layer.bias.data = torch.from_numpy(values["beta"])
    layer.weight.requires_grad = "gamma" in values
    for attribute, name in (("weight", "gamma"), ("running_mean", "moving_mean"), ("running_var", "moving_variance")):
        if name in values:
            getattr(layer, attribute).data = torch.from_numpy(values[name])
    return layer


def pooling(settings: Settings, kind: Callable[..., nn.Module], **options: Any) -> nn.Module:
    size = tuple(settings["pool_size"])
    padding = tuple(side // 2 for side in size) if settings["padding"] == "same" else 0
    return kind(size, tuple(settings["strides"]), padding, **options)


def dense(settings: Settings, values: Values) -> nn.Module:
    layer = nn.Linear(*values["kernel"].shape)
    layer.weight.data = torch.from_numpy(values["kernel"]).T.contiguous()
    layer.bias.data = torch.from_numpy(values["bias"])
    return nn.Sequential(layer, nn.ReLU(inplace=True)) if settings["activation"] == "relu" else layer


class Rescale(nn.Module):
    """Maps pixels 0..255 to the network's input range. flip: from RGB to BGR."""

    def __init__(self, scale: float, offset: Any, *, flip: bool = False):
        super().__init__()
        self.scale, self.flip = scale, flip
        self.register_buffer("offset", torch.tensor(offset, dtype=torch.float32).reshape(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x.flip(1) if self.flip else x).float() * self.scale + self.offset


class Flatten(nn.Module):
    """Flattens in the order height, width, channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).flatten(1) if x.ndim == 4 else x


class Concatenate(nn.Module):
    def forward(self, *parts: Tensor) -> Tensor:
        return torch.cat(parts, 1)


class GlobalPooling(nn.Module):
    def __init__(self, kind: Callable[[Tensor], Tensor]):
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        return self.kind(x)


MEAN_BGR = [-103.939, -116.779, -123.68]  # of ImageNet, for VGG networks with three channels
KINDS: dict[str, Callable[[Settings, Values], nn.Module]] = {
    "Rescaling": lambda settings, _: Rescale(settings["scale"], settings["offset"]),
    "Functional": lambda *_: Rescale(1.0, MEAN_BGR, flip=True),
    "Conv2D": convolution,
    "BatchNormalization": normalisation,
    "Activation": lambda *_: nn.ReLU(inplace=True),
    "MaxPooling2D": lambda settings, _: pooling(settings, nn.MaxPool2d),
    "AveragePooling2D": lambda settings, _: pooling(settings, nn.AvgPool2d, count_include_pad=False),
    "GlobalAveragePooling2D": lambda *_: GlobalPooling(lambda x: x.mean((2, 3))),
    "GlobalMaxPooling2D": lambda *_: GlobalPooling(lambda x: x.amax((2, 3))),
    "Concatenate": lambda *_: Concatenate(),
    "Flatten": lambda *_: Flatten(),
    "Dense": dense,
    "Dropout": lambda settings, _: nn.Dropout(settings["rate"]),
}


class Network(nn.Module):
    """Runs the layers of network.json in order. Images uint8 [N, C, H, W] -> logits by output."""

    def __init__(self, description: dict[str, Any], values: Values):
        super().__init__()
        self.outputs = description["outputs"]
        self.graph = []
        self.layers = nn.ModuleList()
        self.input_name = description["layers"][0]["name"]
        for layer in description["layers"][1:]:
            weights = {
                name.rpartition("/")[2]: value for name, value in values.items() if name.startswith(layer["name"] + "/")
            }
            self.layers.append(KINDS[layer["kind"]](layer["settings"], weights))
            self.graph.append((layer["name"], layer["inputs"]))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        tensors = {self.input_name: images}
        for layer, (name, inputs) in zip(self.layers, self.graph, strict=True):
            tensors[name] = layer(*(tensors[input_name] for input_name in inputs))
        return {output: tensors[name] for output, name in self.outputs.items()}


def read(folder: Path) -> Network:
    """Reads an exported network. Raises: AssertionError if the number of parameters differs."""
    description = json.loads((folder / "network.json").read_text())
    network = Network(description, dict(np.load(folder / "values.npz")))
    trainable = [p for p in network.parameters() if p.requires_grad]
    statistics = [b for name, b in network.named_buffers() if "running_" in name]
    count = sum(tensor.numel() for tensor in [*trainable, *statistics])
    assert count == description["parameters"], f"{count} parameters, expected {description['parameters']}"
    return network


def parity(network: Network, folder: Path) -> float:
    """Returns the largest difference in the logits, in float32. Raises: AssertionError if it exceeds rounding."""
    expected = np.load(folder / "asked.npz")
    with torch.no_grad():
        logits = network.eval()(torch.from_numpy(expected["images"]).permute(0, 3, 1, 2))
    worst = max(float((logits[name] - torch.from_numpy(expected[name])).abs().max()) for name in logits)
    check_parity(worst)
    return worst


def main() -> None:
    folder, batch, precision, mode, steps = Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:5], int(sys.argv[5])
    start = float(os.environ.get("BENCH_BEGUN", time.time()))
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = read(folder)
    worst = parity(network, folder)
    network.to(device, memory_format=torch.channels_last).train()
    model = torch.compile(network) if mode == "compiled" else network
    trainable = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, LEARNING_RATE, MOMENTUM, nesterov=True)
    expected = np.load(folder / "asked.npz")
    shape = expected["images"].shape[1:]
    classes = expected["main"].shape[-1]
    draw = np.random.default_rng(0)
    all_images = torch.from_numpy(draw.integers(0, 256, (batch * steps, *shape), dtype=np.uint8)).permute(0, 3, 1, 2)
    all_labels = torch.from_numpy(draw.integers(0, classes, batch * steps))
    ends, loss = [], torch.zeros(())
    for step in range(steps):
        indices = slice(step * batch, (step + 1) * batch)
        images = all_images[indices].to(device, memory_format=torch.channels_last, non_blocking=True)
        labels = all_labels[indices].to(device, non_blocking=True)
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            outputs = model(images)
            loss = sum(
                (1.0 if name == "main" else AUX_WEIGHT) * F.cross_entropy(logits.float(), labels)
                for name, logits in outputs.items()
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step < WARM_UP or step == steps - 1:
            loss.item()  # waits for the device
        ends.append(time.time())
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else None
    print_results(batch, ends, start=start, worst=worst, memory=memory)


if __name__ == "__main__":
    main()
